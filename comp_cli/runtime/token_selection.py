"""What is left of the tokens of one forward pass, while image tokens leave a decoder at its stages: which, where they are, and
the rows and columns of masks and rotary embeddings that belong to them.

Ships beside compact checkpoints, see modeling_comp_vlm.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from .kept_cache import KeptLayer, KeptStaticLayer, KeptTokens
from .token_rules import STAGE_RULES, View, needs_of


class SmallImage(ValueError):
    """An image has no more tokens than a stage keeps."""


@dataclass(frozen=True)
class Stage:
    """Before a layer of the decoder: how image tokens are ranked, and how many of each image stay."""

    layer: int
    rule: str
    keep: int | None = None
    share: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """What has to be computed for the rule, see token_rules.StageRule."""
        return needs_of(self.rule, self.settings)

    def left(self, tokens: int) -> int:
        """How many stay of an image that had so many tokens at first."""
        return math.ceil(tokens * self.share) if self.share is not None else self.keep or 0


@dataclass
class Heard:
    """What a layer's attention was made of, for the stage behind it: queries and keys (batch, tokens, heads * head_dim) before
    RoPE, and what they are turned and masked with."""

    head_dim: int
    scaling: float
    position_embeddings: tuple[Tensor, Tensor]
    mask: Tensor | None  # of the layer, as its kernel takes it
    past: Tensor | None  # (batch, key-value heads, past, head_dim): keys of earlier tokens, behind RoPE
    query: Tensor | None = None
    key: Tensor | None = None

    def heads(self, states: Tensor | None) -> Tensor:
        """(batch, tokens, heads, head_dim)"""
        assert states is not None  # the hooks have run
        return states if states.dim() == 4 else states.unflatten(-1, (-1, self.head_dim))

    def attention_from(self, rows: Tensor) -> Tensor:
        """Attention that the tokens `rows`, (batch, r), pay to the tokens of this pass, softmax over all that they see, mean
        over heads: (batch, r, tokens), fp32."""
        cos, sin = (part.float() for part in self.position_embeddings)
        if cos.shape[-1] != self.head_dim:
            raise ValueError("a rotary embedding of a part of each head: attention cannot be ranked by, use another rule.")
        query, key = self.heads(self.query).float(), self.heads(self.key).float()
        batch, tokens, groups = key.shape[:3]
        each = rows[:, :, None, None].expand(-1, -1, *query.shape[2:])
        turned = rows[:, :, None].expand(-1, -1, self.head_dim)
        own = (part.expand(batch, -1, -1).gather(1, turned) for part in (cos, sin))
        query = rotated(query.gather(1, each), *own).unflatten(2, (groups, -1))
        keys = rotated(key, cos, sin).transpose(1, 2)
        if self.past is not None:
            keys = torch.cat([self.past.float(), keys], 2)
        logits = torch.einsum("brghd,bgkd->bghrk", query, keys) * self.scaling
        logits = logits + self.bias(rows, keys.shape[2])
        logits = logits.masked_fill(~self.sees(rows, keys.shape[2]), torch.finfo(torch.float32).min)
        return logits.softmax(-1).mean((1, 2))[..., -tokens:]

    def sees(self, rows: Tensor, keys: int) -> Tensor:
        """(batch, 1, 1, r, keys), True where a row looks."""
        past = 0 if self.past is None else self.past.shape[2]
        if self.mask is not None and self.mask.dim() == 4:
            mask = self._mask_rows(rows, keys)
            return (mask if mask.dtype == torch.bool else mask > -1.0)[:, None, None]
        causal = torch.arange(keys, device=rows.device) <= rows.unsqueeze(-1) + past
        if self.mask is not None:
            causal = causal & self.mask[:, None, :keys].bool()
        return causal[:, None, None]

    def bias(self, rows: Tensor, keys: int) -> Tensor | float:
        """What the mask adds to logits of what is seen, (batch, 1, 1, r, keys)."""
        if self.mask is None or self.mask.dim() != 4 or self.mask.dtype == torch.bool:
            return 0.0
        return self._mask_rows(rows, keys).float().clamp(min=0)[:, None, None]

    def _mask_rows(self, rows: Tensor, keys: int) -> Tensor:
        """(batch, r, keys) of a mask of four axes."""
        assert self.mask is not None
        mask = self.mask[..., :keys].expand(rows.shape[0], -1, -1, -1)[:, 0]
        return mask.gather(1, rows.unsqueeze(-1).expand(-1, -1, mask.shape[-1]))


def sources_of(attention: Any) -> list[Any]:
    """What makes the queries and keys of an attention, before RoPE."""
    return [getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_proj") for letter in "qk"]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves. states (batch, tokens, heads, dim); cos, sin (batch, tokens, dim)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(2) + torch.cat([-second, first], -1) * sin.unsqueeze(2)


def first_ones(chosen: Tensor, count: int) -> Tensor:
    """Indices of the first `count` columns of each row, those that are True before the others, in their order. (rows, count)"""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


@dataclass
class Images:
    """The image tokens of a batch, one row an image, padded to the most tokens of one.

    samples, firsts, counts: of each image its sample, its tokens at first and those that are left. columns (images, n): where
    they are among the tokens that are left of the sample. positions (images, n): where they were in the image. weights (images,
    n): how many tokens of the image each stands for, None for itself.
    """

    samples: list[int]
    firsts: list[int]
    counts: list[int]
    columns: Tensor
    positions: Tensor
    class_attention: Tensor | None = None  # (images, n) fp32
    tower_keys: Tensor | None = None  # (images, n, width)
    labels: Tensor | None = None  # (images, n)
    weights: Tensor | None = None  # (images, n) fp32
    square: bool = False  # whether their tokens are rasters of squares; where not, no raster is known

    @cached_property
    def rows(self) -> Tensor:
        """(images, 1): the sample of each."""
        return torch.tensor(self.samples, device=self.columns.device).unsqueeze(1)

    @property
    def valid(self) -> Tensor:
        """(images, n) booleans."""
        counts = torch.tensor(self.counts, device=self.columns.device)
        return torch.arange(self.columns.shape[1], device=self.columns.device) < counts.unsqueeze(1)

    def keep(self, kept: Tensor, counts: list[int], moved: Tensor) -> None:
        """Only those that are kept, (images, n); moved (batch, tokens): new columns."""
        order = first_ones(kept, max(counts))
        self.columns = moved[self.rows, self.columns.gather(1, order)]
        self.positions = self.positions.gather(1, order)
        for name in ("class_attention", "labels", "weights"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held.gather(1, order))
        if self.tower_keys is not None:
            self.tower_keys = self.tower_keys.gather(1, order.unsqueeze(-1).expand(-1, -1, self.tower_keys.shape[-1]))
        self.counts = counts


@dataclass
class Selection:
    """What is left of the tokens of one forward pass.

    index: (batch, left) into those that entered, None while all are left. valid: which of them count, None for all: samples
    that keep fewer are filled up in front. bias: (batch, left) fp32, what is added to attention logits at them, None for
    nothing. text: (batch, left), those of the prompt's words.
    """

    tokens: int
    images: Images | None = None  # None in a decoding step, and for texts without images
    text: Tensor | None = None
    extra: Tensor | None = None  # (batch, tokens): padding and newline embeddings, which leave at the first stage
    left: list[int] = field(default_factory=list)  # of each sample
    index: Tensor | None = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    heard: Heard | None = None
    made: dict[Any, Any] = field(default_factory=dict)  # what layers between two stages share, see `once_for`

    def once_for(self, things: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What is made of the same objects and numbers is made once. They are kept, so that no other takes the place of one."""
        key = tuple(thing if isinstance(thing, int | str) else id(thing) for thing in things)
        if key not in self.made:
            self.made[key] = (things, make())
        return self.made[key][1]

    def turned(self, position_embeddings: Any) -> tuple[Tensor, ...]:
        """cos and sin of the tokens that are left, (batch, left, dim)."""
        index = self.index
        assert index is not None
        make = lambda: tuple(picked(part, index) for part in position_embeddings)  # noqa: E731
        found: tuple[Tensor, ...] = self.once_for(("turned", position_embeddings, index), make)
        return found

    @property
    def width(self) -> int:
        return self.tokens if self.index is None else self.index.shape[1]

    def drop(self, stage: Stage, states: Tensor) -> Tensor:
        """Let image tokens go. states (batch, left, dim) -> (batch, fewer, dim). Raises SmallImage where none would go; shares
        of small images may be the same number at two stages."""
        images = self.images
        assert images is not None and self.text is not None
        counts = [stage.left(first) for first in images.firsts]
        for count, have in zip(counts, images.counts, strict=True):
            same_share = count == have and stage.share is not None and self.index is not None
            if not (0 < count < have or same_share):
                raise SmallImage(
                    f"an image of {have} tokens, and the stage before layer {stage.layer} keeps {count}: nothing would be "
                    "dropped. Give larger images, or prune with fewer tokens, or with a share of an image's (--tokens-share)."
                )
        with torch.autocast(states.device.type, enabled=False):  # ranking is in fp32
            view = self.view(stage, states)
            choice = STAGE_RULES[stage.rule].choose(view, counts, **stage.settings)
        place, nowhere = images.rows * self.width + images.columns, self.text.numel()  # padding of `images` goes nowhere
        flat = torch.where(view.valid & ~choice.kept, place, nowhere).flatten()
        goes = torch.zeros(nowhere + 1, dtype=torch.bool, device=flat.device).index_fill(0, flat, True)[:-1].view_as(self.text)
        if choice.states is not None:
            flat = torch.where(choice.kept, place, nowhere).flatten()
            room = F.pad(states.flatten(0, 1), (0, 0, 0, 1))
            states = room.index_copy(0, flat, choice.states.to(states.dtype).flatten(0, 1))[:-1].view_as(states)
        images.labels = images.labels if choice.labels is None else choice.labels
        images.weights = images.weights if choice.weights is None else choice.weights
        for sample, count, have in zip(images.samples, counts, images.counts, strict=True):
            self.left[sample] -= have - count
        if self.extra is not None:
            goes = goes | self.extra
            self.left = [have - int(extra) for have, extra in zip(self.left, self.extra.sum(1).tolist(), strict=True)]
            self.extra = None
        chosen = self._shrink(goes)
        moved = torch.zeros_like(goes, dtype=torch.long)
        moved.scatter_(1, chosen, torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen))
        images.keep(choice.kept, counts, moved)
        self.bias = None if images.weights is None else self._bias(images, images.weights)
        return states.gather(1, chosen.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def _bias(self, images: Images, weights: Tensor) -> Tensor:
        """log of the weights, where the tokens of images are; 0 elsewhere."""
        assert self.text is not None
        nowhere = self.text.numel()
        place = torch.where(images.valid, images.rows * self.width + images.columns, nowhere).flatten()
        room = torch.zeros(nowhere + 1, device=weights.device)
        return room.index_copy(0, place, weights.clamp(min=1).log().flatten())[:-1].view_as(self.text)

    def _shrink(self, goes: Tensor) -> Tensor:
        """Indices into what is left, (batch, fewer), of those that stay, in their order; those that go in front where a sample
        keeps fewer than another."""
        stays = ~goes if self.valid is None else ~goes & self.valid
        most = max(self.left)
        chosen = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, self.width - most :]
        same = all(left == most for left in self.left)
        valid = stays.gather(1, chosen)
        assert self.text is not None
        self.valid, self.text = None if same else valid, self.text.gather(1, chosen) & valid
        self.index = chosen if self.index is None else self.index.gather(1, chosen)
        return chosen

    def view(self, stage: Stage, states: Tensor) -> View:
        """What the rule of a stage sees."""
        images, needs, heard = self.images, stage.needs, self.heard
        assert images is not None and self.text is not None
        rows = images.rows
        view = View(valid=images.valid, states=states[rows, images.columns], positions=images.positions, labels=images.labels)
        view.weights = images.weights
        view.grid = None if images.square else torch.zeros(len(rows), 2, dtype=torch.long, device=rows.device)
        if "class" in needs:
            view.class_attention, view.tower_keys = images.class_attention, images.tower_keys
        if "keys" in needs and heard is not None:
            view.keys = heard.heads(heard.key)[rows, images.columns]
        if "last" in needs and heard is not None:
            last = (self.text * torch.arange(1, self.width + 1, device=rows.device)).amax(1, keepdim=True) - 1
            paid = heard.attention_from(last.clamp(min=0))[:, 0]
            view.last_attention = paid[rows, images.columns]
        return self._with_text(view, states, heard if "attention" in needs else None) if "text" in needs else view

    def _with_text(self, view: View, states: Tensor, heard: Heard | None) -> View:
        images = self.images
        assert images is not None and self.text is not None
        pictured = [sum(n for s, n in zip(images.samples, images.counts, strict=True) if s == b) for b in range(len(self.left))]
        most = max(left - count for left, count in zip(self.left, pictured, strict=True))
        words = first_ones(self.text, most)
        rows = images.rows
        view.text_states = states[rows, words[rows[:, 0]]]
        view.text_valid = self.text.gather(1, words)[rows[:, 0]]
        if heard is not None:
            paid = heard.attention_from(words)[rows[:, 0]]
            columns = images.columns.unsqueeze(1).expand(-1, most, -1)
            view.text_attention = paid.gather(2, columns) * view.text_valid.unsqueeze(-1)
        return view


