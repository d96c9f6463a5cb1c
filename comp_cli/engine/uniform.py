"""Plans that keep as many units in every layer of a tower, which is all that the config of a stock class can say.

Parameters only. What goes is shared between the key-value heads of the decoder and the feed-forward channels, of which all
towers that are pruned keep the same share. Few such pairs have a ratio, so that they can be compared. Which units go is each
layer's own: its cheapest ones (see statistics.prices).
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..families import Tower
from ..plan import Channels, Plan
from . import flops
from .allocation import Space
from .schedule import TOLERANCE

MOST = 6  # plans that are compared: each is a recovery
Place = tuple[str, str]  # tower, part
Sizes = Mapping[Place, int]  # units that every layer keeps


@dataclass(frozen=True)
class Uniform:
    """The uniform plans of a space, of a decoder that reads images."""

    space: Space

    @property
    def decoder(self) -> Tower:
        return self.space.ref.family.decoder_of_images[1]

    @cached_property
    def widths(self) -> dict[Place, int]:
        """Units of the dense model, of all parts."""
        layers = {tower.name: tower.layers[0] for tower in self.space.dense.towers}
        return {(name, part): len(units.units) for name, layer in layers.items() for part, units in layer.parts.items()}

    @cached_property
    def costs(self) -> dict[Place, int]:
        """FLOPs that a unit of a part has in all layers together."""
        found = dict.fromkeys(self.widths, 0)
        for row in flops.count(self.space.dense, self.space.ref).layers:
            for part, cost in row.parts.items():
                found[row.tower, part] += cost // self.widths[row.tower, part]
        return found

    @property
    def heads(self) -> Place:
        return self.decoder.name, self.decoder.self_attention.name

    @cached_property
    def channels(self) -> tuple[Place, ...]:
        """Feed-forward parts that may lose channels; first the decoder's."""
        towers = sorted(self.space.dense.towers, key=lambda tower: tower.name != self.decoder.name)
        parts = (
            (tower.name, part)
            for tower in towers
            for part, units in tower.layers[0].parts.items()
            if isinstance(units, Channels)
        )
        return tuple((name, part) for name, part in parts if (name, 0, part) not in self.space.stay)

    @property
    def steps(self) -> int:
        """In how many steps the decoder's channels go."""
        return math.ceil(self.widths[self.channels[0]] / self.space.floors.ffn_multiple)

    def sizes(self, groups: int, step: int) -> Sizes:
        """So many key-value heads, and of the channels `step` of `steps`: in every tower the same share."""
        multiple, found = self.space.floors.ffn_multiple, {self.heads: groups}
        for place in self.channels:
            width = self.widths[place]
            least = max(self.space.floors.channels(width), width * step / self.steps)
            found[place] = min(width, math.ceil(least / multiple) * multiple)
        return found

    def flops(self, sizes: Sizes) -> int:
        gone = ((self.widths[place] - count) * self.costs[place] for place, count in sizes.items())
        return self.space.total - sum(gone)

    def of_ratio(self, ratio: float) -> list[Sizes]:
        """All pairs of a ratio, the one with the most heads first: the most channels that the ratio allows."""
        target, found = (1 - ratio) * self.space.total, []
        for groups in range(self.widths[self.heads], 0, -1):
            within = bisect_right(range(1, self.steps + 1), target, key=lambda step: self.flops(self.sizes(groups, step)))
            if not within:
                continue  # too many heads for this ratio
            sizes = self.sizes(groups, within)
            if within == self.steps and self.flops(sizes) < target - TOLERANCE * self.space.total:
                break  # with all channels less is left than should be, and fewer heads leave still less
            found.append(sizes)
        return found

    @property
    def most(self) -> float:
        """The largest ratio."""
        return 1 - self.flops(self.sizes(1, 1)) / self.space.total

    def plan(self, sizes: Sizes) -> Plan:
        """The plan with these sizes, of each layer's dearest units."""
        plan = self.space.dense
        for (name, part), count in sizes.items():
            gone = self.widths[name, part] - count
            for index in range(len(plan.tower(name).layers) if gone else 0):
                plan = self.space.without_cheapest(plan, (name, index, part), gone)
        return plan


def spread(found: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(found) <= most:
        return list(found)
    places: Iterable[int] = (round(number * (len(found) - 1) / (most - 1)) for number in range(most))
    return [found[place] for place in places]
