"""Opened image-text pairs: which rows serve calibration and which evaluation, read through `datasets` or from texts.

All is streamed: nothing is converted or written beside the data, and an image is opened only when its pair is asked for.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import RefusedError, UsageError
from ..progress import Progress
from .cells import BadRow, written
from .columns import REMOTE_SAMPLE, SAMPLE, Table, chosen_columns, column_types, first_rows, is_string, rows_of, sample_size
from .pictures import DEEP, MISSING, Hub, Root, read_content, stored_image
from .rows import (
    COLUMN_NAMES,
    UNLABELLED,
    Accepts,
    Columns,
    FoundColumns,
    Pair,
    Tally,
    every,
    find_columns,
    image_number,
    purpose_of,
    read_rows,
    says_match,
)
from .splits import (
    SPLIT_COLUMN,
    SPLIT_COLUMNS,
    Purpose,
    Reader,
    SplitColumn,
    are_splits,
    choose_split,
    find_split_columns,
    flag_reader,
    folder_value,
    is_test,
    kind_of,
    split_column,
    split_value,
)
from .tables import BROKEN, TextTable

SHUFFLED_PATHS, SHUFFLED_IMAGES = 100_000, 1_000  # rows in memory while shuffling
SCALE = "Save them with 8 bits, scaled as you do it for the model; Pillow alone makes them white."


@dataclass(frozen=True)
class PairSet:
    """Opened pairs, by split. Relative image paths start in the split's root; see `pictures.Root`."""

    name: str
    splits: Mapping[str, Table]
    roots: Mapping[str, Root]
    columns: Columns
    wanted: str | None  # the split to calibrate on, where the user named one
    progress: Progress
    by_column: SplitColumn | None = None  # what the splits come from, if not from files
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # purpose -> counts of rows, see Tally
    calibrated: set[int] = field(default_factory=set)  # images that calibration has read
    warned: set[str] = field(default_factory=set)  # what was said already

    def split(self, purpose: Purpose) -> str:
        """The split that serves a purpose; see `choose_split`."""
        try:
            return choose_split(self.name, list(self.splits), purpose, self._wanted())
        except UsageError as error:
            if self.by_column:
                error.hint = (
                    error.hint or ""
                ) + f" They are from the column {self.by_column.name}; --split-column '' takes all rows."
            raise

    def describe(self, purpose: Purpose) -> str:
        """What is read, for reports: "pairs.jsonl, split train, four fifths of the images"."""
        part = {"calibration": "four fifths of the images", "evaluation": "the other fifth of the images"}[purpose]
        split = self.split(purpose)
        named = self.by_column.describe(split) if self.by_column else split
        return f"{self.name}, split {named}" + (f", {part}" if self._shares_split(purpose) else "")

    def counts(self) -> dict[str, dict[str, Any]]:
        """What became of the rows, for each purpose that was read for; see `Tally.counts`."""
        return dict(self.told)

    def read(self, purpose: Purpose, limit: int | None = None, seed: int = 0, accepts: Accepts = every) -> Iterator[Pair]:
        """Up to `limit` pairs that are taken, in an order that the seed decides. No image serves both purposes.

        An image with several texts makes as many pairs. A row with a missing or broken image, no text, or no label where there
        are labels, is skipped; a warning at the end counts them. Raises UsageError for columns that are missing or not clear,
        RefusedError for a set that is empty, unreadable, or bad by more than half. The call itself opens the first pair, so
        that a set that is no good is refused before any work is done."""
        rows, columns, held = self._open(self.split(purpose), seed)
        found = [f"images from {columns.image}", f"texts from {columns.text}{held}"]
        more = {"answers": columns.answer, "labels": columns.label}
        found += [f"{what} from {column}" for what, column in more.items() if column]
        self.progress.say(f"{purpose} on {self.describe(purpose)}: {', '.join(found)}")
        pairs = self._pairs(rows, columns, purpose, limit, accepts)
        return chain([next(pairs)], pairs)

    def _wanted(self) -> str | None:
        """What --split names, as the splits are called."""
        if self.wanted is None or self.by_column is None or self.wanted in self.splits:
            return self.wanted
        lower = self.wanted.lower()
        return next((split for split, values in self.by_column.splits.items() if values == {lower}), self.wanted)

    def _shares_split(self, purpose: Purpose) -> bool:
        return not is_test(self.split(purpose)) and self.split("calibration") == self.split("evaluation")

    def _open(self, split: str, seed: int) -> tuple[Iterator[dict[str, Any]], FoundColumns, str]:
        """The rows in the seed's order, with images as they are stored and labels by name, their columns, and what is to be
        said of the texts."""
        table = self.splits[split]
        found = column_types(table, self.name)
        if not found:
            raise RefusedError(f"{self.name}, split {split}: no pairs.")
        columns = find_columns(found, self.columns, self.name)
        columns = replace(columns, split=self._split_column(found))
        read = [name for name in (columns.image, columns.text, columns.label, columns.answer, columns.split) if name]
        read = list(dict.fromkeys(read))
        sample = list(islice(first_rows(table, found, read, self.name), sample_size(table, self.roots[split])))
        if columns.label and self.columns.label is None:
            if odd := says_match(columns.label, (row.get(columns.label) for row in sample), self.name):
                told = f"{self.name}: {columns.label} holds {odd}, not match or mismatch; it is not taken for labels."
                if told not in self.warned:
                    self.warned.add(told)
                    self.progress.warn(told)
                columns = replace(columns, label=None)
        held = " (lists)" if any(is_list(row.get(columns.text)) for row in sample) else ""
        kind = found[columns.image]
        buffer = SHUFFLED_PATHS if is_string(kind) else SHUFFLED_IMAGES
        if isinstance(table, TextTable):
            return table.shuffled(read, seed, buffer), columns, held
        dataset = chosen_columns(table, found, read)
        mixed = min(10, dataset.num_shards)  # files that are read in turns, by threads that `datasets` is slow to end
        dataset = dataset.shuffle(seed=seed, buffer_size=buffer, max_buffer_input_shards=mixed)
        return rows_of(dataset, self.name), columns, held

    def _split_column(self, found: Mapping[str, Any]) -> str | None:
        """The column to look up a row's split in. Where files have splits, only one that is sure to name them."""
        if self.by_column:
            return self.by_column.name
        named = self.columns.split
        if named is None and len(self.splits) > 1:
            return next((name for name in found if name.lower() == SPLIT_COLUMN), None)
        return named or None

    def _pairs(
        self, rows: Iterator[dict[str, Any]], columns: FoundColumns, purpose: Purpose, limit: int | None, accepts: Accepts
    ) -> Iterator[Pair]:
        where, tally = self.describe(purpose), Tally()
        root = self.roots[self.split(purpose)]
        most = sys.maxsize if limit is None else limit
        for pair in read_rows(self._of_use(rows, columns, purpose, root, tally), columns, root, most, tally, accepts):
            if purpose == "calibration" and limit is not None:  # training reads as much as it has time for
                self.calibrated.add(pair.image_id)
            yield pair
        if tally.looked > tally.skipped and not tally.given:
            raise RefusedError(
                f"{where}: no pairs that match, or none with an answer.",
                hint="Are the columns of labels and answers the right ones?",
            )
        if not tally.looked:
            left_out = f" Left out: {', '.join(f'{n} {why}' for why, n in tally.left_out.items())}." if tally.left_out else ""
            hint = "Give more pairs, or a split for each purpose: train and validation."
            raise RefusedError(f"{where}: no pairs.{left_out}", hint=hint)
        if 2 * tally.skipped > tally.looked:
            hints = {MISSING: f"Relative paths start in {root}."} if isinstance(root, Path) else {}
            hints |= {DEEP: SCALE, UNLABELLED: f"If {columns.label} says something else, leave it out with --label-column ''."}
            remedy = next((hints[problem] for problem in hints if problem in tally.bad), None)
            raise RefusedError(f"{where}: {tally}.", hint=remedy)
        self._tell("training" if purpose == "calibration" and limit is None else purpose, where, tally, limit)

    def _of_use(
        self, rows: Iterator[dict[str, Any]], columns: FoundColumns, purpose: Purpose, root: Root, tally: Tally
    ) -> Iterator[dict[str, Any]]:
        """The rows that serve a purpose, with the content of their images; the others are counted."""
        split, shared = self.split(purpose), self._shares_split(purpose)
        other = {"calibration": "evaluation", "evaluation": "calibration"}[purpose]
        for row in rows:
            if columns.split and BROKEN not in row and (why := self._other_split(row.get(columns.split), split, purpose)):
                tally.leave(why)
                continue
            try:
                content = None if BROKEN in row else read_content(row.get(columns.image), root)
            except BadRow:
                content = None  # to be read again, and counted
            if content is None:
                yield row
            elif shared and purpose_of(content) != purpose:
                tally.leave(f"kept for {other}")
            elif purpose == "evaluation" and image_number(content) in self.calibrated:
                tally.leave("with an image that calibration has seen")
            else:
                yield row | {columns.image: {"bytes": content, "path": stored_image(row[columns.image])[1]}}

    def _other_split(self, value: Any, split: str, purpose: Purpose) -> str | None:
        """Why a row that names another split than the one that is read is left out; None where it is not."""
        named = (self.by_column.reader if self.by_column else split_value)(value)
        if self.by_column:
            inside = named in self.by_column.splits[split]
        else:  # files have splits as well: a row is left out where it contradicts them
            kind = kind_of(named) or kind_of(split)
            inside = kind != "test" if purpose == "calibration" else split == self.split("calibration") or kind != "train"
        return None if inside else f"of split {named}" if named else "without a split"

    def _tell(self, purpose: str, where: str, tally: Tally, limit: int | None) -> None:
        """One line for people, once for each purpose, and the counts for the report."""
        if purpose in self.told:
            return
        self.told[purpose] = tally.counts(limit)
        self.progress.say(f"{purpose}: {tally.line(limit)}")
        if mismatches := tally.left_out["labelled as mismatches"]:
            of = f"{mismatches} of {mismatches + tally.given} pairs are labelled as mismatches and are not used"
            self.progress.warn(f"{where}: {of}: this task is about those that match.")
        if tally.skipped:
            self.progress.warn(f"{where}: {tally}. They are skipped.")


