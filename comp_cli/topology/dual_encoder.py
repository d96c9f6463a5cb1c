"""Dual encoders: images and texts become embeddings apart from one another, whose cosine says how well they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .base import APART, PIXELS, Config, Halves, Tensors, Topology, named_outputs
from .card_examples import picture_of, texts_of
from .client_cards import CLIENT, IN_CLIENT, zero_shot
from .graph_specs import IMAGE_EMBEDS, TEXT, TEXT_EMBEDS, VISION, Axes, GraphSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig

    from ..families import Family
    from ..tasks import Task


BIAS = "logit_bias"  # of models that judge every text by itself, not among others


@dataclass(frozen=True, kw_only=True)
class DualEncoder(Topology):
    """text_embeds: path of the matrix that texts end with. halves: where the class of transformers has no `get_image_features`
    and `get_text_features` of its own."""

    text_embeds: str
    halves: Halves | None = None

    AXES: ClassVar[dict[str, Axes]] = APART
    layouts: ClassVar[tuple[str, ...]] = ("optimum", "transformers.js")

    def fixed_flops(self, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, int]) -> int:
        """The cosine of an image with a text."""
        return 2 * shapes[f"{self.text_embeds}.weight"][0]

    def interface(self, model_class: type) -> type:
        if self.halves is None:
            return model_class
        from .dual_interface import dual_class

        return dual_class(model_class, self.halves)

    def facts(self, model: Any) -> dict[str, float]:
        """logit = scale * cosine + bias, which not all have."""
        scale = {"logit_scale": model.logit_scale.exp().item()}
        return scale | ({BIAS: model.logit_bias.item()} if hasattr(model, BIAS) else {})

    # Graphs ------------------------------------------------------------------------------------------------------------

    @property
    def why_whole(self) -> None:
        return None

    def splits(self, split: bool, layout: str) -> tuple[bool, ...]:
        """transformers.js has a class for the whole model and one for each half."""
        return (split,) if layout == "optimum" else (False, True)

    def one_for_all(self, split: bool) -> bool:
        return True

    def graphs(self, family: Family, config: Config, task: Task, split: bool) -> list[GraphSpec]:
        """Split: pixel_values -> image_embeds (images, dim), and input_ids, attention_mask -> text_embeds (texts, dim)."""
        if not split:
            return super().graphs(family, config, task, split)
        axes = self.axes()
        images, texts = {PIXELS: axes.pop(PIXELS)}, axes

        def example(names: Iterable[str], model: nn.Module) -> Tensors:
            made = self.example(family, config, model)
            return {name: made[name] for name in names}

        return [
            GraphSpec(VISION, image_embeds, (IMAGE_EMBEDS,), images, partial(example, images)),
            GraphSpec(TEXT, text_embeds, (TEXT_EMBEDS,), texts, partial(example, texts)),
        ]

    def expected(self, model: nn.Module, task: Task, inputs: Tensors, split: bool) -> Tensors:
        if not split:
            return named_outputs(task.outputs, model, inputs)
        given = {name: tensor for name, tensor in inputs.items() if name != PIXELS}
        (images,), (texts,) = image_embeds(model, inputs), text_embeds(model, given)
        return {IMAGE_EMBEDS: images, TEXT_EMBEDS: texts}

    # Code for cards ----------------------------------------------------------------------------------------------------

    @property
    def note(self) -> str | None:
        return f"It was pruned for `model(..., {self.halves.asked})`." if self.halves else None

    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        logits = "model(**inputs).logits_per_image[0]"
        if self.halves:
            logits = f"model(**inputs, {self.halves.asked}).itm_score.flatten() / {self.halves.temperature}"
        chances = "logits.sigmoid()" if BIAS in facts else "logits.softmax(-1)"
        return (
            f"{texts_of(task)}\n"
            f"inputs = processor(images=load_image(picture), text=texts, {self.padding_code(longest)})\n"
            f"with torch.no_grad():\n    logits = {logits}\n"
            f'for text, chance in zip(texts, {chances}):\n    print(f"{{chance:6.1%}} {{text}}")'
        )

    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        if BIAS in document:  # trained so: every text is a question of its own
            chances = "chances = 1 / (1 + np.exp(-logits))  # of each text by itself"
        else:
            chances = "chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()  # among these texts"
        said = 'for text, chance in zip(texts, chances):\n    print(f"{chance:6.1%} {text}")'
        return f"{texts_of(task)}\n{_logits_code(document)}\n{chances}\n{said}"

    def client_code(
        self,
        document: Mapping[str, Any],
        task: Task,
        generation: GenerationConfig | None,
        processor: Any,
        hub_id: str | None,
    ) -> tuple[str, str] | None:
        return (CLIENT, zero_shot(task, hub_id)) if document["layout"] == "transformers.js" else None

    def graphs_note(self, document: Mapping[str, Any]) -> str | None:
        return IN_CLIENT if document["layout"] == "transformers.js" else super().graphs_note(document)


def image_embeds(model: Any, inputs: Tensors) -> tuple[Tensor]:
    """(images, 3, side, side) -> (images, dim), not normalised."""
    return (model.get_image_features(pixel_values=inputs[PIXELS]).pooler_output,)


def text_embeds(model: Any, inputs: Tensors) -> tuple[Tensor]:
    """(texts, tokens) each -> (texts, dim), not normalised."""
    return (model.get_text_features(**inputs).pooler_output,)


def _logits_code(document: Mapping[str, Any]) -> str:
    """Lines that end with `logits`, a number for each text."""
    if VISION not in document["graphs"]:
        return f'logits = run("model", tokens(texts) | {{{picture_of(document)}}})["logits_per_image"][0]'
    bias = f" + {document[BIAS]!r}" if BIAS in document else ""
    return (
        f'image = run("{Path(VISION).stem}", {{{picture_of(document)}}})["image_embeds"]\n'
        f'words = run("{Path(TEXT).stem}", tokens(texts))["text_embeds"]\n'
        "image, words = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (image, words))\n"
        f"logits = {document['logit_scale']!r} * (words @ image[0]){bias}"
    )
