"""The runtime of compact models: sliced attention, sliced feed-forward layers, token pruning.

This file ships beside every compact checkpoint and needs torch and transformers only. It knows no model family: the block
`comp` of config.json says, for each tower, where its parts are (`layout`) and how large each layer is (`layers`). Nothing
is derived: head counts, head widths, softmax scales, feed-forward widths and kept tokens are read from there.

    AutoModel.from_pretrained(folder, trust_remote_code=True)

Where numbers would depend on something that it does not know (an argument, a mask, a cache), it raises: `refuse_unknown`.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

TESTED = ("5.20", "5.24")  # releases of transformers, the first and the last one that this file was tested with
CACHES = ("cache", "past_key_values")  # what layers call their keys and values, since transformers 5.24 and before
# What stock models hand down to every layer, and no number depends on: hidden states are recorded by hooks around the layers,
# the number of items is for the loss.
HARMLESS = frozenset({"output_hidden_states", "use_cache", "return_dict", "num_items_in_batch"})


@once
def warn_if_untested() -> None:
    """One sentence, once, where transformers is of a release that this file was not tested with."""
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    first, last = (tuple(map(int, version.split("."))) for version in TESTED)
    if not first <= release <= last:
        warnings.warn(
            f"transformers {transformers.__version__} is not one that this runtime of compact models was tested with "
            f"({TESTED[0]} to {TESTED[1]}): install one of those, or a newer comp, and `comp upgrade FOLDER`.",
            stacklevel=2,
        )


def refuse_unknown(module: nn.Module, given: dict[str, Any]) -> None:
    """Raise for arguments that would change what a stock layer says, and that a compact layer does not know: a new name of
    the cache or of a mask must not be ignored. None and False say that nothing is asked for."""
    for name, value in given.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name == "output_attentions":
            raise ValueError("compact layers make no attention maps: leave output_attentions out, or ask the dense model.")
        raise TypeError(
            f"{type(module).__name__} got an argument that it does not know, {name}=, and will not ignore it. It was tested "
            f"with transformers {TESTED[0]} to {TESTED[1]}; this is {transformers.__version__}."
        )


def the_cache(cache: Any, past_key_values: Any) -> Any:
    """The keys and values of earlier tokens, under whichever name they came."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("two caches were given, as cache= and as past_key_values=: give one.")
    return past_key_values if cache is None else cache


def cache_name(forward: Callable[..., Any]) -> str | None:
    """What a stock module calls its cache."""
    return next((name for name in CACHES if name in inspect.signature(forward).parameters), None)


def check_mask(attention_mask: Any) -> None:
    """Raise unless a mask is one of attention: (batch, 1, tokens, tokens), True or 0 where a query may look."""
    if attention_mask is None:
        return
    tensor = isinstance(attention_mask, torch.Tensor)
    known = tensor and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point())
    if not known or attention_mask.dim() != 4:
        found = f"{tuple(attention_mask.shape)} of {attention_mask.dtype}" if tensor else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask: compact layers take (batch, 1, tokens, tokens), boolean or additive, and found {found}. Load the "
            "model with attn_implementation='sdpa' or 'eager': masks of other kernels mean something else."
        )


