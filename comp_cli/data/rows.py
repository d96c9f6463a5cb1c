"""Pairs of an image and a text, made of the rows of a table; bad rows and rows that are left out are counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .cells import MATCHES, MISMATCHES, BadRow, read_answers, read_label, read_texts, shown
from .pictures import Root, decode, digest, read_content, stored_image
from .splits import Purpose
from .tables import BROKEN

COLUMN_NAMES = {
    "image": "image img picture photo image_path img_path image_file file_name filename file_path filepath path".split(),
    "text": "text texts caption captions sentence sentences question description".split(),
    "label": "match matches matched is_match is_matched label labels".split(),
    "answer": "answers answer multiple_choice_answer".split(),
}
UNLABELLED = "no match or mismatch as label"
UNCERTAIN = {"label", "labels"}  # columns that say anything of a pair: the names above say that it matches


@dataclass(frozen=True)
class Pair:
    """An image, a text, and whether they match (1), do not (0), or nobody said (None). Pairs with one image (the same file,
    wherever it is) share its id. A text that is a question has answers, of one person or of several.

    known: whether the model was made for such pairs; if not, nothing in them is a label.
    """

    image: Any  # a picture, or what a processor has made of it (see batches.Collator.seen)
    text: str
    label: int | None = None
    image_id: int = 0
    answers: tuple[str, ...] = ()
    known: bool = True

    @property
    def answer(self) -> str | None:
        """The answer that most people gave."""
        return max(self.answers, key=self.answers.count, default=None)


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None to find one by its common names, "" for no labels, answers or splits."""

    image: str | None = None
    text: str | None = None
    label: str | None = None
    answer: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class FoundColumns:
    """The columns that are read of a table; None for labels, answers or splits that it has none of."""

    image: str
    text: str
    label: str | None = None
    answer: str | None = None
    split: str | None = None


Accepts = Callable[[Pair], bool]  # whether a pair is of use


@dataclass
class Tally:
    """What became of rows: how many were for another purpose or split, how many were looked at, how many pairs these gave,
    which are bad (problem -> what they hold), and how many rows and pairs were left out, and why."""

    passed: int = 0
    looked: int = 0
    given: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        return sum(map(len, self.bad.values()))

    def leave(self, why: str) -> None:
        """A row that serves another purpose."""
        self.passed += 1
        self.left_out[why] += 1

    def counts(self, asked: int | None) -> dict[str, Any]:
        """For reports; asked is None where all were wanted."""
        bad = {problem: len(found) for problem, found in self.bad.items()}
        return {
            "asked": asked,
            "pairs": self.given,
            "rows": self.passed + self.looked,
            "bad_rows": bad,
            "left_out": dict(self.left_out),
        }

    def line(self, asked: int | None) -> str:
        """For people: "13 pairs (256 were asked for) of 20 rows; left out: 7 kept for evaluation"."""
        fewer = f" ({asked} were asked for)" if asked is not None and self.given < asked else ""
        left_out = [f"{self.skipped} bad rows"] * bool(self.skipped)
        left_out += [f"{count} {reason}" for reason, count in self.left_out.items()]
        return f"{self.given} pairs{fewer} of {self.passed + self.looked} rows" + (
            f"; left out: {', '.join(left_out)}" if left_out else ""
        )

    def __str__(self) -> str:
        problems = "; ".join(f"{problem} ({len(found)}): {few(found)}" for problem, found in self.bad.items())
        return f"{self.skipped} of {self.looked} rows are bad: {problems}"


