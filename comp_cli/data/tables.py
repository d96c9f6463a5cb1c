"""Tables that are texts (jsonl, json, csv, tsv), row by row, every cell as it is written.

The readers of `datasets` guess: "true", 007, 1.0 and 2020-01-01 in a column become truth values, numbers and dates, and what
was written is lost; a line that is nested deeply ends the process. Python's own readers of json and csv do neither.
"""

import codecs
import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from ..errors import RefusedError
from .cells import VERBATIM

BROKEN = "\0broken"  # the key of a row that could not be read: what is wrong, and where
LINE = 2**24  # letters of the longest line
FILE = 2**30  # bytes of the largest .json, which is read as a whole
SEPARATORS = ",;\t|"
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before that of UTF-16, which begins alike
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
RECORDS = (
    "Expected a list of records, a record of lists, or a record a line: pandas writes them with to_json(orient='records')."
)
Row = dict[str, Any]


@dataclass(frozen=True)
class TextTable:
    """Files of one kind that make a table: paths, or addresses on the hub."""

    files: tuple[str, ...]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, with these columns only, where they are named."""
        return read_files(self.files, columns)

    def shuffled(self, columns: Sequence[str], seed: int, room: int) -> Iterator[Row]:
        """The rows in an order that the seed decides, as far as that can be with `room` rows in memory."""
        chance = random.Random(seed)
        held: list[Row] = []
        files = list(self.files)
        chance.shuffle(files)
        for row in read_files(files, columns):
            if len(held) < room:
                held.append(row)
            else:
                place = chance.randrange(room)
                yield held[place]
                held[place] = row
        chance.shuffle(held)
        yield from held

    def separators(self) -> set[str]:
        """What stands between the cells of the files, where that is not what their names say."""
        found = set()
        for file in self.files:
            if file.lower().endswith(".csv"):
                with opened(file) as stream, suppress(UnicodeError, csv.Error):  # which reading will tell
                    found.add(separator(next(Lines(stream), "")))
        return found - {","}


def read_files(files: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of files one after another. A line that cannot be read is a row with the key BROKEN. Raises RefusedError for a
    file that is no text, or whose end is missing."""
    for file in files:
        name = file.rpartition("/")[2]
        read = {"csv": read_csv, "tsv": read_csv, "json": read_json}.get(file.lower().rpartition(".")[2], read_lines)
        try:
            with opened(file) as stream:
                for row in read(stream, name):
                    yield row if columns is None or BROKEN in row else {column: row.get(column) for column in columns}
        except UnicodeError as error:
            hint = "Save it as UTF-8: iconv -f latin1 -t utf-8, or CSV UTF-8 in a spreadsheet program."
            raise RefusedError(f"{name} is no UTF-8 text: {error}.", hint=hint) from error


@contextmanager
def opened(file: str) -> Iterator[TextIO]:
    """A local file or one on the hub as text: UTF-8, or what the mark at its beginning says."""
    import fsspec

    with fsspec.open(file, "rb") if file.startswith("hf://") else open(file, "rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
        with io.TextIOWrapper(raw, encoding=encoding, newline="") as stream:
            yield stream


class Lines:
    """The lines of a stream, with their numbers. One that is too long, or holds what no text does, raises csv.Error; the next
    call goes on behind it."""

    def __init__(self, stream: TextIO):
        self.stream, self.number = stream, 0
        self.waiting = ""  # a line that was put back

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        if self.waiting:
            line, self.waiting = self.waiting, ""
            return line
        line = self.stream.readline(LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LINE:
            while line and not line.endswith(("\n", "\r")):
                line = self.stream.readline(LINE + 1)
            raise csv.Error(f"more than {LINE} letters")
        if "\0" in line:
            raise csv.Error("a NUL byte")
        return line


def broken(problem: str, number: int) -> Row:
    return {BROKEN: (problem, f"line {number}")}


def read_csv(stream: TextIO, name: str) -> Iterator[Row]:
    """The rows below a header, all cells strings. A row with more or fewer cells is broken, or one that is quoted wrongly."""
    csv.field_size_limit(LINE)
    lines = Lines(stream)
    try:
        first = next(lines, "")
        if mark := re.fullmatch(r"sep=(.)\s*", first):  # a spreadsheet program says what it writes
            first = next(lines, "")
        lines.waiting = first
        between = mark[1] if mark else "\t" if name.lower().endswith(".tsv") else separator(first)
        reader = csv.reader(lines, strict=True, skipinitialspace=between != "\t", delimiter=between)
        header = [column.strip() for column in next(reader, [])]
    except csv.Error as error:
        raise RefusedError(f"{name}: the header cannot be read: {error}.") from error
    if twice := next((column for column in header if column and header.count(column) > 1), None):
        raise RefusedError(f"{name} has two columns {twice!r}.", hint="Rename one: which is meant is not clear.")
    while True:
        before = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                hint = 'Text with a quote in it is written with "" for each, in quotes.'
                raise RefusedError(f"{name}: a quote in line {before} never ends.", hint=hint) from error
            yield broken("line that is no CSV", before)
            continue
        if cells and len(cells) != len(header):
            yield broken(f"line without the {len(header)} cells of the header", before)
        elif cells:
            yield {column: cell for column, cell in zip(header, cells, strict=True) if column}


def separator(header: str) -> str:
    """What stands between the cells of a header most often, outside quotes; a comma where nothing does."""
    bare = re.sub('"[^"]*"', "", header)
    return max(SEPARATORS, key=bare.count)


def read_lines(stream: TextIO, name: str) -> Iterator[Row]:
    """The records of JSON lines, numbers as they are written."""
    lines = Lines(stream)
    while True:
        try:
            line = next(lines)
            if not line.strip():
                continue
            record = json.loads(line, **VERBATIM)
        except StopIteration:
            return
        except csv.Error as error:
            yield broken(f"line with {error}", lines.number)
        except RecursionError:
            yield broken("line that is nested too deeply", lines.number)
        except UnicodeError:
            raise
        except json.JSONDecodeError:
            yield broken("line that is no JSON", lines.number)
        except ValueError as error:
            yield broken(f"line with {error}", lines.number)
        else:
            yield record if isinstance(record, dict) else broken("line that is no record", lines.number)


def read_json(stream: TextIO, name: str) -> Iterator[Row]:
    """The records of a file that is one JSON value, or one a line."""
    text = stream.read(FILE + 1)
    if len(text) > FILE:
        hint = "Write a record a line (.jsonl), which is read line by line."
        raise RefusedError(f"{name} is larger than {FILE >> 30} GiB.", hint=hint)
    try:
        found = json.loads(text, **VERBATIM)
    except RecursionError as error:
        raise RefusedError(f"{name} is nested too deeply.", hint=RECORDS) from error
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise RefusedError(f"{name} is no JSON: {error}.") from error
        yield from read_lines(io.StringIO(text), name)
        return
    if isinstance(found, dict):
        found = from_columns(found)
    if not isinstance(found, list):
        raise RefusedError(f"{name} holds no records.", hint=RECORDS)
    for number, record in enumerate(found, 1):
        yield record if isinstance(record, dict) else {BROKEN: ("entry that is no record", f"entry {number}")}


def from_columns(found: dict[str, Any]) -> list[Row] | None:
    """The rows of a record of lists that are equally long; a record of anything else but records is a row itself."""
    if any(
        isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        for value in found.values()
    ):
        return None
    if found and all(isinstance(value, list) for value in found.values()):
        lengths = {len(value) for value in found.values()}
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)] if len(lengths) == 1 else None
    return [found] if found else []
