"""Users' own image-text pairs (`--data`): a hub data set, a file or a folder, read through `datasets`.

All is streamed: nothing is converted or written beside the data, and an image is opened only when its pair is asked for.
"""

import glob
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .data import (
    SPLIT_WORDS,
    Columns,
    Pair,
    Purpose,
    Takes,
    Tally,
    choose_split,
    every,
    few,
    find_columns,
    is_test,
    purpose_of,
    read_label,
    read_rows,
)
from .errors import FAILED, REFUSED, USAGE, CompError
from .output import Output

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
OPTIONS = {".csv": {"keep_default_na": False}, ".tsv": {"keep_default_na": False, "sep": "\t"}}  # "None" may be a caption
SAVED = {"dataset_info.json", "dataset_dict.json", "state.json"}  # written by save_to_disk beside its .arrow files
SAMPLE = 32  # rows that tell whether a column holds labels
SHUFFLED_PATHS, SHUFFLED_IMAGES = 100_000, 1_000  # rows in memory while shuffling


@dataclass(frozen=True)
class PairSet:
    """Opened pairs, by split. Relative image paths start in the split's folder; a hub data set has no folders."""

    name: str
    splits: Mapping[str, Any]  # datasets.IterableDataset
    folders: Mapping[str, Path]
    columns: Columns
    wanted: str | None  # the split to calibrate on, where the user named one
    out: Output

    def split(self, purpose: Purpose) -> str:
        """The split that serves a purpose; see `choose_split`."""
        return choose_split(self.name, list(self.splits), purpose, self.wanted)

    def describe(self, purpose: Purpose) -> str:
        """What is read, for reports: "pairs.jsonl, split train, four fifths of the images"."""
        part = {"calibration": "four fifths of the images", "evaluation": "the other fifth of the images"}[purpose]
        return f"{self.name}, split {self.split(purpose)}" + (f", {part}" if self._shares_split(purpose) else "")

    def read(self, purpose: Purpose, limit: int | None = None, seed: int = 0, takes: Takes = every) -> Iterator[Pair]:
        """Up to `limit` pairs that are taken, in an order that the seed decides. No image serves both purposes.

        An image with several texts makes as many pairs. A row with a missing or broken image, no text, or no label
        where there are labels, is skipped; a warning at the end counts them. Exit 2 for columns that are missing or not
        clear, 4 for a set that is empty, unreadable, or bad by more than half. The call itself opens the first pair, so
        that a set that is no good is refused before any work is done.
        """
        rows, columns = self._open(self.split(purpose), seed)
        labels = f"labels from {columns.label}" if columns.label else "no labels"
        self.out.say(f"{purpose} on {self.describe(purpose)}: images from {columns.image}, texts from {columns.text}, {labels}")
        if self._shares_split(purpose):
            rows = (row for row in rows if purpose_of(row[columns.image]) in (purpose, None))
        pairs = self._pairs(rows, columns, purpose, sys.maxsize if limit is None else limit, takes)
        return chain([next(pairs)], pairs)

    def _shares_split(self, purpose: Purpose) -> bool:
        return not is_test(self.split(purpose)) and self.split("calibration") == self.split("evaluation")

    def _open(self, split: str, seed: int) -> tuple[Iterator[dict[str, Any]], Columns]:
        """The rows in the seed's order, with images as they are stored and labels by name, and their columns."""
        import datasets

        dataset = self.splits[split]
        found = dict(dataset.features or dict.fromkeys(next(_rows(dataset, self.name), {})))
        if not found:
            raise CompError(f"{self.name}, split {split}: no pairs.", code=REFUSED)
        columns = find_columns(found, self.columns, self.name)
        kind = found[columns.image]
        if isinstance(kind, datasets.Image):
            dataset = dataset.decode(False)  # a cast would come too late: hub images are decoded ahead, by threads
        dataset = dataset.select_columns(
            [name for name in (columns.image, columns.text, columns.label, columns.answer) if name]
        )
        for column in filter(None, {columns.text, columns.label}):
            if names := getattr(found[column], "names", None):  # of a ClassLabel
                dataset = dataset.map(_name_label, fn_kwargs={"column": column, "names": names})
        if columns.label and self.columns.label is None:
            sample = [row[columns.label] for row in islice(_rows(dataset, self.name), SAMPLE)]
            present = [value for value in sample if value not in (None, "")]
            if odd := [value for value in present or [None] if read_label(value) is None]:
                told = f"{self.name}: {columns.label} holds {odd[0]!r}, not match or mismatch; it is not taken for labels."
                if told not in self.out.warnings:
                    self.out.warn(told)
                columns = replace(columns, label=None)
        buffer = SHUFFLED_PATHS if kind is None or kind == datasets.Value("string") else SHUFFLED_IMAGES
        mixed = min(10, dataset.num_shards)  # files that are read in turns, by threads that `datasets` is slow to end
        dataset = dataset.shuffle(seed=seed, buffer_size=buffer, max_buffer_input_shards=mixed)
        return _rows(dataset, self.name), columns

    def _pairs(
        self, rows: Iterator[dict[str, Any]], columns: Columns, purpose: Purpose, limit: int, takes: Takes
    ) -> Iterator[Pair]:
        folder, where, tally = self.folders.get(self.split(purpose)), self.describe(purpose), Tally()
        yield from read_rows(rows, columns, folder, limit, tally, takes)
        if tally.looked > tally.skipped and not tally.given:
            raise CompError(
                f"{where}: no pairs that match, or none with an answer.",
                code=REFUSED,
                hint="Are the columns of labels and answers the right ones?",
            )
        if not tally.looked:
            hint = "Give more pairs, or a split for each purpose: train and validation."
            raise CompError(f"{where}: no pairs.", code=REFUSED, hint=hint)
        if 2 * tally.skipped > tally.looked:
            raise CompError(f"{where}: {tally}.", code=REFUSED, hint=f"Relative paths start in {folder}." if folder else None)
        if tally.skipped:
            self.out.warn(f"{where}: {tally}. They are skipped.")