def find_columns(found: Mapping[str, Any], named: Columns, owner: str) -> FoundColumns:
    """The columns to read of those a table has (name -> type, or None). Raises UsageError where one is missing or not clear."""
    from datasets import Image as ImageType

    listed = f"Columns: {', '.join(found)}."
    taken: dict[str, str] = {}  # "" for none
    for role, common in COLUMN_NAMES.items():
        name, flag = getattr(named, role), f"--{role}-column"
        if name is None:
            candidates = [column for column in found if column.lower() in common and column not in taken.values()]
            if role == "image":  # stored images before file names
                candidates = [column for column, kind in found.items() if isinstance(kind, ImageType)] or candidates
            if role == "answer":  # those of all people before the one that was chosen
                candidates = sorted(candidates, key=lambda column: common.index(column.lower()))[:1]
            if role == "label":  # names that say what they mean before those that do not
                candidates = [column for column in candidates if column.lower() not in UNCERTAIN] or candidates
            if len(candidates) > 1:
                several = " or ".join(candidates)
                raise UsageError(f"{owner}: is the {role} in {several}?", hint=f"{listed} Name one with {flag}.")
            name = candidates[0] if candidates else ""
        elif name and name not in found:
            raise UsageError(f"{owner} has no column {name!r}.", hint=f"{listed} Name one with {flag}.")
        if not name and role not in ("label", "answer"):
            hint = f"{listed} Name the one with the {role} with {flag}."
            raise UsageError(f"{owner}: no {role} column found.", hint=hint)
        taken[role] = name
    return FoundColumns(taken["image"], taken["text"], taken["label"] or None, taken["answer"] or None)


def says_match(column: str, values: Iterable[Any], owner: str) -> str | None:
    """Whether a column that was found by its name holds matches and mismatches: None if so, else what it holds.

    A name such as is_match says so itself. What `label` means is certain where it holds those words only; hateful or not,
    positive or negative, 0 or 1 are labels of many things, and others raise UsageError, with the question.
    """
    if column.lower() not in UNCERTAIN:
        return None
    present = [value for value in values if shown(value) != "None"]
    words = {shown(value).lower() for value in present}
    if words and words <= MATCHES | MISMATCHES:
        return None
    if not words or any(read_label(value) is None for value in present):
        return next((shown(value) for value in present if read_label(value) is None), "None")[:60]
    raise UsageError(
        f"{owner}: does the column {column!r} ({few(sorted(words))}) say whether image and text match?",
        hint=f"If so, --label-column {column}. If it says something else of them, --label-column ''.",
    )


def every(pair: Pair) -> bool:
    """Accepts every pair."""
    return True


def read_rows(
    rows: Iterable[Mapping[str, Any]], columns: FoundColumns, root: Root, limit: int, tally: Tally, accepts: Accepts = every
) -> Iterator[Pair]:
    """Up to `limit` pairs of those that are taken. Bad rows are skipped and tallied; more than `limit` of them, and more than
    half of all, end the reading."""
    for row in rows:
        tally.looked += 1
        try:
            found = read_row(row, columns, root)
        except BadRow as bad:
            tally.bad.setdefault(bad.problem, []).append(bad.found)
            found = []
        for pair in found:
            if not accepts(pair):
                tally.left_out["labelled as mismatches" if pair.label == 0 else "without an answer"] += 1
            elif tally.given < limit:
                tally.given += 1
                yield pair
        if tally.given >= limit or tally.skipped > max(limit, tally.looked // 2):
            return


def read_row(row: Mapping[str, Any], columns: FoundColumns, root: Root) -> list[Pair]:
    """The pairs of a row: one for each of its texts. Relative image paths start in `root`; raises BadRow."""
    if BROKEN in row:
        raise BadRow(*row[BROKEN])
    cell, label = row.get(columns.image), None
    _, path = stored_image(cell)
    texts = read_texts(row.get(columns.text))
    if not texts:
        raise BadRow("no text", path or "an embedded image")
    if columns.label and (label := read_label(row.get(columns.label))) is None:
        raise BadRow(UNLABELLED, shown(row.get(columns.label)))
    answers = read_answers(row.get(columns.answer)) if columns.answer else ()
    content = read_content(cell, root)
    image = decode(content, path)
    return [Pair(image, text, label, image_number(content), answers) for text in texts]


def image_number(content: bytes) -> int:
    return int.from_bytes(digest(content)[:7], "big")


def purpose_of(content: bytes) -> Purpose:
    """Of images that share a split, a fifth is for evaluation: their content decides, not where they are."""
    return "evaluation" if int.from_bytes(digest(content)[:8], "big") % 5 == 0 else "calibration"


def few(found: Sequence[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
