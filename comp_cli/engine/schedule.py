"""Which units and tokens go: from scores to a plan of the wanted FLOPs.

Every mode has one threshold (CoMP, Eq. 2). For parameters it is a quantile, weighted by FLOPs, of the scores; for tokens
it is a score relative to uniform. `prune_to` raises the thresholds of the chosen modes together until the FLOPs fall to a
target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import RefusedError
from ..families import Family, Mode
from ..plan import Channels, Plan
from . import flops
from .scoring import Key, Scores

TOLERANCE = 0.01  # of the FLOPs ratio that is asked for


@dataclass(frozen=True)
class Floors:
    """What always stays, and how kept numbers are rounded."""

    ffn_multiple: int = 8  # odd widths cost 3 to 8 % in ONNX Runtime
    ffn_share: float = 0.1  # of the dense width
    tokens: int = 5  # [CLS] and four more; text: [CLS], [SEP] and more
    least_drop: float = 0.04  # a layer that would drop a smaller share of its tokens drops none: scoring is not free

    @classmethod
    def of(cls, family: Family, plan: Plan) -> "Floors":
        """For a decoder of usual size widths that tensor cores like."""
        decoders = (tower for tower in plan.towers if family.tower(tower.name).writes)
        widest = max((len(units.units) for tower in decoders for units in tower.layers[0].parts.values()), default=0)
        return cls(ffn_multiple=64) if widest >= 2048 else cls()

    def channels(self, width: int) -> int:
        """How many of so many channels of the dense model stay in every layer, before rounding."""
        return min(width, max(self.ffn_multiple, math.ceil(self.ffn_share * width)))


@dataclass(frozen=True)
class Unit:
    score: float
    cost: int  # FLOPs
    key: Key
    index: int  # into the kept heads or channels of the current plan


def prune_to(
    plan: Plan, scores: Scores, ref: flops.Reference, modes: Sequence[str], target: float, floors: Floors
) -> tuple[Plan, float]:
    """Raise the thresholds of `modes` together, by bisection, until the plan's FLOPs are at most `target`.

    modes: names of the family's modes. Returns the plan nearest above the threshold that suffices, and that threshold; if the
    floors forbid the target, the smallest plan.
    """

    def pruned(threshold: float) -> Plan:
        result = plan
        for mode in modes:
            result = prune_mode(result, scores, ref, mode, threshold, floors)
        return result

    low, high = 0.0, max(_highest(scores, ref.family.modes[mode]) for mode in modes)
    if flops.count(plan, ref).total <= target:
        return plan, low
    best = pruned(high)
    if flops.count(best, ref).total > target:
        return best, high
    for _ in range(40):
        middle = (low + high) / 2
        candidate = pruned(middle)
        if flops.count(candidate, ref).total <= target:
            best, high = candidate, middle
        else:
            low = middle
    return best, high


def prune_mode(plan: Plan, scores: Scores, ref: flops.Reference, name: str, threshold: float, floors: Floors) -> Plan:
    """Remove what scores below the threshold of a mode, of those that the family has."""
    mode = ref.family.modes[name]
    if mode.stream is None:
        return prune_parameters(plan, scores, ref, mode.parts, threshold, floors)
    return prune_tokens(plan, scores, ref, mode.stream, threshold, floors)


def _highest(scores: Scores, mode: Mode) -> float:
    """A threshold at which everything but the floors goes. Raises RefusedError for a stream whose tokens were not scored."""
    if mode.stream is None:
        return 1.0
    found = [t.nan_to_num(0, posinf=0).max().item() for (stream, _), t in scores.tokens.items() if stream == mode.stream]
    if not found:
        said = f"{mode.name}: the tokens of {mode.stream} have no scores: its tower has tokens of several streams."
        raise RefusedError(said, hint="Use a method that removes parameters only.")
    return max(found) * len(found) + 1e-3


def prune_parameters(
    plan: Plan, scores: Scores, ref: flops.Reference, parts: Sequence[tuple[str, str]], quantile: float, floors: Floors
) -> Plan:
    """Remove the units of some (tower, part) with the lowest scores, until they hold `quantile` of the FLOPs of all."""
    units = _units(plan, scores, ref, parts)
    budget = quantile * sum(unit.cost for unit in units)
    doomed: set[tuple[Key, int]] = set()
    left = {unit.key: 0 for unit in units}
    for unit in units:
        left[unit.key] += 1
    channels = {name: isinstance(plan.tower(name[0]).layers[0].parts[name[1]], Channels) for name in parts}
    least = {(tower, layer, part): _least(ref, tower, part, channels[tower, part], floors) for tower, layer, part in left}
    spent = 0
    for unit in sorted(units, key=lambda unit: (unit.score, unit.key[1:], unit.index, unit.key[0])):
        if spent + unit.cost > budget:
            break
        if left[unit.key] > least[unit.key]:
            left[unit.key] -= 1
            spent += unit.cost
            doomed.add((unit.key, unit.index))
    for name in dict.fromkeys(tower for tower, _ in parts):
        tower = plan.tower(name)
        layers = list(tower.layers)
        for key in (key for key in left if key[0] == name):
            _, index, part = key
            before = layers[index].kept(part)
            survivors = [i for i in range(len(before)) if (key, i) not in doomed]
            if channels[name, part]:
                survivors = _rounded(survivors, scores.units[key], least[key], floors.ffn_multiple)
            layers[index] = layers[index].keeping(part, [before[i] for i in survivors])
        plan = plan.with_tower(replace(tower, layers=tuple(layers)))
    return plan


def _units(plan: Plan, scores: Scores, ref: flops.Reference, parts: Sequence[tuple[str, str]]) -> list[Unit]:
    units = []
    for row in flops.count(plan, ref).layers:
        for part in (part for tower, part in parts if tower == row.tower):
            key = (row.tower, row.layer, part)
            cost = row.parts[part] // len(plan.tower(row.tower).layers[row.layer].kept(part))
            units += [Unit(score, cost, key, i) for i, score in enumerate(scores.units[key].tolist())]
    return units


def _least(ref: flops.Reference, tower: str, part: str, channels: bool, floors: Floors) -> int:
    """Units of a part that stay in every layer: one head, or a share of the channels of the dense model."""
    return floors.channels(ref.sizes[tower, part].units) if channels else 1


def _rounded(survivors: list[int], scores: torch.Tensor, least: int, multiple: int) -> list[int]:
    """As many channels as the nearest multiple (not under `least`), the best ones, in order. A whole layer stays whole."""
    width = len(scores)
    wanted = max(math.ceil(least / multiple), round(len(survivors) / multiple)) * multiple
    if len(survivors) == width or wanted >= width:
        return list(range(width))
    return sorted(scores.topk(wanted).indices.tolist())


def prune_tokens(plan: Plan, scores: Scores, ref: flops.Reference, stream: str, threshold: float, floors: Floors) -> Plan:
    """Keep in each layer as many tokens of a stream as score above its threshold on average over the calibration samples.

    The threshold of a layer is the mode's times the share of layers that a token dropped there saves: a token goes where
    the attention lost buys the most FLOPs.

    The counts are constants of the plan. Tokens are dropped between attention and feed-forward layer, so a layer never
    sees more tokens than the one before it handed on.
    """
    tower = plan.tower(ref.family.streams[stream][0].name)
    scored = [row.entering[stream] for row in flops.count(plan, ref).layers if row.tower == tower.name]
    if scores.tokens[stream, 0].shape[1] < ref.tokens[stream]:
        return plan  # the calibration pairs are shorter than the reference: what goes would seem to cost nothing
    entering = ref.tokens[stream]
    layers = []
    for index, layer in enumerate(tower.layers):
        relative, kept = scores.tokens[stream, index], layer.keep.get(stream)
        valid = (~relative.isnan()).sum(1)
        saved = (len(tower.layers) - index) / len(tower.layers)
        share = float(((relative > threshold * saved).sum(1) / valid).mean())
        before = entering if kept is None else kept
        keep = max(min(floors.tokens, before), min(math.ceil(share * scored[index]), before, entering))
        if keep > entering * (1 - floors.least_drop):
            keep = entering if kept is None else min(kept, entering)
        layers.append(layer.handing_on(stream, keep if keep < entering else None))
        entering = keep
    return plan.with_tower(replace(tower, layers=tuple(layers)))
