"""FLOPs and parameters by tower and part, of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..numbers import percent, short
from .charts import Bar, bars
from .figures import Document, Path, Term
from .layers import PARTS, Costs
from .markup import Html, Piece
from .shell import beside, figure, folded, legend, section, table


@dataclass(frozen=True)
class Share:
    """Where the cost of a part of the model stands in the document: a sum, or what such a sum leaves of the whole.

    name: of the part. now: terms of the sum. whole: of the model. left: whether what is left of the whole is meant.
    """

    name: str
    now: list[Path]
    whole: Path
    left: bool = False

    def number(self, document: Document) -> float:
        return document.value(*self._cost)

    def said(self, document: Document) -> Html:
        return document.made(*self._cost, short)

    def part(self, document: Document) -> Html:
        """Its share of the whole."""
        return document.made("rest" if self.left else "share", [self.now, self.whole], percent)

    @property
    def _cost(self) -> tuple[str, list[Term]]:
        return ("difference", [self.now, self.whole]) if self.left else ("sum", [self.now])


@dataclass(frozen=True)
class Row:
    """A part of the model, and the same part of the dense one, if there is another."""

    now: Share
    dense: Share | None = None


def rows_of(found: Sequence[Costs], whole: Path, dense: Path | None = None) -> list[Row]:
    """By tower and part, and what is outside of the layers. whole, dense: of the model, and of the dense one."""
    sums: dict[str, tuple[list[Path], list[Path]]] = {}
    for one in found:
        for part, where in one.parts.items():
            now, before = sums.setdefault(f"{one.tower}: {PARTS[part]}", ([], []))
            now.append(where)
            before += [one.dense[part]] if one.dense else []
    rows = [_row(name, now, before, whole, dense) for name, (now, before) in sums.items()]
    inside = [where for one in found for where in one.parts.values()]
    inside_dense = [where for one in found for where in one.dense.values()]
    return [*rows, _row("embeddings and heads", inside, inside_dense, whole, dense, left=True)]


def rows_compared(document: Document, name: str) -> list[Row]:
    """Of a compact model that was analyzed. name: "flops" or "params"."""
    rows = []
    for index, one in enumerate(document.at("compact", "parts")):
        path: Path = ("compact", "parts", index, name)
        said = f"{one['tower']}: {PARTS[one['part']]}" if one["part"] else "embeddings and heads"
        whole = ("compact", name)
        rows.append(_row(said, [(*path, "compact")], [(*path, "dense")], (*whole, "compact"), (*whole, "dense")))
    return rows


def _row(name: str, now: list[Path], before: list[Path], whole: Path, dense: Path | None, left: bool = False) -> Row:
    return Row(Share(name, now, whole, left), None if dense is None else Share(name, before, dense, left))


def part_section(document: Document, flops: Sequence[Row], params: Sequence[Row]) -> Html:
    """Charts beside each other, and one table of the numbers."""
    twice = flops[0].dense is not None
    charts = beside(
        *(
            figure(name, bars(_bars(document, rows)))
            for name, rows in (("FLOPs of a sample", flops), ("parameters", params))
            if rows
        )
    )
    columns = ["part", *_columns("FLOPs", twice), *(_columns("parameters", twice) if params else [])]
    cells = [[row.now.name, *_cells(document, row)] for row in flops]
    for index, row in enumerate(params):
        cells[index] += _cells(document, row)
    what = legend(("dense", "dense model"), ("compact", "compact model")) if twice else None
    lead = "What each part costs, and what is left of it." if twice else "What each part costs."
    return section(
        "Where FLOPs and parameters are", what, charts, folded("table: every part", table(columns, cells)), lead=lead
    )


def _columns(name: str, twice: bool) -> list[str]:
    return [f"{name}, dense", f"{name}, compact", "share"] if twice else [name, "share"]


def _cells(document: Document, row: Row) -> list[Piece]:
    before = [] if row.dense is None else [row.dense.said(document)]
    return [*before, row.now.said(document), row.now.part(document)]


def _bars(document: Document, rows: Sequence[Row]) -> list[Bar]:
    longest = max((row.dense or row.now).number(document) for row in rows) or 1
    found = []
    for row in rows:
        now = row.now.said(document)
        length = row.now.number(document) / longest
        if row.dense is None:
            found.append(Bar(row.now.name, [now, " (", row.now.part(document), ")"], length))
        else:
            found.append(
                Bar(row.now.name, [row.dense.said(document), " → ", now], row.dense.number(document) / longest, length)
            )
    return found
