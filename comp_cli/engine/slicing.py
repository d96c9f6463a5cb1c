"""From a plan to smaller tensors. Pure: tensors in, tensors out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..families import Attention, Family
from ..plan import AttentionPlan, LayerPlan, Plan


def head_channels(heads: Sequence[int], head_dim: int) -> Tensor:
    """Channels that belong to the kept heads: (2, 0), head_dim 2 -> [4, 5, 0, 1]."""
    return (torch.tensor(heads).unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def fused_channels(heads: Sequence[int], head_dim: int, dense_heads: int) -> Tensor:
    """The same channels in each of the three parts of a fused qkv matrix."""
    one = head_channels(heads, head_dim)
    return torch.cat([one + part * dense_heads * head_dim for part in range(3)])


def slice_rows(state: dict[str, Tensor], path: str, kept: Tensor) -> None:
    """Keep some outputs of the linear layer at `path`."""
    for name in (f"{path}.weight", f"{path}.bias"):
        if name in state:
            state[name] = state[name].index_select(0, kept.to(state[name].device))


def slice_columns(state: dict[str, Tensor], path: str, kept: Tensor) -> None:
    """Keep some inputs of the linear layer at `path`."""
    weight = state[f"{path}.weight"]
    state[f"{path}.weight"] = weight.index_select(1, kept.to(weight.device))


def slice_state(state: Mapping[str, Tensor], family: Family, plan: Plan) -> dict[str, Tensor]:
    """The weights of the compact model from those of the dense one. Tensors that keep their size are shared, not copied."""
    sliced = dict(state)
    for tower_plan in plan.towers:
        tower = family.tower(tower_plan.name)
        for index, layer in enumerate(tower_plan.layers):
            root = f"{tower.encoder}.{tower.layers}.{index}"
            _slice_attention(sliced, root, tower.attention, layer.attention)
            if tower.cross:
                _slice_attention(sliced, root, tower.cross, layer.cross)
            _slice_ffn(sliced, root, tower.ffn, layer)
    return padded(sliced, family, plan)


def padded(state: Mapping[str, Tensor], family: Family, plan: Plan) -> dict[str, Tensor]:
    """The weights of a plan's kept units, with the channels of zeros that it has beside them (see Plan.told_apart)."""
    wider = dict(state)
    for tower_plan in plan.towers:
        tower = family.tower(tower_plan.name)
        for index, layer in enumerate(tower_plan.layers):
            first, second = (f"{tower.encoder}.{tower.layers}.{index}.{path}" for path in tower.ffn)
            for name, sides in ((f"{first}.weight", (0, 0, 0, 1)), (f"{first}.bias", (0, 1)), (f"{second}.weight", (0, 1))):
                if layer.padding and name in wider:
                    wider[name] = F.pad(wider[name], [layer.padding * side for side in sides])
    return wider


def _slice_attention(state: dict[str, Tensor], root: str, parts: Attention, plan: AttentionPlan) -> None:
    inner = state[f"{root}.{parts.out}.weight"].shape[1]
    if len(plan.heads) * plan.head_dim == inner:
        return
    channels = head_channels(plan.heads, plan.head_dim)
    rows = channels
    if len(parts.qkv) == 1:
        rows = fused_channels(plan.heads, plan.head_dim, inner // plan.head_dim)
    for name in parts.qkv:
        slice_rows(state, f"{root}.{parts.module}.{name}", rows)
    slice_columns(state, f"{root}.{parts.out}", channels)


def _slice_ffn(state: dict[str, Tensor], root: str, ffn: tuple[str, str], layer: LayerPlan) -> None:
    if len(layer.ffn) == state[f"{root}.{ffn[0]}.weight"].shape[0]:
        return
    kept = torch.tensor(layer.ffn)
    slice_rows(state, f"{root}.{ffn[0]}", kept)
    slice_columns(state, f"{root}.{ffn[1]}", kept)
