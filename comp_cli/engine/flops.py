"""FLOPs of a plan, counted by formula: 2 x multiply-accumulates of matmuls and convolutions, for one sample.

Counted at the reference input: the model's own image size, and as many text tokens as the caller says. Scoring tokens
where they are pruned costs FLOPs as well and is counted. Of a decoder that writes behind an image and a text: the prompt, with
logits of its last token; all pairs of tokens count, also those that a causal mask hides. What it costs to choose the image
tokens that stay is not counted there: a query row, or distances between features (under a hundredth of the tower).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..families import Family, Tower, tower_config
from ..plan import LayerPlan, Plan, StreamPlan, TowerPlan
from .description_check import Shape, matching
from .parts import PartSizes, matrices_of, part_sizes


@dataclass(frozen=True)
class Reference:
    """The reference input of a model, and the sizes that a plan does not hold."""

    family: Family
    tokens: dict[str, int]  # stream -> tokens that enter its tower
    sizes: dict[tuple[str, str], PartSizes]  # (tower, part) -> sizes of its matrices
    fixed: int  # FLOPs outside the towers that no text makes more: patch embedding, heads
    outside: dict[str, int] = field(default_factory=dict)  # tower -> FLOPs of each token that enters it, outside its layers
    whole: dict[str, int] = field(default_factory=dict)  # tower -> FLOPs of a token in each layer's matrices that all stay
    behind: dict[str, int] = field(default_factory=dict)  # stream -> FLOPs of each token that its tower hands out, outside it
    pairs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # see Topology.pairs
    step: int = 0  # FLOPs outside the layers of a token that is written

    def entering(self, tower: Tower) -> int:
        """Tokens of all streams that enter a tower."""
        return sum(self.tokens[stream.name] for stream in tower.streams)

    def with_texts(self, tokens: Mapping[str, int]) -> "Reference":
        """The same image with texts of other lengths. tokens: stream -> tokens, of streams of texts and answers."""
        return replace(self, tokens=self.tokens | dict(tokens))


@dataclass(frozen=True)
class LayerFlops:
    tower: str
    layer: int
    parts: dict[str, int]  # part -> FLOPs
    whole: int  # FLOPs of what no plan prunes
    entering: dict[str, int]  # stream -> tokens
    handed_on: dict[str, int]  # stream -> tokens that the attention hands on

    @property
    def tokens_in(self) -> int:
        return sum(self.entering.values())

    @property
    def tokens_out(self) -> int:
        return sum(self.handed_on.values())

    @property
    def total(self) -> int:
        return self.whole + sum(self.parts.values())


@dataclass(frozen=True)
class Flops:
    layers: tuple[LayerFlops, ...]
    fixed: int

    @property
    def total(self) -> int:
        return self.fixed + sum(layer.total for layer in self.layers)

    def tower(self, name: str) -> int:
        return sum(layer.total for layer in self.layers if layer.tower == name)

    def part(self, tower: str, part: str) -> int:
        """FLOPs of one part of a tower."""
        return sum(layer.parts[part] for layer in self.layers if layer.tower == tower)


def reference(config: dict[str, Any], family: Family, shapes: Mapping[str, Shape], text_tokens: int) -> Reference:
    """The reference input from config.json and the shapes of the weights.

    Raises RefusedError where the family's description does not fit the shapes, see `part_sizes`.
    """
    sizes = part_sizes(config, family, shapes)
    tokens = family.topology.lengths(family, config, text_tokens)
    topology = family.topology
    times = topology.uses(family, config, tokens)
    fixed, outside = topology.fixed_flops(shapes, times), dict.fromkeys((tower.name for tower in family.towers), 0)
    for path, often in family.fixed.items():
        each = sum(2 * math.prod(shapes[name]) for name in matching(path, shapes))
        if often in times:
            fixed += each * times[often]
        else:
            outside[often] += each
    behind = {}
    if family.pooling:  # one query; its keys and values are made of every token
        name, images = _images(family)
        own = tower_config(config, images)
        width, square = own["hidden_size"], 2 * own["hidden_size"] ** 2
        fixed += 2 * square + 4 * width * own["intermediate_size"]
        behind[name] = 2 * square + 4 * width
    whole = {tower.name: _whole(tower, shapes) for tower in family.towers if tower.whole}
    pairs, step = topology.pairs(family, config), topology.step_flops(shapes)
    return Reference(family, tokens, sizes, fixed, outside, whole, behind, pairs, step)


def _images(family: Family) -> tuple[str, Tower]:
    """The first stream of image tokens, and its tower."""
    return next((name, tower) for name, (tower, stream) in family.streams.items() if stream.source == "image")


def _whole(tower: Tower, shapes: Mapping[str, Shape]) -> int:
    """FLOPs of a token in the matrices of a layer that all stay."""
    inside = tuple(f"{path}." for path in tower.whole)
    return sum(2 * math.prod(shape) for name, shape in matrices_of(shapes, tower, 0).items() if name.startswith(inside))


def count(plan: Plan, ref: Reference) -> Flops:
    """FLOPs of every layer of a plan at the reference input."""
    rows = []
    handed_out: dict[str, int] = {}  # stream -> tokens that its tower hands out
    for planned in plan.towers:
        tower = ref.family.tower(planned.name)
        tokens = {stream.name: ref.tokens[stream.name] for stream in tower.streams}
        for index, layer in enumerate(planned.layers):
            tokens = tokens | _left(plan, tower, index, ref)  # another dict: rows hold those before
            rows.append(_layer(planned, tower, index, layer, tokens, handed_out, ref))
            tokens = rows[-1].handed_on
        handed_out |= tokens
    outside = sum(each * ref.entering(ref.family.tower(tower)) for tower, each in ref.outside.items())
    behind = sum(each * handed_out[stream] for stream, each in ref.behind.items())
    return Flops(tuple(rows), ref.fixed + outside + behind)


def decode_step(plan: Plan, ref: Reference) -> Flops:
    """FLOPs of the first token that is written behind the reference input: one token in every layer, its query against the keys
    that the layer holds and its own. `tokens_in` of a layer: those that it holds. No towers but the one that writes."""
    rows = []
    tower = ref.family.tower(_writing(plan, ref).name)
    for row, layer in zip(_prompt(plan, ref), plan.tower(tower.name).layers, strict=True):
        parts = {}
        for part in tower.parts:
            sizes = ref.sizes[tower.name, part.name]
            outputs, columns = sizes.column
            macs = sum(width * inputs for width, inputs in sizes.rows) + columns * outputs
            if part.is_attention:
                macs += 2 * (row.tokens_in + 1) * columns
            parts[part.name] = 2 * layer.built(part.name) * macs
        rows.append(replace(row, parts=parts))
    return Flops(tuple(rows), ref.step)


def kv_bytes(plan: Plan, ref: Reference, dtype_bytes: int) -> tuple[int, ...]:
    """Bytes of keys and values that each layer of the tower that writes holds behind the reference input, for one sample. Heads
    that queries share are held once."""
    planned = _writing(plan, ref)
    attention = ref.family.tower(planned.name).self_attention
    (_, (keys, _), (values, _)) = ref.sizes[planned.name, attention.name].rows  # of a key-value head: its width
    widths = (layer.built(attention.name) * (keys + values) for layer in planned.layers)
    return tuple(row.tokens_in * width * dtype_bytes for row, width in zip(_prompt(plan, ref), widths, strict=True))


def _writing(plan: Plan, ref: Reference) -> TowerPlan:
    """The tower that writes a text behind what it reads. Raises ValueError for models that have none."""
    found = [tower.name for tower in ref.family.towers if tower.writes]
    if not found:
        raise ValueError(f"{ref.family.name}: no tower that reads a prompt and writes on")
    return plan.tower(found[0])


def _prompt(plan: Plan, ref: Reference) -> list[LayerFlops]:
    """The layers of the tower that writes, while they read the reference input."""
    name = _writing(plan, ref).name
    return [row for row in count(plan, ref).layers if row.tower == name]


def _left(plan: Plan, tower: Tower, index: int, ref: Reference) -> dict[str, int]:
    """Tokens of the streams that a stage before a layer makes fewer. What stands between the rows of an image leaves at the
    first stage."""
    stages = [stage for stage in plan.stages if stage.layer == index]
    kinds = {stream.name: stream.source for stream in tower.streams if tower.writes}
    left = {name: stage.left(ref.tokens[name]) for stage in stages for name, source in kinds.items() if source == "image"}
    return left | {name: 0 for name, source in kinds.items() if stages and source == "newline"}


def _layer(
    planned: TowerPlan,
    tower: Tower,
    index: int,
    layer: LayerPlan,
    entering: dict[str, int],
    handed_out: dict[str, int],
    ref: Reference,
) -> LayerFlops:
    handed_on = {name: min(layer.keep.get(name, number), number) for name, number in entering.items()}
    parts, ranking = {}, tower.self_attention
    own, pruned = sum(entering.values()), sum(handed_on.values())
    for part in tower.parts:
        read = own if part.reads is None else handed_out[part.reads]
        sizes, units = ref.sizes[tower.name, part.name], layer.built(part.name)
        (rows, inputs), *others = sizes.rows
        outputs, columns = sizes.column
        macs = own * (rows * inputs + columns * outputs) + read * sum(rows * inputs for rows, inputs in others)
        if part.is_attention:  # queries with keys, maps with values
            seen = ref.pairs[tower.name][index] if tower.name in ref.pairs and part.reads is None else own * read
            macs += 2 * seen * columns
        if part == ranking:
            voters = (
                _score_rows(planned.streams[stream.name], entering[stream.name] - stream.skips_first)
                for stream in tower.streams
                if stream.name in layer.keep  # also where so few tokens enter that all of them stay
            )
            macs += sum(voters) * own * columns
            own = pruned
        parts[part.name] = 2 * units * macs
    return LayerFlops(tower.name, index, parts, ref.whole.get(tower.name, 0) * pruned, entering, handed_on)


def _score_rows(stream: StreamPlan, most: int) -> int:
    """Query rows behind the token scores."""
    from ..runtime.modeling_comp import TOKEN_RULES  # brings torch; whoever wants a default of this file does not need it

    rows = TOKEN_RULES[stream.score_rule].query_rows
    return min(stream.score_rows or most if rows is None else rows, most)
