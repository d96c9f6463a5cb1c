"""Single encoders: one half of a dual encoder by itself, of images or of texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import APART, Topology
from .card_examples import TEXTS, picture_of
from .client_cards import CLIENT, IN_CLIENT, of_images, of_texts
from .graph_specs import TEXT, VISION, Axes

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from ..tasks import Task


@dataclass(frozen=True, kw_only=True)
class SingleEncoder(Topology):
    """`inputs` say of what."""

    inputs: tuple[str, ...]

    AXES: ClassVar[dict[str, Axes]] = APART
    layouts: ClassVar[tuple[str, ...]] = ("optimum", "transformers.js")

    @property
    def why_whole(self) -> str:
        return "encodes only one of images and texts"

    def called(self, graph: str) -> str:
        """As the half of the model that it is."""
        return VISION if self.reads_images else TEXT

    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        """How near two things are."""
        if self.reads_images:
            made = (
                "image = load_image(picture)\n"
                "both = [image, ImageOps.mirror(image)]  # or another picture\n"
                'inputs = processor(images=both, return_tensors="pt")'
            )
        else:
            made = f"texts = {json.dumps(TEXTS)}\ninputs = processor(texts, {self.padding_code(longest)})"
        return (
            f"{made}\n"
            f"with torch.no_grad():\n    first, second = model(**inputs).{task.outputs[0]}\n"
            'print(f"{torch.cosine_similarity(first, second, dim=0):.3f} alike (1: the same)")'
        )

    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        output = task.outputs[0]
        mirror = ":, :, ::-1" if document["with_preprocessing"] else "..., ::-1"  # columns are the last but one, or the last
        if self.reads_images:
            made = [
                "values = pixels(picture)",
                f"both = np.concatenate([values, values[{mirror}]])  # the picture and its mirror image, or another one",
                f'first, second = run("model", {{{picture_of(document, "both")}}})["{output}"]',
            ]
        else:
            made = [f"texts = {json.dumps(TEXTS)}", f'first, second = run("model", tokens(texts))["{output}"]']
        cosine = "cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)"
        return "\n".join([*made, cosine, 'print(f"{cosine:.3f} alike (1: the same)")'])

    def client_code(
        self,
        document: Mapping[str, Any],
        task: Task,
        generation: GenerationConfig | None,
        processor: Any,
        hub_id: str | None,
    ) -> tuple[str, str] | None:
        if document["layout"] != "transformers.js":
            return None
        return CLIENT, of_images(hub_id) if self.reads_images else of_texts(hub_id)

    def graphs_note(self, document: Mapping[str, Any]) -> str | None:
        return IN_CLIENT if document["layout"] == "transformers.js" and self.reads_images else None
