"""FLOPs and parameters of a model by tower, layer and part."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ..engine import flops
from ..engine.scoring import Key
from ..families import Family
from ..models.dense import Dense
from ..report.analyze import Cost, LayerCost

PARTS = ("attention", "cross", "ffn")  # columns of the report: names of parts, in families' descriptions


def costs(dense: Dense) -> tuple[Cost, Cost, tuple[LayerCost, ...]]:
    """Parameters and FLOPs of the model and of what lies outside its layers, and those of every layer's attention,
    cross-attention and feed-forward part."""
    counted = flops.count(dense.plan, dense.reference)
    params = part_params(dense.state.items(), dense.family)
    layers = layer_costs(counted, params)
    total = dense.params(dense.plan)
    return Cost(total, total - sum(params.values())), Cost(counted.total, counted.fixed), layers


def layer_costs(counted: flops.Flops, params: Mapping[Key, int]) -> tuple[LayerCost, ...]:
    """Those of every layer's parts. params: see `part_params`."""
    return tuple(
        LayerCost(
            row.tower,
            row.layer,
            flops={part: row.parts.get(part, 0) for part in PARTS},
            params={part: params.get((row.tower, row.layer, part), 0) for part in PARTS},
        )
        for row in counted.layers
    )


def part_params(tensors: Iterable[tuple[str, Tensor]], family: Family) -> dict[Key, int]:
    """Parameters of each prunable part, norms counted with the part that they belong to. tensors: names and weights."""
    tensors, found = list(tensors), dict[Key, int]()
    for tower in family.towers:
        root = f"{tower.encoder}.{tower.layers}."
        inside = {_first(part.column): part.name for part in tower.parts if part.is_attention}
        for name, tensor in tensors:
            if not name.startswith(root):
                continue
            index, _, path = name.removeprefix(root).partition(".")
            key = (tower.name, int(index), inside.get(_first(path), tower.parts[-1].name))
            found[key] = found.get(key, 0) + tensor.numel()
    return found


def _first(path: str) -> str:
    """The module right inside a layer that a path goes through."""
    return path.partition(".")[0]
