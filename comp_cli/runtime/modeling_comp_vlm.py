"""The runtime of compact large vision-language models: image tokens leave between the layers of a stock decoder.

This file and token_rules.py ship beside every such checkpoint and need torch and transformers only. They know no model family:
the block `comp` of config.json says where things are and how large they are.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

The forward passes are those of transformers, and so are the attention kernels; no attention map of the decoder is made.
Classes are mixed in before the stock ones, at three seams:

* `ImageFeatures` before the multimodal model notes where image tokens are, and hands on what [CLS] of the vision tower says;
* `DroppingDecoder` before the text model opens a `Selection` for a forward pass, and puts states back where they were;
* `DroppingLayer` before every decoder layer drops tokens at its stage, and hands the stock layer what belongs to those left.

A layer of the cache holds what its layer has kept (`KeptTokens`), and its length is what it has seen: so positions, masks and
slices that transformers derives from a cache are right. Original position ids stay, with gaps.

With `output_hidden_states` the states of a layer are of the tokens that are left there; the last ones are put back in place,
zero where a token has gone.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy as shallow
from dataclasses import dataclass, field
from functools import cache as once
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .token_rules import OF_THE_LAYER_BEFORE, STAGE_RULES, View, may_be_first, needs_of

TESTED = ("5.23", "5.24")  # releases of transformers, the first and the last one that this file was tested with
KINDS = ("image", "video")
CACHES = ("cache", "past_key_values")  # what stock modules call keys and values, since transformers 5.24 and before


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


# The cache ---------------------------------------------------------------------------------------------------------------


def the_cache(cache: Any, past_key_values: Any) -> Any:
    """The keys and values of earlier tokens, under whichever name they came. Raises TypeError for two of them."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise TypeError("two caches were given, as cache= and as past_key_values=: give one.")
    return past_key_values if cache is None else cache


def cache_name(forward: Callable[..., Any]) -> str:
    """What a stock forward pass calls its cache. Raises ValueError where it is neither name: it would be lost."""
    name = next((name for name in CACHES if name in inspect.signature(forward).parameters), None)
    if name is None:
        raise ValueError(f"transformers {transformers.__version__}: {forward.__qualname__} takes no cache that is known here.")
    return name


