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
from functools import reduce
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache

TESTED = ("5.20", "5.24")  # releases of transformers, the first and the last one that this file was tested with
Arguments = tuple[Any, ...]  # of a call, by position
CACHES = ("cache", "past_key_values")  # what layers call their keys and values, since transformers 5.24 and before
# What stock models hand down to every layer, and no number depends on: hidden states are recorded by hooks around the layers,
# the number of items is for the loss.
HARMLESS = frozenset({"output_hidden_states", "use_cache", "return_dict", "num_items_in_batch"})
# Of a layout: what config.json leaves out where comp 0.1 wrote it. `norms` and `mlp` are children of a pre_norm layer: the
# norms before the attention and before the feed-forward part, and that part.
LAYOUT_DEFAULTS: dict[str, Any] = {"norms": ["layer_norm1", "layer_norm2"], "mlp": "mlp", "causal": False, "text_end": None}


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
    chosen: torch.Tensor | slice = slice(first, None)
    if rows and tokens - first > rows:
        chosen = torch.linspace(first, tokens - 1, rows, device=query.device).round().long()
    seen = None if attention_mask is None else unmasked(attention_mask)
    attention = row_attention(query[:, :, chosen], key, scale, None if seen is None else seen[:, :, chosen], head_mask)
    received = attention.amax(1)
    if seen is None:
        return received.sum(1)
    valid = seen[:, 0, -1]  # (batch, tokens): what the last row sees is everything that is not padding
    received = received * valid[:, chosen].unsqueeze(-1)
    return received.sum(1).masked_fill(~valid, -1.0)


def class_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    rows: int = 0,
    skip_first: bool = True,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much attention [CLS] pays to each token, mean over heads (the score of EViT), with CIT as in `token_scores`.

    One query row is read, whatever `rows` and `skip_first` say.
    """
    valid = valid_tokens(key, attention_mask)
    attention = row_attention(query[:, :, :1], key, scale, valid[:, None, None], head_mask)[:, :, 0]
    return attention.mean(1).masked_fill(~valid, -1.0)


def last_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    *,
    rows: int = 0,
    skip_first: bool = True,
    attention_mask: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much attention the last token that is not padding pays to each: max over heads, with CIT as in `token_scores`.

    For causal towers, whose last token is all that is read. Their other rows cannot be summed: a later token is seen by fewer.
    One query row is read, whatever `rows` and `skip_first` say.
    """
    valid = valid_tokens(key, attention_mask)
    last = torch.where(valid, torch.arange(key.shape[2], device=key.device), -1).amax(-1).view(-1, 1, 1, 1)
    row = query.gather(2, last.expand(query.shape[0], query.shape[1], 1, query.shape[3]))
    attention = row_attention(row, key, scale, valid[:, None, None], head_mask)[:, :, 0]
    return attention.amax(1).masked_fill(~valid, -1.0)


def row_attention(
    query: torch.Tensor, key: torch.Tensor, scale: float, seen: torch.Tensor | None, head_mask: torch.Tensor | None
) -> torch.Tensor:
    """The attention map of some query rows, a fading head's scaled (Eq. 7): (batch, heads, rows, head_dim) -> (batch, heads,
    rows, tokens). seen: (batch, 1, rows, tokens), True where a row may look. A merged token counts as one."""
    logits = (query * scale) @ key.transpose(-1, -2)
    if seen is not None:
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    attention = logits.softmax(-1, dtype=torch.float32)  # half precision would make ties of hundreds of scores
    return attention if head_mask is None else attention * head_mask.view(1, -1, 1, 1)


