"""What a family file describes. Data only: engine, export and bench read it, none of them knows a family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..topology import Topology


@dataclass(frozen=True)
class Part:
    """A prunable part of a layer: its units are made by the rows of some matrices and read by the columns of one.

    A unit is a feed-forward channel, or a head of an attention. Of grouped-query attention it is a key-value head, which drags
    along the query heads that read it. How many rows and columns a unit has follows from the shapes of the matrices; biases go
    with the rows. Every path is one inside a layer.
    """

    name: str  # also of the part in plans and in config.json
    units: str  # attribute of the tower's config: how many units the dense model has
    rows: tuple[str, ...]  # matrices whose rows make the units; of an attention queries, keys, values, or all three in one
    column: str  # the matrix whose columns read the units
    copies: int = 1  # how often all units stand one behind the other in each of `rows`: 3 in a fused qkv matrix
    queries: str = ""  # of an attention, attribute of the tower's config: how many query heads
    head_dim: str | None = None  # of an attention, attribute of the tower's config: width of a head; None for an equal share
    module: str = ""  # of an attention: the module that holds its matrices
    reads: str | None = None  # of a cross-attention: the stream whose tokens make keys and values
    group: str | None = None  # parts of one group are one parameter mode, over all towers; None for the tower's

    @property
    def is_attention(self) -> bool:
        return bool(self.queries)

    def layout(self) -> dict[str, Any] | tuple[str, ...]:
        """Where the matrices are, for the runtime: config.json has an attention in words, channels as a list of paths."""
        if not self.is_attention:
            return (*self.rows, self.column)
        return {"module": self.module, "qkv": tuple(path[len(self.module) + 1 :] for path in self.rows), "out": self.column}


def attention(
    module: str,
    qkv: tuple[str, ...],
    out: str,
    *,
    name: str = "attention",
    units: str | None = None,
    queries: str = "num_attention_heads",
    head_dim: str | None = None,
    reads: str | None = None,
    group: str | None = None,
) -> Part:
    """An attention with as many key-value heads as query heads, or with fewer (`units="num_key_value_heads"`). queries: what
    the config calls their number.

    qkv: names of the projections inside `module`: one where they are fused into one matrix, else query, key, value. out: path
    inside the layer.
    """
    rows, copies = tuple(f"{module}.{one}" for one in qkv), 3 if len(qkv) == 1 else 1
    return Part(name, units or queries, rows, out, copies, queries, head_dim, module, reads, group)


def feed_forward(*paths: str, name: str = "ffn") -> Part:
    """A feed-forward part: its matrices in the order in which tokens go through them, gate and up before down."""
    return Part(name, "intermediate_size", rows=paths[:-1], column=paths[-1])


@dataclass(frozen=True)
class Stream:
    """Tokens of one kind in a tower. The tower's only stream has its name."""

    name: str
    source: str  # what the tokens are made of: "image", "text", "answer" for a text that is predicted, or "newline" for what
    # stands between the rows of an image
    prunable: bool = True  # not where a text is generated, for every token is predicted from
    protected: tuple[str, ...] = ()  # tokens that always stay: "first", "last" (behind it is padding), "end" (padding or not)
    class_token: str | None = "first"  # where the token is that the model reads: "first", "last", or None for all alike
    rule: str = "attention"  # how tokens are ranked, see modeling_comp.TOKEN_RULES
    fuse: bool = False  # whether tokens that go by this rule stay as one; for streams whose tokens nothing else reads

    @property
    def skips_first(self) -> bool:
        """Whether the first token casts no vote on the others."""
        return "first" in self.protected


@dataclass(frozen=True)
class Mode:
    """What a stage of the search removes: units of parts of some towers, or tokens of a stream."""

    name: str
    parts: tuple[tuple[str, str], ...] = ()  # (tower, part)
    stream: str | None = None
    unasked: bool = True  # whether it is on where nobody names modes

    @property
    def kind(self) -> str:
        return "tokens" if self.stream else "parameters"


