"""Keys and values that decoders hand from one token to the next: their names in graphs, their sizes, and the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import IDS, Config
from .graph_specs import DECODER, PAST, STATES, Step, Values

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import DynamicCache

    from ..families import Tower


def cached(layers: int, prefix: str, *parts: str) -> tuple[str, ...]:
    """Names of keys and values, layer by layer; parts: "decoder" of the text, "encoder" of what is attended to."""
    return tuple(f"{prefix}.{i}.{part}.{kind}" for i in range(layers) for part in parts for kind in ("key", "value"))


def keys_of(layers: int, prefix: str) -> tuple[str, ...]:
    """The same of a decoder that attends to its own tokens alone."""
    return tuple(f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


def keys_and_values(*caches: DynamicCache) -> list[Tensor]:
    """Of every layer, cache by cache."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return [tensor for parts in layers for layer in parts for tensor in (layer.keys, layer.values)]


def begin(step: Step, input_ids: Any, states: Any) -> Values:
    """Logits (batch, tokens, vocabulary) of the beginnings of texts, and the cache: keys and values of each layer."""
    return step(DECODER, {IDS: input_ids, STATES: states})


def go_on(step: Step, input_ids: Any, cache: Values) -> Values:
    """The same for the tokens that come next; the cache holds those before them."""
    past = {name.replace("present", "past_key_values"): value for name, value in cache.items()}
    return step(PAST, past | {IDS: input_ids})


def heads_of(config: Config, tower: Tower, text: Mapping[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """Heads and their width in self- ("decoder") and cross-attention ("encoder") of each layer of a tower."""
    if "comp" not in config:
        dense = (text["num_attention_heads"], text["hidden_size"] // text["num_attention_heads"])
        return [{"decoder": dense, "encoder": dense}] * text["num_hidden_layers"]
    layers = next(entry["layers"] for entry in config["comp"]["towers"] if entry["layout"]["encoder"] == tower.encoder)
    parts = {"decoder": "attention", "encoder": "cross"}
    return [{name: (layer[kind]["num_heads"], layer[kind]["head_dim"]) for name, kind in parts.items()} for layer in layers]


class Heads(NamedTuple):
    """Of a layer's keys and values."""

    number: int
    width: int


def heads_of_groups(config: Config, tower: Tower, text: Mapping[str, Any]) -> tuple[Heads, ...]:
    """Key-value heads of each layer of a tower of grouped queries."""
    if "comp" not in config:
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        return (Heads(text["num_key_value_heads"], width),) * text["num_hidden_layers"]
    layers = next(entry["layers"] for entry in config["comp"]["towers"] if entry["layout"]["encoder"] == tower.encoder)
    sizes = (layer["attention"] for layer in layers)
    return tuple(Heads(size.get("num_key_value_heads", size["num_heads"]), size["head_dim"]) for size in sizes)
