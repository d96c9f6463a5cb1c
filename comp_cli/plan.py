"""The plan: what a compact model keeps. The only thing that passes between scoring, slicing, loading and exporting."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from .families import Family, tower_config

SCHEMA_VERSION = 1
PADDING = 8  # channels of zeros, see Plan.told_apart


@dataclass(frozen=True)
class AttentionPlan:
    """Kept heads as indices into the dense model. head_dim and scale are stored, never derived."""

    heads: tuple[int, ...]
    head_dim: int
    scale: float


@dataclass(frozen=True)
class LayerPlan:
    attention: AttentionPlan
    cross: AttentionPlan | None
    ffn: tuple[int, ...]  # kept feed-forward channels, indices into the dense model
    keep: int | None = None  # tokens handed on from attention to feed-forward layer; None for all
    padding: int = 0  # channels of zeros behind those that are kept, see Plan.told_apart

    @property
    def width(self) -> int:
        """Channels of the feed-forward layer as it is built and written."""
        return len(self.ffn) + self.padding

    def kept(self, part: str) -> tuple[int, ...]:
        """Kept units of "attention", "cross" (heads) or "ffn" (channels)."""
        return self.ffn if part == "ffn" else getattr(self, part).heads


@dataclass(frozen=True)
class TowerPlan:
    name: str
    layers: tuple[LayerPlan, ...]
    score_rows: int = 0  # query rows behind the token scores; 0 for all
    score_rule: str = "attention"  # see modeling_comp.TOKEN_RULES
    fuse: bool = False  # whether tokens that go stay as one, see modeling_comp.TokenPruning


@dataclass(frozen=True)
class Plan:
    """Towers in the order of the family's description."""

    architecture: str
    towers: tuple[TowerPlan, ...]

    def tower(self, name: str) -> TowerPlan:
        return next(tower for tower in self.towers if tower.name == name)

    def with_tower(self, tower: TowerPlan) -> "Plan":
        return replace(self, towers=tuple(tower if t.name == tower.name else t for t in self.towers))

    def within(self, outer: "Plan") -> "Plan":
        """The same plan for a model that is sliced to `outer` already: kept units as indices into those that `outer` keeps."""

        def attention(part: AttentionPlan | None, before: AttentionPlan | None) -> AttentionPlan | None:
            return part and replace(part, heads=tuple(map(before.heads.index, part.heads)))

        def layer(part: LayerPlan, before: LayerPlan) -> LayerPlan:
            place = {channel: index for index, channel in enumerate(before.ffn)}
            heads = {name: attention(getattr(part, name), getattr(before, name)) for name in ("attention", "cross")}
            return replace(part, ffn=tuple(place[channel] for channel in part.ffn), **heads)

        pairs = zip(self.towers, outer.towers, strict=True)
        return replace(self, towers=tuple(replace(t, layers=tuple(map(layer, t.layers, o.layers))) for t, o in pairs))

    def told_apart(self, dense: "Plan") -> "Plan":
        """The same plan with shapes that no stock class takes, in every tower that drops tokens.

        Where heads or channels went the shapes differ anyway. A tower that loses tokens only has the shapes of the dense one:
        a stock class would load it, and answer as the dense model, without a word. Its first feed-forward layer gets
        channels of zeros: they add exactly nothing, and the stock class refuses the shape.
        """

        def tower(found: TowerPlan, before: TowerPlan) -> TowerPlan:
            sizes = [[_layer_sizes(replace(layer, keep=None)) for layer in part.layers] for part in (found, before)]
            if sizes[0] != sizes[1] or all(layer.keep is None for layer in found.layers):
                return found
            first, *others = found.layers
            return replace(found, layers=(replace(first, padding=PADDING), *others))

        return replace(self, towers=tuple(map(tower, self.towers, dense.towers)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Plan":
        """What `to_json` wrote, also after a way through a JSON file."""

        def attention(part: dict[str, Any] | None) -> AttentionPlan | None:
            return part and AttentionPlan(tuple(part["heads"]), part["head_dim"], part["scale"])

        def layer(part: dict[str, Any]) -> LayerPlan:
            heads = attention(part["attention"]), attention(part["cross"])
            return LayerPlan(*heads, tuple(part["ffn"]), part["keep"], part.get("padding", 0))

        towers = (
            TowerPlan(t["name"], tuple(map(layer, t["layers"])), t["score_rows"], t["score_rule"], t.get("fuse", False))
            for t in found["towers"]
        )
        return cls(found["architecture"], tuple(towers))

    def comp_block(self, family: Family, **facts: Any) -> dict[str, Any]:
        """The block `comp` of config.json: the sizes that the runtime needs, and `facts` about the origin."""
        towers = [
            {
                "layout": family.tower(tower.name).layout(),
                "score_rows": tower.score_rows,
                "score_rule": tower.score_rule,
                "fuse": tower.fuse,
                "layers": [_layer_sizes(layer) for layer in tower.layers],
            }
            for tower in self.towers
        ]
        return {"schema_version": SCHEMA_VERSION, "family": family.name, **facts, "towers": towers}


def _layer_sizes(layer: LayerPlan) -> dict[str, Any]:
    def sizes(attention: AttentionPlan) -> dict[str, Any]:
        return {"num_heads": len(attention.heads), "head_dim": attention.head_dim, "scale": attention.scale}

    cross = {"cross": sizes(layer.cross)} if layer.cross else {}
    return {"attention": sizes(layer.attention), **cross, "ffn": layer.width, "keep": layer.keep}


def dense_plan(config: dict[str, Any], family: Family, architecture: str) -> Plan:
    """The plan that keeps everything. The config is that of a model that was loaded."""
    towers = []
    for tower in family.towers:
        part = tower_config(config, tower)
        width, heads = part["hidden_size"], part["num_attention_heads"]
        attention = AttentionPlan(tuple(range(heads)), width // heads, (width // heads) ** -0.5)
        ffn = tuple(range(part["intermediate_size"]))
        layer = LayerPlan(attention, attention if tower.cross else None, ffn)
        layers = (layer,) * part["num_hidden_layers"]
        towers.append(TowerPlan(tower.name, layers, score_rule=tower.score_rule, fuse=tower.fuse))
    return Plan(architecture, tuple(towers))
