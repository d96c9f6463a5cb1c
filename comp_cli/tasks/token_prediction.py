"""Captioning and question answering, judged token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from ..data.rows import Pair
from ..topology import Topology
from ..topology.base import Written
from .base import Outputs, Ranking, Task, unwrapped

SUBSAMPLE = 4  # tokens of a text on average: each is as many numbers as the vocabulary has words, 120 kB for BERT's


@dataclass(frozen=True)
class TokenPrediction(Task):
    """Which token comes next in a text, after those before it as they should be (teacher forcing)? A row for each token that
    is predicted. Labels: the tokens of the text.

    written: where the texts are, which the shape of the model says (see `of`).
    """

    name: str
    new_tokens: int
    has_answers: bool = False
    outputs: tuple[str, ...] = ("logits",)
    metric: str = "token accuracy"
    written: Written | None = None
    paired_inputs = True

    def of(self, topology: Topology) -> Self:
        return replace(self, written=topology.written)

    @property
    def place(self) -> Written:
        """Where the texts are. Raises ValueError for a task that no model was named for."""
        if self.written is None:
            raise ValueError(f"{self.name}: of no model yet, so where its texts are is not known; see Task.of")
        return self.written

    @property
    def compares(self) -> str:
        return f"the {'answers' if self.has_answers else 'texts'} are what should be written"

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        captured: list[Tensor] = []
        head = unwrapped(model).get_submodule(self.place.head)
        hook = head.register_forward_hook(lambda module, args, output: captured.extend((output, args[0])))
        try:
            model(**inputs)
        finally:
            hook.remove()
        wanted = self.place.predicted(inputs)
        return tuple(part[:, :-1][wanted].float() for part in captured)

    def subsample(self, parts: Outputs, samples: int) -> Outputs:
        rows, most = len(parts[0]), SUBSAMPLE * samples
        if rows <= most:
            return parts
        evenly = torch.arange(most) * rows // most  # in integers: the same on every device
        return tuple(part[evenly.to(part.device)] for part in parts)

    def features(self, outputs: Outputs) -> Tensor:
        return outputs[1]

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        return [Ranking(outputs[0], labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs[self.place.text][:, 1:][self.place.predicted(inputs)]

    def predictions(self, outputs: Outputs) -> Tensor:
        return outputs[0].argmax(-1)

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        return {self.metric: rankings[0].top_k_accuracy()}
