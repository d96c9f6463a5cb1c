"""The decoder of a model that reads images as one graph, for prompts and steps: image tokens leave inside of it.

How many image tokens come in is a shape: all of them in a prompt, none in a step. So nothing in the graph depends on values but
what is gathered, and in a step the rules work on nothing. Keys and values of a layer are of the tokens that are left there.

Prompts are filled up at the left: padding never leaves, and so the first `pads` keys of a sample are padding in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import transformers
from torch import Tensor, nn

from ..runtime.kept_cache import cache_name
from ..runtime.modeling_comp import refuse_unknown
from ..runtime.modeling_comp_vlm import made_by
from ..runtime.token_rules import OF_THE_LAYER_BEFORE, STAGE_RULES, Choice, View, gathered, of_tokens
from ..runtime.token_selection import Heard, Stage, picked, sources_of
from .base import MASK
from .decoder_names import EMBEDS, KEPT, LABELS, POSITIONS, WEIGHTS, WHERE

if TYPE_CHECKING:
    from .decoder_graphs import DecoderGraphs

ATTENTION = "comp_onnx_attention"  # what transformers knows `attention_node` by


def attention_node(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as one node, ONNX's own of opset 23, key-value heads not repeated; an attention function of transformers.

    query (batch, heads, tokens, head_dim); key, value (batch, key-value heads, seen, head_dim); attention_mask (batch or 1, 1,
    tokens, seen), booleans or what is added to logits, None for all -> (batch, tokens, heads, head_dim). Raises TypeError for
    arguments that the node does not carry.
    """
    refuse_unknown(module, kwargs)
    made = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling)[0]
    return made.transpose(1, 2), None


@contextmanager
def attention_nodes(*configs: Any) -> Iterator[None]:
    """Attention of the models of these configs is one node."""
    transformers.AttentionInterface.register(ATTENTION, attention_node)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


class Growing:
    """Keys and values of each layer, (batch, key-value heads, held, head_dim), as a stock layer asks a cache for them."""

    def __init__(self, past: Sequence[Tensor]):
        self.keys, self.values = list(past[::2]), list(past[1::2])

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer] = torch.cat([self.keys[layer], key], 2)
        self.values[layer] = torch.cat([self.values[layer], value], 2)
        return self.keys[layer], self.values[layer]

    @property
    def present(self) -> list[Tensor]:
        return [tensor for pair in zip(self.keys, self.values, strict=True) for tensor in pair]


