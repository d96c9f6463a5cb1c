"""The three graphs of a decoder that reads images, with the names that optimum and transformers.js have for them.

vision_encoder: pixel_values -> image_features, and, where image tokens are chosen before the first layer by what images are,
image_kept, and image_labels or image_weights. embed_tokens: input_ids -> inputs_embeds, into which the features are put where
the placeholders are. decoder_model_merged: a prompt or a step, see merged_decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import IDS, MASK, PIXELS, Tensors
from .caches import Heads, keys_of
from .decoder_names import (
    BATCH,
    BIAS,
    EMBED,
    EMBEDS,
    FEATURES,
    KEPT,
    LABELS,
    MERGED,
    PAST,
    POSITIONS,
    PRESENT,
    VISION_ENCODER,
    WEIGHTS,
    WHERE,
    WRITTEN,
)
from .graph_specs import Axes, GraphSpec, Shape, Signature, Step, Values

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ..runtime.token_selection import Stage

CLUSTERING = ("cls-clusters", "diverse-clusters")  # rules that say which cluster each token is in
APART = "Put prompts with another number of images into a batch of their own."
IMAGES, TEXT, SEEN = 3, 7, 5  # of the example: images of a prompt, words around them, tokens of the past


class Cached(NamedTuple):
    """A tensor of the cache, (batch, number, tokens, width). length: the layer whose number of tokens it has."""

    length: int
    heads: Heads


def why_not(stages: Sequence[Stage], layout: str) -> str | None:
    """Why a decoder with these stages has no graphs of a layout, as a sentence; None where it has."""
    from ..runtime.token_rules import STAGE_RULES

    weighing = next((stage for stage in stages if STAGE_RULES[stage.rule].weighs), None)
    if weighing is None:
        return None
    said = f"the rule {weighing.rule} before layer {weighing.layer} gives image tokens weights"
    if weighing.layer or len(stages) > 1:
        return (
            f"{said}, which graphs carry from a stage before layer 0 where no other follows. Prune the model with that one "
            "stage, or by another rule, tops or divprune for example."
        )
    if layout != "optimum":
        return (
            f"{said}, which the client of --layout {layout} does not hand on. Export without --layout, or prune the model by "
            "another rule, tops or divprune for example."
        )
    return None


@dataclass(frozen=True)
class DecoderGraphs:
    """What is to be known of a model for its graphs.

    layout: comp.image_tokens of config.json. encode: (multimodal model, pixels) -> features. head: path of what makes logits.
    stages: at which image tokens leave. tokens: of an image. placeholder: its id in input_ids. side: of an image, pixels.
    heads: of each layer. prefix: whether prompts with images are read in both directions. first_position: of a text.
    """

    layout: Mapping[str, Any]
    encode: Callable[[Any, Tensor], Tensor]
    head: str
    stages: tuple[Stage, ...]
    tokens: int
    placeholder: int
    side: int
    width: int
    vocabulary: int
    heads: tuple[Heads, ...]
    prefix: bool = False
    first_position: int = 0

    @property
    def asks(self) -> bool:
        """Whether the decoder is told where image tokens are."""
        return bool(self.stages) or self.prefix

    @property
    def ahead(self) -> Stage | None:
        """The stage that needs nothing but the image, and so is the vision encoder's; None where there is none."""
        first = self.stages[0] if self.stages else None
        return first if first and first.layer == 0 and not first.needs & {"text"} else None

    @property
    def weighted(self) -> bool:
        """Whether image tokens stand for several, see `why_not`."""
        from ..runtime.token_rules import STAGE_RULES

        return self.ahead is not None and STAGE_RULES[self.ahead.rule].weighs

    @property
    def handed_on(self) -> tuple[str, ...]:
        """What the vision encoder says of images, beside their features."""
        if self.ahead is None:
            return ()
        if self.weighted:
            return (KEPT, WEIGHTS)
        return (KEPT, LABELS) if self.ahead.rule in CLUSTERING else (KEPT,)

    # The graphs --------------------------------------------------------------------------------------------------------

    def specs(self) -> list[GraphSpec]:
        free: Axes = {0: BATCH, 1: "tokens"}
        past: dict[str, Axes] = {name: {0: BATCH, 2: f"past_tokens_{part.length}"} for name, part in self.caches(PAST).items()}
        images: dict[str, Axes] = {WHERE: {0: BATCH, 1: "image_tokens"}} if self.asks else {}
        images |= {name: {0: BATCH, 1: "kept_tokens"} for name in self.handed_on}
        read: dict[str, Axes] = {EMBEDS: free, MASK: {0: BATCH, 1: "seen_tokens"}, POSITIONS: free}
        made: dict[str, tuple[int | str, ...]] = {"logits": (BATCH, 1, self.vocabulary)}
        for name, part in self.caches(PRESENT).items():
            made[name] = (BATCH, part.heads.number, f"present_tokens_{part.length}", part.heads.width)
        see = GraphSpec(VISION_ENCODER, self._see, (FEATURES, *self.handed_on), {PIXELS: {0: "images"}}, self._pixels)
        decode = GraphSpec(MERGED, self._decode, tuple(made), read | images | past, self._go_on)
        return [
            replace(see, may_be_empty=True),
            GraphSpec(EMBED, self._embed, (EMBEDS,), {IDS: free}, self._ids),
            replace(decode, may_be_empty=True, sizes=made),
        ]

    def caches(self, prefix: str) -> dict[str, Cached]:
        """What is handed from pass to pass, in its order: keys and values of each layer, and, where tokens have weights, what
        is added to logits at them. All layers hold the same tokens then."""
        each = [(layer, heads) for layer, heads in enumerate(self.heads) for _ in ("key", "value")]
        parts = [Cached(0 if self.weighted else layer, heads) for layer, heads in each]
        found = dict(zip(keys_of(len(self.heads), prefix), parts, strict=True))
        return found | {f"{prefix}.{BIAS}": Cached(0, Heads(1, 1))} if self.weighted else found

    def _see(self, model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
        import torch

        from ..runtime.token_rules import View
        from .merged_decoder import attention_nodes, chosen_by

        inner: Any = model.get_submodule(self.layout["model"])
        asks = self.ahead is not None and "class" in self.ahead.needs
        if asks:
            inner.comp_reader.listen()
        with attention_nodes(model.get_submodule(self.layout["features"]).config):
            features = self.encode(inner, inputs[PIXELS])
        if self.ahead is None:
            return (features,)
        places = torch.arange(self.tokens, device=features.device).expand(features.shape[0], -1)
        view = View(torch.ones_like(places, dtype=torch.bool), features, places)
        view.grid = None if self.layout["square"] else places.new_zeros(places.shape[0], 2)
        if asks:
            read = inner.comp_reader.payload()
            view.class_attention, view.tower_keys = read[..., 0], read[..., 1:]
        choice, kept = chosen_by(self.ahead, view, self.tokens)
        features = features if choice.states is None else choice.states
        said = (part.gather(1, kept) for part in (choice.labels, choice.weights) if part is not None)
        return (features, kept, *said)

    def _embed(self, model: nn.Module, inputs: Tensors) -> tuple[Tensor]:
        text: Any = model.get_submodule(self.layout["text"])
        return (text.embed_tokens(inputs[IDS]),)

    def _decode(self, model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
        from .merged_decoder import decode

        return decode(model, self, inputs, [inputs[name] for name in self.caches(PAST)])

    # Examples: of sizes that are nothing else's, for equal sizes could be taken for the same one

    def _pixels(self, model: nn.Module) -> Tensors:
        import torch

        return {PIXELS: torch.randn(IMAGES, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))}

    def _ids(self, model: nn.Module) -> Tensors:
        import torch

        return {IDS: torch.arange(2 * TEXT).view(2, TEXT) % self.vocabulary}

    def _go_on(self, model: nn.Module) -> Tensors:
        """A prompt with images behind tokens of before, as many in the first layer and one more in each that follows, if the
        layers may hold different tokens."""
        import torch

        generator = torch.Generator().manual_seed(0)
        count = IMAGES * self.tokens
        length = count + TEXT
        made: Tensors = {
            EMBEDS: torch.randn(2, length, self.width, generator=generator),
            MASK: torch.ones(2, SEEN + length, dtype=torch.long),
            POSITIONS: (torch.arange(length) + SEEN).expand(2, -1).contiguous(),
            WHERE: (torch.arange(count) + 2).expand(2, -1).contiguous(),
        }
        if self.ahead:
            kept = self.ahead.left(self.tokens)
            made[KEPT] = torch.arange(kept).repeat(2, IMAGES)
            made[LABELS] = (torch.arange(kept) // 2).repeat(2, IMAGES)
            made[WEIGHTS] = made[LABELS] + 1.0
        for name, (length, (heads, width)) in self.caches(PAST).items():
            made[name] = torch.randn(2, heads, SEEN + length, width, generator=generator)
        return {name: made[name] for name in self.specs()[2].inputs}

    def signatures(self) -> dict[str, Signature]:
        """What each graph takes and hands out."""
        embeds: dict[str, Shape] = {EMBEDS: (None, None, self.width)}
        said: dict[str, Shape] = dict.fromkeys(self.handed_on, (None, None))
        read: dict[str, Shape] = dict.fromkeys((MASK, POSITIONS, *((WHERE,) if self.asks else ())), (None, None))

        def cache(prefix: str) -> dict[str, Shape]:
            return {name: (None, heads, None, width) for name, (_, (heads, width)) in self.caches(prefix).items()}

        chosen: dict[str, Shape] = {name: (None, self.ahead.left(self.tokens)) for name in self.handed_on if self.ahead}
        return {
            VISION_ENCODER: Signature(
                {PIXELS: (None, 3, self.side, self.side)}, {FEATURES: (None, self.tokens, self.width)} | chosen
            ),
            EMBED: Signature({IDS: (None, None)}, embeds),
            MERGED: Signature(embeds | read | said | cache(PAST), {"logits": (None, 1, self.vocabulary)} | cache(PRESENT)),
        }

    # Running them ------------------------------------------------------------------------------------------------------

    def see(self, step: Step, pixels: np.ndarray, batch: int) -> Values:
        """What the vision encoder makes of the images of so many prompts, as many of each: image_features (batch, image tokens,
        dim), and what it hands on besides, (batch, kept tokens)."""
        if len(pixels) % batch:
            raise ValueError(f"{len(pixels)} images for {batch} prompts: the graphs take as many for each. {APART}")
        found = step(VISION_ENCODER, {PIXELS: pixels})
        shaped = {FEATURES: found.pop(FEATURES).reshape(batch, -1, self.width)}
        return shaped | {name: value.reshape(batch, -1) for name, value in found.items()}

    def read(
        self,
        step: Step,
        input_ids: np.ndarray,
        mask: np.ndarray,
        images: Values,
        past: Sequence[np.ndarray] = (),
        positions: np.ndarray | None = None,
    ) -> Values:
        """Logits (batch, 1, vocabulary) behind some tokens, and the cache: present.0.key, ..., see `caches`.

        mask: (batch, seen + tokens), zeros where prompts are filled up, at the left. images: as `see` makes them, nothing where
        the tokens have none. past: the cache of the tokens before, in its order; none for a prompt. positions: of the
        tokens, as the mask says unless given. Raises ValueError where images and placeholders are not as many.
        """
        import numpy as np

        batch = len(input_ids)
        embeds = step(EMBED, {IDS: input_ids})[EMBEDS]
        kinds = {name: np.float32 if name == WEIGHTS else np.int64 for name in (WHERE, *self.handed_on)}
        given: Values = {name: np.zeros((batch, 0), kind) for name, kind in kinds.items()} | images
        caches = self.caches(PAST)
        if not past:
            past = [np.zeros((batch, count, 0, width), np.float32) for _, (count, width) in caches.values()]
        if features := [given.pop(name) for name in (FEATURES,) if name in given]:
            given[WHERE] = self.places(input_ids, features[0].shape[1])
            np.put_along_axis(embeds, given[WHERE][:, :, None], features[0], 1)
        if positions is None:
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :] + self.first_position
        named = dict(zip(caches, past, strict=True))
        return step(MERGED, given | named | {EMBEDS: embeds, MASK: mask, POSITIONS: positions})

    def places(self, input_ids: np.ndarray, tokens: int) -> np.ndarray:
        """(batch, image tokens): where the placeholders are, as many in each prompt as its images have tokens."""
        import numpy as np

        holds = input_ids == self.placeholder
        if (counts := holds.sum(1).tolist()) != [tokens] * len(input_ids):
            raise ValueError(
                f"prompts with {', '.join(map(str, counts))} placeholders, and images of {tokens} tokens for each: the graphs "
                f"take prompts with as many images each, {self.tokens} placeholders an image. {APART}"
            )
        return np.nonzero(holds)[1].reshape(len(input_ids), -1)

    def logits(self, step: Step, values: Values) -> Values:
        """Logits (batch, tokens, vocabulary) behind a prompt and behind every token that is written but the last."""
        import numpy as np

        ids, mask, written, found = values[IDS], values[MASK], values[WRITTEN], []
        images = self.see(step, values[PIXELS], len(ids))
        past: tuple[np.ndarray, ...] = ()
        for place in range(written.shape[1]):
            made = self.read(step, ids, mask, images, past)
            found.append(made.pop("logits"))
            ids, images, past = written[:, place : place + 1], {}, tuple(made.values())
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
        return {"logits": np.concatenate(found, 1)}
