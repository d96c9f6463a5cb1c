"""Where a curve over the ratio falls through zero: by how much a target is still missed, or how much may still be lost.

Curves are measured, so they fall in the trend only. What is kept is a bracket: a ratio that was found above zero, and a larger
one that was found at zero or below. Whatever lies between them, both of its ends are measurements.
"""

from collections.abc import Callable
from dataclasses import dataclass

Curve = Callable[[float], float | None]  # ratio -> its value; None where no plan has the ratio
DIGITS = 3  # ratios are numbers that can be typed
CLOSE = 1e-9  # what floating-point numbers make of two ratios that are a tolerance apart


@dataclass(frozen=True)
class Bracket:
    """Two ratios on a curve. above: one of a value > 0. below: a larger one of a value <= 0; None where none was found."""

    above: float
    below: float | None


def crossing(curve: Curve, low: float, high: float, tolerance: float) -> Bracket:
    """A bracket that is no wider than `tolerance`, by false position, with a halving wherever that crawls.

    low: a ratio above zero, which is not asked. high: the largest ratio that is asked, after all others. A ratio that no plan
    has counts as too large.
    """
    end, over, under, asked = high, None, None, 0  # over, under: values at low and high
    while high - low > tolerance + CLOSE:
        ratio = middle = (low + high) / 2
        if over is not None and under is not None and asked % 3:
            aimed = low + (high - low) * over / (over - under)
            nudge = tolerance / 2 if asked % 3 == 1 else -tolerance / 2  # so that the bracket closes from both sides
            ratio = min(max(aimed + nudge, low + tolerance / 2), high - tolerance / 2)
        ratio = next(each for each in (round(ratio, DIGITS), middle) if low < each < high)
        found, asked = curve(ratio), asked + 1
        if found is not None and found > 0:
            low, over = ratio, found
        else:
            high, under = ratio, found
    if high == end and low < end:
        found = curve(end)
        low, under = (end, None) if found is not None and found > 0 else (low, found)
    return Bracket(low, None if under is None else high)


def settle(whole: Curve, guide: Curve, low: float, high: float, tolerance: float, *, least: bool, most: int) -> Bracket:
    """A bracket of a curve that is dear, with the help of a cheap one that is like it around the ratio where the former was
    asked last.

    least: whether the smallest ratio at or below zero is looked for, or else the largest one above. most: ratios that `whole`
    is asked for. low, high: as in `crossing`.
    """
    above, below = low, None
    for _ in range(most):
        if below is not None and below - above <= tolerance + CLOSE:
            break
        near = crossing(guide, above, high, tolerance)
        ratio = near.below if least and near.below is not None else near.above
        if below is None and (least or above == low):  # nothing is found so far: one step at least
            ratio = max(ratio, round(min(above + tolerance, high), DIGITS))
        elif (below - ratio if least and below is not None else ratio - above) <= tolerance + CLOSE:
            break
        if ratio <= above:
            break
        value = whole(ratio)
        if value is not None and value > 0:
            above = ratio
        elif value is None:
            high = round(ratio - 10**-DIGITS, DIGITS)
        else:
            high = below = ratio
    return Bracket(above, below)