class KeptTokens:
    """Mixed in before a layer of a cache: it holds fewer tokens than it has seen, and its length is what it has seen.

    index, valid: (batch, known), where the first tokens that it holds were, and which of them count; those behind them are all
    there. None where nothing went yet, or where all count.
    """

    gone: int
    index: Tensor | None
    valid: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Any:
        """The layer with all that it holds."""
        made = cls.__new__(cls)
        vars(made).update(vars(layer))
        made.forget()
        return made

    def forget(self) -> None:
        self.gone, self.index, self.valid = 0, None, None

    @property
    def held(self) -> int:
        """Tokens that it holds."""
        raise NotImplementedError

    @property
    def seen(self) -> int:
        return self.held + self.gone

    def positions(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where what it holds was, (batch, held), and which of it counts (None for all)."""
        have = self.held
        if self.index is None:
            return torch.arange(have, device=device).expand(batch, -1), None
        known = min(self.index.shape[1], have)
        behind = torch.arange(known, have, device=device) + self.gone
        index = torch.cat([self.index[:, :known], behind.expand(batch, -1)], 1)
        return index, None if self.valid is None else F.pad(self.valid[:, :known], (0, have - known), value=True)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Samples change their places, as they do in `keys`."""
        self.index = None if self.index is None else change(self.index)
        self.valid = None if self.valid is None else change(self.valid)

    def forget_last(self, count: int) -> None:
        """Forget where the last tokens seen were, as long as all of them are held. Raises ValueError where some have gone."""
        left = self.held - count
        if self.index is None or left >= self.index.shape[1]:
            return
        held = left >= 0 and self.index[:, left] == self.seen - count  # the first that is forgotten
        if left >= 0 and self.valid is not None:
            held = held & self.valid[:, left]
        if not bool(torch.as_tensor(held).all()):
            said = f"{count} tokens back would cut into an image, of which some tokens have gone"
            raise ValueError(f"a cache cannot be cropped so far: {said}. Start again with an empty cache.")
        self.index, self.valid = self.index[:, :left], None if self.valid is None else self.valid[:, :left]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.rearrange(lambda tensor: tensor[indices])


class KeptLayer(KeptTokens, DynamicLayer):
    """A layer of a cache that grows."""

    @property
    def held(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        self.forget_last(abs(tokens_to_remove))
        super().crop(tokens_to_remove)


class KeptStaticLayer(KeptTokens, StaticLayer):
    """A layer of a cache of fixed size; what has gone before it was filled takes no room."""

    is_compileable = False  # how much it holds is a number of Python's
    count: int

    @classmethod
    def of(cls, layer: Any) -> Any:
        made = super().of(layer)
        made.count = int(layer.cumulative_length)
        return made

    @property
    def held(self) -> int:
        return self.count

    def get_seq_length(self) -> Any:
        return super().get_seq_length() + self.gone

    @property
    def room(self) -> int:
        """Tokens that there is room for: the width of masks."""
        return self.keys.shape[-2] if self.keys is not None else self.max_cache_len - self.gone

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        whole = self.max_cache_len
        self.max_cache_len = whole - self.gone
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len = whole

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.count += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """As of a layer that grows. transformers crops static caches since 5.24."""
        self.forget_last(abs(tokens_to_remove))
        super().crop(-abs(tokens_to_remove))  # type: ignore[misc]
        self.count -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized, self.count = False, 0
        self.forget()


def keep_count(cache: Any, first: int, layers: int) -> None:
    """Make the layers of a cache from the first stage on count what they have seen, and all that are of fixed size: for such
    caches transformers makes a mask in every step, but not where one layer holds what it does not know. Raises ValueError for
    kinds of caches in which layers cannot hold different numbers of tokens."""
    if not hasattr(cache, "layers"):
        raise ValueError(
            f"{type(cache).__name__}: image tokens cannot leave with this cache; use a DynamicCache or StaticCache."
        )
    while cache.layer_class_to_replicate is not None and len(cache.layers) < layers:  # a DynamicCache without a config
        cache.layers.append(cache.layer_class_to_replicate())
    kinds: dict[type, type[KeptTokens]] = {DynamicLayer: KeptLayer, StaticLayer: KeptStaticLayer}
    for place, layer in enumerate(cache.layers[:layers]):
        if place < first and type(layer) is not StaticLayer:
            continue
        if type(layer) in kinds:
            cache.layers[place] = kinds[type(layer)].of(layer)
        elif not isinstance(layer, KeptTokens):
            raise ValueError(
                f"{type(layer).__name__}: image tokens cannot leave with this kind of cache (sliding windows, recurrent "
                "states and quantised keys count what they hold). Use the dynamic cache, or cache_implementation='static'."
            )


# What modules make --------------------------------------------------------------------------------------------------------


def listen_to(module: Any) -> None:
    """Let a module remember what it makes next, where `comp_listens` says so. At the module itself: a copy of a model, whose
    hooks are the same functions, has its own."""
    module.comp_listens, module.comp_made = False, None
    module.register_forward_hook(hold_on)


def hold_on(module: Any, args: Any, output: Tensor) -> None:
    if module.comp_listens:
        module.comp_listens, module.comp_made = False, output.detach()


def made_by(modules: Sequence[Any]) -> list[Tensor]:
    """What they remembered, which they forget."""
    found = [module.comp_made for module in modules]
    for module in modules:
        module.comp_made = None
    return found


# What is left of a forward pass's tokens --------------------------------------------------------------------------------


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
        logits = logits.masked_fill(~self.sees(rows, keys.shape[2]), torch.finfo(torch.float32).min)
        return logits.softmax(-1).mean((1, 2))[..., -tokens:]

    def sees(self, rows: Tensor, keys: int) -> Tensor:
        """(batch, 1, 1, r, keys), True where a row looks."""
        past = 0 if self.past is None else self.past.shape[2]
        if self.mask is not None and self.mask.dim() == 4:
            mask = self.mask[..., :keys].expand(len(rows), -1, -1, -1)[:, 0]
            mask = mask.gather(1, rows.unsqueeze(-1).expand(-1, -1, mask.shape[-1]))
            return (mask if mask.dtype == torch.bool else mask > -1.0)[:, None, None]
        causal = torch.arange(keys, device=rows.device) <= rows.unsqueeze(-1) + past
        if self.mask is not None:
            causal = causal & self.mask[:, None, :keys].bool()
        return causal[:, None, None]


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
    they are among the tokens that are left of the sample. positions (images, n): where they were in the image.
    """

    samples: list[int]
    firsts: list[int]
    counts: list[int]
    columns: Tensor
    positions: Tensor
    class_attention: Tensor | None = None  # (images, n) fp32
    tower_keys: Tensor | None = None  # (images, n, width)
    labels: Tensor | None = None  # (images, n)
    square: bool = False  # whether their tokens are rasters of squares; where not, no raster is known

    @property
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
        for name in ("class_attention", "labels"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held.gather(1, order))
        if self.tower_keys is not None:
            self.tower_keys = self.tower_keys.gather(1, order.unsqueeze(-1).expand(-1, -1, self.tower_keys.shape[-1]))
        self.counts = counts


@dataclass
class Selection:
    """What is left of the tokens of one forward pass.

    index: (batch, left) into those that entered, None while all are left. valid: which of them count, None for all: samples
    that keep fewer are filled up in front. text: (batch, left), those of the prompt's words.
    """

    tokens: int
    images: Images | None = None  # None in a decoding step, and for texts without images
    text: Tensor | None = None
    extra: Tensor | None = None  # (batch, tokens): padding and newline embeddings, which leave at the first stage
    left: list[int] = field(default_factory=list)  # of each sample
    index: Tensor | None = None
    valid: Tensor | None = None
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
        """Let image tokens go. states (batch, left, dim) -> (batch, fewer, dim). Raises ValueError where none would go; shares
        of small images may be the same number at two stages."""
        images = self.images
        assert images is not None and self.text is not None
        counts = [stage.left(first) for first in images.firsts]
        for count, have in zip(counts, images.counts, strict=True):
            same_share = count == have and stage.share is not None and self.index is not None
            if not (0 < count < have or same_share):
                raise ValueError(
                    f"an image of {have} tokens, and the stage before layer {stage.layer} keeps {count}: nothing would be "
                    "dropped. Give larger images, or prune with fewer tokens, or with a share of an image's (--tokens-share)."
                )
        with torch.autocast(states.device.type, enabled=False):  # ranking is in fp32
            choice = STAGE_RULES[stage.rule].choose(self.view(stage, states), counts, **stage.settings)
        place, nowhere = images.rows * self.width + images.columns, self.text.numel()  # padding of `images` goes nowhere
        flat = torch.where(images.valid & ~choice.kept, place, nowhere).flatten()
        goes = torch.zeros(nowhere + 1, dtype=torch.bool, device=flat.device).index_fill(0, flat, True)[:-1].view_as(self.text)
        if choice.states is not None:
            flat = torch.where(choice.kept, place, nowhere).flatten()
            room = F.pad(states.flatten(0, 1), (0, 0, 0, 1))
            states = room.index_copy(0, flat, choice.states.to(states.dtype).flatten(0, 1))[:-1].view_as(states)
        images.labels = images.labels if choice.labels is None else choice.labels
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
        return states.gather(1, chosen.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

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


# Images, before the decoder ----------------------------------------------------------------------------------------------


@dataclass
class Notes:
    """What the multimodal model says of the images of one forward pass."""

    real: Tensor | None = None  # (batch, tokens): which are no padding, None for all
    answers: Tensor | None = None  # (batch, tokens): which are to be predicted, and so no part of what is asked
    newline: Tensor | None = None  # (dim,): what stands behind the rows of an image
    asked: int | None = None  # tokens that are asked, of all that were seen; what follows was written. None for all
    masks: dict[str, Tensor] = field(default_factory=dict)  # kind -> (batch, tokens)
    sizes: dict[str, list[int]] = field(default_factory=dict)  # kind -> tokens of each image or video
    precision: torch.dtype | None = None  # of their features, and of the newlines among these
    payload: Tensor | None = None  # (image tokens, 1 + width) fp32: attention of [CLS], and keys of the vision tower


def token_counts(features: Any) -> list[int]:
    """Tokens of each image: of a list of (tokens, dim), or (images, tokens, dim)."""
    if isinstance(features, Tensor) and features.dim() == 2:
        return [len(features)]
    return [len(one) for one in features]


class ClassAttention:
    """What [CLS] of the vision tower pays to the patches, and their keys, from one query row of a layer: two hooks, no map."""

    def __init__(self, model: nn.Module, where: dict[str, Any]):
        self.attention: Any = model.get_submodule(where["module"])
        self.sources: list[Any] = [self.attention.get_submodule(where[name]) for name in ("query", "key")]
        for source in self.sources:
            listen_to(source)

    def listen(self) -> None:
        """To the pass that comes."""
        for source in self.sources:
            source.comp_listens = True

    def payload(self) -> Tensor:
        """(images, patches, 1 + width), fp32: the attention summed over heads, and the keys, of the last pass."""
        width: int = self.attention.head_dim
        query, keys = (states.float() for states in made_by(self.sources))
        q, k = (states.unflatten(-1, (-1, width)).transpose(1, 2) for states in (query[:, :1], keys))
        with torch.autocast(keys.device.type, enabled=False):
            paid = ((q * width**-0.5) @ k.transpose(-1, -2)).softmax(-1)[:, :, 0, 1:].sum(1)
        return torch.cat([paid.unsqueeze(-1), keys[:, 1:]], -1)


class ImageFeatures:
    """Mixed in before the multimodal model."""

    comp_reader: ClassAttention | None  # where a rule asks the vision tower
    comp_arguments: tuple[str, ...]  # of the stock forward pass, in their order
    comp_text: str  # name of the text model
    comp_newline: str  # name of the embedding behind the rows of an image, empty where there is none
    comp_shuffle: float | None  # how much patches are shuffled down (InternVL), None where they are not
    comp_notes: Notes | None = None  # while a forward pass runs
    comp_answers: Tensor | None = None  # of the pass that comes, see Notes
    comp_asked: int | None = None  # while a text is generated, see Notes
    comp_kind: str | None = None  # what is encoded just now

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_placeholder_mask(*args, **kwargs)  # type: ignore[misc]
        if (notes := self.comp_notes) is not None:
            if kwargs.get("video_features") is not None:
                notes.masks["video"] = (found[1] if isinstance(found, tuple) else found)[..., 0]
            else:
                notes.masks["image"] = (found[0] if isinstance(found, tuple) else found)[..., 0]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(self.comp_arguments, args, strict=False))
        notes = self.comp_notes = Notes(kwargs.get("attention_mask"), self.comp_answers, asked=self.comp_asked)
        notes.newline = getattr(self, self.comp_newline) if self.comp_newline else None
        self.comp_answers = None
        text: Any = getattr(self, self.comp_text)
        if encoded := kwargs.get("mm_encoder_outputs"):
            kwargs["mm_encoder_outputs"] = {kind: self.comp_unpack(kind, found) for kind, found in encoded.items()}
        text.comp_notes = notes
        try:
            return super().forward(**kwargs)  # type: ignore[misc]
        finally:
            self.comp_notes = text.comp_notes = None

    def comp_unpack(self, kind: str, encoded: Any) -> Any:
        """Features as the stock model reads them, of what `get_image_features` handed out before: `generate` encodes images
        first, and repeats features, and only these, for beams."""
        notes = self.comp_notes
        assert notes is not None
        if encoded is None:
            return None
        encoded, features = shallow(encoded), encoded.pooler_output
        notes.sizes[kind], notes.precision = token_counts(features), features[0].dtype
        if self.comp_reader is not None and kind == "image":
            parts = [features] if isinstance(features, Tensor) else list(features)
            width = self.config.get_text_config().hidden_size  # type: ignore[attr-defined]
            if any(part.shape[-1] == width for part in parts):
                raise ValueError("image features without what the vision tower says of them: make them with this model.")
            notes.payload = torch.cat([part[..., width:].flatten(0, -2).contiguous().view(torch.float32) for part in parts])
            cut = [part[..., :width] for part in parts]
            encoded.pooler_output = cut[0] if isinstance(features, Tensor) else cut
        return encoded

    def comp_encoded(self, encoded: Any, arguments: dict[str, Any]) -> Any:
        """Note what the features of images are, or, where no forward pass runs, put what the tower says behind them."""
        if not hasattr(encoded, "pooler_output"):
            raise TypeError("get_image_features(return_dict=False) has no room for what token pruning needs: leave it out.")
        payload = None if self.comp_reader is None or self.comp_kind != "image" else self.comp_arranged(encoded, arguments)
        if (notes := self.comp_notes) is not None and self.comp_kind is not None:
            notes.sizes[self.comp_kind], notes.precision = token_counts(encoded.pooler_output), encoded.pooler_output[0].dtype
            if payload is not None:
                notes.payload = torch.cat([part.flatten(0, -2) for part in payload])
        elif payload is not None:
            features = encoded.pooler_output
            pairs = zip([features] if isinstance(features, Tensor) else features, payload, strict=True)
            made = [torch.cat([part, said.to(part.device).view(part.dtype)], -1) for part, said in pairs]
            encoded.pooler_output = made[0] if isinstance(features, Tensor) else made
        return encoded

    def comp_arranged(self, encoded: Any, arguments: dict[str, Any]) -> list[Tensor]:
        """What the tower says, in the order of the features: (tokens, 1 + width) of each, or of all as one."""
        assert self.comp_reader is not None
        said, features, model = self.comp_reader.payload(), encoded.pooler_output, self
        if hasattr(model, "pack_image_features"):  # crops are put together, with newline embeddings
            newline, sizes = said.new_zeros(said.shape[-1]), arguments["image_sizes"]
            parts, _ = model.pack_image_features(said.split(crops_of(model, sizes)), sizes, "default", image_newline=newline)
        elif (ratio := self.comp_shuffle) is not None:  # patches that become one token: their mean
            side = math.isqrt(said.shape[1])
            mixed: Any = model.pixel_shuffle(said.reshape(len(said), side, side, -1), scale_factor=ratio)  # type: ignore[attr-defined]
            parts = [mixed.flatten(1, 2).unflatten(-1, (-1, said.shape[-1])).mean(-2)]
        else:
            parts = list(said)
        expected = [features] if isinstance(features, Tensor) else features
        if [part.shape[:-1] for part in parts] != [part.shape[:-1] for part in expected]:
            raise ValueError("the vision tower has other tokens than its features: ranking by [CLS] is not possible here.")
        return parts


def crops_of(model: Any, image_sizes: Any) -> list[int]:
    """Crops of each image, of a model that cuts large images into some (LLaVA-NeXT)."""
    points, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return [image_size_to_num_patches(size, points, side) for size in image_sizes]


def noting(stock: Any, name: str) -> Callable[..., Any]:
    """`get_image_features` or `get_video_features` of a stock model, its results noted. `generate` reads the signature."""
    kind, encode = name.split("_")[1], getattr(stock, name)
    signature = inspect.signature(encode)

    @wraps(encode)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.comp_kind is not None:  # videos may be encoded as images are
            return encode(self, *args, **kwargs)
        self.comp_kind = kind
        given = signature.bind_partial(self, *args, **kwargs).arguments
        if self.comp_reader is not None and kind == "image":
            if given.get("vision_feature_layer") not in (None, getattr(self.config, "vision_feature_layer", None)):
                raise ValueError("vision_feature_layer: images are ranked by [CLS] in the layer of config.json. Leave it out.")
            self.comp_reader.listen()
        try:
            return self.comp_encoded(encode(self, *args, **kwargs), given)
        finally:
            self.comp_kind = None

    return features


# The decoder -------------------------------------------------------------------------------------------------------------


class DroppingDecoder:
    """Mixed in before the text model."""

    comp_first: int  # the first layer with a stage
    comp_square: bool  # whether the tokens of an image are the raster of a square
    comp_asks: bool  # whether a rule reads the text
    comp_tiles: bool  # whether images stand in tiles, which follow one another in the prompt
    comp_cache_name: str  # of the stock class
    comp_notes: Notes | None = None
    comp_current: Selection | None = None  # while a forward pass runs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        model: Any = self
        cache = the_cache(cache, past_key_values)
        notes, self.comp_notes = self.comp_notes, None
        states = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        pictured = notes is not None and bool(notes.masks)
        if pictured and model.config._attn_implementation == "flex_attention":
            raise ValueError(
                "flex_attention makes BlockMasks, which cannot be cut to the image tokens that are left: load the model with "
                "attn_implementation='sdpa'."
            )
        if pictured:
            cache = self.comp_cache(cache, kwargs)
        counted = cache is not None and any(isinstance(layer, KeptTokens) for layer in cache.layers)
        if pictured or counted:
            selection = Selection(states.shape[1], left=[states.shape[1]] * len(states))
            if pictured and notes is not None:
                past = 0 if cache is None else cache.get_seq_length()
                self.comp_open(selection, notes, states, past)
            kwargs["selection"] = self.comp_current = selection
        try:
            given = {"attention_mask": attention_mask, "position_ids": position_ids, self.comp_cache_name: cache}
            found = super().forward(inputs_embeds=states, **given, **kwargs)  # type: ignore[misc]
        finally:
            selection, self.comp_current = self.comp_current, None  # type: ignore[assignment]
        if selection is not None and selection.index is not None:
            last = found.last_hidden_state
            if selection.valid is not None:
                last = last * selection.valid.unsqueeze(-1)
            index = selection.index.unsqueeze(-1).expand_as(last)
            found.last_hidden_state = last.new_zeros(states.shape).scatter(1, index, last)
        return found

    def comp_cache(self, cache: Any, arguments: dict[str, Any]) -> Any:
        """The cache of a pass with images, counting what it has seen; that of the stock model would count what it holds."""
        model: Any = self
        wanted = arguments.get("use_cache")
        wanted = model.config.use_cache if wanted is None else wanted
        checkpointed = model.training and model.gradient_checkpointing
        if self.comp_cache_name == CACHES[0]:  # since transformers 5.24 not without gradients
            checkpointed = checkpointed and torch.is_grad_enabled()
        if cache is None and wanted and not checkpointed:
            cache = DynamicCache(config=model.config)
        if cache is not None:
            keep_count(cache, self.comp_first, len(model.layers))
        return cache

    def comp_open(self, selection: Selection, notes: Notes, states: Tensor, past: int | Tensor) -> None:
        """Find the tokens of each image, and those of what is asked. past: tokens seen before this pass."""
        batch, tokens = states.shape[:2]
        places, sizes = [], []
        for kind in KINDS:
            if kind in notes.masks:
                own = [size for size in notes.sizes[kind] if size]  # a list of samples has some without images
                places.append(first_ones(notes.masks[kind].reshape(1, -1), sum(own))[0])
                sizes += own if kind == "video" else apart(places[-1], own)
        where = torch.cat(places)
        ends = list(accumulate(sizes))
        begins = [end - size for end, size in zip(ends, sizes, strict=True)]
        bounds = where[torch.tensor([*begins, *(end - 1 for end in ends)], device=where.device)].tolist()
        heads, tails = bounds[: len(sizes)], bounds[len(sizes) :]
        if any(head // tokens != tail // tokens for head, tail in zip(heads, tails, strict=True)):
            raise ValueError("an image whose tokens are in two samples: images and placeholders are not in the same order.")
        samples = [head // tokens for head in heads]
        if self.comp_tiles:
            samples, sizes = joined(samples, sizes, heads, tails)
        selection.text = real_tokens(notes.real, batch, tokens, past, states.device)
        selection.extra = ~selection.text
        pictured = torch.zeros(batch * tokens, dtype=torch.bool, device=states.device).index_fill(0, where, True)
        selection.text = selection.text & ~pictured.view(batch, tokens)
        if notes.answers is not None:
            selection.text = selection.text & ~notes.answers.to(states.device)
        if notes.asked is not None:
            selection.text = selection.text & (torch.arange(tokens, device=states.device) + past < notes.asked)
        if self.comp_asks and not bool(selection.text[samples].any(1).all()):
            raise ValueError(
                "images are ranked by what is asked, and a prompt has no word that asks, or labels say that all are answers. "
                "Give labels of -100 for what is asked, or prune by a rule that does not read the text."
            )
        most, device = max(sizes), states.device
        begin = torch.tensor(list(accumulate(sizes, initial=0))[:-1], device=device).unsqueeze(1)
        count = torch.tensor(sizes, device=device).unsqueeze(1)
        place = torch.arange(most, device=device)
        slots = begin + torch.minimum(place, count - 1)  # (images, n) into `where`
        valid = place < count
        if notes.newline is not None:
            newline = notes.newline.to(states.device, notes.precision).to(states.dtype)
            extra = (states.flatten(0, 1)[where] == newline).all(-1)
            valid = valid & ~extra[slots]
            flags = torch.zeros(batch * tokens, dtype=torch.bool, device=device).index_copy(0, where, extra)
            selection.extra = selection.extra | flags.view(batch, tokens)
            sizes = valid.sum(1).tolist()
            slots = slots.gather(1, first_ones(valid, max(sizes)))
        columns = where[slots] % tokens
        positions = torch.arange(columns.shape[1], device=device).expand_as(columns)
        images = Images(samples, sizes, list(sizes), columns, positions, square=self.comp_square)
        if notes.payload is not None:
            said = notes.payload.to(device)[slots]
            images.class_attention, images.tower_keys = said[..., 0], said[..., 1:]
        selection.images = images

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        """Features of deeper layers of the tower, added to the image tokens that are left (Qwen3-VL)."""
        selection = self.comp_current
        if selection is None or selection.index is None:
            return super()._deepstack_process(hidden_states, visual_pos_masks, visual_embeds)  # type: ignore[misc]
        whole = hidden_states.new_zeros(*visual_pos_masks.shape, hidden_states.shape[-1])
        whole = whole.masked_scatter(visual_pos_masks.to(whole.device).unsqueeze(-1), visual_embeds.to(whole))
        return hidden_states + whole.gather(1, selection.index.unsqueeze(-1).expand_as(hidden_states))


def real_tokens(mask: Any, batch: int, tokens: int, past: int | Tensor, device: torch.device) -> Tensor:
    """(batch, tokens): which of the tokens of a pass are no padding. mask: (batch, seen); or as `generate` makes it ahead for
    caches of fixed size, (batch or 1, 1, tokens, seen), a dict of such by kind of layer: what does not see itself is padding.
    past: tokens seen before the pass."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -tokens:].bool().to(device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        own = torch.arange(tokens, device=mask.device)
        seen = mask[:, 0, own, own + past]
        return (seen if seen.dtype == torch.bool else seen > -1.0).to(device).expand(batch, -1)
    return torch.ones(batch, tokens, dtype=torch.bool, device=device)


def apart(places: Tensor, sizes: list[int]) -> list[int]:
    """Tokens of each image, cut where words stand between them: SmolVLM hands over the images of a prompt as one.

    places: (tokens,) int, rising, of all images one behind the other.
    """
    ends = {*accumulate(sizes), *(places.diff() != 1).nonzero()[:, 0].add(1).tolist()}
    return [end - start for start, end in pairwise([0, *sorted(ends)])]


def joined(samples: list[int], sizes: list[int], heads: list[int], tails: list[int]) -> tuple[list[int], list[int]]:
    """Sample and tokens of each image whose tiles follow one another without a word between them."""
    found: list[list[int]] = []
    end = None
    for sample, size, head, tail in zip(samples, sizes, heads, tails, strict=True):
        if end is not None and head == end + 1 and found[-1][0] == sample:
            found[-1][1] += size
        else:
            found.append([sample, size])
        end = tail
    return [sample for sample, _ in found], [size for _, size in found]


class DroppingLayer:
    """Mixed in before a decoder layer. What it does comes before gradient checkpointing, so that nothing is chosen twice."""

    comp_stage: Stage | None = None
    comp_heard: frozenset[str] = frozenset()  # what the stage behind this layer asks of it
    comp_cache_name: str  # of the stock class

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        selection: Selection | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        layer: Any = self
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        cache = the_cache(cache, past_key_values)
        given = {self.comp_cache_name: cache, **kwargs}
        if selection is None:
            asked = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "position_ids": position_ids}
            return call(hidden_states, **asked, **given)
        if self.comp_stage is not None and selection.images is not None:
            hidden_states = selection.drop(self.comp_stage, hidden_states)
        held = None if cache is None else cache.layers[layer.self_attn.layer_idx]
        before = earlier_keys(held) if self.comp_heard and selection.images is not None else None
        held = held if isinstance(held, KeptTokens) else None
        if selection.index is not None:
            position_embeddings = selection.turned(position_embeddings)
            position_ids = None  # only flash attention reads it, and takes gaps for the ends of packed sequences
        if held is not None or selection.index is not None:
            attention_mask = layer_mask(attention_mask, hidden_states, selection, held)
        if not self.comp_heard or selection.images is None:
            asked = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "position_ids": position_ids}
            return call(hidden_states, **asked, **given)
        attention = layer.self_attn
        heard = Heard(attention.head_dim, attention.scaling, position_embeddings, attention_mask, before)
        asked = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "position_ids": position_ids}
        for source in self.comp_sources():
            source.comp_listens = True
        found = call(hidden_states, **asked, **given)
        heard.query, heard.key = made_by(self.comp_sources())
        selection.heard = heard
        return found

    def comp_sources(self) -> list[Any]:
        """What makes queries and keys of the attention, before RoPE."""
        attention: Any = self.self_attn  # type: ignore[attr-defined]
        return [getattr(attention, f"{letter}_norm", None) or getattr(attention, f"{letter}_proj") for letter in "qk"]

    def comp_listen(self) -> None:
        """Remember queries and keys, for the stage behind this layer."""
        for source in self.comp_sources():
            listen_to(source)


