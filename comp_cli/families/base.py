"""What a family file describes. Data only: engine, export and bench read it, none of them knows a family."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..topology import Topology


@dataclass(frozen=True)
class Attention:
    """Where the parts of an attention are, as paths inside a layer.

    `qkv` names the projections inside `module`: one name where they are fused into one matrix, else query, key, value.
    """

    module: str
    qkv: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class Tower:
    """One stack of layers."""

    name: str  # "vision", "language", or "answer" for what decodes where "language" encodes
    config: str  # attribute of the model's config with hidden_size, num_attention_heads, ...; "" for the config itself
    encoder: str  # path of the module that runs the layers
    layers: str  # name of the list of layers in it
    order: str  # "pre_norm" or "post_norm", see modeling_comp.LAYERS
    attention: Attention
    ffn: tuple[str, str]  # paths of the first and second matrix inside a layer
    cross: Attention | None = None  # attention to the tokens that another tower hands out
    reads: str = "vision"  # that tower
    tokens: bool = True  # whether tokens may go; not where a text is generated, for every one is predicted from
    protected: tuple[str, ...] = ()  # tokens that always stay: "first", "last" (behind it is padding), "end" (padding or not)
    class_token: str | None = "first"  # where the token is that the model reads: "first", "last", or None for all alike
    causal: bool = False  # a token sees those before it only
    text_end: str | None = None  # path of the text model that is read at the end-of-text token; None where none is
    score_rule: str = "attention"  # how tokens are ranked, see modeling_comp.TOKEN_RULES
    fuse: bool = False  # whether tokens that go by this rule stay as one; for towers whose tokens nothing else reads

    def layout(self) -> dict[str, Any]:
        """The part of the description that the runtime needs; goes into config.json."""
        names = ("encoder", "layers", "order", "attention", "cross", "ffn", "protected", "causal", "text_end")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class Family:
    """A group of architectures that are built alike, for tasks that go through the same parts of them."""

    name: str
    model_type: str  # what transformers calls the kind in config.json
    architectures: dict[str, tuple[str, ...]]  # transformers class -> its tasks (see tasks.TASKS), the usual one first
    towers: tuple[Tower, ...]
    topology: Topology  # the shape of the model, and what it can do
    # Matmuls outside the towers: path -> "patches", "once", or the tower of which every token goes through.
    fixed: dict[str, str] = field(default_factory=dict)
    pooling: str | None = None  # path of an attention pooling head over the image tokens; never pruned

    def sections(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """The parts of a whole config.json that describe the towers, by their names."""
        return {tower.name: config[tower.config] if tower.config else config for tower in self.towers}

    def tower(self, name: str) -> Tower:
        return next(tower for tower in self.towers if tower.name == name)
