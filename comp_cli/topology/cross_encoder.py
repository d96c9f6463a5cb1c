"""Cross-encoders: a text tower that attends to the tokens of an image says whether the two belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import IDS, PIXELS, Config, Tensors, Topology, named_outputs, run_model
from .card_examples import picture_of, texts_of
from .graph_specs import IMAGE_EMBEDS, TEXT, VISION, GraphSpec, matrix_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig

    from ..families import Family
    from ..tasks import Task

MATCHING = """
for text, (no, yes) in zip(texts, scores):
    print(f"{1 / (1 + np.exp(no - yes)):6.1%} sure that this matches: {text}")
"""


@dataclass(frozen=True, kw_only=True)
class CrossEncoder(Topology):
    """vision: path of the module that encodes images. image_embeds: what the rest of the model reads of its output."""

    vision: str
    image_embeds: str

    def encode_images(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """(images, 3, side, side) -> (images, kept tokens, dim)."""
        return getattr(model.get_submodule(self.vision)(pixel_values), self.image_embeds)

    # Graphs ------------------------------------------------------------------------------------------------------------

    @property
    def why_whole(self) -> None:
        return None

    def one_for_all(self, split: bool) -> bool:
        return split

    def graphs(self, family: Family, config: Config, task: Task, split: bool) -> list[GraphSpec]:
        """Split: pixel_values -> image_embeds (images, kept tokens, dim), done once for an image; and image_embeds (of one or
        of each text), input_ids, attention_mask -> the outputs of the task: the model's own forward with a vision tower that
        hands out what it is given."""
        if not split:
            return super().graphs(family, config, task, split)
        whole, images = partial(self.example, family, config), {PIXELS: {0: "images"}}

        def image_graph(model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
            return (self.encode_images(model, inputs[PIXELS]),)

        def text_graph(model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
            embeds = inputs[IMAGE_EMBEDS]
            return run_model(task.outputs, model, {PIXELS: embeds} | {n: t for n, t in inputs.items() if n != IMAGE_EMBEDS})

        def texts_and_image(model: nn.Module) -> Tensors:
            import torch

            made = whole(model)
            with torch.no_grad():
                embeds = self.encode_images(model, made[PIXELS].to(matrix_dtype(model)))
            texts = {name: tensor for name, tensor in made.items() if name != PIXELS}
            return {IMAGE_EMBEDS: torch.zeros(3, *embeds.shape[1:])} | texts  # not as many as texts

        texts = {IMAGE_EMBEDS: {0: "images"}} | {name: axes for name, axes in self.axes().items() if name != PIXELS}
        return [
            GraphSpec(VISION, image_graph, (IMAGE_EMBEDS,), images, lambda model: {PIXELS: whole(model)[PIXELS]}),
            GraphSpec(TEXT, text_graph, task.outputs, texts, texts_and_image, self.without_vision, shares_images=True),
        ]

    def without_vision(self, model: nn.Module) -> nn.Module:
        """The same model, which takes image_embeds for pixel_values; all else is shared."""
        from .stand_ins import Encoded, with_module

        return with_module(model, self.vision, Encoded(self.image_embeds))

    def expected(self, model: nn.Module, task: Task, inputs: Tensors, split: bool) -> Tensors:
        """An image alone goes with every text."""
        found = {IMAGE_EMBEDS: self.encode_images(model, inputs[PIXELS])} if split else {}
        every = inputs[PIXELS].expand(len(inputs[IDS]), -1, -1, -1)
        return found | named_outputs(task.outputs, model, inputs | {PIXELS: every})

    # Code for cards ----------------------------------------------------------------------------------------------------

    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        return (
            f"{texts_of(task)}\n"
            f"inputs = processor(images=[load_image(picture)] * len(texts), text=texts, {self.padding_code(longest)})\n"
            "with torch.no_grad():\n    chances = model(**inputs).itm_score.softmax(-1)[:, 1]\n"
            'for text, chance in zip(texts, chances):\n    print(f"{chance:6.1%} sure that this matches: {text}")'
        )

    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        if VISION in document["graphs"]:
            scores = (
                f'image = run("{Path(VISION).stem}", {{{picture_of(document)}}})  # once, for any number of texts\n'
                f'scores = run("{Path(TEXT).stem}", tokens(texts) | image)["itm_score"]'
            )
        else:
            scores = (
                "images = np.repeat(pixels(picture), len(texts), axis=0)  # one for each text\n"
                f'scores = run("model", tokens(texts) | {{{picture_of(document, "images")}}})["itm_score"]'
            )
        return f"{texts_of(task)}\n{scores}{MATCHING}"
