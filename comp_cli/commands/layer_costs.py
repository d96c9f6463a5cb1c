"""FLOPs and parameters of a model by tower, layer and part."""

from collections.abc import Mapping

from ..engine import flops
from ..engine.scoring import Key
from ..models.dense import Dense
from ..report.analyze import Cost, LayerCost

PARTS = ("attention", "cross", "ffn")  # columns of the report: names of parts, in families' descriptions


def costs(dense: Dense) -> tuple[Cost, Cost, tuple[LayerCost, ...]]:
    """Parameters and FLOPs of the model and of what lies outside its layers, and those of every layer's attention,
    cross-attention and feed-forward part."""
    counted = flops.count(dense.plan, dense.reference)
    params = dense.part_params(dense.plan)
    layers = layer_costs(counted, params)
    total = dense.params(dense.plan)
    return Cost(total, total - sum(params.values())), Cost(counted.total, counted.fixed), layers


def layer_costs(counted: flops.Flops, params: Mapping[Key, int]) -> tuple[LayerCost, ...]:
    """Those of every layer's parts; what no plan prunes of a layer counts with the last one. params: see `part_params`."""
    return tuple(
        LayerCost(
            row.tower,
            row.layer,
            flops={part: row.parts.get(part, 0) + row.whole * (part == list(row.parts)[-1]) for part in PARTS},
            params={part: params.get((row.tower, row.layer, part), 0) for part in PARTS},
        )
        for row in counted.layers
    )