def valid_tokens(key: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which tokens are not padding: those that the last row sees. (batch, tokens), booleans."""
    if attention_mask is None:
        return key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    return unmasked(attention_mask)[:, 0, -1]


class ScoreFunction(Protocol):
    """How the tokens of a self-attention are ranked, with the arguments of `token_scores`: the highest of (batch, tokens) stay,
    padding is negative."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        *,
        rows: int = 0,
        skip_first: bool = True,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def by_position(order: Callable[[torch.Tensor], torch.Tensor]) -> ScoreFunction:
    """Scores that know nothing of the image: an order of the positions, (tokens,) -> (tokens,), the same for each sample."""

    def scores(
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        *,
        rows: int = 0,
        skip_first: bool = True,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found = order(torch.arange(key.shape[2], device=key.device)).float().expand(key.shape[0], -1)
        return found if attention_mask is None else found.masked_fill(~unmasked(attention_mask)[:, 0, -1], -1.0)

    return scores


def bit_reversed(position: torch.Tensor) -> torch.Tensor:
    """Positions with their lowest ten bits reversed: the k largest are evenly spread, whatever k."""
    bits = (((position >> bit) & 1) << (9 - bit) for bit in range(10))
    return reduce(torch.add, bits)


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

    score: ScoreFunction
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


class TokenScores(nn.Module):
    """Ranks the tokens of a self-attention by a rule of TOKEN_RULES. It has no parameters, and is a module so that profiles and
    graphs can name what it costs."""

    def __init__(self, rule: str, rows: int, skip_first: bool):
        super().__init__()
        self.rule, self.rows, self.skip_first = rule, rows, skip_first

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        head_dim: int,
        scale: float,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, key: (batch, tokens, heads * head_dim). Returns (batch, tokens). The scores only choose: no gradient goes
        through them."""
        query, key = (split_heads(states.detach(), head_dim) for states in (query, key))
        score = TOKEN_RULES[self.rule].score
        how = {"attention_mask": attention_mask, "head_mask": head_mask}
        return score(query, key, scale, rows=self.rows, skip_first=self.skip_first, **how)


class TokenPruning(nn.Module):
    """Hands on the `keep` best tokens, between attention and feed-forward part. `keep` is a constant: no result depends on its
    batch mates. With `merge` the last of them stands for all that go, see `merge_others`. No parameters, as `TokenScores`."""

    def __init__(self, keep: int, protected: tuple[str, ...] = (), merge: bool = False):
        super().__init__()
        self.keep, self.protected, self.merge = keep, protected, merge

    def forward(
        self, hidden_states: torch.Tensor, scores: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(batch, tokens, dim), (batch, tokens), (batch, 1, tokens, tokens) -> (batch, keep, dim), the mask of those, and their
        indices (batch, keep), None where all stay."""
        if torch.compiler.is_exporting():
            keep = torch.sym_min(self.keep, hidden_states.shape[1])  # no branch on the text length in a graph
        elif hidden_states.shape[1] <= self.keep:
            return hidden_states, attention_mask, None
        else:
            keep = self.keep
        if self.merge and self.keep > 1:
            return self.merge_others(hidden_states, scores, attention_mask, keep)
        kept = kept_tokens(scores, keep, self.protected)
        if attention_mask is not None:
            attention_mask = select_mask(attention_mask, kept)
        return select_tokens(hidden_states, kept), attention_mask, kept

    def merge_others(
        self, hidden_states: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep the `keep` - 1 best tokens; the last one stands for all others: it is their mean, and attention counts it as
        often as there are tokens in it (the proportional attention of ToMe).

        bias: what that adds to attention logits, (1, 1, tokens, tokens): the logarithm of how many tokens each column stands
        for; None before any are merged. The logits of n equal tokens are that of one plus log(n), so nothing is lost where
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


class TokenState:
    """What is left of the tokens of one call. It travels with the call: `add_token_state` gives it to the stock loop, which
    hands it to every layer, as it does with all arguments that it does not know.

    A layer reads what the layer before it left, and leaves its own under the number of the next. Nothing is overwritten by
    another layer, so a layer that runs again in the backward pass (gradient checkpointing) finds what it found before.

    masks: number of a layer -> the mask that its attention gets, (batch, 1, tokens, tokens), None for none. kept: number of a
    layer that drops tokens -> those that stay, (batch, keep), indices into the ones that enter it. For loops that give all
    layers one mask, as those of BLIP, CLIP and SigLIP do.
    """

    def __init__(self) -> None:
        self.masks: dict[int, torch.Tensor | None] = {}
        self.kept: dict[int, torch.Tensor] = {}

    def mask_of(self, layer: int, given: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """given: the mask of all tokens, which the stock loop hands to every layer. device: of the layer; a model may lie on
        several."""
        if layer not in self.masks:
            return given
        mask = self.masks[layer]
        return mask if mask is None or mask.device == device else mask.to(device)

    def positions(self, before: int | None = None) -> torch.Tensor | None:
        """Where the tokens that are left (behind the tower, or before a layer) were when they entered it, (batch, left); None
        where all are left."""
        positions = None
        for layer in sorted(layer for layer in self.kept if before is None or layer < before):
            kept = self.kept[layer]
            positions = kept if positions is None else positions.to(kept.device).gather(1, kept)
        return positions


def add_token_state(encoder: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    """Forward pre-hook of the stock module that runs the layers of a tower in which the number of tokens falls."""
    return args, kwargs | {"token_state": TokenState()}


def restore_positions(encoder: nn.Module, args: Arguments, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of such a module where what is behind the tower reads tokens by their position: those that are left come
    out where they were, (batch, tokens, dim), zeros between them."""
    positions = kwargs["token_state"].positions()
    if positions is not None:
        entered, left = args[0] if args else kwargs["inputs_embeds"], output.last_hidden_state
        index = positions.unsqueeze(-1).expand(-1, -1, left.shape[-1])
        output.last_hidden_state = torch.zeros_like(entered).scatter(1, index, left)
    return output


def mask_behind_end(text_model: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
    """Forward pre-hook of a text model that is read at the first end-of-text token: see `end_of_text`."""
    return (), end_of_text(text_model.eos_token_id, *args, **kwargs)


def end_of_text(
    eos_token_id: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of a text model with what comes behind the first end-of-text token as padding, whatever mask is given: so
    that the end is the last token of every text, which stays. input_ids, attention_mask: (batch, tokens)."""
    ids = input_ids.view(-1, input_ids.shape[-1])
    # Configs of the first checkpoints say 2 where the end is the highest id (see transformers' CLIPTextModel).
    ends = ids == (eos_token_id if eos_token_id != 2 else ids.amax(-1, keepdim=True))
    behind = ends.long().cumsum(-1) - ends.long() > 0
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    elif not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError("attention_mask: expected one number for each token of a text, (batch, tokens).")
    return kwargs | {"input_ids": input_ids, "attention_mask": attention_mask.masked_fill(behind, 0)}


def split_heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim); what comes from a cache is so already."""
    return states if states.dim() == 4 else states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


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
    elsewhere — and the token scores (batch, tokens), None unless `token_scores` is there.
    """

    token_scores: TokenScores | None

    def __init__(self, stock: nn.Module, layout: dict[str, Any], num_heads: int, head_dim: int, scale: float):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.layout = layout
        self.config = getattr(stock, "config", None)
        self.layer_idx: Any = getattr(stock, "layer_idx", None)  # place in the cache of a tower that generates
        self.causal = False
        self.register_module("token_scores", None)
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
        context, scores = self.attend(hidden_states, attention_mask, encoder_hidden_states, cache)
        return (context if self.out_name is None else getattr(self, self.out_name)(context)), scores

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the output projection reads, (batch, tokens, heads * head_dim), and the token scores."""
        query, key, value = self.project(hidden_states, encoder_hidden_states, cache)
        if self.share_images and encoder_hidden_states is not None and torch.onnx.is_in_onnx_export():
            key, value = share_images(key, query), share_images(value, query)
        if self.fused_node and torch.onnx.is_in_onnx_export():
            context = fused_attention(query, key, value, self.num_heads, self.scale, attention_mask)
        else:
            queries, keys, values = (self.split(states) for states in (query, key, value))
            context = F.scaled_dot_product_attention(queries, keys, values, attention_mask, scale=self.scale)
            context = context.transpose(1, 2).flatten(2)
        scores = None
        if self.token_scores is not None:
            scores = self.token_scores(query, key, self.head_dim, self.scale, attention_mask, self.head_mask)
        return context, scores

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
            known: Any = cache.cross_attention_cache.layers[self.layer_idx]  # what does not change is made once
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
        return split_heads(states, self.head_dim)


class CompactLayer(nn.Module):
    """What compact layers share. Mixed in before the stock class; `compact_layer` sets what is declared here."""

    layer_idx: int
    token_pruning: TokenPruning | None
    norms: tuple[str, ...]
    attention_name: str
    mlp_name: str
    cache_name: str | None  # what the stock module around the attention calls the cache

    def prune_tokens(
        self,
        hidden_states: torch.Tensor,
        scores: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_state: TokenState | None,
    ) -> torch.Tensor:
        """Drop tokens where the plan says so, (batch, tokens, dim) -> (batch, keep, dim), and leave word of it."""
        kept = None
        if self.token_pruning is not None:
            hidden_states, attention_mask, kept = self.token_pruning(hidden_states, scores, attention_mask)
        if token_state is not None:
            token_state.masks[self.layer_idx + 1] = attention_mask
            if kept is not None:
                token_state.kept[self.layer_idx] = kept
        elif kept is not None:
            raise TypeError(
                f"{type(self).__name__} drops tokens, and has nowhere to say which: call the module that runs the layers, or "
                "give token_state=TokenState()."
            )
        return hidden_states


class PreNormLayer(CompactLayer):
    """Layer of a ViT-like tower (BLIP's vision tower, CLIP, SigLIP)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, tokens, dim) -> (batch, tokens or keep, dim). attention_mask: of all tokens that entered the tower."""
        refuse_unknown(self, kwargs)
        attention, mlp = getattr(self, self.attention_name), getattr(self, self.mlp_name)
        norm, next_norm = (getattr(self, name) for name in self.norms)
        if is_causal is not None and is_causal != attention.causal:
            raise ValueError(f"is_causal={is_causal}: config.json says that this tower is not so (comp.towers.layout.causal).")
        if token_state is not None:
            attention_mask = token_state.mask_of(self.layer_idx, attention_mask, hidden_states.device)
        attended, scores = attention(norm(hidden_states), attention_mask=attention_mask)
        hidden_states = self.prune_tokens(hidden_states + attended, scores, attention_mask, token_state)
        return hidden_states + mlp(next_norm(hidden_states))


class PostNormLayer(CompactLayer):
    """Layer of a BERT-like tower with cross-attention (BLIP's text towers).

    encoder_attention_mask is taken and not used: the stock layer (5.20 to 5.24) does not hand it to the attention either.
    """

    attention: nn.Module
    crossattention: nn.Module
    feed_forward_chunk: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        token_state: TokenState | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(batch, tokens, dim) -> (batch, tokens or keep, dim). attention_mask: of all tokens that entered the tower."""
        refuse_unknown(self, kwargs)
        past, cache = {}, the_cache(cache, past_key_values)
        if cache is not None:
            if token_state is not None:
                raise ValueError("where tokens are dropped there is no cache: those that are left differ from layer to layer.")
            if self.cache_name is None:
                raise TypeError(f"{type(self.attention).__name__} of transformers {transformers.__version__} takes no cache.")
            past[self.cache_name] = cache
        if token_state is not None:
            attention_mask = token_state.mask_of(self.layer_idx, attention_mask, hidden_states.device)
        hidden_states, scores = self.attention(hidden_states, attention_mask=attention_mask, **past)
        hidden_states = self.prune_tokens(hidden_states, scores, attention_mask, token_state)
        if encoder_hidden_states is not None:
            hidden_states, _ = self.crossattention(hidden_states, encoder_hidden_states=encoder_hidden_states, **past)
        return self.feed_forward_chunk(hidden_states)


LAYERS: dict[str, type[CompactLayer]] = {"pre_norm": PreNormLayer, "post_norm": PostNormLayer}


@once
def _layer_class(order: str, stock_class: Any) -> Any:
    # A subclass of the stock layer, so that transformers' recording of hidden states and checkpointing find it.
    return type(f"Compact{stock_class.__name__}", (LAYERS[order], stock_class), {})


def compact_layer(
    stock: nn.Module, index: int, layout: dict[str, Any], sizes: dict[str, Any], tower: dict[str, Any]
) -> CompactLayer:
    """The layer with the sizes of its plan, `index` in its tower. Weights that change size are left uninitialised."""
    stock_class: Any = type(stock)
    layer_class = _layer_class(layout["order"], stock_class)
    layer: CompactLayer = layer_class.__new__(layer_class)
    layer.__dict__.update(stock.__dict__)
    inside: Callable[[str], Any] = layer.get_submodule
    around = stock.get_submodule(layout["attention"]["module"].split(".")[0])  # the stock module that holds the attention
    layer.layer_idx, layer.cache_name = index, cache_name(around.forward)
    layer.norms, layer.mlp_name, layer.attention_name = tuple(layout["norms"]), layout["mlp"], layout["attention"]["module"]
    for kind in ("attention", "cross"):
        parts = layout[kind]
        if parts is None:
            continue
        attention = CompactAttention(stock.get_submodule(parts["module"]), parts, **sizes[kind])
        attention.causal = kind == "attention" and layout["causal"]
        layer.set_submodule(parts["module"], attention)
        if attention.out_name is None:
            out = inside(parts["out"])
            inner = attention.num_heads * attention.head_dim
            layer.set_submodule(parts["out"], resized(out, inner, out.out_features))
    for path in layout["ffn"]:
        linear, last = inside(path), path == layout["ffn"][-1]
        shape = (sizes["ffn"], linear.out_features) if last else (linear.in_features, sizes["ffn"])
        layer.set_submodule(path, resized(linear, *shape))
    layer.register_module("token_pruning", None)
    if sizes["keep"] is not None:
        protected = tuple(layout["protected"])
        layer.token_pruning = TokenPruning(sizes["keep"], protected, tower.get("fuse", False))
        scores = TokenScores(tower.get("score_rule", "attention"), tower["score_rows"], "first" in protected)
        inside(layout["attention"]["module"]).token_scores = scores
    return layer


def check_sizes(tower: dict[str, Any], hidden_size: int, heads: int) -> None:
    """ValueError where the sizes of a tower cannot be those of heads and channels taken from a dense one: such a plan would
    load, and give wrong numbers. heads: of the dense tower."""
    attentions = [layer[name] for layer in tower["layers"] for name in ("attention", "cross") if name in layer]
    if "streams" in tower or any("num_key_value_heads" in part for part in attentions):
        raise ValueError("towers of several streams, and shared key-value heads, are not run by this version of the runtime")
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
        layout = LAYOUT_DEFAULTS | tower["layout"]
        encoder = model.get_submodule(layout["encoder"])
        layers = getattr(encoder, layout["layers"])
        config: Any = encoder.config
        check_sizes(tower, config.hidden_size, config.num_attention_heads)
        if len(layers) != len(tower["layers"]):
            raise ValueError(f"{layout['encoder']}: the plan has {len(tower['layers'])} layers, the model {len(layers)}")
        for index, sizes in enumerate(tower["layers"]):
            layers[index] = compact_layer(layers[index], index, layout, sizes, tower)
        if any(sizes["keep"] is not None for sizes in tower["layers"]):
            encoder.register_forward_pre_hook(add_token_state, with_kwargs=True)
            if layout["text_end"] is not None:
                encoder.register_forward_hook(restore_positions, with_kwargs=True)
                model.get_submodule(layout["text_end"]).register_forward_pre_hook(mask_behind_end, with_kwargs=True)


@once
def compact_class(architecture: str) -> type:
    """The stock class of that name with `__init__` extended: same forward, same outputs, layers of the plan's sizes."""
    warn_if_untested()
    stock = getattr(transformers, architecture)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        make_compact(self, config.comp)
        # What scales all logits stays exact, whatever precision the matrices are loaded in.
        scalars = {name for name, parameter in self.named_parameters() if parameter.numel() == 1}
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) | scalars

    def dtype(self: Any) -> torch.dtype:
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
