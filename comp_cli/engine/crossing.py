"""Where a curve over the ratio falls through zero: by how much a target is still missed, or how much may still be lost.

Curves are measured, so they fall in the trend only. What is kept is a bracket: a ratio that was found above zero, and a larger
one that was found at zero or below. Whatever lies between them, both of its ends are measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass

# ratio -> the ratio of a plan near it, and its value there; None where no plan is near
Curve = Callable[[float], tuple[float, float] | None]
DIGITS = 3  # ratios are numbers that can be typed
CLOSE = 1e-9  # what floating-point numbers make of two ratios that are a tolerance apart


@dataclass(frozen=True)
class Bracket:
    """Two ratios on a curve. above: one of a value > 0. below: a larger one of a value <= 0; None where none was found."""

    above: float
    below: float | None


def crossing(
    curve: Curve, low: float, high: float, tolerance: float, over: float | None = None, under: float | None = None
) -> Bracket:
    """A bracket with no plan between its ends, or no wider than `tolerance`: by false position, and halved where that crawls.

    low: a ratio above zero, which is not asked. high: the largest ratio that is asked, after all others. over, under: values
    at low and high, where they are known: then high is not asked either. Behind a ratio that no plan is near nothing is asked.
    """
    end, below, asked = (high, None, 0) if under is None else (None, high, 0)
    while high - low > tolerance + CLOSE:
        ratio = middle = (low + high) / 2
        if over is not None and under is not None and asked % 3 < 2:
            aimed = low + (high - low) * over / (over - under)
            nudge = tolerance / 2 if asked % 3 == 0 else -tolerance / 2  # so that the bracket closes from both sides
            ratio = min(max(aimed + nudge, low + tolerance / 2), high - tolerance / 2)
        ratio = next(each for each in (round(ratio, DIGITS), middle) if low < each < high)
        found, asked = curve(ratio), asked + 1
        if found is None or not low < found[0] < high:
            high, under = ratio, None
        elif found[1] > 0:
            low, over = found
        else:
            high, under = found
            below = high
    if high == end and low < high and (found := curve(high)) is not None:
        (low, below) = (high, None) if found[1] > 0 else (low, high)
    return Bracket(low, below)


def settle(
    whole: Curve, guide: Curve, low: float, high: float, tolerance: float, over: float, *, least: bool, most: int
) -> Bracket:
    """A bracket of a curve that is dear, with the help of a cheap one that is like it around the ratio where the former was
    asked last.

    least: whether the smallest ratio at or below zero is looked for, or else the largest one above. most: ratios that `whole`
    is asked for. low, high, over: as in `crossing`.
    """
    above, below, under = low, None, None
    for _ in range(most):
        if below is not None and below - above <= tolerance + CLOSE:
            break
        near = crossing(guide, above, high, tolerance, over, under)
        ratio = near.below if least and near.below is not None else near.above
        if below is None and (least or above == low):  # nothing is found so far: one step at least
            ratio = max(ratio, round(min(above + tolerance, high), DIGITS))
        elif (below - ratio if least and below is not None else ratio - above) <= tolerance + CLOSE:
            break
        found = whole(ratio) if ratio > above else None
        if found is None:
            high, under = round(ratio - 10**-DIGITS, DIGITS), None
        elif not above < found[0] < (below or 1):
            break
        elif found[1] > 0:
            above, over = found
        else:
            high, under = found
            below = high
        if high <= above:
            break
    return Bracket(above, below)
