"""One encoder of a dual pair, on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.rows import Pair
from .base import Outputs, Ranking, Task

SHARPNESS = 20.0  # what a cosine counts where a model has no scale of its own


@dataclass(frozen=True)
class Embedding(Task):
    """One encoder of a dual pair, on its own: which of the other samples is the nearest? No labels: the dense model knows."""

    name: str
    output: str
    metric: str = "agreement"

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,)

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        return (F.normalize(getattr(model(**inputs), self.output).float(), dim=-1),)

    def features(self, outputs: Outputs) -> Tensor:
        return outputs[0]

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        logits = SHARPNESS * outputs[0] @ outputs[0].T
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -1e4)
        return [Ranking(logits, labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> None:
        return None

    def predictions(self, outputs: Outputs) -> Tensor:
        return self.rankings(outputs, None)[0].logits.argmax(-1)

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        return {"agreement": rankings[0].top_k_accuracy()}

    def decisions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return self.rankings((F.normalize(outputs[self.output], dim=-1),), None)[0].logits