# What belongs to them -------------------------------------------------------------------------------------------------


def picked(part: Tensor, index: Tensor) -> Tensor:
    """cos or sin of the tokens that are left: (1 or batch, tokens, dim) -> (batch, left, dim)."""
    if part.dim() != 3:
        raise ValueError(
            f"rotary embeddings of {part.dim()} axes: transformers {transformers.__version__} is not supported here."
        )
    return part.expand(index.shape[0], -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, part.shape[-1]))


def layer_mask(mask: Any, states: Tensor, selection: Selection, held: KeptTokens | None) -> Tensor | None:
    """The part of the stock mask that belongs to what a layer sees and holds; the layer of the cache learns what comes.

    mask: of all tokens, (batch or 1, 1, tokens, seen), boolean or additive; (batch, seen) for flash attention; None where the
    kernel is causal by itself. Raises ValueError for any other.
    """
    nothing_known = isinstance(held, KeptLayer) and held.valid is None and held.bias is None
    if mask is None and selection.index is None and nothing_known:
        return None  # a decoding step: the kernel is right as it is
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}: where image tokens leave, masks of sdpa, eager or flash attention are "
            "known. Load the model with attn_implementation='sdpa'."
        )
    own, room = selection.index, held.room if isinstance(held, KeptStaticLayer) else 0
    what = (mask, own, selection.valid, selection.bias)
    where = () if held is None else (held.held, held.gone, room, held.index, held.valid, held.bias)
    found: LayerMask = selection.once_for(("mask", *what, *where), lambda: masked(mask, states, selection, held))
    if held is not None and own is not None:
        held.index, held.valid, held.bias = found.index, found.valid, found.bias
        held.gone += selection.tokens - own.shape[1]
    return found.mask


