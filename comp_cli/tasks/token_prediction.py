"""Captioning and question answering, judged token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.rows import Pair
from .base import Outputs, Ranking, Task, unwrapped

SUBSAMPLE = 4  # tokens of a text on average: each is as many numbers as the vocabulary has words, 120 kB for BERT's


@dataclass(frozen=True)
class TokenPrediction(Task):
    """Which token comes next in a text, after those before it as they should be (teacher forcing)? A row for each token that
    is predicted. Labels: the tokens of the text.

    text, mask: the inputs that hold it. head: path of the module that makes logits of its states.
    """

    name: str
    text: str
    mask: str
    outputs: tuple[str, ...] = ("logits",)
    head: str = "text_decoder.cls"
    metric: str = "token accuracy"
    has_answers: bool = False
    paired_inputs = True

    @property
    def compares(self) -> str:
        return f"the {'answers' if self.has_answers else 'texts'} are what should be written"

    @property
    def judged(self) -> tuple[str, ...]:
        return self.outputs

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        captured = []
        head = unwrapped(model).get_submodule(self.head)
        hook = head.register_forward_hook(lambda module, args, output: captured.extend((output, args[0])))
        try:
            model(**inputs)
        finally:
            hook.remove()
        wanted = inputs[self.mask][:, 1:].bool()
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
        return inputs[self.text][:, 1:][inputs[self.mask][:, 1:].bool()]

    def predictions(self, outputs: Outputs) -> Tensor:
        return outputs[0].argmax(-1)

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        return {self.metric: rankings[0].top_k_accuracy()}
