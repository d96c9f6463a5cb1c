"""The plan: what a compact model keeps. Scoring makes it; slicing, loading and exporting read it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .families import Family, Part, Tower, tower_config

SCHEMA_VERSION = 1
PADDING = 8  # channels of zeros, see Plan.told_apart
JSON_PARTS = ("attention", "cross", "ffn")  # parts that every layer of a plan has had in JSON since version 0.1, null for none
Kept = dict[str, Any] | list[int] | None


@dataclass(frozen=True)
class Heads:
    """Kept heads of an attention. head_dim and scale are stored, never derived."""

    units: tuple[int, ...]  # indices into the key-value heads of the dense model
    head_dim: int
    scale: float
    group: int = 1  # query heads of a key-value head

    @property
    def width(self) -> int:
        """Channels of a unit, as the output projection reads them."""
        return self.group * self.head_dim

    def to_json(self) -> Kept:
        group = {"group": self.group} if self.group > 1 else {}
        return {"heads": list(self.units), "head_dim": self.head_dim, "scale": self.scale, **group}


@dataclass(frozen=True)
class Channels:
    """Kept channels of a feed-forward part."""

    units: tuple[int, ...]  # indices into the channels of the dense model
    width: int = field(default=1, init=False)

    def to_json(self) -> Kept:
        return list(self.units)


Units = Heads | Channels


@dataclass(frozen=True)
class LayerPlan:
    parts: Mapping[str, Units]  # name of the part -> its kept units, in the order of the family's description
    keep: Mapping[str, int] = field(default_factory=dict)  # stream -> tokens handed on from attention; all where not named
    padding: int = 0  # channels of zeros behind those that are kept, see Plan.told_apart

    def kept(self, part: str) -> tuple[int, ...]:
        """Kept heads or channels of a part, as indices into the dense model."""
        return self.parts[part].units

    def built(self, part: str) -> int:
        """Units of a part as it is built and written."""
        units = self.parts[part]
        return len(units.units) + (self.padding if isinstance(units, Channels) else 0)

    def keeping(self, part: str, units: Sequence[int]) -> "LayerPlan":
        """The layer with other kept units of a part."""
        return replace(self, parts={**self.parts, part: replace(self.parts[part], units=tuple(units))})

    def handing_on(self, stream: str, tokens: int | None) -> "LayerPlan":
        """The layer with another number of kept tokens of a stream, None for all."""
        others = {name: count for name, count in self.keep.items() if name != stream}
        return replace(self, keep=others if tokens is None else {**others, stream: tokens})


@dataclass(frozen=True)
class StreamPlan:
    """How the tokens of a stream are ranked."""

    score_rows: int = 0  # query rows behind the token scores; 0 for all
    score_rule: str = "attention"  # see modeling_comp.TOKEN_RULES
    fuse: bool = False  # whether tokens that go stay as one, see modeling_comp.TokenPruning


@dataclass(frozen=True)
class TokenStage:
    """Where image tokens leave a decoder: before one of its layers, the same for the prompt of every question.

    keep: image tokens of each image that stay. share: the same as a share of those that the image had at first, for models
    whose images are of several sizes. One of the two is None.
    """

    layer: int
    rule: str  # see runtime/token_rules.py, STAGE_RULES
    keep: int | None = None
    share: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the rule needs to know besides, see there

    def left(self, tokens: int) -> int:
        """How many of an image's tokens stay, of those that it had at first."""
        return math.ceil(tokens * self.share) if self.share is not None else min(tokens, self.keep or 0)

    def to_json(self) -> dict[str, Any]:
        amount = {"share": self.share} if self.keep is None else {"keep": self.keep}
        return {"layer": self.layer, "rule": self.rule, **amount, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "TokenStage":
        return cls(found["layer"], found["rule"], found.get("keep"), found.get("share"), found["settings"])


@dataclass(frozen=True)
class TowerPlan:
    name: str
    layers: tuple[LayerPlan, ...]
    streams: Mapping[str, StreamPlan]

    def rules(self) -> dict[str, Any]:
        """How tokens are ranked, as JSON: flat where the tower has one stream, which has its name."""
        rules = {name: asdict(stream) for name, stream in self.streams.items()}
        return rules[self.name] if set(rules) == {self.name} else {"streams": rules}

    def keep(self, layer: LayerPlan) -> int | dict[str, int] | None:
        """How many tokens a layer hands on, as JSON: a number where the tower has one stream, None for all."""
        return layer.keep.get(self.name) if set(self.streams) == {self.name} else dict(layer.keep) or None


@dataclass(frozen=True)
class Plan:
    """Towers in the order of the family's description."""

    architecture: str
    towers: tuple[TowerPlan, ...]
    stages: tuple[TokenStage, ...] = ()  # of a decoder that reads images, in the order of their layers

    @property
    def streams(self) -> dict[str, StreamPlan]:
        return {name: stream for tower in self.towers for name, stream in tower.streams.items()}

    def tower(self, name: str) -> TowerPlan:
        return next(tower for tower in self.towers if tower.name == name)

    def with_tower(self, tower: TowerPlan) -> "Plan":
        return replace(self, towers=tuple(tower if t.name == tower.name else t for t in self.towers))

    def with_layer(self, tower: str, index: int, layer: LayerPlan) -> "Plan":
        """The same plan with another layer."""
        own = self.tower(tower)
        return self.with_tower(replace(own, layers=(*own.layers[:index], layer, *own.layers[index + 1 :])))

    def with_streams(self, changed: Mapping[str, StreamPlan]) -> "Plan":
        """The same plan, tokens of some streams ranked in another way."""
        towers = (
            replace(tower, streams={name: changed.get(name, stream) for name, stream in tower.streams.items()})
            for tower in self.towers
        )
        return replace(self, towers=tuple(towers))

    def with_keeps_of(self, other: "Plan") -> "Plan":
        """The same heads and channels, with the tokens that another plan keeps."""

        def tower(own: TowerPlan, theirs: TowerPlan) -> TowerPlan:
            pairs = zip(own.layers, theirs.layers, strict=True)
            return replace(own, layers=tuple(replace(layer, keep=wanted.keep) for layer, wanted in pairs))

        return replace(self, towers=tuple(map(tower, self.towers, other.towers)))

    def within(self, outer: "Plan") -> "Plan":
        """The same plan for a model that is sliced to `outer` already: kept units as indices into those that `outer` keeps."""

        def layer(own: LayerPlan, before: LayerPlan) -> LayerPlan:
            for part in own.parts:
                place = {unit: index for index, unit in enumerate(before.kept(part))}
                own = own.keeping(part, [place[unit] for unit in own.kept(part)])
            return own

        pairs = zip(self.towers, outer.towers, strict=True)
        return replace(self, towers=tuple(replace(t, layers=tuple(map(layer, t.layers, o.layers))) for t, o in pairs))

    def told_apart(self, dense: "Plan") -> "Plan":
        """The same plan with shapes that no stock class takes, in every tower that drops tokens.

        Where heads or channels went the shapes differ anyway. A tower that loses tokens only has the shapes of the dense one:
        a stock class would load it, and answer as the dense model, without a word. The feed-forward part of its first layer
        gets channels of zeros: they add exactly nothing, and the stock class refuses the shape. A decoder whose image tokens
        leave is one class with its vision tower: there the last tower gets them, where no tower lost anything.
        """
        if self.stages and all(map(_same_sizes, self.towers, dense.towers)):
            return self.with_tower(_widened(self.towers[-1]))

        def tower(found: TowerPlan, before: TowerPlan) -> TowerPlan:
            drops = any(layer.keep for layer in found.layers)
            return _widened(found) if drops and _same_sizes(found, before) else found

        return replace(self, towers=tuple(map(tower, self.towers, dense.towers)))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; version 0.1 wrote the same."""

        def layer(tower: TowerPlan, found: LayerPlan) -> dict[str, Any]:
            parts = dict.fromkeys(JSON_PARTS) | {name: units.to_json() for name, units in found.parts.items()}
            return {**parts, "keep": tower.keep(found), "padding": found.padding}

        towers = (
            {"name": tower.name, "layers": [layer(tower, found) for found in tower.layers], **tower.rules()}
            for tower in self.towers
        )
        return {"architecture": self.architecture, "towers": list(towers), **self._stages()}

    def _stages(self) -> dict[str, Any]:
        return {"token_stages": [stage.to_json() for stage in self.stages]} if self.stages else {}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Plan":
        """What `to_json` wrote, also after a way through a JSON file."""

        def units(kept: dict[str, Any] | list[int]) -> Units:
            if isinstance(kept, dict):
                return Heads(tuple(kept["heads"]), kept["head_dim"], kept["scale"], kept.get("group", 1))
            return Channels(tuple(kept))

        def layer(tower: str, part: dict[str, Any]) -> LayerPlan:
            parts = {name: units(kept) for name, kept in part.items() if name not in ("keep", "padding") and kept is not None}
            keep = part["keep"] or {}
            return LayerPlan(parts, keep if isinstance(keep, dict) else {tower: keep}, part.get("padding", 0))

        def streams(tower: dict[str, Any]) -> dict[str, StreamPlan]:
            rules = tower.get("streams", {tower["name"]: tower})
            return {
                name: StreamPlan(rule["score_rows"], rule["score_rule"], rule.get("fuse", False))
                for name, rule in rules.items()
            }

        towers = (
            TowerPlan(tower["name"], tuple(layer(tower["name"], one) for one in tower["layers"]), streams(tower))
            for tower in found["towers"]
        )
        return cls(found["architecture"], tuple(towers), tuple(map(TokenStage.from_json, found.get("token_stages", ()))))

    @classmethod
    def from_block(cls, block: Mapping[str, Any], dense: "Plan") -> "Plan":
        """The plan of a block `comp` of config.json, which says how many units are left, not which: the first ones stand for
        them. dense: the plan of the dense model."""

        def kept(units: Units, said: Any) -> Units:
            count = said.get("num_key_value_heads", said["num_heads"]) if isinstance(units, Heads) else said
            return replace(units, units=units.units[:count])

        def layer(tower: TowerPlan, before: LayerPlan, said: Mapping[str, Any]) -> LayerPlan:
            parts = {name: kept(units, said[name]) for name, units in before.parts.items()}
            added = (said[name] - len(units.units) for name, units in before.parts.items() if isinstance(units, Channels))
            keep = said["keep"] or {}
            return LayerPlan(parts, keep if isinstance(keep, dict) else {tower.name: keep}, max([0, *added]))

        def tower(before: TowerPlan, said: Mapping[str, Any]) -> TowerPlan:
            pairs = zip(before.layers, said["layers"], strict=True)
            rules = said.get("streams", {before.name: said})
            streams = {
                name: StreamPlan(rule["score_rows"], rule.get("score_rule", "attention"), rule.get("fuse", False))
                for name, rule in rules.items()
            }
            return TowerPlan(before.name, tuple(layer(before, *pair) for pair in pairs), streams)

        towers = tuple(map(tower, dense.towers, block["towers"]))
        return cls(dense.architecture, towers, tuple(map(TokenStage.from_json, block.get("token_stages", ()))))

    def comp_block(self, family: Family, config: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """The block `comp` of config.json: the sizes that the runtime needs, and `facts` about the origin. config: the whole
        config.json of the dense model, defaults filled in."""
        towers = [
            {
                "layout": family.tower(tower.name).layout(),
                **tower.rules(),
                "layers": [{**_part_sizes(layer), "keep": tower.keep(layer)} for layer in tower.layers],
            }
            for tower in self.towers
        ]
        found = family.topology.image_tokens(config)
        images = {"image_tokens": found} if found else {}
        return {"schema_version": SCHEMA_VERSION, "family": family.name, **facts, "towers": towers, **images, **self._stages()}


def _same_sizes(one: TowerPlan, other: TowerPlan) -> bool:
    return [_part_sizes(layer) for layer in one.layers] == [_part_sizes(layer) for layer in other.layers]


def _widened(tower: TowerPlan) -> TowerPlan:
    """With channels of zeros in the first layer."""
    first, *others = tower.layers
    return replace(tower, layers=(replace(first, padding=PADDING), *others))


def _part_sizes(layer: LayerPlan) -> dict[str, Any]:
    """What config.json says of each part of a layer: an attention in words, channels as a number."""

    def sizes(name: str, units: Units) -> dict[str, Any] | int:
        if isinstance(units, Channels):
            return layer.built(name)
        grouped = {"num_key_value_heads": len(units.units)} if units.group > 1 else {}
        return {"num_heads": units.group * len(units.units), **grouped, "head_dim": units.head_dim, "scale": units.scale}

    return {name: sizes(name, units) for name, units in layer.parts.items()}


def dense_plan(config: dict[str, Any], family: Family, architecture: str) -> Plan:
    """The plan that keeps everything. The config is that of a model that was loaded."""
    return Plan(architecture, tuple(_dense_tower(tower_config(config, tower), tower) for tower in family.towers))


def _dense_tower(config: dict[str, Any], tower: Tower) -> TowerPlan:
    parts: dict[str, Units] = {}
    for part in tower.parts:
        every = tuple(range(config[part.units]))
        if not part.is_attention:
            parts[part.name] = Channels(every)
        else:
            head_dim = width_of_head(config, part)
            parts[part.name] = Heads(every, head_dim, head_dim**-0.5, config[part.queries] // len(every))
    streams = {stream.name: StreamPlan(score_rule=stream.rule, fuse=stream.fuse) for stream in tower.streams}
    return TowerPlan(tower.name, (LayerPlan(parts),) * config[tower.depth], streams)


def width_of_head(config: dict[str, Any], part: Part) -> int:
    """Channels of an attention head: an equal share of the hidden size, unless the model reads it from its tower's config."""
    said: int | None = config.get(part.head_dim) if part.head_dim else None
    return said or config["hidden_size"] // config[part.queries]
