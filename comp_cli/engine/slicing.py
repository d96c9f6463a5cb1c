"""From a plan to smaller tensors. Pure: tensors in, tensors out."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RefusedError
from ..families import Family, Part
from ..plan import Channels, LayerPlan, Plan, Units


def unit_channels(units: Sequence[int], width: int) -> Tensor:
    """Channels that belong to the kept units: (2, 0), width 2 -> [4, 5, 0, 1]."""
    return (torch.tensor(units).unsqueeze(1) * width + torch.arange(width)).flatten()


def copied_channels(units: Sequence[int], width: int, dense_units: int, copies: int) -> Tensor:
    """The same channels in each of the copies of all dense units that stand one behind the other, as in a fused qkv matrix."""
    one = unit_channels(units, width)
    return torch.cat([one + copy * dense_units * width for copy in range(copies)])


def slice_rows(state: dict[str, Tensor], path: str, kept: Tensor) -> None:
    """Keep some outputs of the linear layer at `path`."""
    for name in (f"{path}.weight", f"{path}.bias"):
        if name in state:
            state[name] = state[name].index_select(0, kept.to(state[name].device))


def slice_columns(state: dict[str, Tensor], path: str, kept: Tensor) -> None:
    """Keep some inputs of the linear layer at `path`."""
    weight = state[f"{path}.weight"]
    state[f"{path}.weight"] = weight.index_select(1, kept.to(weight.device))


def slice_part(state: dict[str, Tensor], root: str, part: Part, kept: Units) -> None:
    """Keep some units of the part of the layer at `root`; a part that keeps all stays as it is."""
    dense_units = state[f"{root}.{part.column}.weight"].shape[1] // kept.width
    if len(kept.units) == dense_units:
        return
    check_norms(state, root, part)
    for path in part.rows:
        width = state[f"{root}.{path}.weight"].shape[0] // (dense_units * part.copies)
        slice_rows(state, f"{root}.{path}", copied_channels(kept.units, width, dense_units, part.copies))
    slice_columns(state, f"{root}.{part.column}", unit_channels(kept.units, kept.width))


def check_norms(state: Mapping[str, Tensor], root: str, part: Part) -> None:
    """Raises RefusedError where queries or keys are normalised over all heads together: without some of them, the others would
    be other numbers. A norm of each head by itself is none of those."""
    for path in part.rows if part.is_attention else ():
        norm = state.get(f"{root}.{path.removesuffix('_proj')}_norm.weight")
        if norm is not None and len(norm) == len(state[f"{root}.{path}.weight"]):
            said = f"{root}.{part.module} normalises its heads together ({len(norm)} numbers), so none of them can be removed"
            raise RefusedError(f"{said}.", hint="Name the modes to be used with --modes, without this tower's.")


def layers_of(family: Family, plan: Plan) -> Iterator[tuple[str, Part, LayerPlan]]:
    """Every part of every layer of a plan: path of the layer, description, plan of the layer."""
    for tower_plan in plan.towers:
        tower = family.tower(tower_plan.name)
        for index, layer in enumerate(tower_plan.layers):
            for part in tower.parts:
                yield f"{tower.encoder}.{tower.layers}.{index}", part, layer


def slice_state(state: Mapping[str, Tensor], family: Family, plan: Plan) -> dict[str, Tensor]:
    """The weights of the compact model from those of the dense one. Tensors that keep their size are shared, not copied."""
    sliced = dict(state)
    for root, part, layer in layers_of(family, plan):
        slice_part(sliced, root, part, layer.parts[part.name])
    return padded(sliced, family, plan)


def padded(state: Mapping[str, Tensor], family: Family, plan: Plan) -> dict[str, Tensor]:
    """The weights of a plan's kept units, with the channels of zeros that it has beside them (see Plan.told_apart)."""
    wider = dict(state)
    for root, part, layer in layers_of(family, plan):
        if not layer.padding or not isinstance(layer.parts[part.name], Channels):
            continue
        for path in part.rows:
            for name in (f"{root}.{path}.weight", f"{root}.{path}.bias"):
                if name in wider:
                    wider[name] = torch.cat([pad_rows(copy, layer.padding) for copy in wider[name].chunk(part.copies)])
        column = f"{root}.{part.column}.weight"
        wider[column] = F.pad(wider[column], (0, layer.padding))
    return wider


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """Rows of zeros behind those of a matrix, or zeros behind a vector."""
    return torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])])
