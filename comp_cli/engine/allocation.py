"""How a FLOPs reduction is shared between tokens and parameters: whole plans of the wanted ratio are compared.

A candidate says where tokens of each stream go, and how much of the reduction they bring. Parameters bring the rest: whatever
costs the least loss per FLOPs, in all towers alike (see statistics.prices). What a candidate loses is measured with all of its
recovery, on pairs that the recovery has not seen. The best candidate is found by descent, from one to its neighbours.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ..plan import Channels, Plan
from . import flops
from .leaving import Leaving
from .schedule import TOLERANCE, Floors
from .scoring import Key
from .stages import out_of_reach

START = 0.5  # the share that the descent begins with
STEPS = (0.15, 0.075)  # in which it goes, first the longer ones
SHARES = (0.05, 0.95)  # the least and the most
LARGE = (0.65, 0.8, SHARES[1])  # that are tried at the first layer where the ratio is out of reach otherwise
LEAST_SHARE = 0.1  # of the FLOPs that a stream must touch to be looked at: each candidate is a recovery
EXPECTED = 16  # candidates that a descent looks at, about
# How deep in a tower descents begin, by what its tokens are made of. Images from two places: the best cut at one layer is often
# better than its neighbours' and still not the best of all.
DEPTHS: dict[str, tuple[float, ...]] = {"image": (0.0, 1 / 6)}
MIDDLE = (1 / 2,)  # for others
FAR = 3  # times what the first descent began with, from where no second one begins: at another layer, with the same share


@dataclass(frozen=True)
class Cut:
    """Where tokens of a stream go: behind the attention of a layer. share: what they bring of the FLOPs that are to go, or of
    those that the stream could bring if these are fewer."""

    layer: int
    share: float


class Judged(NamedTuple):
    """What a plan loses: the mean of both halves of the pairs, or what one of them says of it. halves: that it was judged on.
    first: the loss on the first one."""

    loss: float
    halves: int
    first: float


Cuts = Mapping[str, Cut]  # stream -> its cut; none where no token of it goes
Streams = Mapping[str, tuple[int, Sequence[float]]]  # stream -> layers of its tower, and how deep in it a descent begins


@dataclass(frozen=True)
class Look:
    """A candidate that was looked at. tokens: stream -> the layer behind which, and how many, are kept. judged: distance of the
    features from the dense model's, of pairs that were not recovered on; None where the ratio cannot be reached so. units: of a
    uniform plan, tower and part -> units that every layer keeps."""

    cuts: dict[str, Cut]
    tokens: dict[str, tuple[int, int]]
    ratio: float
    judged: Judged | None
    units: dict[str, int] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """What it loses; None where the ratio cannot be reached so."""
        return None if self.judged is None else self.judged.loss

    def in_words(self) -> str:
        where = [f"{kept} {stream} tokens from layer {layer} on" for stream, (layer, kept) in self.tokens.items()]
        where += [f"{name} {count}" for name, count in self.units.items()]
        if self.loss is None:
            return "out of reach"
        return f"{', '.join(where) or 'all tokens'}: {self.loss:.4f}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"judged": None if self.judged is None else self.judged._asdict()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Look":
        cuts = {stream: Cut(**cut) for stream, cut in found["cuts"].items()}
        tokens = {stream: (layer, kept) for stream, (layer, kept) in found["tokens"].items()}
        known = found.get("judged")
        if (loss := found.get("loss")) is not None:  # plan files of comp 0.5
            known = {"loss": loss, "halves": found.get("halves", 2), "first": loss}
        return cls(cuts, tokens, found["ratio"], None if known is None else Judged(**known), found.get("units", {}))


@dataclass
class AllocationState:
    """How far a search has come, as JSON."""

    plan: Plan
    looks: list[Look] = field(default_factory=list)

    @property
    def leader(self) -> Judged | None:
        """What the plan of the lowest loss so far loses."""
        known = (look.judged for look in self.looks if look.judged is not None)
        return min(known, key=lambda judged: judged.loss, default=None)

    def to_json(self) -> dict[str, Any]:
        return {"looks": [look.to_json() for look in self.looks], "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "AllocationState":
        return cls(Plan.from_json(found["plan"]), [Look.from_json(look) for look in found["looks"]])


@dataclass(frozen=True)
class Space:
    """What plans are made of: the dense plan, prices of its units in the order of their elimination (see statistics.prices),
    what always stays, and for decoders that read images how their tokens leave (None: behind the attention of a layer)."""

    dense: Plan
    ref: flops.Reference
    prices: Mapping[Key, Tensor]
    floors: Floors = Floors()
    stay: frozenset[Key] = frozenset()  # parts that keep all of their units
    leaving: Leaving | None = None

    @cached_property
    def total(self) -> int:
        """FLOPs of the dense model."""
        return flops.count(self.dense, self.ref).total

    def candidate(self, ratio: float, cuts: Cuts) -> Plan | None:
        """The plan of a ratio with these cuts; None where it cannot be reached so."""
        plan = self.nearest(ratio, cuts)
        return plan if plan and abs(1 - flops.count(plan, self.ref).total / self.total - ratio) <= TOLERANCE else None

    def nearest(self, ratio: float, cuts: Cuts) -> Plan | None:
        """The plan with these cuts that comes as near to the ratio as the floors allow; None where these tokens alone are too
        much or cannot go."""
        plan, total = self.dense, self.total
        for stream, cut in cuts.items():
            before = flops.count(plan, self.ref).total
            fewest = next(iter(self.choices(stream)), self.ref.tokens[stream])
            possible = before - flops.count(self.keeping(plan, stream, 0, fewest), self.ref).total
            found = self.cut_tokens(plan, stream, cut.layer, before - cut.share * min(ratio * total, possible))
            if found is None:
                return None
            plan = found
        if flops.count(plan, self.ref).total < total * (1 - ratio):
            return None
        return self.remove_cheapest(plan, total * (1 - ratio))

    def most(self, streams: Iterable[str]) -> float:
        """The largest ratio that a descent over these streams can find."""
        cuts: tuple[Cuts, ...] = ({}, {stream: Cut(0, SHARES[1]) for stream in streams})
        plans = (self.nearest(1.0, each) for each in cuts)
        return 1 - min(flops.count(plan, self.ref).total for plan in plans if plan) / self.total

    def cut_tokens(self, plan: Plan, stream: str, layer: int, target: float) -> Plan | None:
        """Keep as many tokens of a stream behind a layer as the FLOPs allow; None where the floors forbid it, or where it would
        be too few to be worth scoring them."""
        choices = self.choices(stream)
        within = bisect_right(  # FLOPs rise with the tokens
            choices, target, key=lambda tokens: flops.count(self.keeping(plan, stream, layer, tokens), self.ref).total
        )
        return self.keeping(plan, stream, layer, choices[within - 1]) if within else None

    def choices(self, stream: str) -> Sequence[int]:
        """How many tokens of a stream may be kept where some leave, rising."""
        least, most = self.floors.tokens, math.floor(self.ref.tokens[stream] * (1 - self.floors.least_drop))
        found = range(least, most + 1)
        return found if self.leaving is None else [tokens for tokens in found if tokens in self.leaving.possible]

    def keeping(self, plan: Plan, stream: str, layer: int, tokens: int) -> Plan:
        """The plan with so many tokens of a stream behind a layer."""
        if self.leaving is not None:
            return replace(plan, stages=self.leaving.stages(layer, tokens))
        tower = self.ref.family.streams[stream][0].name
        return plan.with_layer(tower, layer, plan.tower(tower).layers[layer].handing_on(stream, tokens))

    def kept(self, plan: Plan, stream: str, layer: int) -> int:
        """How many tokens of a stream a plan keeps behind a layer where some leave."""
        if self.leaving is not None:
            return plan.stages[0].left(self.ref.tokens[stream])
        return plan.tower(self.ref.family.streams[stream][0].name).layers[layer].keep[stream]

    def ranking_parts(self, plan: Plan) -> set[Key]:
        """The self-attentions that rank tokens. Their heads stay: without them others would be ranked high than the dense model
        ranks (the finding behind CoMP's CIT)."""
        found = set()
        for tower in plan.towers:
            part = self.ref.family.tower(tower.name).self_attention.name
            found |= {(tower.name, index, part) for index, layer in enumerate(tower.layers) if layer.keep}
            if self.ref.family.tower(tower.name).writes:  # a stage asks the layer before it
                found |= {(tower.name, stage.layer - 1, part) for stage in plan.stages if stage.layer}
        return found

    def remove_cheapest(self, plan: Plan, target: float) -> Plan:
        """Remove heads, and channels in groups of `floors.ffn_multiple`, of the lowest price per FLOPs, until the FLOPs are at
        most `target`. The smallest plan where the floors forbid the target."""
        counted, kept = flops.count(plan, self.ref), self.ranking_parts(plan) | self.stay
        left: float = counted.total
        gone: dict[Key, int] = {}
        groups = sorted(
            (price, key, number, size, cost)
            for row in counted.layers
            for key, number, size, price, cost in self._groups(row, plan, kept)
        )
        for _, key, _, size, cost in groups:
            if left <= target:
                break
            left -= cost * size
            gone[key] = gone.get(key, 0) + size
        for key, count in gone.items():
            plan = self.without_cheapest(plan, key, count)
        return plan

    def without_cheapest(self, plan: Plan, key: Key, count: int) -> Plan:
        """The plan without so many units of the lowest price of a part."""
        name, index, part = key
        first = set(self.prices[key].argsort(stable=True)[:count].tolist())
        layer = plan.tower(name).layers[index]
        return plan.with_layer(name, index, layer.keeping(part, [unit for unit in layer.kept(part) if unit not in first]))

    def _groups(self, row: flops.LayerFlops, plan: Plan, kept: set[Key]) -> Iterator[tuple[Key, int, int, float, float]]:
        """Units of a layer that may go, in their order: key, number of the group, units in it, price per FLOPs, FLOPs of a
        unit."""
        for part, units in plan.tower(row.tower).layers[row.layer].parts.items():
            key, width = (row.tower, row.layer, part), len(units.units)
            if key in kept:
                continue
            ordered = self.prices[key].sort(stable=True).values
            cost = row.parts[part] / width
            step, least = 1, 1
            if isinstance(units, Channels):
                step = self.floors.ffn_multiple
                least = min(width, math.ceil(self.floors.channels(width) / step) * step)
            begin = number = 0
            while begin < width - least:
                end = begin + ((width - begin) % step or step)
                yield key, number, end - begin, float(ordered[begin:end].mean()) / cost, cost
                begin, number = end, number + 1


def descend(
    look: Callable[[dict[str, Cut]], Look],
    towers: Streams,
    tell: Callable[[Look], None],
    known: list[Look],
    steps: Sequence[float] = STEPS,
    most: float = math.inf,
) -> Look | None:
    """From no cut at all, stream by stream, from the deepest place first: go on to whichever neighbour loses less, and take the
    best cut if it loses less than none. None begins at a further place that loses more than `FAR` times what the first does.
    Where all of these are out of reach, from the least of the `LARGE` shares that is not; the next stream from the largest.

    towers: stream -> layers of its tower, and how deep in it to begin, once or more; of those whose tokens may go, the ones
    with the most FLOPs first. `known`: what was looked at before a kill. steps: of shares. most: candidates
    of the ratio that are looked at, after which the best of them is taken. None where no candidate reaches the ratio.
    """
    seen: dict[frozenset[tuple[str, Cut]], Look] = {frozenset(found.cuts.items()): found for found in known}

    def at(cuts: dict[str, Cut]) -> Look:
        key = frozenset(cuts.items())
        if key not in seen and sum(found.loss is not None for found in seen.values()) >= most:
            return Look(cuts, {}, 0.0, None)
        if key not in seen:
            seen[key] = look(cuts)
            tell(seen[key])
        return seen[key]

    def lowest_from(others: dict[str, Cut], stream: str, here: Cut, layers: int) -> Look:
        found = at(others | {stream: here})
        for step in steps:
            while True:
                near = min((at(others | {stream: cut}) for cut in _neighbours(here, layers, step)), key=_loss)
                if _loss(near) >= _loss(found):
                    break
                found, here = near, near.cuts[stream]
        return found

    best = at({})
    for stream, (layers, depths) in towers.items():
        others = dict(best.cuts)
        begins = [Cut(min(round(depth * layers), layers - 1), START) for depth in reversed(depths)]
        for here in begins:
            if _loss(at(others | {stream: here})) <= FAR * _loss(at(others | {stream: begins[0]})):
                best = min(best, lowest_from(others, stream, here, layers), key=_loss)
        if best.loss is None:
            large = [Cut(0, share) for share in LARGE]
            here = next((cut for cut in large if at(others | {stream: cut}).loss is not None), large[-1])
            best = lowest_from(others, stream, here, layers)
    return None if best.loss is None else best


def unseen(space: Space, ratio: float, towers: Mapping[str, tuple[int, Sequence[float]]]) -> Plan:
    """The plan that a descent begins with, where none is compared: tokens of the first stream go in the deepest of the places,
    and bring half of the reduction, or what the ratio needs. towers: as in `descend`. Raises DeadEnd where none reaches it."""
    cuts: list[Cuts] = []
    for stream, (layers, depths) in towers.items():
        here = min(round(depths[-1] * layers), layers - 1)
        cuts += [{stream: Cut(here, START)}, *({stream: Cut(0, share)} for share in LARGE)]
    plans = (space.candidate(ratio, each) for each in (*cuts, {}))
    found = next((plan for plan in plans if plan is not None), None)
    if found is None:
        raise out_of_reach(ratio, space.most(towers))
    return found


def _loss(look: Look) -> float:
    return math.inf if look.loss is None else look.loss


def _neighbours(cut: Cut, layers: int, step: float) -> Iterator[Cut]:
    """A share more or less; with the first step a layer further or back."""
    low, high = SHARES
    yield from (Cut(cut.layer, round(min(max(share, low), high), 3)) for share in (cut.share - step, cut.share + step))
    if step == STEPS[0]:
        yield from (Cut(layer, cut.share) for layer in (cut.layer - 1, cut.layer + 1) if 0 <= layer < layers)
