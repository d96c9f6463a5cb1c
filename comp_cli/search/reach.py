"""Which ratio can be had where the one that was asked for cannot. What is advised here was tried before."""

from collections.abc import Callable, Sequence

from ..engine import allocation, flops, stages
from ..engine.schedule import TOLERANCE
from ..errors import DeadEnd

TRIES = 40  # hundredths around a ratio
LESS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)  # than where a search ended that each try repeats


def nearest_in_reach(
    ratio: float, space: allocation.Space, streams: allocation.Streams, steps: Sequence[float]
) -> tuple[float | None, float]:
    """The ratio in hundredths, nearest to one out of reach, of which a descent finds a plan, and what this plan has; None and
    the largest ratio of all plans where there is none."""
    most = space.most(streams)
    works = nearest(ratio, lambda each: reached(each, space, streams, steps) is not None, most + TOLERANCE)
    return works, most if works is None else reached(works, space, streams, steps) or most


def reached(ratio: float, space: allocation.Space, streams: allocation.Streams, steps: Sequence[float]) -> float | None:
    """What the first plan has that a descent finds of a ratio; None where it finds none. A descent goes its way by the losses,
    but only once it has found a plan: without losses it finds one exactly where it does with them."""

    def look(cuts: dict[str, allocation.Cut]) -> allocation.Look:
        plan = space.candidate(ratio, cuts)
        if plan is None:
            return allocation.Look(cuts, {}, 0.0, None)
        return allocation.Look(cuts, {}, 1 - flops.count(plan, space.ref).total / space.total, allocation.Judged(0.0, 0, 0.0))

    found = allocation.descend(look, streams, lambda _: None, [], steps, most=1)
    return None if found is None else found.ratio


def nearest(ratio: float, works: Callable[[float], bool], most: float, parts: int = 100) -> float | None:
    """The hundredth (or another part) nearest to a ratio that works, of those up to `most`; None where none of a few does."""
    tried = sorted((each / parts for each in range(1, parts) if each / parts <= most), key=lambda each: abs(each - ratio))
    return next((each for each in tried[:TRIES] if works(each)), None)


def repeated(error: DeadEnd, again: Callable[[float], object]) -> float | None:
    """A ratio with which a search comes to its end, near where one of another ratio ended. again: searches anew, and raises
    DeadEnd where it does not come to its end; None where none of a few does."""
    reached = int(100 * error.reached) / 100
    for ratio in dict.fromkeys(round(reached - less, 2) for less in LESS):
        if ratio < 0.01:
            break
        try:
            again(ratio)
            return ratio
        except DeadEnd:
            continue
    return None


def out_of_reach(ratio: float, reached: float, works: float | None) -> DeadEnd:
    """The error of a ratio. reached: what the nearest plan has. works: the ratio to try."""
    error = stages.out_of_reach(ratio, reached)
    if reached >= stages.NOTHING:
        error.hint = f"Try --ratio {works:g}." if works is not None else "Lower --ratio by more than a little."
    return error