@dataclass(frozen=True)
class Tower:
    """One stack of layers."""

    name: str  # "vision", "language", or "answer" for what decodes where "language" encodes
    config: str  # attribute of the model's config with hidden_size, num_attention_heads, ...; "" for the config itself
    encoder: str  # path of the module that runs the layers
    layers: str  # name of the list of layers in it
    order: str  # "pre_norm" or "post_norm", see modeling_comp.LAYERS; "stock" where layers run as they are with other matrices
    parts: tuple[Part, ...]  # in the order in which tokens go through them
    streams: tuple[Stream, ...]
    depth: str = "num_hidden_layers"  # attribute of the tower's config: how many layers
    causal: bool = False  # a token sees those before it only
    text_end: str | None = None  # path of the text model that is read at the end-of-text token; None where none is
    group: str | None = None  # see Part.group; None for the tower's name
    norms: tuple[str, str] | None = None  # of a pre_norm layer, before attention and feed-forward part; None as in a ViT
    mlp: str | None = None  # of a pre_norm layer, the module of the feed-forward part; None as in a ViT
    whole: tuple[str, ...] = ()  # modules of a layer whose matrices stay as they are, and every token goes through: a router
    unused: tuple[str, ...] = ()  # modules of a layer that the model has, and no token goes through
    unasked: bool = True  # whether its parameters are removed where nobody names modes
    # Sizes that its config calls otherwise: name -> attributes whose product it is ("intermediate_size": a width and a ratio).
    sizes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def section(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a whole config.json that describes the tower, its sizes under the names that descriptions use."""
        own = dict(config[self.config] if self.config else config)
        return own | {name: math.prod(own[factor] for factor in factors) for name, factors in self.sizes}

    @property
    def writes(self) -> bool:
        """Whether it is a decoder that reads a prompt and writes on, in stock layers."""
        return self.order == "stock" and self.causal

    @property
    def self_attention(self) -> Part:
        """The attention that ranks tokens; what it does not rank high goes between it and the parts behind it."""
        return next(part for part in self.parts if part.is_attention and part.reads is None)

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def layout(self) -> dict[str, Any]:
        """The part of the description that the runtime needs; goes into config.json."""
        protected: Any = {stream.name: stream.protected for stream in self.streams}
        if len(self.streams) == 1:
            protected = self.streams[0].protected
        parts = {part.name: part.layout() for part in self.parts}
        own = {"attention": None, "ffn": None, "cross": None} | parts  # names and order that version 0.1 wrote
        where = {"encoder": self.encoder, "layers": self.layers, "order": self.order}
        others = {name: value for name, value in (("norms", self.norms), ("mlp", self.mlp)) if value is not None}
        return where | own | {"protected": protected, "causal": self.causal, "text_end": self.text_end} | others


@dataclass(frozen=True)
class Family:
    """A group of architectures that are built alike, for tasks that go through the same parts of them."""

    name: str
    model_type: str  # what transformers calls the kind in config.json
    architectures: dict[str, tuple[str, ...]]  # transformers class -> its tasks (see tasks.TASKS), the usual one first
    towers: tuple[Tower, ...]
    topology: Topology  # the shape of the model, and what it can do
    # Matmuls outside the towers: path -> "patches", "once", "features" (what becomes an image token), or the tower of which
    # every token goes through. `*` in a path stands for any number.
    fixed: dict[str, str] = field(default_factory=dict)
    pooling: str | None = None  # path of an attention pooling head over the image tokens; never pruned
    asked: tuple[str, ...] | None = None  # modes that are on; None for those that are unasked
    backbones: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # part of the config -> kinds (model_type) that fit

    def sections(self, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """The parts of a whole config.json that describe the towers, by their names."""
        return {tower.name: tower.section(config) for tower in self.towers}

    def tower(self, name: str) -> Tower:
        return next(tower for tower in self.towers if tower.name == name)

    @property
    def streams(self) -> dict[str, tuple[Tower, Stream]]:
        """Every stream with its tower."""
        return {stream.name: (tower, stream) for tower in self.towers for stream in tower.streams}

    @property
    def decoder_of_images(self) -> tuple[str, Tower]:
        """The stream of image tokens that leave a decoder, and the decoder. Raises ValueError for models that have none."""
        found = [(name, tower) for name, (tower, stream) in self.streams.items() if stream.source == "image" and tower.causal]
        if not found:
            raise ValueError(f"{self.name}: no decoder that reads images")
        return found[0]

    @property
    def modes(self) -> dict[str, Mode]:
        """What is to be removed, one mode at a time: of all modes those that are on."""
        every = self.every_mode
        return {name: mode for name, mode in every.items() if (mode.unasked if self.asked is None else name in self.asked)}

    @property
    def every_mode(self) -> dict[str, Mode]:
        """What can be removed, one mode at a time: parameters of each group, tokens of each stream."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for tower in self.towers:
            for part in tower.parts:
                groups.setdefault(part.group or tower.group or tower.name, []).append((tower.name, part.name))
        unasked = {tower.name: tower.unasked for tower in self.towers}
        parameters = [
            Mode(f"{name}_params", parts=tuple(parts), unasked=all(unasked[tower] for tower, _ in parts))
            for name, parts in groups.items()
        ]
        streams = [Mode(f"{name}_tokens", stream=name) for name, (_, stream) in self.streams.items() if stream.prunable]
        return {mode.name: mode for mode in (*parameters, *streams)}