def is_list(value: Any) -> bool:
    """Whether a cell is a text in which a list is written."""
    try:
        return isinstance(value, str) and isinstance(written(value), list | tuple)
    except BadRow:
        return False


def split_by_column(pairs: PairSet) -> PairSet:
    """The pairs with the splits that a column names, where nothing else names any. All rows of a local table are looked at,
    and the first ones of a data set on the hub."""
    named = pairs.columns.split
    if named == "":
        return pairs
    if len(pairs.splits) > 1 and not named:
        return pairs
    for table in pairs.splits.values():
        found = column_types(table, pairs.name)
        if named and named not in found:
            hint = f"Columns: {', '.join(found)}. Name one with --split-column."
            raise UsageError(f"{pairs.name} has no column {named!r}.", hint=hint)
    if len(pairs.splits) > 1:
        return pairs
    (root,) = pairs.roots.values()
    most = REMOTE_SAMPLE if isinstance(root, Hub) else None

    def column(name: str, certain: bool = False, reader: Reader = split_value) -> SplitColumn | None:
        rows = islice(first_rows(table, found, [name], pairs.name), most)
        cells = (row[name] for row in rows if BROKEN not in row)
        return split_column(name, cells, pairs.wanted, certain=certain, reader=reader)

    def split_up(made: SplitColumn) -> PairSet:
        pairs.progress.say(f"{pairs.name}: {made}")
        return replace(pairs, splits=dict.fromkeys(made.splits, table), roots=dict.fromkeys(made.splits, root), by_column=made)

    used = {pairs.columns.image, pairs.columns.text, pairs.columns.label, pairs.columns.answer}
    for name in [named] if named else [name for name in find_split_columns(found) if name not in used]:
        if made := column(name, certain=bool(named) or name.lower() == SPLIT_COLUMN):
            return split_up(made)
        pairs.progress.say(f"{pairs.name}: the column {name} names no splits; all rows are taken.")
    if not named and isinstance(root, Path):
        for name, reader in other_split_columns(pairs, table, found):
            made = column(name, reader=reader)
            if made and (len(made.splits) > 1 or (flag_reader(name) and "test" in made.splits)):
                return split_up(made)
    return pairs


