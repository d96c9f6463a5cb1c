"""FLOPs of a plan, counted by formula: 2 x multiply-accumulates of matmuls and convolutions, for one sample.

Counted at the reference input: the model's own image size, and as many text tokens as the caller says. Scoring tokens
where they are pruned costs FLOPs as well and is counted.
"""

import math
from dataclasses import dataclass
from typing import Any

from ..families import Family, tower_config
from ..plan import LayerPlan, Plan, TowerPlan

TEXT_TOKENS = 35


@dataclass(frozen=True)
class Reference:
    """The reference input of a model, and the widths that a plan does not hold."""

    tokens: dict[str, int]  # tower -> tokens that enter it
    width: dict[str, int]  # tower -> hidden size
    ffn: dict[str, int]  # tower -> feed-forward channels of the dense model
    class_token: dict[str, bool]  # tower -> whether token 0 is [CLS], which casts no vote on the others
    fixed: int  # FLOPs outside the towers: patch embedding, heads
    reads: dict[str, str]  # tower -> the one whose tokens its cross-attention reads
    whole: tuple[str, ...] = ()  # towers whose tokens all stay
    pooling: tuple[int, int] = (0, 0)  # of an attention pooling head over the image tokens: FLOPs, and those of a token


@dataclass(frozen=True)
class LayerFlops:
    tower: str
    layer: int
    attention: int
    cross: int
    ffn: int
    tokens_in: int
    tokens_out: int

    @property
    def total(self) -> int:
        return self.attention + self.cross + self.ffn


@dataclass(frozen=True)
class Flops:
    layers: tuple[LayerFlops, ...]
    fixed: int

    @property
    def total(self) -> int:
        return self.fixed + sum(layer.total for layer in self.layers)

    def tower(self, name: str) -> int:
        return sum(layer.total for layer in self.layers if layer.tower == name)

    def part(self, name: str, part: str) -> int:
        """FLOPs of one part ("attention", "cross" or "ffn") of a tower."""
        return sum(getattr(layer, part) for layer in self.layers if layer.tower == name)


def reference(config: dict[str, Any], family: Family, shapes: dict[str, tuple[int, ...]], text_tokens: int) -> Reference:
    """The reference input from config.json and the shapes of the weights (which the matmuls outside the towers need)."""
    parts = {tower.name: tower_config(config, tower) for tower in family.towers}
    class_token = {tower.name: "first" in tower.protected for tower in family.towers}
    tokens = family.topology.lengths(family, config, text_tokens)
    times = {"once": 1, "patches": tokens.get("vision", 0) - class_token.get("vision", False)} | tokens
    fixed = sum(2 * math.prod(shapes[f"{path}.weight"]) * times[often] for path, often in family.fixed.items())
    fixed += family.topology.fixed_flops(shapes)
    width = {name: part["hidden_size"] for name, part in parts.items()}
    ffn = {name: part["intermediate_size"] for name, part in parts.items()}
    pooling = (0, 0)
    if family.pooling:  # one query; its keys and values are made of every token
        square = 2 * width["vision"] ** 2
        pooling = (2 * square + 4 * width["vision"] * ffn["vision"], 2 * square + 4 * width["vision"])
    reads = {tower.name: tower.reads for tower in family.towers if tower.cross}
    whole = tuple(tower.name for tower in family.towers if not tower.tokens)
    return Reference(tokens, width, ffn, class_token, fixed, reads, whole, pooling)


def count(plan: Plan, ref: Reference) -> Flops:
    """FLOPs of every layer of a plan at the reference input."""
    rows = []
    handed_on = {}
    for tower in plan.towers:
        tokens, width = ref.tokens[tower.name], ref.width[tower.name]
        for index, layer in enumerate(tower.layers):
            rows.append(_layer(tower, index, layer, tokens, width, handed_on.get(ref.reads.get(tower.name)), ref))
            tokens = rows[-1].tokens_out
        handed_on[tower.name] = tokens
    pooling = ref.pooling[0] + ref.pooling[1] * handed_on.get("vision", 0)
    return Flops(tuple(rows), ref.fixed + pooling)


def _layer(
    tower: TowerPlan, index: int, layer: LayerPlan, tokens: int, width: int, read: int | None, ref: Reference
) -> LayerFlops:
    inner = len(layer.attention.heads) * layer.attention.head_dim
    attention = 2 * tokens * width * inner * 4 + 4 * tokens * tokens * inner
    out = tokens
    if layer.keep is not None and layer.keep < tokens:
        out = layer.keep
        attention += 2 * _score_rows(tower, tokens - ref.class_token[tower.name]) * tokens * inner
    cross = 0
    if layer.cross is not None:
        cross_inner = len(layer.cross.heads) * layer.cross.head_dim
        other = ref.width[ref.reads[tower.name]]
        cross = 4 * out * width * cross_inner + 4 * read * other * cross_inner + 4 * out * read * cross_inner
    return LayerFlops(tower.name, index, attention, cross, 4 * out * width * layer.width, tokens, out)


def _score_rows(tower: TowerPlan, most: int) -> int:
    """Query rows behind the token scores."""
    rows = {"attention": tower.score_rows or most, "cls": 1, "last": 1}
    return min(rows.get(tower.score_rule, 0), most)
