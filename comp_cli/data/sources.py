"""Users' own image-text pairs (`--data`): a hub data set, a file or a folder, read through `datasets`.

All is streamed: nothing is converted or written beside the data, and an image is opened only when its pair is asked for.
"""

import glob
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RefusedError, UsageError
from ..progress import Progress
from .columns import Table, unreadable
from .pairset import PairSet, split_by_column
from .pictures import Hub, Root
from .rows import Columns, few
from .splits import SPLIT_WORDS
from .tables import TextTable

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TEXTS = {".jsonl", ".json", ".csv", ".tsv"}  # read by comp itself, see tables.py
STATE = "state.json"
SAVED = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", STATE}  # what `datasets` writes beside its tables


def open_pairs(
    data: str,
    *,
    progress: Progress,
    split: str | None = None,
    columns: Columns | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> PairSet:
    """Open a file, a folder, or a hub data set: "org/name", or "org/name:config" where it has several configurations.

    `split` is the one to calibrate on. Raises UsageError for a path that does not exist or a file of an unknown kind,
    RefusedError for data that holds no pairs or cannot be read, CompError where the hub cannot be reached."""
    path, name = check_place(data)
    quiet_datasets(progress)
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision {revision} needs a hub data set; {data} is a local path.")
        splits, roots = open_files(path.absolute(), progress)
    else:
        splits, root = open_hub(name, revision, cache_dir)
        roots = dict.fromkeys(splits, root)
    shown = path.absolute().name if path.exists() else name
    for between in sorted({found for table in splits.values() if isinstance(table, TextTable) for found in table.separators()}):
        progress.say(f"{shown}: cells are separated by {between!r}")
    return split_by_column(PairSet(shown, splits, roots, columns or Columns(), split, progress))


def check_place(data: str) -> tuple[Path, str]:
    """The path and the name on the hub that `data` may be. Raises UsageError where it must be a path, and nothing is there."""
    path, name = Path(data).expanduser(), re.sub("^(hf://|https://huggingface.co/)datasets/", "", data)
    if not path.exists() and (path.suffix.lower() in KINDS or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UsageError(f"--data {data}: no such file or folder.")
    return path, name


def open_files(path: Path, progress: Progress) -> tuple[Mapping[str, Table], Mapping[str, Root]]:
    """The splits of a file or folder with tables, and for each the folder in which its image paths start.

    Of an imagefolder only the metadata files are read: `datasets` would look for splits in the names of its images.
    """
    from datasets import load_dataset

    tables = find_tables(path, progress)
    suffixes = sorted({file.suffix.lower() for files in tables.values() for file in files})
    parents = {split: sorted({file.parent for file in files}) for split, files in tables.items()}
    if len(suffixes) > 1 or any(len(places) > 1 for places in parents.values()):
        listed = few([str(file.relative_to(path)) for files in tables.values() for file in files])
        message = f"{path}: which tables hold the pairs? Found {listed}."
        raise UsageError(message, hint="Give one file, or one kind of tables with each split in one folder.")
    roots = {split: places[0] for split, places in parents.items()}
    if suffixes[0] in TEXTS:
        return {split: TextTable(tuple(map(str, files))) for split, files in tables.items()}, roots
    names = {split: [glob.escape(str(file)) for file in files] for split, files in tables.items()}
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for the lock of `datasets`, which keeps nothing when it streams
            return load_dataset(KINDS[suffixes[0]], data_files=names, streaming=True, cache_dir=scratch), roots
    except Exception as error:
        raise unreadable(str(path), error) from error


def find_tables(path: Path, progress: Progress) -> dict[str, list[Path]]:
    """The files with pairs, by split. Files that name no split are the folder's own split, or train, unless others are: then a
    warning names them."""
    kinds = f"Expected {', '.join(KINDS)}."
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise UsageError(f"{path}: not a table of pairs.", hint=kinds)
        files, folder = [path], path.parent
    else:
        files, folder = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS and file.is_file()), path
        shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
        files = [file for file in shown if file.stem == "metadata"] or [file for file in shown if is_table(file)]
    if not (files := [file for file in files if file.stat().st_size]):
        raise RefusedError(f"{path}: no pairs.", hint=f"{kinds} An imagefolder needs texts in metadata files.")
    own = next((split for split, words in SPLIT_WORDS.items() if folder.name.lower() in words), "train")
    tables: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        words = set(re.split("[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower()))
        split = next((split for split, named in SPLIT_WORDS.items() if words & named), None)
        (tables.setdefault(split, []) if split else unnamed).append(file)
    if own in tables and unnamed:
        listed = few([str(file.relative_to(folder)) for file in unnamed])
        progress.warn(f"{folder.name}: not read, as the names say no split and others do: {listed}.")
    return tables if own in tables or not unnamed else {**tables, own: unnamed}


def is_table(file: Path) -> bool:
    """Whether a file holds rows of its own: of what save_to_disk wrote, the files that it lists. `map` and `filter` leave what
    they made beside them, the same rows again."""
    state = file.with_name(STATE)
    if file.suffix.lower() != ".arrow" or not state.is_file():
        return file.name not in SAVED
    try:
        return file.name in [part["filename"] for part in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def open_hub(address: str, revision: str | None, cache_dir: Path | None) -> tuple[Mapping[str, Table], Hub]:
    """The splits of a data set on the hub; with HF_HUB_OFFLINE, of one that `datasets` has downloaded as a whole before."""
    import datasets

    name, _, config = address.partition(":")
    name, _, tag = name.partition("@")
    place = {"revision": revision or tag or None, "cache_dir": cache_dir and str(cache_dir / "datasets")}
    kept = place["cache_dir"] or datasets.config.HF_DATASETS_CACHE
    hub = Hub(name, (Path(kept), Path(datasets.config.DOWNLOADED_DATASETS_PATH)))
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            builder = datasets.load_dataset_builder(name, config or None, **place)
            if texts := text_tables(builder):
                return texts, hub
            return {str(split): dataset for split, dataset in builder.as_streaming_dataset().items()}, hub
        splits = datasets.load_dataset(name, config or None, **place)
        return {split: dataset.to_iterable_dataset() for split, dataset in splits.items()}, hub
    except Exception as error:
        raise unreadable(f"--data {address}", error) from error


def text_tables(builder: Any) -> dict[str, TextTable] | None:
    """The splits of a data set on the hub that is plain texts: none that are packed, and none whose columns its card types."""
    config = builder.config
    told = [builder.info.features, *(getattr(config, name, None) for name in ("field", "names", "column_names"))]
    if builder.name not in ("csv", "json") or any(told):
        return None
    splits = {str(split): tuple(map(str, files)) for split, files in config.data_files.items()}
    if all(Path(file).suffix.lower() in TEXTS for files in splits.values() for file in files):
        return {split: TextTable(files) for split, files in splits.items()}
    return None


def quiet_datasets(progress: Progress) -> None:
    """No logging, and bars only where comp shows its own; `CompError` tells what matters."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it asks a server on the net, for local files too
    if not progress.shows_bars:
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