def open_pairs(
    data: str,
    *,
    out: Output,
    split: str | None = None,
    columns: Columns | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> PairSet:
    """Open a file, a folder, or a hub data set: "org/name", or "org/name:config" where it has several configurations.

    `split` is the one to calibrate on. Exit 2 for a path that does not exist or a file of an unknown kind, 4 for data
    that holds no pairs or cannot be read, 1 where the hub cannot be reached.
    """
    path, name = Path(data).expanduser(), re.sub("^(hf://|https://huggingface.co/)datasets/", "", data)
    quiet_datasets(out)
    if path.exists():
        if revision is not None:
            raise CompError(f"--revision {revision} needs a hub data set; {data} is a local path.", code=USAGE)
        splits, folders = open_files(path.absolute())
    elif path.suffix.lower() in KINDS or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CompError(f"--data {data}: no such file or folder.", code=USAGE)
    else:
        splits, folders = open_hub(name, revision, cache_dir), {}
    return PairSet(path.absolute().name if folders else name, splits, folders, columns or Columns(), split, out)


def open_files(path: Path) -> tuple[Mapping[str, Any], dict[str, Path]]:
    """The splits of a file or folder with tables, and for each the folder in which its image paths start.

    Of an imagefolder only the metadata files are read: `datasets` would look for splits in the names of its images.
    """
    from datasets import load_dataset

    tables = find_tables(path)
    suffixes = sorted({file.suffix.lower() for files in tables.values() for file in files})
    parents = {split: sorted({file.parent for file in files}) for split, files in tables.items()}
    if len(suffixes) > 1 or any(len(places) > 1 for places in parents.values()):
        listed = few([str(file.relative_to(path)) for files in tables.values() for file in files])
        message = f"{path}: which tables hold the pairs? Found {listed}."
        raise CompError(message, code=USAGE, hint="Give one file, or one kind of tables with each split in one folder.")
    names = {split: [glob.escape(str(file)) for file in files] for split, files in tables.items()}
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for the lock of `datasets`, which keeps nothing when it streams
            options = {"data_files": names, "streaming": True, "cache_dir": scratch, **OPTIONS.get(suffixes[0], {})}
            return load_dataset(KINDS[suffixes[0]], **options), {split: places[0] for split, places in parents.items()}
    except Exception as error:
        raise unreadable(str(path), error) from error


def find_tables(path: Path) -> dict[str, list[Path]]:
    """The files with pairs, by split. Files that name no split are the folder's own split, or train, unless others are."""
    kinds = f"Expected {', '.join(KINDS)}."
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise CompError(f"{path}: not a table of pairs.", code=USAGE, hint=kinds)
        files, folder = [path], path.parent
    else:
        files, folder = sorted(file for file in path.rglob("*") if file.suffix.lower() in KINDS and file.is_file()), path
        shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
        files = [file for file in shown if file.stem == "metadata"] or [file for file in shown if file.name not in SAVED]
    if not (files := [file for file in files if file.stat().st_size]):
        raise CompError(f"{path}: no pairs.", code=REFUSED, hint=f"{kinds} An imagefolder needs texts in metadata files.")
    own = next((split for split, words in SPLIT_WORDS.items() if folder.name.lower() in words), "train")
    tables = defaultdict(list)
    for file in files:
        words = set(re.split("[^a-z]+", str(file.relative_to(folder).with_suffix("")).lower()))
        tables[next((split for split, named in SPLIT_WORDS.items() if words & named), None)].append(file)
    unnamed = tables.pop(None, [])
    return dict(tables) if own in tables or not unnamed else {**tables, own: unnamed}


def open_hub(address: str, revision: str | None, cache_dir: Path | None) -> Mapping[str, Any]:
    """The splits of a data set on the hub; with HF_HUB_OFFLINE, of one that `datasets` has downloaded as a whole before."""
    import datasets

    name, _, config = address.partition(":")
    name, _, tag = name.partition("@")
    place = {"revision": revision or tag or None, "cache_dir": cache_dir and str(cache_dir / "datasets")}
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            return datasets.load_dataset(name, config or None, streaming=True, **place)
        splits = datasets.load_dataset(name, config or None, **place)
        return {split: dataset.to_iterable_dataset() for split, dataset in splits.items()}
    except Exception as error:
        raise unreadable(f"--data {address}", error) from error


def unreadable(owner: str, error: Exception) -> CompError:
    """What `datasets` raised, as a sentence and an exit code: 2 a wrong name, 1 the network, 4 the data."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    lines = str(error).strip().splitlines() or [type(error).__name__]
    match error:
        case HFValidationError():
            return CompError(f"{owner}: neither a path here nor the name of a data set.", code=USAGE)
        case DatasetNotFoundError():
            hint = "For a private or gated data set set HF_TOKEN."
            return CompError(f"{owner}: neither a path here nor a data set you may see. {lines[0]}", code=REFUSED, hint=hint)
        case ConnectionError() | HTTPError() | OfflineModeIsEnabled():
            message = f"{owner}: no path here, and the hub cannot be reached. {lines[0]}"
            return CompError(message, code=FAILED, hint="Check path, network, HF_ENDPOINT and HF_HUB_OFFLINE.")
        case ValueError() if "onfig" in lines[0]:
            return CompError(f"{owner}: {' '.join(lines)}", code=USAGE, hint="Write org/name:config.")
    return CompError(f"{owner} cannot be read: {lines[0]}", code=REFUSED)


def quiet_datasets(out: Output) -> None:
    """No logging, and bars only where comp shows its own; `CompError` tells what matters."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not out.show_progress:
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def _rows(dataset: Any, owner: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except Exception as error:
        raise unreadable(owner, error) from error


def _name_label(row: dict[str, Any], column: str, names: Sequence[str]) -> dict[str, Any]:
    """A class of a label column by its name; None for -1, which stands for no label."""
    index = row[column]
    return {column: names[index] if index is not None and index >= 0 else None}
