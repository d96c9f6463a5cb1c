"""Columns and rows of a table, whatever holds it: a text that comp reads itself, or a data set of `datasets`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..errors import CompError, RefusedError, UsageError
from .pictures import Hub, Root
from .tables import BROKEN, TextTable

SAMPLE = 1_000  # rows that tell which columns there are, and what they hold
TEXT_SAMPLE = 100_000  # of a local text, where any row may begin a column
REMOTE_SAMPLE = 100  # of a data set on the hub, whose rows may hold large images

Table = Any  # a TextTable or a datasets.IterableDataset


def column_types(table: Table, owner: str) -> dict[str, Any]:
    """The columns of a table and their types; None where they have none, as in a text."""
    if isinstance(table, TextTable):
        found: dict[str, Any] = {}
        for row in islice(table.rows(), sample_size(table)):
            found |= row if BROKEN in row else dict.fromkeys(row)
        if (broken := found.pop(BROKEN, None)) and not found:
            problem, place = broken
            raise RefusedError(f"{owner}: no row can be read. The last was a {problem} ({place}).")
        return found
    return dict(table.features or dict.fromkeys(next(rows_of(table, owner), {})))


def chosen_columns(table: Table, found: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """A datasets.IterableDataset with some of its columns: images as they are stored, classes by their names."""
    import datasets

    for column in columns:
        if isinstance(found[column], datasets.Image):
            table = table.decode(False)  # a cast would come too late: hub images are decoded ahead, by threads
    table = table.select_columns(list(columns))
    for column in columns:
        if names := getattr(found[column], "names", None):  # of a ClassLabel
            table = table.map(_name_label, fn_kwargs={"column": column, "names": names})
        inner = getattr(found[column], "feature", found[column])  # of a list
        if (kind := getattr(inner, "dtype", None)) in ("float16", "float32"):
            table = table.map(_short_floats, fn_kwargs={"column": column, "kind": kind})
    return table


def is_string(kind: Any) -> bool:
    """Whether a column is of texts, by its type; polars and newer pandas have another one for these. None: nobody said."""
    return kind is None or getattr(kind, "dtype", None) in ("string", "large_string", "string_view")


def first_rows(table: Table, found: Mapping[str, Any], columns: Sequence[str], owner: str) -> Iterator[dict[str, Any]]:
    """The rows in the order of the table, with some of the columns."""
    return table.rows(columns) if isinstance(table, TextTable) else rows_of(chosen_columns(table, found, columns), owner)


def sample_size(table: Table, root: Root = None) -> int:
    """How many rows are looked at before any is read."""
    local = isinstance(table, TextTable) and not any(file.startswith("hf://") for file in table.files)
    return TEXT_SAMPLE if local else REMOTE_SAMPLE if isinstance(root, Hub) else SAMPLE


def unreadable(owner: str, error: Exception) -> CompError:
    """What `datasets` raised: UsageError for a wrong name, RefusedError for the data, CompError for the network."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    lines = str(error).strip().splitlines() or [type(error).__name__]
    match error:
        case HFValidationError():
            return UsageError(f"{owner}: neither a path here nor the name of a data set.")
        case DatasetNotFoundError():
            hint = "For a private or gated data set set HF_TOKEN."
            return RefusedError(f"{owner}: neither a path here nor found on the Hub, or no access. {lines[0]}", hint=hint)
        case ConnectionError() | HTTPError() | OfflineModeIsEnabled():
            message = f"{owner}: no path here, and the hub cannot be reached. {lines[0]}"
            return CompError(message, hint="Check path, network, HF_ENDPOINT and HF_HUB_OFFLINE.")
        case ValueError() if "onfig" in lines[0]:
            return UsageError(f"{owner}: {' '.join(lines)}", hint="Write org/name:config.")
    return RefusedError(f"{owner} cannot be read: {lines[0]}")


def rows_of(dataset: Any, owner: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except CompError:
        raise
    except Exception as error:
        raise unreadable(owner, error) from error


def _name_label(row: dict[str, Any], column: str, names: Sequence[str]) -> dict[str, Any]:
    """A class of a label column by its name; None for -1, which stands for no label."""
    index = row[column]
    return {column: names[index] if index is not None and index >= 0 else None}


def _short_floats(row: dict[str, Any], column: str, kind: str) -> dict[str, Any]:
    """Numbers of fewer than 64 bits as they are written: 0.1, where Python makes 0.10000000149011612 of it."""

    def short(value: float | None) -> float | None:
        return value if value is None else float(str(np.dtype(kind).type(value)))

    value = row[column]
    return {column: list(map(short, value)) if isinstance(value, list) else short(value)}