def token_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    rows: int = 0,
    skip_first: bool = True,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much attention each token receives: S_i = sum over queries n of max over heads h of A^(h)[n, i].

    CoMP, Eq. 6; with `head_mask` Eq. 7 (CIT): the softmaxed map of a fading head is scaled, not its logits. Not normalised.

    query, key: (batch, heads, tokens, head_dim). `rows` bounds the query rows that are used (evenly spaced; 0 for all).
    `skip_first` leaves the [CLS] row out. attention_mask: (batch, 1, tokens, tokens), additive or boolean; rows and
    columns of padding do not count. head_mask: (heads,) in [0, 1]. Returns (batch, tokens).
    """
    first = int(skip_first)
    tokens = query.shape[2]
    if rows and tokens - first > rows:
        chosen = torch.linspace(first, tokens - 1, rows, device=query.device).round().long()
        query = query[:, :, chosen]
    else:
        chosen = slice(first, None)
        query = query[:, :, first:]
    logits = (query * scale) @ key.transpose(-1, -2)
    seen = None
    if attention_mask is not None:
        seen = unmasked(attention_mask)
        logits = logits.masked_fill(~seen[:, :, chosen], torch.finfo(logits.dtype).min)
    attention = logits.softmax(-1, dtype=torch.float32)  # half precision would make ties of hundreds of scores
    if head_mask is not None:
        attention = attention * head_mask.view(1, -1, 1, 1)
    received = attention.amax(1)
    if seen is not None:
        valid = seen[:, 0, -1]  # (batch, tokens): what the last row sees is everything that is not padding
        received = received * valid[:, chosen].unsqueeze(-1)
        return received.sum(1).masked_fill(~valid, -1.0)
    return received.sum(1)


def row_attention(query: torch.Tensor, key: torch.Tensor, scale: float, valid: torch.Tensor) -> torch.Tensor:
    """What one query row pays to every token that is not padding: (batch, heads, 1, head_dim) -> (batch, heads, tokens). One
    that stands for others counts as one."""
    logits = (query * scale) @ key.transpose(-1, -2)
    logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32)[:, :, 0]


def valid_tokens(key: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are not padding: those that the last row sees. (batch, tokens), booleans."""
    if attention_mask is None:
        return key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    return unmasked(attention_mask)[:, 0, -1]


def class_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """How much attention [CLS] pays to each token, mean over heads (the score of EViT), with CIT as in `token_scores`."""
    valid = valid_tokens(key, attention_mask)
    attention = row_attention(query[:, :, :1], key, scale, valid)
    if head_mask is not None:
        attention = attention * head_mask.view(1, -1, 1)
    return attention.mean(1).masked_fill(~valid, -1.0)


def last_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """How much attention the last token that is not padding pays to each: max over heads, with CIT as in `token_scores`.

    For causal towers, whose last token is all that is read. Their other rows cannot be summed: a later token is seen by fewer.
    """
    valid = valid_tokens(key, attention_mask)
    last = torch.where(valid, torch.arange(key.shape[2], device=key.device), -1).amax(-1).view(-1, 1, 1, 1)
    row = query.gather(2, last.expand(query.shape[0], query.shape[1], 1, query.shape[3]))
    attention = row_attention(row, key, scale, valid)
    if head_mask is not None:
        attention = attention * head_mask.view(1, -1, 1)
    return attention.amax(1).masked_fill(~valid, -1.0)


