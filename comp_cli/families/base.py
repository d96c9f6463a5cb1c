"""What a family file describes. Data only: engine, export and bench read it, none of them knows a family."""

from dataclasses import asdict, dataclass, field
from typing import Any


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

    name: str  # "vision" or "language"
    config: str  # attribute of the model's config with hidden_size, num_attention_heads, ...
    encoder: str  # path of the module that runs the layers
    layers: str  # name of the list of layers in it
    order: str  # "pre_norm" or "post_norm", see modeling_comp.LAYERS
    attention: Attention
    ffn: tuple[str, str]  # paths of the first and second matrix inside a layer
    cross: Attention | None = None  # attention to the tokens that the vision tower hands out
    protected: tuple[str, ...] = ()  # tokens that always stay: "first", "last"

    def layout(self) -> dict[str, Any]:
        """The part of the description that the runtime needs; goes into config.json."""
        names = ("encoder", "layers", "order", "attention", "cross", "ffn", "protected")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class Family:
    """A group of architectures that are built alike."""

    name: str
    architectures: dict[str, str]  # transformers class -> task
    towers: tuple[Tower, ...]
    vision: str  # name of the module that encodes images
    image_embeds: str  # what the rest of the model reads of its output
    fixed: dict[str, str] = field(default_factory=dict)  # matmuls outside the towers: path -> "patches" or "once"

    def tower(self, name: str) -> Tower:
        return next(tower for tower in self.towers if tower.name == name)
