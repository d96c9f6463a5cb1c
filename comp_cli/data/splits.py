"""Which rows calibrate and which evaluate: splits of files, folders and hub data sets, or those that a column names."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

from ..errors import RefusedError, UsageError
from .cells import read_label, shown

# Words that name a split: those of `datasets` and of Karpathy's COCO and Flickr files, the one to be careful with first.
SPLIT_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
    "train": {"train", "training", "restval", "trainval"},
}
SPLIT_COLUMN = "split"
SPLIT_COLUMNS = (SPLIT_COLUMN, "splits", "data_split", "dataset_split", "partition", "subset", "set", "fold", "phase")
NO_VALUE = {"", "none", "nan", "null"}
FEW = 8  # values that a column of any other name holds, if it names splits
Purpose = Literal["calibration", "evaluation"]
Reader = Callable[[Any], str]  # what a cell names as the split, in small letters; "" where it names none


def kind_of(split: str) -> str | None:
    """train, validation or test, by the words in a name (train2014, test_dev); None for another name."""
    words = set(re.split("[^a-z]+", split.lower()))
    return "test" if is_test(split) else next((kind for kind, named in SPLIT_WORDS.items() if words & named), None)


def is_test(split: str) -> bool:
    return "test" in split.lower() or bool(SPLIT_WORDS["test"] & set(re.split("[^a-z]+", split.lower())))


def choose_split(owner: str, splits: Sequence[str], purpose: Purpose, wanted: str | None) -> str:
    """Calibration: the wanted split, else train, else validation, else the only one; never a test split.

    Evaluation: validation, else test, else the split of the calibration, which then share it. Raises UsageError for a wanted
    split that is unknown or a test split, or none where one is needed; RefusedError for nothing but test data."""
    tests = [split for split in splits if is_test(split)]
    usable = [split for split in splits if not is_test(split)]
    if purpose == "evaluation":
        calibration = [choose_split(owner, splits, "calibration", wanted)] if usable or wanted else []
        validation = [split for split in usable if split.lower() in SPLIT_WORDS["validation"] and split not in calibration]
        return [*validation, *tests, *calibration][0]
    listed = f"Splits: {', '.join(splits)}."
    if wanted and wanted not in splits:
        raise UsageError(f"{owner} has no split {wanted!r}.", hint=listed)
    if wanted in tests:
        raise UsageError(f"{wanted} is a test split: comp never calibrates on one.", hint=listed)
    if not usable:
        hint = "Give training or validation pairs; if these are, rename the file, folder or split."
        raise RefusedError(f"{owner} is test data: comp never calibrates on it.", hint=hint)
    known = [split for kind in ("train", "validation") for split in usable if split.lower() in SPLIT_WORDS[kind]]
    if not wanted and not known and len(usable) > 1:
        raise UsageError(f"{owner} has no split called train.", hint=f"{listed} Name one with --split.")
    return wanted or [*known, *usable][0]


def split_value(value: Any) -> str:
    """What a cell names as the split, in small letters; "" where it names none."""
    text = shown(value).lower()
    return "" if text in NO_VALUE else text


def folder_value(value: Any) -> str:
    """The folder that the path of an image begins with."""
    first, *more = PurePosixPath(value if isinstance(value, str) else "").parts or ("",)
    return first.lower() if more else ""


def flag_value(value: Any, kind: str) -> str:
    """What the truth value of a column such as is_test says: what is not called training data is none."""
    named: dict[int | None, str] = {1: kind, 0: "test" if kind == "train" else "train"}
    return named.get(read_label(value), "")


def flag_reader(column: str) -> Reader | None:
    """How a column called is_test, is_train and the like is read; None for others: is_valid may say anything of a row."""
    named = re.fullmatch("is_?((?!valid$)[a-z]+)", column.lower())
    kind = next((kind for kind, words in SPLIT_WORDS.items() if named and named[1] in words), None)
    return partial(flag_value, kind=kind) if kind else None


def are_splits(values: Sequence[Any]) -> bool:
    """Whether the first cells of a column hold a few words again and again, each of which names a split."""
    found = {named for value in values if (named := split_value(value))}
    words = all(kind_of(named) and re.fullmatch("[a-z0-9_-]+", named) for named in found)
    return words and 0 < len(found) <= min(FEW, len(values) // 2)


@dataclass(frozen=True)
class SplitColumn:
    """A column that names the split of a row, what it holds (value -> rows), and the splits made of it (name -> values).

    Rows without a value, and those of other values than are known, belong to a split that nobody asked for.
    """

    name: str
    counts: Mapping[str, int]
    splits: Mapping[str, frozenset[str]]
    reader: Reader = split_value

    def describe(self, split: str) -> str:
        """ "train", or "train (restval, train)" where that is more than one value."""
        values = sorted(self.splits[split])
        return split if values == [split] else f"{split} ({', '.join(values)})"

    def __str__(self) -> str:
        counted = ", ".join(f"{rows} {value or 'without one'}" for value, rows in self.counts.items())
        return f"splits from {'the folders of ' * (self.reader is folder_value)}{self.name} ({counted})"


def split_column(
    name: str, values: Iterable[Any], wanted: str | None, *, certain: bool = False, reader: Reader = split_value
) -> SplitColumn | None:
    """The splits of a column. None where it holds nothing, or, unless it is `certain` to hold splits, anything else. Raises
    UsageError, with the question, where this may be test data.

    Values of a kind make one split, by which they are called: train and restval are training data. A value that is `wanted`
    is a split of its own.
    """
    counts = Counter(map(reader, values))
    kinds = {value: kind_of(value) for value in counts if value}
    if not certain and reader is split_value and {"test", None} <= set(kinds.values()):
        listed = ", ".join(list(kinds)[:FEW])
        hint = f"If so, --split-column {name}. If it says something else of them, --split-column ''."
        raise UsageError(f"Does the column {name!r} ({listed}) name the splits of the rows?", hint=hint)
    if not kinds or not (certain or all(kinds.values())):
        return None
    splits: dict[str, set[str]] = {}
    for value, kind in kinds.items():
        alone = value == (wanted or "").lower()
        splits.setdefault(value if alone else kind or value, set()).add(value)
    made = {split: frozenset(found) for split, found in splits.items()}
    return SplitColumn(name, dict(counts.most_common()), made, reader)


def find_split_columns(columns: Iterable[str]) -> list[str]:
    """Columns that may name splits, by their names, the most likely one first."""
    found = [column for column in columns if column.lower() in SPLIT_COLUMNS]
    return sorted(found, key=lambda column: SPLIT_COLUMNS.index(column.lower()))