def by_position(order: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Scores that know nothing of the image: an order of the positions, (tokens,) -> (tokens,), the same for each sample."""

    def scores(query: torch.Tensor, key: torch.Tensor, scale: float, *, attention_mask=None, **kwargs: Any) -> torch.Tensor:
        found = order(torch.arange(key.shape[2], device=key.device)).float().expand(key.shape[0], -1)
        return found if attention_mask is None else found.masked_fill(~unmasked(attention_mask)[:, 0, -1], -1.0)

    return scores


def bit_reversed(position: torch.Tensor) -> torch.Tensor:
    """Positions with their lowest ten bits reversed: the k largest are evenly spread, whatever k."""
    return sum(((position >> bit) & 1) << (9 - bit) for bit in range(10))


def hashed(position: torch.Tensor) -> torch.Tensor:
    """Pseudo-random numbers in integer arithmetic: the same on every device and in every runtime."""
    mixed = (position + 1) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 16)) * 73244475 % 2**32
    return (mixed ^ (mixed >> 16)) % 2**20


def unmasked(attention_mask: torch.Tensor) -> torch.Tensor:
    """The mask as booleans, True where a query may look. Additive masks hold 0 or a very negative number."""
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1.0


@dataclass(frozen=True)
class TokenRule:
    """How tokens are ranked: all that anybody needs to know of a rule."""

    score: Callable[..., torch.Tensor]
    query_rows: int | None = 0  # query rows that the scores are made of; None for as many as `score_rows` says
    class_token: bool = False  # whether it asks [CLS]


# "even" is for towers that keep all of their tokens; "stride" and "random" are baselines.
TOKEN_RULES: dict[str, TokenRule] = {
    "attention": TokenRule(token_scores, query_rows=None),
    "last": TokenRule(last_attention, query_rows=1),
    "even": TokenRule(by_position(torch.ones_like)),
    "cls": TokenRule(class_attention, query_rows=1, class_token=True),
    "stride": TokenRule(by_position(bit_reversed)),
    "random": TokenRule(by_position(hashed)),
}


def kept_tokens(scores: torch.Tensor, keep: int, protected: tuple[str, ...]) -> torch.Tensor:
    """Indices of the `keep` best tokens in their original order. scores (batch, tokens) -> (batch, keep).

    Protected tokens stay whatever their score: "first" is token 0 ([CLS]), "last" the last one that is not padding
    ([SEP]; padding has a negative score), "end" the last one of all.
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    if "first" in protected:
        scores = scores.masked_fill(position == 0, torch.inf)
    if "last" in protected:
        last = torch.where(scores >= 0, position, -1).amax(1, keepdim=True)
        scores = scores.masked_fill(position == last, torch.inf)
    if "end" in protected:
        scores = scores.masked_fill(position == scores.shape[1] - 1, torch.inf)
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def select_tokens(hidden_states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, dim), (batch, keep) -> (batch, keep, dim)."""
    return hidden_states[torch.arange(kept.shape[0], device=kept.device).unsqueeze(1), kept]


def select_mask(attention_mask: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(batch, 1, tokens, tokens), (batch, keep) -> (batch, 1, keep, keep)."""
    sample = torch.arange(kept.shape[0], device=kept.device).view(-1, 1, 1)
    return attention_mask.expand(kept.shape[0], -1, -1, -1)[sample, 0, kept.unsqueeze(2), kept.unsqueeze(1)].unsqueeze(1)


def resized(linear: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    """An uninitialised layer like `linear`, of another size."""
    if (linear.in_features, linear.out_features) == (in_features, out_features):
        return linear
    weight = linear.weight
    bias = linear.bias is not None
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias, device=weight.device, dtype=weight.dtype)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """ONNX Runtime's MultiHeadAttention node, for export only. All (batch, tokens, heads * head_dim); keys and values of a
    cache (batch, heads, tokens, head_dim)."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    if attention_mask is not None and attention_mask.shape[0] != 1:
        # A mask of its own for every head: ONNX Runtime 1.20 reads past the end of (batch, 1, ...), up to 1.19 refuses it.
        attention_mask = attention_mask.expand(query.shape[0], num_heads, -1, -1)
    bias = () if attention_mask is None else (None, None, attention_mask)
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value, *bias),
        {"num_heads": num_heads, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def share_images(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """One image's states for every text, or each text's own: (1 or batch, ...) -> (batch, ...). For export only."""
    node = torch.onnx.ops.symbolic
    batch = node("Shape", (query,), {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,), version=15)
    shape = torch.cat([batch, batch.new_ones(states.dim() - 1)])
    return node("Expand", (states, shape), dtype=states.dtype, shape=(query.shape[0], *states.shape[1:]), version=13)


class CompactAttention(nn.Module):
    """Self- or cross-attention with any number of heads, on the fused kernel; keeps the stock names of its weights.

    While a model generates, keys and values are cached, (batch, heads, tokens, head_dim) in each layer.

    Returns the attended tokens (batch, tokens, dim) — before the output projection where the stock module has it
    elsewhere — and the token scores (batch, tokens), None unless `score_rows` is set (0: all rows).
    """

    def __init__(self, stock: nn.Module, layout: dict[str, Any], num_heads: int, head_dim: int, scale: float):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.layout = layout
        self.config = getattr(stock, "config", None)
        self.layer_idx: int | None = getattr(stock, "layer_idx", None)  # place in the cache of a tower that generates
        self.skip_first, self.causal = True, False
        self.score_rows: int | None = None
        self.score_rule = "attention"
        self.head_mask: torch.Tensor | None = None
        self.fused_node = False  # export as one node of ONNX Runtime
        self.share_images = False  # export with one image for many texts: its keys and values are made once
        inner = num_heads * head_dim
        for name in layout["qkv"]:
            linear = getattr(stock, name)
            parts = 3 if len(layout["qkv"]) == 1 else 1
            self.add_module(name, resized(linear, linear.in_features, parts * inner))
        self.out_name = layout["out"].removeprefix(layout["module"] + ".")
        if self.out_name == layout["out"]:
            self.out_name = None
        else:
            linear = getattr(stock, self.out_name)
            self.add_module(self.out_name, resized(linear, inner, linear.out_features))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse_unknown(self, kwargs)
        refuse_unknown(self, {"output_attentions": getattr(self.config, "output_attentions", None)})
        check_mask(attention_mask)
        cache = the_cache(cache, past_key_values)
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise TypeError(f"the cache of a compact layer is an EncoderDecoderCache, not a {type(cache).__name__}.")
        if encoder_hidden_states is not None:
            attention_mask = None  # as in the stock model: whatever mask it is given for what it attends across to
        elif attention_mask is None and cache is not None:
            if cache.self_attention_cache.is_compileable:
                raise ValueError("a cache of fixed length needs an attention_mask: what is not written yet must not be seen.")
            attention_mask = self.complete(None, hidden_states, cache.get_seq_length(self.layer_idx))
        else:
            attention_mask = self.complete(attention_mask, hidden_states)
        query, key, value = self.project(hidden_states, encoder_hidden_states, cache)
        if self.share_images and encoder_hidden_states is not None and torch.onnx.is_in_onnx_export():
            key, value = share_images(key, query), share_images(value, query)
        if self.fused_node and torch.onnx.is_in_onnx_export():
            context = fused_attention(query, key, value, self.num_heads, self.scale, attention_mask)
        else:
            split = (self.split(states) for states in (query, key, value))
            context = F.scaled_dot_product_attention(*split, attention_mask, scale=self.scale)
            context = context.transpose(1, 2).flatten(2)
        scores = None
        if self.score_rows is not None:
            options = {"rows": self.score_rows, "skip_first": self.skip_first}
            masks = {"attention_mask": attention_mask, "head_mask": self.head_mask}
            # The scores only choose: no gradient goes through them.
            states = (self.split(states.detach()) for states in (query, key))
            scores = TOKEN_RULES[self.score_rule].score(*states, self.scale, **options, **masks)
        return (context if self.out_name is None else getattr(self, self.out_name)(context)), scores

    def complete(self, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor, past: int = 0) -> torch.Tensor | None:
        """The mask of a causal tower where transformers left it out, which it does where nothing is padded. past: tokens in
        the cache. (batch, 1, tokens, past + tokens)."""
        if attention_mask is not None or not self.causal:
            return attention_mask
        batch, tokens, _ = hidden_states.shape
        return hidden_states.new_ones(tokens, past + tokens, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1)

    def project(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        cache: EncoderDecoderCache | None = None,
    ) -> list[torch.Tensor]:
        """Queries, keys and values, each (batch, tokens, heads * head_dim); with a cache the keys and values of all tokens, as
        they lie there."""
        names = self.layout["qkv"]
        if len(names) == 1:
            return list(getattr(self, names[0])(hidden_states).chunk(3, dim=-1))
        crosses = encoder_hidden_states is not None
        query = getattr(self, names[0])(hidden_states)
        if cache is not None and crosses and cache.is_updated.get(self.layer_idx):
            known = cache.cross_attention_cache.layers[self.layer_idx]  # what does not change is made once
            return [query, known.keys, known.values]
        other = encoder_hidden_states if crosses else hidden_states
        key, value = (getattr(self, name)(other) for name in names[1:])
        if cache is not None:
            part = cache.cross_attention_cache if crosses else cache.self_attention_cache
            key, value = part.update(self.split(key), self.split(value), self.layer_idx)
            if crosses:
                cache.is_updated[self.layer_idx] = True
        return [query, key, value]

    def split(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim); what comes from a cache is so already."""
        if states.dim() == 4:
            return states
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


class TokenPruning:
    """What layers that hand on fewer tokens share. `keep` is a constant: no result depends on its batch mates."""

    keep: int | None = None
    protected: tuple[str, ...] = ()
    fuse = False

    def prune_tokens(
        self, hidden_states: torch.Tensor, scores: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Keep the best tokens of (batch, tokens, dim), between attention and feed-forward layer; also returns the mask of
        those and their indices (batch, keep), None where all stay. With `fuse` see `fuse_others`."""
        if self.keep is None:
            return hidden_states, attention_mask, None
        if torch.compiler.is_exporting():
            keep = torch.sym_min(self.keep, hidden_states.shape[1])  # no branch on the text length in a graph
        elif hidden_states.shape[1] <= self.keep:
            return hidden_states, attention_mask, None
        else:
            keep = self.keep
        if self.fuse and self.keep > 1:
            return self.fuse_others(hidden_states, scores, attention_mask, keep)
        kept = kept_tokens(scores, keep, self.protected)
        if attention_mask is not None:
            attention_mask = select_mask(attention_mask, kept)
        return select_tokens(hidden_states, kept), attention_mask, kept

    def fuse_others(
        self, hidden_states: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep the `keep` - 1 best tokens; the last one stands for all others: it is their mean, and attention counts it as
        often as there are tokens in it.

        bias: what that adds to attention logits, (1, 1, tokens, tokens): the logarithm of how many tokens each column stands
        for; None before any are fused. The logits of n equal tokens are that of one plus log(n), so nothing is lost where
        those that go are alike. For towers without padding.
        """
        token_size = hidden_states.new_ones(1, hidden_states.shape[1])
        if bias is not None:
            token_size = bias[:, 0, 0].exp()
            last = torch.arange(scores.shape[1], device=scores.device) == scores.shape[1] - 1
            scores = scores.masked_fill(last, -1.0)
        kept = kept_tokens(scores, keep - 1, self.protected)
        gone = token_size.expand(scores.shape[0], -1).scatter(1, kept, 0.0).unsqueeze(-1)
        mean = (hidden_states * (gone / gone.sum(1, keepdim=True))).sum(1, keepdim=True)  # a sum could overflow fp16
        weight = (token_size.sum() - (keep - 1)).log().expand(1, 1, keep, 1)
        bias = torch.cat([hidden_states.new_zeros(1, 1, keep, keep - 1), weight], dim=-1)
        return torch.cat([select_tokens(hidden_states, kept), mean], dim=1), bias, kept


class PreNormLayer(TokenPruning):
    """Layer of a ViT-like tower (BLIP's vision tower, CLIP, SigLIP). Mixed in before the stock class."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ):
        refuse_unknown(self, kwargs)
        if is_causal is not None and is_causal != self.self_attn.causal:
            raise ValueError(f"is_causal={is_causal}: config.json says that this tower is not so (comp.towers.layout.causal).")
        attended, scores = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask)
        hidden_states, attention_mask, kept = self.prune_tokens(hidden_states + attended, scores, attention_mask)
        hidden_states = hidden_states + self.mlp(self.layer_norm2(hidden_states))
        return hidden_states if self.keep is None else (hidden_states, attention_mask, kept)


class PostNormLayer(TokenPruning):
    """Layer of a BERT-like tower with cross-attention (BLIP's text towers). Mixed in before the stock class.

    cache_name: what the stock module around the attention calls the cache. encoder_attention_mask is taken and not used: the
    stock layer (5.20 to 5.24) does not hand it to the attention either.
    """

    cache_name: str | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ):
        refuse_unknown(self, kwargs)
        cache = the_cache(cache, past_key_values)
        if cache is not None and self.cache_name is None:
            raise TypeError(f"{type(self.attention).__name__} of transformers {transformers.__version__} takes no cache.")
        past = {} if cache is None else {self.cache_name: cache}
        hidden_states, scores = self.attention(hidden_states, attention_mask=attention_mask, **past)
        hidden_states, attention_mask, kept = self.prune_tokens(hidden_states, scores, attention_mask)
        if encoder_hidden_states is not None:
            hidden_states, _ = self.crossattention(hidden_states, encoder_hidden_states=encoder_hidden_states, **past)
        hidden_states = self.feed_forward_chunk(hidden_states)
        return hidden_states if self.keep is None else (hidden_states, attention_mask, kept)


LAYERS = {"pre_norm": PreNormLayer, "post_norm": PostNormLayer}


class CompactEncoder(nn.Module):
    """Runs the layers of a tower in which the number of tokens falls from layer to layer.

    With `in_place` the tokens that are left come out where they were, zeros between them: what is behind the tower reads
    them by position.
    """

    def __init__(self, stock: nn.Module, layers: str, in_place: bool):
        super().__init__()
        self.config = getattr(stock, "config", None)
        self.layers_name, self.in_place = layers, in_place
        self.add_module(layers, getattr(stock, layers))

    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,  # each layer refuses what it does not know
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if any(kwargs.get(name) is not None for name in CACHES):
            raise ValueError("where tokens are dropped there is no cache: those that are left differ from layer to layer.")
        check_mask(attention_mask)
        hidden_states = inputs_embeds if hidden_states is None else hidden_states
        entered, positions = hidden_states, None
        if encoder_hidden_states is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
        for layer in getattr(self, self.layers_name):
            output = layer(hidden_states, attention_mask=attention_mask, **kwargs)
            hidden_states, attention_mask, kept = output if isinstance(output, tuple) else (output, attention_mask, None)
            if kept is not None and self.in_place:
                positions = kept if positions is None else positions.gather(1, kept)
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1])
            hidden_states = torch.zeros_like(entered).scatter(1, index, hidden_states)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


@once
def _layer_class(order: str, stock_class: type) -> type:
    # A subclass of the stock layer, so that transformers' recording of hidden states and checkpointing find it.
    return type(f"Compact{stock_class.__name__}", (LAYERS[order], stock_class), {})


def compact_layer(stock: nn.Module, layout: dict[str, Any], sizes: dict[str, Any], tower: dict[str, Any]) -> nn.Module:
    """The layer with the sizes of its plan. Weights that change size are left uninitialised."""
    layer_class = _layer_class(layout["order"], type(stock))
    layer = layer_class.__new__(layer_class)
    layer.__dict__.update(stock.__dict__)
    around = stock.get_submodule(layout["attention"]["module"].split(".")[0])  # the stock module that holds the attention
    layer.cache_name = cache_name(around.forward)
    for kind in ("attention", "cross"):
        parts = layout[kind]
        if parts is None:
            continue
        attention = CompactAttention(stock.get_submodule(parts["module"]), parts, **sizes[kind])
        attention.skip_first = "first" in layout["protected"]
        attention.causal = kind == "attention" and layout.get("causal", False)
        layer.set_submodule(parts["module"], attention)
        if attention.out_name is None:
            out = layer.get_submodule(parts["out"])
            inner = attention.num_heads * attention.head_dim
            layer.set_submodule(parts["out"], resized(out, inner, out.out_features))
    fc1, fc2 = (layer.get_submodule(path) for path in layout["ffn"])
    layer.set_submodule(layout["ffn"][0], resized(fc1, fc1.in_features, sizes["ffn"]))
    layer.set_submodule(layout["ffn"][1], resized(fc2, sizes["ffn"], fc2.out_features))
    if sizes["keep"] is not None:
        layer.keep, layer.protected, layer.fuse = sizes["keep"], tuple(layout["protected"]), tower.get("fuse", False)
        attention = layer.get_submodule(layout["attention"]["module"])
        attention.score_rows, attention.score_rule = tower["score_rows"], tower.get("score_rule", "attention")
    return layer


class EndOfText:
    """A text model that is read at the first end-of-text token. What comes behind it is padding, whatever mask is given: so
    that the end is the last token of every text, which stays. Mixed in before the stock class."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any):
        ids = input_ids.view(-1, input_ids.shape[-1])
        # Configs of the first checkpoints say 2 where the end is the highest id (see transformers' CLIPTextModel).
        ends = ids == (self.eos_token_id if self.eos_token_id != 2 else ids.amax(-1, keepdim=True))
        behind = ends.long().cumsum(-1) - ends.long() > 0
        if attention_mask is None:
            attention_mask = torch.ones_like(ids)
        elif not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            raise ValueError("attention_mask: expected one number for each token of a text, (batch, tokens).")
        return super().forward(input_ids, attention_mask=attention_mask.masked_fill(behind, 0), **kwargs)


@once
def _ending(stock_class: type) -> type:
    return type(f"Compact{stock_class.__name__}", (EndOfText, stock_class), {"__module__": __name__})


def check_sizes(tower: dict[str, Any], hidden_size: int, heads: int) -> None:
    """ValueError where the sizes of a tower cannot be those of heads and channels taken from a dense one: such a plan would
    load, and give wrong numbers. heads: of the dense tower."""
    head_dim = hidden_size // heads
    rows, rule = tower["score_rows"], tower.get("score_rule", "attention")
    if type(rows) is not int or rows < 0 or rule not in TOKEN_RULES:
        raise ValueError(f"score_rows {rows!r}, score_rule {rule!r}: no way to rank tokens")
    for index, layer in enumerate(tower["layers"]):
        for part in (layer[name] for name in ("attention", "cross") if name in layer):
            kept, wide, scale = part["num_heads"], part["head_dim"], part["scale"]
            close = abs(scale * head_dim**0.5 - 1) <= 1e-6
            if type(kept) is not int or not 1 <= kept <= heads or wide != head_dim or not close:
                raise ValueError(f"layer {index}: {part} are no heads of {heads} that are {head_dim} wide")
        keep = layer["keep"]
        if keep is not None and (type(keep) is not int or keep < max(1, len(tower["layout"]["protected"]))):
            raise ValueError(f"layer {index}: keep {keep!r} is no number of tokens")


def make_compact(model: nn.Module, comp: dict[str, Any]) -> None:
    """Give every tower of a stock model the sizes of its plan, in place."""
    for tower in comp["towers"]:
        layout = tower["layout"]
        encoder = model.get_submodule(layout["encoder"])
        layers = getattr(encoder, layout["layers"])
        check_sizes(tower, encoder.config.hidden_size, encoder.config.num_attention_heads)
        if len(layers) != len(tower["layers"]):
            raise ValueError(f"{layout['encoder']}: the plan has {len(tower['layers'])} layers, the model {len(layers)}")
        for index, sizes in enumerate(tower["layers"]):
            layers[index] = compact_layer(layers[index], layout, sizes, tower)
        if any(sizes["keep"] is not None for sizes in tower["layers"]):
            pooled_at_end = layout.get("text_end")
            model.set_submodule(layout["encoder"], CompactEncoder(encoder, layout["layers"], pooled_at_end is not None))
            if pooled_at_end is not None:
                text_model = model.get_submodule(pooled_at_end)
                text_model.__class__ = _ending(type(text_model))


@once
def compact_class(architecture: str) -> type:
    """The stock class of that name with `__init__` extended: same forward, same outputs, layers of the plan's sizes."""
    warn_if_untested()
    stock = getattr(transformers, architecture)

    def __init__(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        make_compact(self, config.comp)
        # What scales all logits stays exact, whatever precision the matrices are loaded in.
        scalars = {name for name, parameter in self.named_parameters() if parameter.numel() == 1}
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | scalars

    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point() and p.numel() > 1)

    # _auto_class: a compact model that was trained further takes this file along when it is saved.
    members = {"__init__": __init__, "dtype": property(dtype), "__module__": __name__, "_auto_class": "AutoModel"}
    return type(f"Compact{architecture}", (stock,), members)


def __getattr__(name: str) -> type:
    # `auto_map` names CompactBlipForImageTextRetrieval and its like; each is made when it is asked for.
    if name.startswith("Compact") and hasattr(transformers, name.removeprefix("Compact")):
        return compact_class(name.removeprefix("Compact"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
