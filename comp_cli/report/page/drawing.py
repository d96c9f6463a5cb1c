"""Charts as inline SVG. What lies side by side is placed in percent of the width, what lies above each other in pixels: a chart
is as wide as its place, and its texts stay as large as they are. Colours are classes of the style sheet.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .markup import Html, Piece, tag

LEFT, RIGHT = 11.0, 3.0  # percent of the width that the axis on the left takes, and that stay free on the right
TOP, BOTTOM = 20, 36  # pixels above and below what is drawn
TICKS = 4  # lines across a chart, about


def percent_of(share: float) -> str:
    """0.125 as "12.5%"."""
    return f"{100 * share:.5g}%"


def chart(label: str, height: int, *marks: Piece) -> Html:
    """A chart. label: what it shows, for those who do not see it."""
    return tag("svg", marks, class_="chart", role="img", aria_label=label, width="100%", height=height)


def bar(dense: float, compact: float | None = None) -> Html:
    """A bar behind a bar, each from the left, as shares of the width. It repeats what a text says."""
    front = None if compact is None else tag("rect", class_="compact", width=percent_of(min(compact, 1)), height=9, rx=2)
    back = tag("rect", class_="dense" if compact is not None else "compact", width=percent_of(min(dense, 1)), height=9, rx=2)
    return tag("svg", back, front, class_="bar", aria_hidden="true", width="100%", height=9)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, the least of them at or below the first, the last at or above the second."""
    span = high - low or abs(high) or 1.0
    raw = span / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * each for each in (1, 2, 2.5, 5, 10) if unit * each >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Frame:
    """The field of a chart: where a value lies.

    low, high: of the vertical axis. height: pixels of the field.
    """

    low: float
    high: float
    height: int = 160

    @property
    def whole(self) -> int:
        """Pixels of the chart with its axes."""
        return TOP + self.height + BOTTOM

    def x(self, share: float) -> str:
        """Of a place from 0 (left) to 1 (right) of the field."""
        return f"{LEFT + (100 - LEFT - RIGHT) * share:.5g}%"

    def width(self, share: float) -> str:
        return f"{(100 - LEFT - RIGHT) * share:.5g}%"

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return round(TOP + self.height * (1 - (value - self.low) / (self.high - self.low)), 2)


def framed(low: float, high: float, height: int = 160) -> tuple[Frame, list[float]]:
    """The field for values from `low` to `high`, and its ticks."""
    ticks = nice_ticks(low, high)
    return Frame(ticks[0], ticks[-1], height), ticks


def grid(frame: Frame, ticks: Sequence[float], spell: Callable[[float], str]) -> Iterator[Html]:
    """Lines across, with their values at the left."""
    for tick in ticks:
        y = frame.y(tick)
        yield tag("line", class_="grid", x1=frame.x(0), x2=frame.x(1), y1=y, y2=y)
        yield tag("text", spell(tick), class_="tick", x=f"{LEFT - 1}%", y=y + 4, text_anchor="end")


def below(frame: Frame, places: Sequence[tuple[float, str]], title: str) -> Iterator[Html]:
    """Texts under the field, at places from 0 to 1, and what they are."""
    for share, text in places:
        yield tag("text", text, class_="tick", x=frame.x(share), y=TOP + frame.height + 17, text_anchor="middle")
    yield tag("text", title, class_="axis", x=frame.x(0.5), y=TOP + frame.height + 33, text_anchor="middle")


def line(frame: Frame, points: Sequence[tuple[float, float]], kind: str) -> Iterator[Html]:
    """From point to point: (place from 0 to 1, value)."""
    for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False):
        yield tag("line", class_=kind, x1=frame.x(x1), y1=frame.y(y1), x2=frame.x(x2), y2=frame.y(y2))


SHAPES: dict[str, dict[str, Any]] = {  # of points, so that colour is not all that tells them apart; paths around 0,0
    "circle": {"d": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z"},
    "square": {"d": "M-4-4h8v8h-8z"},
    "diamond": {"d": "M0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z"},
    "ring": {"d": "M-9 0a9 9 0 1 0 18 0a9 9 0 1 0-18 0z"},
}


def point(frame: Frame, share: float, value: float, kind: str, shape: str = "circle", said: Piece = None) -> Html:
    """A mark at a place from 0 to 1. said: what it tells when one points at it."""
    mark = tag("path", None if said is None else tag("title", said), class_=kind, **SHAPES[shape])
    return tag("svg", mark, x=frame.x(share), y=frame.y(value), overflow="visible", width=1, height=1)


def every(count: int, most: int = 12) -> range:
    """Which of many ticks are written: at most so many."""
    return range(0, count, max(1, math.ceil(count / most)))
