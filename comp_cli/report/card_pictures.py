"""Pictures in cards: the one that the code of a card reads, and those that reports left in the folder."""

from pathlib import Path

from ..data.scenes import Thing, render
from ..topology.card_examples import PICTURE

SCENE = (Thing("small", "red", "circle", 24, 60), Thing("large", "blue", "square", 62, 30))
USE = "## Use"
SHOWN = {
    "tokens.png": "Which patches of sample pictures stay, layer by layer:\n\n![patches that stay](tokens.png)",
    "report.html": "[report.html](report.html) shows every layer before and after.",
}


def save_example(folder: Path) -> None:
    """A generated scene, so that the code of the card runs as it stands."""
    render(SCENE, background=0).save(folder / PICTURE)


def show_pictures(folder: Path) -> None:
    """Put what lies in a folder, of what reports draw, into its card, before the part on use."""
    card = folder / "README.md"
    said = [words for name, words in SHOWN.items() if (folder / name).is_file()]
    before, found, after = card.read_text(encoding="utf-8").partition(f"\n{USE}\n")
    if said and found:
        card.write_text("\n".join([before, *(f"{words}\n" for words in said)]) + found + after, encoding="utf-8")