@dataclass
class LayerMask:
    """The mask of a layer; where what its cache holds then was, (batch, held), which of it counts, None for all, and what is
    added to logits at it, None for nothing."""

    mask: Tensor | None
    index: Tensor
    valid: Tensor | None
    bias: Tensor | None


def masked(mask: Tensor | None, states: Tensor, selection: Selection, held: KeptTokens | None) -> LayerMask:
    """Of a layer whose cache holds so much: see `layer_mask`."""
    batch, device = len(states), states.device
    own, valid = selection.index, selection.valid
    rows = torch.arange(selection.tokens, device=device).expand(batch, -1) if own is None else own
    past = 0 if held is None else held.seen
    index = rows + past if past else rows
    if held is not None and held.held:
        before, known = held.positions(batch, index.device)
        index = torch.cat([before, index], 1)
        if valid is not None or known is not None:
            known = torch.ones_like(before, dtype=torch.bool) if known is None else known
            valid = torch.cat([known, torch.ones_like(rows, dtype=torch.bool) if valid is None else valid], 1)
    bias = biases(rows, selection, held)
    if mask is None and valid is None and bias is None and not isinstance(held, KeptStaticLayer):
        return LayerMask(None if past == 0 or rows.shape[1] == 1 else causal(rows, index, past), index, None, None)
    columns, counts = index, valid
    if isinstance(held, KeptStaticLayer):  # behind what it holds there is room, which nobody sees
        free = held.room - index.shape[1] + (0 if own is None or held.is_initialized else own.shape[1] - selection.tokens)
        counts = F.pad(torch.ones_like(index, dtype=torch.bool) if valid is None else valid, (0, free), value=False)
        columns = F.pad(index, (0, free))
    if mask is None:
        found = causal(rows, columns, past)
    elif mask.dim() == 2:
        if bias is not None:
            raise ValueError(
                "flash attention takes no weights of tokens, and image tokens here stand for several: load the model with "
                "attn_implementation='sdpa', or prune it by a method that does not merge with weights."
            )
        seen = mask.gather(1, columns)
        return LayerMask(seen if counts is None else seen * counts.to(seen.dtype), index, valid, None)
    else:
        sample = torch.arange(batch, device=rows.device).view(-1, 1, 1)
        found = mask.expand(batch, -1, -1, -1)[sample, 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
    if counts is not None:
        nothing = False if found.dtype == torch.bool else torch.finfo(found.dtype).min
        found = found.masked_fill(~counts[:, None, None], nothing)
    return LayerMask(found if bias is None else added(found, bias, states.dtype), index, valid, bias)


def biases(rows: Tensor, selection: Selection, held: KeptTokens | None) -> Tensor | None:
    """What is added to logits at what a layer sees, (batch, held + rows); None for nothing."""
    before = None if held is None else held.biases()
    if before is None and selection.bias is None:
        return None
    own = torch.zeros(rows.shape, device=rows.device) if selection.bias is None else selection.bias
    if held is None or not held.held:
        return own
    before = own.new_zeros(len(own), held.held) if before is None else before
    return torch.cat([before, own], 1)


def added(mask: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask, (batch, 1, rows, columns), with a number for each column that is seen. bias: (batch, columns or fewer)."""
    bias = F.pad(bias, (0, mask.shape[-1] - bias.shape[1])).to(dtype)[:, None, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return torch.where(mask > -1.0, mask + bias, mask)


def causal(rows: Tensor, columns: Tensor, past: int) -> Tensor:
    """(batch, 1, rows, columns): a token sees those that were not behind it."""
    return (columns.unsqueeze(1) <= (rows + past).unsqueeze(2)).unsqueeze(1)