@dataclass
class ImagesLeft:
    """The image tokens that are left of a pass whose images all have as many.

    columns (batch, images * n): where they are among the tokens that are left. positions (batch * images, n): where they were
    in their image. labels: of the same shape, their clusters, if there are any. square: whether images are squares of tokens.
    """

    columns: Tensor
    positions: Tensor
    square: bool
    labels: Tensor | None = None

    @classmethod
    def of(cls, columns: Tensor, tokens: int, square: bool) -> Self:
        """All of images that have so many tokens each."""
        batch, count = columns.shape
        places = torch.arange(tokens, device=columns.device).expand(count // tokens * batch, -1)
        return cls(columns, places, square)

    @property
    def each(self) -> int:
        """Tokens of an image that are left."""
        return self.positions.shape[1]

    @property
    def samples(self) -> Tensor:
        """(batch * images,): the sample of each image."""
        batch, tokens = self.columns.shape
        return torch.arange(batch, device=self.columns.device)[:, None].expand(-1, tokens // self.each).reshape(-1)

    def view(self, stage: Stage, states: Tensor, heard: Heard | None, pads: Tensor) -> View:
        """What the rule of a stage sees, one row an image. states (batch, left, dim); heard: of the layer before; pads (batch,
        1)."""
        rows, samples, places = self.columns.reshape(-1, self.each), self.samples, self.positions
        view = View(torch.ones_like(places, dtype=torch.bool), of_tokens(states[samples], rows), places, labels=self.labels)
        view.grid = None if self.square else places.new_zeros(places.shape[0], 2)
        needs = stage.needs
        if "keys" in needs and heard is not None:
            keys = heard.heads(heard.key)[samples]
            view.keys = keys.gather(1, rows[:, :, None, None].expand(-1, -1, *keys.shape[2:]))
        if needs & {"last", "attention", "text"}:
            words = self.words(states.shape[1])
            if "last" in needs and heard is not None:
                paid = of_samples(heard, samples).attention_from(words[samples][:, -1:])[:, 0]
                view.last_attention = paid.gather(1, rows)
            if "text" in needs:
                view.text_states = of_tokens(states, words)[samples]
                view.text_valid = (words >= pads)[samples]
            if "attention" in needs and heard is not None:
                paid = of_samples(heard, samples).attention_from(words[samples])
                paid = paid.gather(2, rows[:, None].expand(-1, paid.shape[1], -1))
                assert view.text_valid is not None
                view.text_attention = paid * view.text_valid.unsqueeze(-1)
        return view

    def words(self, left: int) -> Tensor:
        """(batch, left - image tokens): where the other tokens are, in their order, padding in front."""
        flags = torch.zeros(self.columns.shape[0], left, dtype=torch.long, device=self.columns.device)
        return first_columns(flags.scatter(1, self.columns, 1), left - self.columns.shape[1])

    def keep(self, kept: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Let all but some tokens go: kept (batch * images, k), those that stay of the n of each image, in their order. states
        (batch, left, dim). Returns the states of those that are left and their columns, (batch, fewer)."""
        batch, left = states.shape[:2]
        rows, count = self.columns.reshape(-1, self.each), kept.shape[1]
        flags = torch.zeros_like(rows, dtype=torch.long).scatter(1, kept, 1)
        gone = rows.gather(1, first_columns(flags, self.each - count)).reshape(batch, -1)
        flags = torch.zeros(batch, left, dtype=torch.long, device=states.device).scatter(1, gone, 1)
        chosen = first_columns(flags, left - gone.shape[1])
        moved = (1 - flags).cumsum(1) - 1
        self.columns = moved.gather(1, rows.gather(1, kept).reshape(batch, -1))
        self.positions = self.positions.gather(1, kept)
        return of_tokens(states, chosen), chosen


def of_samples(heard: Heard, samples: Tensor) -> Heard:
    """What was heard of each of these samples, which may be none or come twice."""
    cos, sin = (part.expand(heard.heads(heard.key).shape[0], -1, -1)[samples] for part in heard.position_embeddings)
    query, key = heard.heads(heard.query)[samples], heard.heads(heard.key)[samples]
    assert heard.mask is not None and heard.past is not None
    return Heard(heard.head_dim, heard.scaling, (cos, sin), heard.mask[samples], heard.past[samples], query, key)


def first_columns(flags: Tensor, count: int) -> Tensor:
    """(rows, n) whole numbers -> (rows, count): columns with the smallest, the first of equal ones, in their order."""
    width = flags.shape[1]
    return (flags * width + torch.arange(width, device=flags.device)).topk(count, dim=1, largest=False).indices


def merge(states: Tensor, images: ImagesLeft, choice: Choice) -> Tensor:
    """States with those of image tokens that a rule has merged. (batch, left, dim)"""
    if choice.states is None:
        return states
    changed = choice.states.reshape(states.shape[0], -1, states.shape[-1]).to(states.dtype)
    return states.scatter(1, images.columns.unsqueeze(-1).expand_as(changed), changed)


def chosen_by(stage: Stage, view: View, tokens: int) -> tuple[Choice, Tensor]:
    """What a rule decides, and (rows, k): the tokens that stay, of images that had so many at first."""
    keep = stage.left(tokens)
    choice = STAGE_RULES[stage.rule].choose(view, [keep], **stage.settings)  # the same number for every image
    return choice, gathered(choice.kept, keep)


def visible(pads: Tensor, before: int, tokens: int, whole: Tensor | None = None) -> Tensor:
    """(batch, 1, tokens, before + tokens): which keys a token sees, those before it and itself, or where `whole` is True all of
    them, without padding. What is padding sees itself, so that its row is something. pads (batch, 1)."""
    key = torch.arange(before + tokens, device=pads.device)
    own = before + torch.arange(tokens, device=pads.device)[:, None]
    seen = key <= own if whole is None else (key <= own) | whole
    return (seen & ((key >= pads[:, :, None]) | (key == own)))[:, None]


def weighed(seen: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to logits, (batch, 1, tokens, keys). seen: of the same shape, booleans; bias (batch, 1, keys, 1)."""
    return torch.where(seen, bias.transpose(2, 3).to(dtype), torch.finfo(dtype).min)


def decode(model: Any, graphs: DecoderGraphs, inputs: dict[str, Tensor], past: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits (batch, 1, vocabulary) behind the last token, and keys and values of every layer; where image tokens stand for
    several, also what is added to logits at all tokens that are held, (batch, 1, held, 1): the log of for how many.

    inputs: inputs_embeds (batch, tokens, dim), attention_mask (batch, seen + tokens), position_ids (batch, tokens); with stages
    image_positions (batch, images * n); where the vision encoder has chosen, image_kept (batch, images * kept), and
    image_labels or image_weights. past: the same of the tokens seen before, in the same order. Where a sample is not filled up
    at the left, its logits are NaN.
    """
    text = model.get_submodule(graphs.layout["text"])
    at = {stage.layer: stage for stage in graphs.stages}
    states, mask = inputs[EMBEDS], inputs[MASK]
    pads = (mask == 0).sum(1, keepdim=True)
    held = list(past)
    bias = held.pop() if graphs.weighted else None
    cache, heard = Growing(held), None
    turned = text.rotary_emb(states, position_ids=inputs[POSITIONS])
    images = ImagesLeft.of(inputs[WHERE], graphs.tokens, graphs.layout["square"]) if graphs.stages else None
    whole = inputs[WHERE].new_ones(inputs[WHERE].shape).sum() > 0 if graphs.prefix else None
    with attention_nodes(text.config):
        for place, layer in enumerate(text.layers):
            if images is not None and (stage := at.get(place)):
                if place == 0 and graphs.ahead:
                    kept = inputs[KEPT].reshape(-1, stage.left(graphs.tokens))
                    labels = inputs.get(LABELS)
                    images.labels = None if labels is None else labels.reshape(kept.shape)
                else:
                    choice, kept = chosen_by(stage, images.view(stage, states, heard, pads), graphs.tokens)
                    assert choice.weights is None  # refused before: see decoder_graphs.why_not
                    states = merge(states, images, choice)
                    known = images.labels if choice.labels is None else choice.labels
                    images.labels = None if known is None else known.gather(1, kept)
                states, chosen = images.keep(kept, states)
                turned = tuple(picked(part, chosen) for part in turned)
                if bias is not None:
                    own = bias.new_zeros(states.shape[:2]).scatter(1, images.columns, inputs[WEIGHTS].log())
                    bias = torch.cat([bias, own[:, None, :, None]], 2)
            seen = visible(pads, cache.keys[place].shape[2], states.shape[1], whole)
            added = seen if bias is None else weighed(seen, bias, states.dtype)
            given = {"attention_mask": added, "position_embeddings": turned, "position_ids": None}
            given[cache_name(layer.forward)] = cache
            asked = at[place + 1].needs & OF_THE_LAYER_BEFORE if place + 1 in at else None
            if not asked:
                states = layer(states, **given)
                continue
            attention = layer.self_attn
            heard = Heard(attention.head_dim, attention.scaling, turned, seen, cache.keys[place])
            for source in sources_of(attention):
                source.comp_listens = True
            states = layer(states, **given)
            heard.query, heard.key = made_by(sources_of(attention))
    logits = model.get_submodule(graphs.head)(text.norm(states[:, -1:]))
    # A mask of another kind would be taken for one of this kind: better no logits than wrong ones.
    at_left = ((mask != 0) == (torch.arange(mask.shape[1], device=mask.device) >= pads)).all(1)
    present = cache.present if bias is None else [*cache.present, bias]
    return (logits.masked_fill(~at_left[:, None, None], torch.nan), *present)
