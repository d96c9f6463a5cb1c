"""Which units and tokens go: from scores to a plan of the wanted FLOPs.

Every mode has one threshold (CoMP, Eq. 2). For parameters it is a quantile, weighted by FLOPs, of the scores; for tokens
it is a score relative to uniform. `prune_to` raises the thresholds of the chosen modes together until the FLOPs fall to a
target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..plan import LayerPlan, Plan, TowerPlan
from . import flops
from .methods import PARAMETER_MODES, TOKEN_MODES
from .scoring import Key, Scores


@dataclass(frozen=True)
class Floors:
    """What always stays, and how kept numbers are rounded."""

    ffn_multiple: int = 8  # odd widths cost 3 to 8 % in ONNX Runtime
    ffn_share: float = 0.1  # of the dense width
    tokens: int = 5  # [CLS] and four more; text: [CLS], [SEP] and more
    least_drop: float = 0.04  # a layer that would drop a smaller share of its tokens drops none: scoring is not free


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

    Returns the plan nearest above the threshold that suffices, and that threshold; if the floors forbid the target, the
    smallest plan.
    """

    def pruned(threshold: float) -> Plan:
        result = plan
        for mode in modes:
            prune = prune_tokens if mode in TOKEN_MODES else prune_parameters
            result = prune(result, scores, ref, mode, threshold, floors)
        return result

    low, high = 0.0, max(_highest(scores, mode) for mode in modes)
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


def _highest(scores: Scores, mode: str) -> float:
    """A threshold at which everything but the floors goes."""
    if mode in PARAMETER_MODES:
        return 1.0
    found = [t.nan_to_num(0, posinf=0).max().item() for (tower, _), t in scores.tokens.items() if tower == TOKEN_MODES[mode]]
    return max(found) * max(len(found), 1) + 1e-3


def prune_parameters(plan: Plan, scores: Scores, ref: flops.Reference, mode: str, quantile: float, floors: Floors) -> Plan:
    """Remove the units of a mode with the lowest scores, until they hold `quantile` of the mode's FLOPs."""
    names, parts = PARAMETER_MODES[mode]
    towers = [tower for tower in plan.towers if tower.name in names]
    units = _units(plan, towers, scores, ref, parts)
    budget = quantile * sum(unit.cost for unit in units)
    doomed: set[tuple[Key, int]] = set()
    left = {unit.key: 0 for unit in units}
    for unit in units:
        left[unit.key] += 1
    least = {key: _least(ref.ffn[key[0]], key[2], floors) for key in left}
    spent = 0
    for unit in sorted(units, key=lambda unit: (unit.score, unit.key[1:], unit.index, unit.key[0])):
        if spent + unit.cost > budget:
            break
        if left[unit.key] > least[unit.key]:
            left[unit.key] -= 1
            spent += unit.cost
            doomed.add((unit.key, unit.index))
    for tower in towers:
        layers = list(tower.layers)
        for key in (key for key in left if key[0] == tower.name):
            _, index, part = key
            survivors = [i for i in range(len(layers[index].kept(part))) if (key, i) not in doomed]
            if part == "ffn":
                survivors = _rounded(survivors, scores.units[key], least[key], floors.ffn_multiple)
            layers[index] = _keeping(layers[index], part, survivors)
        plan = plan.with_tower(replace(tower, layers=tuple(layers)))
    return plan


def _units(plan: Plan, towers: Sequence[TowerPlan], scores: Scores, ref: flops.Reference, parts: Sequence[str]) -> list[Unit]:
    rows = {(row.tower, row.layer): row for row in flops.count(plan, ref).layers}
    units = []
    for tower in towers:
        for layer, layer_plan in enumerate(tower.layers):
            for part in parts:
                key = (tower.name, layer, part)
                cost = getattr(rows[tower.name, layer], part) // len(layer_plan.kept(part))
                units += [Unit(score, cost, key, i) for i, score in enumerate(scores.units[key].tolist())]
    return units


def _keeping(layer: LayerPlan, part: str, survivors: Sequence[int]) -> LayerPlan:
    """The layer with the units at positions `survivors` of its kept ones."""
    kept = tuple(layer.kept(part)[i] for i in survivors)
    if part == "ffn":
        return replace(layer, ffn=kept)
    return replace(layer, **{part: replace(getattr(layer, part), heads=kept)})


def _least(width: int, part: str, floors: Floors) -> int:
    """Units of a part that stay in every layer. `width`: feed-forward channels of the dense model."""
    return 1 if part != "ffn" else min(width, max(floors.ffn_multiple, math.ceil(floors.ffn_share * width)))


def _rounded(survivors: list[int], scores: torch.Tensor, least: int, multiple: int) -> list[int]:
    """As many channels as the nearest multiple (not under `least`), the best ones, in order. A whole layer stays whole."""
    width = len(scores)
    wanted = max(math.ceil(least / multiple), round(len(survivors) / multiple)) * multiple
    if len(survivors) == width or wanted >= width:
        return list(range(width))
    return sorted(scores.topk(wanted).indices.tolist())


def prune_tokens(plan: Plan, scores: Scores, ref: flops.Reference, mode: str, threshold: float, floors: Floors) -> Plan:
    """Keep in each layer as many tokens as score above its threshold on average over the calibration samples.

    The threshold of a layer is the mode's times the share of layers that a token dropped there saves: a token goes where
    the attention lost buys the most FLOPs.

    The counts are constants of the plan. Tokens are dropped between attention and feed-forward layer, so a layer never
    sees more tokens than the one before it handed on.
    """
    tower = plan.tower(TOKEN_MODES[mode])
    scored = [row.tokens_in for row in flops.count(plan, ref).layers if row.tower == tower.name]
    if scores.tokens[tower.name, 0].shape[1] < ref.tokens[tower.name]:
        return plan  # the calibration pairs are shorter than the reference: what goes would seem to cost nothing
    entering = ref.tokens[tower.name]
    layers = []
    for index, layer in enumerate(tower.layers):
        relative = scores.tokens[tower.name, index]
        valid = (~relative.isnan()).sum(1)
        saved = (len(tower.layers) - index) / len(tower.layers)
        share = float(((relative > threshold * saved).sum(1) / valid).mean())
        before = layer.keep if layer.keep is not None else entering
        keep = max(min(floors.tokens, before), min(math.ceil(share * scored[index]), before, entering))
        if keep > entering * (1 - floors.least_drop):
            keep = layer.keep if layer.keep is not None and layer.keep < entering else None
        layers.append(replace(layer, keep=keep))
        entering = keep if keep is not None else entering
    return plan.with_tower(replace(tower, layers=tuple(layers)))