def other_split_columns(pairs: PairSet, table: Table, found: Mapping[str, Any]) -> list[tuple[str, Reader]]:
    """Columns of a local table that name splits though none is called so, as far as its first rows tell: flags such as is_test,
    a few words again and again, or the folders of the images, where a text has no split of its own by its name."""
    from datasets import ClassLabel

    roles = {name for names in COLUMN_NAMES.values() for name in names} | set(vars(pairs.columns).values())
    texts = [name for name, kind in found.items() if is_string(kind) or isinstance(kind, ClassLabel)]
    rest = [name for name in found if not {name, name.lower()} & roles]
    flags = [(name, reader) for name in rest if (reader := flag_reader(name))]
    images = [name for name in texts if name == pairs.columns.image or name.lower() in COLUMN_NAMES["image"]]
    if not isinstance(table, TextTable) or any(kind_of(Path(file).stem) for file in table.files):
        images = []
    likely = [name for name in rest if name in texts and not flag_reader(name) and name.lower() not in SPLIT_COLUMNS]
    sample = [row for row in islice(first_rows(table, found, [*likely, *images], pairs.name), SAMPLE) if BROKEN not in row]
    words = [(name, split_value) for name in likely if are_splits([row[name] for row in sample])]
    folders = [name for name in images if sample and all(kind_of(folder_value(row[name])) for row in sample)]
    return flags + words + [(name, folder_value) for name in folders]
