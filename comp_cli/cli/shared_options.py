"""Options that several commands have, with their help. Defaults stand in comp_cli.options."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import choices, recipes

MAIN, DATA, SEARCH, TUNING, TOKENS = "Main options", "Data", "Search", "Fine-tuning", "Image tokens of a decoder"
GATES = "Gates (exit code 3 where one is not met)"
ABLATIONS, COMPUTING, HUB, OUTPUT = "Ablations", "Computation", "Hub", "Output"


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help. names: its spelling (default: from its parameter)."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Model = Annotated[str, typer.Argument(help="A Hub id, hf:// URI, folder, or `demo` (shipped with comp).", show_default=False)]
Folder = Annotated[
    str | None,
    typer.Argument(
        help="A folder that `comp prune` wrote, or a compact model's Hub id or hf:// URI (default: the last one here).",
        show_default=False,
    ),
]

PAIRS = "jsonl, csv, parquet, image folder or Hub data set (default: built-in synthetic scenes)."
Data = Annotated[str | None, option(MAIN, f"Image-text pairs: {PAIRS}")]


def output_dir(default: str) -> Any:
    """The option of the folder to write, with what it is called where nobody says."""
    return option(MAIN, f"Folder to write (default: {default}).", "--output", "-o", show_default=False)


TaskName = Annotated[
    choices.TaskName | None, option(DATA, "Evaluation task (default: inferred from the architecture).", "--task")
]
NumSamples = Annotated[int, option(DATA, "Image-text pairs for calibration.")]
Split = Annotated[str | None, option(DATA, "Split of --data to calibrate on; never a test split.")]
ImageColumn = Annotated[str | None, option(DATA, "Column with images or their paths.")]
TextColumn = Annotated[str | None, option(DATA, "Column with texts.")]
LabelColumn = Annotated[str | None, option(DATA, "Column that says whether they match; '' for none.")]
AnswerColumn = Annotated[str | None, option(DATA, "Column with the answers to questions; '' for none.")]
SplitColumn = Annotated[str | None, option(DATA, "Column that names each row's split; '' for none.")]

Device = Annotated[str, option(COMPUTING, "auto, cpu, cuda or cuda:N. Never falls back.", autocompletion=choices.devices)]
Seed = Annotated[int, option(COMPUTING, "Random seed.")]
Threads = Annotated[int, option(COMPUTING, "CPU threads (0: by the model's size and the cores that there are).")]
BatchSize = Annotated[int, option(COMPUTING, "Pairs in one forward pass.")]
TextTokens = Annotated[int, option(COMPUTING, "Text length of the reference input.")]
ScoreRows = Annotated[int, option(COMPUTING, "Query rows that score image tokens; 0 for all (CoMP's full form).")]

Revision = Annotated[str | None, option(HUB, "Branch, tag or commit on the Hub.")]
CacheDir = Annotated[Path | None, option(HUB, "Where downloads are kept (default: $HF_HOME).")]
AllowPickle = Annotated[bool, option(HUB, "Load pytorch_model.bin where there is no safetensors.", "--allow-pickle")]

PushToHub = Annotated[
    str | None,
    option(HUB, "Repository that the folder is uploaded to when it is complete, whole or not at all.", metavar="ORG/NAME"),
]
Private = Annotated[bool, option(HUB, "Make that repository a private one.", "--private")]

Png = Annotated[Path | None, option(OUTPUT, "Draw what matters, or of a compact model which tokens stay.")]
Overwrite = Annotated[bool, option(OUTPUT, "Replace a folder that comp wrote before.", "--overwrite")]
Format = Annotated[choices.Format, option(OUTPUT, "For people, programs, summaries, workflows of GitHub.", "--format")]
Json = Annotated[bool, option(OUTPUT, "One JSON document on stdout.", "--json")]
Quiet = Annotated[bool, option(OUTPUT, "Only the path of the result.", "--quiet", "-q")]
NoProgress = Annotated[bool, option(OUTPUT, "No progress bars.", "--no-progress")]
Recipe = Annotated[
    Path | None,
    option(
        OUTPUT,
        "TOML file with options (default: [tool.comp] of pyproject.toml).",
        "--recipe",
        callback=recipes.follow,
        is_eager=True,
        show_default=False,
    ),
]
