"""The plan that a search usually ends with, made without data and without weights: what an estimate assumes.

FLOPs follow from the ratio. What data decides is which units go, and how much of the reduction tokens bring. Here the units of
a part lose in value evenly, and tokens bring the share that the descent of the method begins with. Plans in which tokens bring
hardly any of the reduction, or nearly all of it, say how far the sizes of a real run can be from that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine import allocation, flops
from ..engine.allocation import Cut
from ..engine.methods import METHODS
from ..engine.scoring import Key
from ..errors import DeadEnd
from ..models.dense import Dense
from ..models.described import Described
from ..options import ResolvedOptions
from ..plan import Plan
from .reach import nearest_in_reach, out_of_reach
from .run import space_of, streams_of
from .uniform_plans import uniform_plans

LEAST, MOST = 0.2, 0.8  # shares of the reduction that tokens brought in nearly all searches so far


@dataclass(frozen=True)
class Assumed:
    """plan: taken for that of the run. others: of the same ratio, between which its sizes are. words: how they were made; None
    where the plan is that of the run."""

    plan: Plan
    others: tuple[Plan, ...]
    words: str | None


def assumed(dense: Dense | Described, options: ResolvedOptions) -> Assumed:
    """Of a model whose modes are those that were asked for. Raises DeadEnd where no plan of the ratio was found."""
    method, ratio = METHODS[options.method], options.ratio
    space = space_of(dense, options, prices_without_data(dense))
    if options.uniform:
        plans = [plan for _, plan in uniform_plans(dense, space, ratio)]
        words = f"the middle one of {len(plans)} uniform plans of the ratio; the run compares them"
        return Assumed(plans[len(plans) // 2], tuple(plans), words)
    images = streams_of(dense, space.leaving, short=True) if method.removes("tokens") else {}
    if method.only_tokens:
        plan = _by_tokens(space, images, ratio)
        if plan is None:
            raise _unreachable(space, images, ratio)
        return Assumed(plan, (), "image tokens alone, all in one place")
    middle, words = 0.0, "parameters alone"
    few: tuple[float, ...] = (0.0,)
    most: tuple[float, ...] = (0.0,)
    if images:
        middle = allocation.START if method.phases is None else (1 - math.sqrt(1 - ratio)) / ratio
        few, most = ((0.0, LEAST), (MOST,)) if method.phases is None else ((middle,), (middle,))
        words = f"{100 * middle:.0f} % of the reduction by image tokens where they reach it"
    plan, *_ = _of_shares(space, images, (middle, *allocation.LARGE, LEAST, 0.0), ratio)
    others = []
    for shares, by_weights in ((few, 0.0), (most, 1.0)):
        extreme = replace(space, prices=prices_without_data(dense, by_weights))
        others += [found for share in shares if (found := next(_plans(extreme, images, share, ratio), None)) is not None]
    return Assumed(
        plan, tuple(others), f"{words}; the units of a part of even value, which loses as much by FLOPs as by weights"
    )


def prices_without_data(dense: Dense | Described, by_weights: float = 0.5) -> dict[Key, Tensor]:
    """A price of every unit, (units,), rising evenly in a part. Between parts by the (geometric) mean of two extremes: as many
    FLOPs cost as much everywhere, at 0, and as many weights do, at 1. Prices with data usually lie between these."""
    found = {}
    for row in flops.count(dense.plan, dense.reference).layers:
        layer = dense.plan.tower(row.tower).layers[row.layer]
        for part, whole in row.parts.items():
            width, sizes = len(layer.parts[part].units), dense.reference.sizes[row.tower, part]
            weights = sum(outputs * inputs for outputs, inputs in sizes.rows) + math.prod(sizes.column)
            found[row.tower, row.layer, part] = (
                (torch.arange(width) + 0.5) / width * (whole / width) ** (1 - by_weights) * weights**by_weights
            )
    return found


def _of_shares(space: allocation.Space, images: allocation.Streams, shares: tuple[float, ...], ratio: float) -> list[Plan]:
    """Plans of the ratio whose image tokens bring these shares of it, where they reach it, in the order of the shares. Raises
    DeadEnd where none does."""
    found = [plan for share in shares if (plan := next(_plans(space, images, share, ratio), None)) is not None]
    if not found:
        raise _unreachable(space, images, ratio)
    return found


def _plans(space: allocation.Space, images: allocation.Streams, share: float, ratio: float) -> Iterator[Plan]:
    """With tokens of the largest stream going in the places where the descent begins, the deepest first."""
    if not share or not images:
        places: list[dict[str, Cut]] = [{}]
    else:
        stream, (layers, depths) = next(iter(images.items()))
        places = [{stream: Cut(min(round(depth * layers), layers - 1), share)} for depth in reversed(depths)]
    for cuts in places:
        if (plan := space.candidate(ratio, cuts)) is not None:
            yield plan


def _unreachable(space: allocation.Space, images: allocation.Streams, ratio: float) -> DeadEnd:
    works, reached = nearest_in_reach(ratio, space, images, allocation.STEPS)
    return out_of_reach(ratio, reached, works)


def _by_tokens(space: allocation.Space, images: allocation.Streams, ratio: float) -> Plan | None:
    for stream in images:
        return space.cut_tokens(space.dense, stream, 0, space.total * (1 - ratio))
    return None
