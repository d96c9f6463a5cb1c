"""Masks that fade: units that a stage removes leave little by little, while the rest learns to do without them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..families import Family
from ..plan import Plan
from .scoring import layer_parts, tower_layers


@contextmanager
def fading(model: nn.Module, family: Family, before: Plan, after: Plan) -> Iterator[Callable[[float], None]]:
    """While open, the units of `before` that `after` does not keep are multiplied with what the yielded function was last
    called with. The maps of fading heads count as little in the token scores (CIT, Eq. 7)."""
    hooks, faders, attentions = [], [], []
    relative = after.within(before)
    for tower in family.towers:
        kept_layers = relative.tower(tower.name).layers
        for index, (layer, kept) in enumerate(zip(tower_layers(model, tower), kept_layers, strict=True)):
            was = before.tower(tower.name).layers[index]
            for part, path in layer_parts(tower).items():
                linear = layer.get_submodule(path)
                units, left = was.kept(part), kept.kept(part)
                if len(units) == len(left):
                    continue
                stays = torch.zeros(len(units), device=linear.weight.device)
                stays[list(left)] = 1
                mask = torch.ones_like(stays)
                width = linear.in_features // len(units)
                hooks.append(linear.register_forward_pre_hook(_multiply(mask, width)))
                faders.append((mask, stays))
                if part == "attention":
                    attention = layer.get_submodule(tower.attention.module)
                    attention.head_mask = mask
                    attentions.append(attention)

    def fade(alpha: float) -> None:
        for mask, stays in faders:
            mask.copy_(stays + alpha * (1 - stays))

    try:
        yield fade
    finally:
        for hook in hooks:
            hook.remove()
        for attention in attentions:
            attention.head_mask = None


def _multiply(mask: Tensor, width: int) -> Callable:
    return lambda module, args: (args[0] * mask.repeat_interleave(width).to(args[0].dtype),)


def fade_at(step: int, steps: int) -> float:
    """alpha(t) = 1 - sin(pi t / 2I), UPop's clock for each group of units: 1 before step 1, 0 at step I."""
    return 1 - math.sin(math.pi * step / (2 * steps))


def forget_head_masks(model: nn.Module) -> None:
    """The ablation without CIT: fading heads vote on tokens as loudly as ever."""
    for module in model.modules():
        if hasattr(module, "head_mask"):
            module.head_mask = None
