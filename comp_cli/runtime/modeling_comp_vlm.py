"""The runtime of compact large vision-language models: image tokens leave between the layers of a stock decoder.

This file, kept_cache.py, token_selection.py and token_rules.py ship beside every such checkpoint and need torch and
transformers only. They know no model family: the block `comp` of config.json says where things are and how large they are.

    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

The forward passes are those of transformers, and so are the attention kernels; no attention map of the decoder is made.
Classes are mixed in before the stock ones, at three seams:

* `ImageFeatures` before the multimodal model notes where image tokens are, and hands on what [CLS] of the vision tower says;
* `DroppingDecoder` before the text model opens a `Selection` for a forward pass, and puts states back where they were
  (token_selection.py);
* `DroppingLayer` before every decoder layer drops tokens at its stage, and hands the stock layer what belongs to those left.

A layer of the cache holds what its layer has kept, and its length is what it has seen (kept_cache.py). Original position ids
stay, with gaps.

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
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .kept_cache import CACHES, KeptTokens, cache_name, keep_count, the_cache
from .token_rules import OF_THE_LAYER_BEFORE, STAGE_RULES, may_be_first
from .token_selection import Heard, Images, Selection, Stage, first_ones, layer_mask, sources_of

TESTED = ("5.23", "5.24")  # releases of transformers, the first and the last one that this file was tested with
KINDS = ("image", "video")


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
        stock: Any = super().get_placeholder_mask  # type: ignore[misc]
        found = stock(*args, **kwargs)
        if (notes := self.comp_notes) is not None:
            given = inspect.signature(stock).bind(*args, **kwargs).arguments
            if given.get("video_features") is not None:
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
        given = signature.bind_partial(self, *args, **kwargs).arguments
        if self.comp_reader is not None and kind == "image":
            if given.get("vision_feature_layer") not in (None, getattr(self.config, "vision_feature_layer", None)):
                raise ValueError("vision_feature_layer: images are ranked by [CLS] in the layer of config.json. Leave it out.")
            self.comp_reader.listen()
        self.comp_kind = kind
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
        sources = sources_of(attention)
        for source in sources:
            source.comp_listens = True
        found = call(hidden_states, **asked, **given)
        heard.query, heard.key = made_by(sources)
        selection.heard = heard
        return found

    def comp_listen(self) -> None:
        """Remember queries and keys, for the stage behind this layer."""
        for source in sources_of(self.self_attn):  # type: ignore[attr-defined]
            listen_to(source)


def earlier_keys(held: Any) -> Tensor | None:
    """Keys of earlier tokens in a layer of the cache, (batch, heads, past, head_dim); None where there are none."""
    if held is None or not held.is_initialized:
        return None
    count = held.held if isinstance(held, KeptTokens) else int(held.get_seq_length())
    return held.keys[:, :, :count] if count else None


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


# What is read of the arguments of a stock forward pass, the cache aside: see cache_name.
READ: dict[type, frozenset[str]] = {
    ImageFeatures: frozenset({"attention_mask", "mm_encoder_outputs"}),
    DroppingDecoder: frozenset({"attention_mask", "position_ids"}),
    DroppingLayer: frozenset({"attention_mask", "position_ids", "position_embeddings"}),
}


@once
def mixed(before: type, stock: Any) -> Any:
    """The stock class with another one before it. Raises ValueError where its forward pass lacks what that one reads: it would
    be None, without a word."""
    if missing := sorted(READ.get(before, frozenset()) - set(inspect.signature(stock.forward).parameters)):
        raise ValueError(f"transformers {transformers.__version__}: {stock.__name__}.forward takes no {', '.join(missing)}.")
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