def earlier_keys(held: Any) -> Tensor | None:
    """Keys of earlier tokens in a layer of the cache, (batch, heads, past, head_dim); None where there are none."""
    if held is None or not held.is_initialized:
        return None
    count = held.held if isinstance(held, KeptTokens) else int(held.get_seq_length())
    return held.keys[:, :, :count] if count else None


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
    if mask is None and selection.index is None and isinstance(held, KeptLayer) and held.valid is None:
        return None  # a decoding step: the kernel is right as it is
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() in (2, 4)):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}: where image tokens leave, masks of sdpa, eager or flash attention are "
            "known. Load the model with attn_implementation='sdpa'."
        )
    own, room = selection.index, held.room if isinstance(held, KeptStaticLayer) else 0
    what = (mask, own, selection.valid)
    where = () if held is None else (held.held, held.gone, room, held.index, held.valid)
    new = held is not None
    found: LayerMask = selection.once_for(
        ("mask", *what, *where, int(new)), lambda: masked(mask, len(states), states.device, selection, held)
    )
    if held is not None and own is not None:
        held.index, held.valid = found.index, found.valid
        held.gone += selection.tokens - own.shape[1]
    return found.mask


@dataclass
class LayerMask:
    """The mask of a layer; where what its cache holds then was, (batch, held), and which of it counts, None for all."""

    mask: Tensor | None
    index: Tensor
    valid: Tensor | None


