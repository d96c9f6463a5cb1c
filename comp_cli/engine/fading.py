"""Masks that fade: units that a stage removes leave little by little, while the rest learns to do without them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..families import Family
from ..plan import Plan
from ..runtime.modeling_comp import CompactAttention
from .scoring import reader_of, tower_layers


@contextmanager
def fading(model: nn.Module, family: Family, before: Plan, after: Plan) -> Iterator[Callable[[float], None]]:
    """While open, the units of `before` that `after` does not keep are multiplied with what the yielded function was last
    called with. The maps of fading heads count as little in the token scores (CIT, Eq. 7)."""
    hooks, faders = [], []
    attentions: list[CompactAttention] = []
    relative = after.within(before)

    def masks(count: int, left: Sequence[int], width: int, linear: nn.Linear) -> Tensor:
        """One number for each of the units, repeated `width` times: ones, of which those that go will fade."""
        stays = torch.zeros(count, device=linear.weight.device)
        stays[list(left)] = 1
        mask, stays = torch.ones_like(stays).repeat_interleave(width), stays.repeat_interleave(width)
        faders.append((mask, stays))
        return mask

    for tower in family.towers:
        planned = before.tower(tower.name).layers, relative.tower(tower.name).layers
        for layer, was, now in zip(tower_layers(model, tower), *planned, strict=True):
            for part in tower.parts:
                linear = reader_of(layer, part)
                units, left = was.parts[part.name], now.kept(part.name)
                count = len(units.units)
                if count == len(left):
                    continue
                mask = masks(count, left, linear.in_features // count, linear)
                hooks.append(linear.register_forward_pre_hook(_multiply(mask)))
                attention = layer.get_submodule(part.module) if part == tower.self_attention else None
                if isinstance(attention, CompactAttention):  # whose heads vote on tokens
                    attention.head_mask = masks(count, left, attention.num_heads // count, linear)
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


def _multiply(mask: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda module, args: (args[0] * mask.to(args[0].dtype),)


def fade_at(step: int, steps: int) -> float:
    """alpha(t) = 1 - sin(pi t / 2I), UPop's clock for each group of units: 1 before step 1, 0 at step I."""
    return 1 - math.sin(math.pi * step / (2 * steps))


def forget_head_masks(model: nn.Module) -> None:
    """The ablation without CIT: fading heads vote on tokens as loudly as ever."""
    for module in model.modules():
        if isinstance(module, CompactAttention):
            module.head_mask = None
