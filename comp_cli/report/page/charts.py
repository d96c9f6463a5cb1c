"""The kinds of charts that pages have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .drawing import Frame, below, every, framed, grid, line, percent_of, point
from .drawing import bar as drawn_bar
from .drawing import chart as drawn
from .markup import Html, Piece, tag


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: a text, numbers, and how long the bars are, as shares of the longest one.

    compact: of the bar in front; None where there is one bar.
    """

    name: Piece
    said: Piece
    dense: float
    compact: float | None = None


def bars(rows: Sequence[Bar]) -> Html:
    """Bars below each other, each under its text and numbers."""
    return tag(
        "ul",
        (
            tag(
                "li",
                tag("span", row.name, class_="name"),
                tag("span", row.said, class_="said"),
                drawn_bar(row.dense, row.compact),
            )
            for row in rows
        ),
        class_="bars",
    )


@dataclass(frozen=True)
class Column:
    """A column of a chart by layers. parts: class and height of what stands on each other; behind: height of the dense one
    behind them; said: what it tells when one points at it."""

    name: str
    parts: Sequence[tuple[str, float]]
    said: str
    behind: float | None = None


def columns(label: str, found: Sequence[Column], highest: float, spell: Callable[[float], str], axis: str = "layer") -> Html:
    """Columns beside each other. highest: the value that the vertical axis has to reach."""
    frame, ticks = framed(0, highest or 1, 130)
    room = 1 / max(len(found), 1)
    marks: list[Piece] = list(grid(frame, ticks, spell))
    for index, column in enumerate(found):
        marks.append(tag("g", tag("title", column.said), _column(frame, column, index * room, room)))
    names = [((index + 0.5) * room, found[index].name) for index in every(len(found))]
    return drawn(label, frame.whole, marks, below(frame, names, axis))


def _column(frame: Frame, column: Column, start: float, room: float) -> list[Html]:
    marks = []
    if column.behind is not None:
        marks.append(_block(frame, start + 0.06 * room, 0.88 * room, 0, column.behind, "dense"))
    inset, base = (0.18 if column.behind is not None else 0.1) * room, 0.0
    for kind, height in column.parts:
        marks.append(_block(frame, start + inset, room - 2 * inset, base, base + height, kind))
        base += height
    return marks


def _block(frame: Frame, start: float, width: float, low: float, high: float, kind: str) -> Html:
    top, bottom = frame.y(high), frame.y(low)
    return tag("rect", class_=kind, x=frame.x(start), width=frame.width(width), y=top, height=round(bottom - top, 2))


@dataclass(frozen=True)
class Series:
    """Points of one kind: (place from 0 to 1, value, what it tells). shape: a name in `SHAPES`, None for a line alone; joined:
    class of the line through them."""

    kind: str
    shape: str | None
    points: Sequence[tuple[float, float, str]]
    joined: str | None = None


def scatter(
    label: str,
    series: Sequence[Series],
    bounds: tuple[float, float],
    spell: Callable[[float], str],
    places: Sequence[tuple[float, str]],
    axis: str,
    *more: Callable[[Frame], Piece],
) -> Html:
    """Points over places from 0 to 1. bounds: of the vertical axis; places: what is written below it; axis: what the places
    are. more: what else is drawn, on top."""
    frame, ticks = framed(*bounds)
    marks: list[Piece] = list(grid(frame, ticks, spell))
    for one in series:
        if one.joined is not None:
            marks.append(line(frame, [(x, y) for x, y, _ in one.points], one.joined))
        if one.shape is not None:
            marks.append([point(frame, x, y, one.kind, one.shape, said) for x, y, said in one.points])
    return drawn(label, frame.whole, marks, [draw(frame) for draw in more], below(frame, places, axis))


def level(value: float) -> Callable[[Frame], Piece]:
    """A line across at a value."""
    return lambda frame: tag("line", class_="level", x1=frame.x(0), x2=frame.x(1), y1=frame.y(value), y2=frame.y(value))


@dataclass(frozen=True)
class Cell:
    """Of a heat map. share: how strong its colour is, 0 to 1."""

    share: float
    said: str
    written: Piece = None


HEAT_ROW = 20  # pixels


def heat_map(label: str, rows: Sequence[tuple[str, Sequence[Cell]]]) -> Html:
    """Rows of cells with a name each; a row fills the width, however many cells it has."""
    left = 0.07
    marks: list[Piece] = []
    for index, (name, cells) in enumerate(rows):
        top = index * HEAT_ROW
        marks.append(tag("text", name, class_="tick", x="5.5%", y=top + 14, text_anchor="end"))
        room = (1 - left) / max(len(cells), 1)
        for place, cell in enumerate(cells):
            where = left + place * room
            how = {"x": percent_of(where), "width": percent_of(room * 0.97), "y": top + 1, "height": HEAT_ROW - 2}
            marks.append(
                tag("rect", tag("title", cell.said), class_="heat", fill_opacity=f"{max(cell.share, 0.03):.2f}", **how)
            )
            if cell.written is not None:
                middle = {"x": percent_of(where + room / 2), "y": top + 14, "text_anchor": "middle"}
                marks.append(tag("text", cell.written, class_="cell", **middle))
    return drawn(label, HEAT_ROW * len(rows), marks)


LEVELS = 10  # of colour, in a raster


def raster(label: str, shares: Sequence[float], columns: int) -> Html:
    """A field of squares, row by row from the top left, each as strong as its share, 0 to 1."""
    by_level: dict[int, list[str]] = {}
    for index, share in enumerate(shares):
        by_level.setdefault(round(share * LEVELS), []).append(squares([index], columns))
    rows = -(-len(shares) // columns)
    paths = (
        tag("path", class_="heat", fill_opacity=f"{max(strength / LEVELS, 0.03):.2f}", d="".join(paths))
        for strength, paths in sorted(by_level.items())
    )
    return tag("svg", paths, class_="raster", role="img", aria_label=label, viewBox=f"0 0 {columns} {rows}")


def squares(indices: Sequence[int], columns: int) -> str:
    """The outline of squares of a raster, as a path; those beside each other are one."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1 and index % columns:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "".join(f"M{start % columns} {start // columns}h{end - start + 1}v1h-{end - start + 1}z" for start, end in runs)