def masked(mask: Tensor | None, batch: int, device: Any, selection: Selection, held: KeptTokens | None) -> LayerMask:
    """Of a layer whose cache holds so much: see `layer_mask`."""
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
    if mask is None and valid is None and not isinstance(held, KeptStaticLayer):
        return LayerMask(None if past == 0 or rows.shape[1] == 1 else causal(rows, index, past), index, None)
    columns, counts = index, valid
    if isinstance(held, KeptStaticLayer):  # behind what it holds there is room, which nobody sees
        free = held.room - index.shape[1] + (0 if own is None or held.is_initialized else own.shape[1] - selection.tokens)
        counts = F.pad(torch.ones_like(index, dtype=torch.bool) if valid is None else valid, (0, free), value=False)
        columns = F.pad(index, (0, free))
    if mask is None:
        found = causal(rows, columns, past)
    elif mask.dim() == 2:
        seen = mask.gather(1, columns)
        return LayerMask(seen if counts is None else seen * counts.to(seen.dtype), index, valid)
    else:
        sample = torch.arange(batch, device=rows.device).view(-1, 1, 1)
        found = mask.expand(batch, -1, -1, -1)[sample, 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
    if counts is not None:
        nothing = False if found.dtype == torch.bool else torch.finfo(found.dtype).min
        found = found.masked_fill(~counts[:, None, None], nothing)
    return LayerMask(found, index, valid)


def causal(rows: Tensor, columns: Tensor, past: int) -> Tensor:
    """(batch, 1, rows, columns): a token sees those that were not behind it."""
    return (columns.unsqueeze(1) <= (rows + past).unsqueeze(2)).unsqueeze(1)


# The model ---------------------------------------------------------------------------------------------------------------


class CompactVLM:
    """Mixed in before the model with its head: refuses what would be wrong without a word."""

    comp_inner_path: str  # of the multimodal model
    comp_placeholders: Sequence[int] = ()  # tokens that stand for those of an image or a video

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock model, which without a cache, or where another model guesses ahead, reads what was written along with
        the prompt: images are ranked by the prompt alone."""
        generate: Callable[..., Any] = super().generate  # type: ignore[misc]
        if not self.comp_placeholders:
            return generate(inputs, *args, **kwargs)
        inner: Any = self.get_submodule(self.comp_inner_path)  # type: ignore[attr-defined]
        given = (inputs, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")))
        lengths = [tensor.shape[1] for tensor in given if isinstance(tensor, Tensor) and tensor.dim() > 1]
        outer, inner.comp_asked = inner.comp_asked, max(lengths, default=None)
        try:
            return generate(inputs, *args, **kwargs)
        finally:
            inner.comp_asked = outer

    def _prefill(self, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if self.comp_placeholders and generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size: an image cut into chunks would be ranked in parts. Leave it out.")
        return super()._prefill(input_ids, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """`generate` compiles steps on a static cache where there is a GPU; not where how much a layer holds is a number of
        Python's: each step would be compiled anew."""
        return not self.comp_placeholders and super()._valid_auto_compile_criteria(*args, **kwargs)  # type: ignore[misc]


def read_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is to be predicted is no instruction: images are ranked as if it were still to be written. And no loss for the token
    right behind an image, for the image's last token, whose state would predict it, may have gone. A hook before the forward
    pass."""
    ids, labels = args[0] if args else kwargs.get("input_ids"), kwargs.get("labels")
    model.get_submodule(model.comp_inner_path).comp_answers = None if labels is None else labels != -100
    if ids is not None and labels is not None:
        pictured = torch.isin(ids[:, :-1], torch.tensor(model.comp_placeholders, device=ids.device))
        kwargs = kwargs | {"labels": labels.masked_fill(F.pad(pictured, (1, 0)), -100)}
    return args, kwargs


def reading_as(stock: Any, made: type) -> type:
    """The made class, which reads weights under the names of older releases as the stock class does. transformers knows these
    names by class or by kind of model; of a class that is not its own it asks neither, unless it is told."""
    known = get_checkpoint_conversion_mapping(stock.__name__)
    if known is None and issubclass(made, CompactVLM):
        known = get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if known is not None:
        register_checkpoint_conversion_mapping(made.__name__, known, overwrite=True)
    return made


@once
def mixed(before: type, stock: Any) -> Any:
    """The stock class with another one before it."""
    members: dict[str, Any] = {"__module__": stock.__module__}
    if before is ImageFeatures:
        names = (f"get_{kind}_features" for kind in KINDS)
        members |= {name: noting(stock, name) for name in names if hasattr(stock, name)}
        members["comp_arguments"] = tuple(inspect.signature(stock.forward).parameters)[1:]  # without self
    elif before is not CompactVLM:
        members["comp_cache_name"] = cache_name(stock.forward)
    # Under its name: transformers asks by it which outputs can be recorded.
    return reading_as(stock, type(stock.__name__, (before, stock), members))


def mix_in(before: type, module: nn.Module) -> Any:
    """Give a module of a stock class one before it, in place."""
    if not isinstance(module, before):
        kind: Any = type(module)
        module.__class__ = mixed(before, kind)
    return module


def drop_tokens(model: Any, layout: dict[str, Any], stages: Sequence[Stage]) -> None:
    """Let image tokens leave a stock model at these stages, in place. Raises ValueError for a decoder in which they cannot."""
    text = model.get_submodule(layout["text"])
    check_decoder(text.config, stages, len(text.layers))
    needs: frozenset[str] = frozenset().union(*(stage.needs for stage in stages))
    inner = mix_in(ImageFeatures, model.get_submodule(layout["model"]))
    inner.comp_text, inner.comp_shuffle = layout["text"].rpartition(".")[2], layout["shuffle"]
    asking = [stage.rule for stage in stages if "class" in stage.needs]
    if asking and layout["class_attention"] is None:
        raise ValueError(f"the rule {asking[0]} ranks by [CLS], and this model's vision tower has none.")
    inner.comp_reader = ClassAttention(model, layout["class_attention"]) if asking else None
    mix_in(DroppingDecoder, text)
    text.comp_asks = bool(needs & {"text", "attention", "last"})
    text.comp_first, text.comp_tiles = min(stage.layer for stage in stages), layout["shuffle"] is not None
    text.comp_square = layout.get("square", False)
    inner.comp_newline = (layout["newline"] or "").rpartition(".")[2]
    at = {stage.layer: stage for stage in stages}
    for place, layer in enumerate(text.layers):
        mix_in(DroppingLayer, layer)
        layer.comp_stage = at.get(place)
        layer.comp_heard = at[place + 1].needs & OF_THE_LAYER_BEFORE if place + 1 in at else frozenset()
        if layer.comp_heard:
            layer.comp_listen()
    mix_in(CompactVLM, model)
    names = [f"{kind}_token_id" for kind in KINDS]
    model.comp_placeholders = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    model.comp_inner_path = layout["model"]
    model.register_forward_pre_hook(read_labels, with_kwargs=True)


def check_decoder(config: Any, stages: Sequence[Stage], layers: int) -> None:
    """Raises ValueError for stages that cannot be, and decoders whose layers do not all see every token before them."""
    kinds = sorted({*(getattr(config, "layer_types", None) or [])} - {"full_attention"})
    if kinds:
        raise ValueError(
            f"layers of {', '.join(kinds)}: image tokens cannot leave such a decoder, whose layers count or mix them."
        )
    places = [stage.layer for stage in stages]
    if places != sorted(set(places)) or not 0 <= places[0] <= places[-1] < layers:
        raise ValueError(f"stages before layers {places} of {layers}: expected each before another layer, in their order.")
    for stage in stages:
        if not (stage.share is None and (stage.keep or 0) > 0 or stage.keep is None and 0 < (stage.share or 0) < 1):
            found = f"keep {stage.keep} and share {stage.share}"
            raise ValueError(
                f"the stage before layer {stage.layer} has {found}: expected a keep above 0, or a share between 0 and 1."
            )
        if stage.rule not in STAGE_RULES:
            raise ValueError(f"the rule {stage.rule!r} is unknown; this runtime has {', '.join(STAGE_RULES)}.")
        if stage.layer == 0 and not may_be_first(stage.rule, stage.settings):
            raise ValueError(f"the rule {stage.rule} reads the layer before: it cannot stand before layer 0.")


def resized(linear: Any, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer of another size, its weights left as they come."""
    kind = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=linear.bias is not None, **kind)


