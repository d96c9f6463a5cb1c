"""Write generated scenes as a folder of pictures with descriptions: pairs of your own for the tutorial.

    python scripts/write_pairs.py out/pairs

`metadata.jsonl` has a line for each picture: file_name, text, split. Every scene has a twin that differs in one thing.
"""

import argparse
import json
from pathlib import Path

from comp_cli.data import scenes


def write(folder: Path, counts: dict[str, int]) -> None:
    """So many pairs of each split. The pictures lie in one folder: it is the column that tells splits apart."""
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for split, count in counts.items():
            for number, (scene, background) in enumerate(scenes.images(split, count)):
                name = f"images/{split}-{number:05}.png"
                scenes.render(scene, background).save(folder / name)
                print(json.dumps({"file_name": name, "text": scenes.describe(scene), "split": split}), file=lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, metavar="N", help="pairs of the split train")
    parser.add_argument("--validation", type=int, default=500, metavar="N", help="pairs of the split validation")
    parsed = parser.parse_args()
    write(parsed.folder, {"train": parsed.train, "validation": parsed.validation})
