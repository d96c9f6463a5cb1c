"""Image-text matching: do the two belong together?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.rows import Pair
from .base import Outputs, Ranking, Task


@dataclass(frozen=True)
class Matching(Task):
    """Do image and text belong together? Labels: 1 where they do, else 0."""

    name: str = "itm"
    outputs: tuple[str, ...] = ("itm_score",)
    judged: tuple[str, ...] = ("itm_score",)
    metric: str = "accuracy"
    feature: str = "question_embeds"  # (batch, tokens, dim), of which the first decides
    has_negatives = paired_inputs = True
    relative = False
    compares = "where labels say whether image and text match, they count; else the dense model's decisions"

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        outputs = model(**inputs)
        return getattr(outputs, self.outputs[0]).float(), getattr(outputs, self.feature)[:, 0].float()

    def features(self, outputs: Outputs) -> Tensor:
        return outputs[1]

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        return [Ranking(outputs[0], labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor | None:
        known = all(pair.label is not None for pair in pairs)
        return torch.tensor([pair.label for pair in pairs]) if known else None

    def predictions(self, outputs: Outputs) -> Tensor:
        return outputs[0].argmax(-1)

    def said(self, outputs: Outputs) -> str:
        return f"match {outputs[0].softmax(-1)[0, 1].item():.2f}"

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        return {"accuracy": rankings[0].top_k_accuracy()}