def resize(layer: nn.Module, layout: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Give a stock layer the heads and channels of its plan, in place; the stock forward pass runs them."""
    where, size = layout["attention"], sizes["attention"]
    attention: Any = layer.get_submodule(where["module"])
    inner = size["num_heads"] * size["head_dim"]
    shared = size.get("num_key_value_heads", size["num_heads"]) * size["head_dim"]
    rows = [3 * inner] if len(where["qkv"]) == 1 else [inner, shared, shared]
    for name, count in zip(where["qkv"], rows, strict=True):
        linear: Any = attention.get_submodule(name)
        if linear.out_features != count:
            attention.set_submodule(name, resized(linear, linear.in_features, count))
    out: Any = layer.get_submodule(where["out"])
    if out.in_features != inner:
        layer.set_submodule(where["out"], resized(out, inner, out.out_features))
        counts = {"num_heads": size["num_heads"], "num_attention_heads": size["num_heads"], "embed_dim": inner}
        counts["num_key_value_heads"] = shared // size["head_dim"]
        for name, value in counts.items():  # of those that its forward pass may read
            if hasattr(attention, name):
                setattr(attention, name, value)
    *widened, last = layout["ffn"]
    for path in widened:
        linear = layer.get_submodule(path)
        if linear.out_features != sizes["ffn"]:
            layer.set_submodule(path, resized(linear, linear.in_features, sizes["ffn"]))
    linear = layer.get_submodule(last)
    if linear.in_features != sizes["ffn"]:
        layer.set_submodule(last, resized(linear, sizes["ffn"], linear.out_features))


def make_compact(model: nn.Module, comp: dict[str, Any]) -> None:
    """Give every tower of a stock model the sizes of its plan, and the decoder its stages, in place."""
    for tower in comp["towers"]:
        layout = tower["layout"]
        layers: Any = model.get_submodule(f"{layout['encoder']}.{layout['layers']}")
        if len(layers) != len(tower["layers"]):
            raise ValueError(f"{layout['encoder']}: the plan has {len(tower['layers'])} layers, the model {len(layers)}")
        for layer, sizes in zip(layers, tower["layers"], strict=True):
            resize(layer, layout, sizes)
    if stages := [Stage(**stage) for stage in comp.get("token_stages", ())]:
        drop_tokens(model, comp["image_tokens"], stages)


@contextmanager
def own_sizes(config: Any) -> Iterator[None]:
    """The config with the sizes of its weights. In config.json one is written larger, so that no stock class loads the folder
    and answers as the dense model, without a word."""
    apart = config.comp.get("told_apart")
    if apart is None:
        yield
        return
    section = getattr(config, apart["section"]) if apart["section"] else config
    written = getattr(section, apart["name"])
    setattr(section, apart["name"], apart["dense"])
    try:
        yield
    finally:
        setattr(section, apart["name"], written)


@once
def compact_class(architecture: str) -> type:
    """The stock class of that name with `__init__` extended: its forward passes, its outputs, its options."""
    warn_if_untested()
    stock = getattr(transformers, architecture)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with own_sizes(config):
            stock.__init__(self, config, *args, **kwargs)
            make_compact(self, config.comp)

    # _auto_class: a compact model that was trained further takes the runtime along when it is saved.
    members = {"__init__": __init__, "__module__": __name__, "_auto_class": "AutoModelForImageTextToText"}
    # Named once more, for Auto classes to see that it can generate: they would make a class of their own otherwise.
    bases = (CompactVLM, stock, transformers.GenerationMixin)
    return reading_as(stock, type(f"Compact{architecture}", bases, members))


def __getattr__(name: str) -> type:
    # `auto_map` names CompactLlavaForConditionalGeneration and its like; each is made when it is asked for.
    if name.startswith("Compact") and hasattr(transformers, name.removeprefix("Compact")):
        return compact_class(name.removeprefix("Compact"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
