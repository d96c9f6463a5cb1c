"""What a model is for: which of its outputs are read, and its metrics.

A task ranks candidates for a set of samples: rows of logits, and where it is known which are right. Whether an image and a
text match is one ranking for each pair; retrieval ranks the texts for each image and the images for each text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.rows import Pair
from ..topology import Topology

# What a task takes of a model's outputs, each (rows, ...): a row for each sample, or for each token that is predicted.
# Those of several batches can be joined.
Outputs = tuple[Tensor, ...]

POINTS = {"CIDEr"}  # metrics that are no shares of the samples: 1.0 is 100 points


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the samples, from 0 to 1."""
    return metric not in POINTS


@dataclass(frozen=True)
class Ranking:
    """logits (rows, candidates); right (rows, candidates), booleans, at least one in a row, or (rows,), the one candidate that
    is right; None where nobody said."""

    logits: Tensor
    right: Tensor | None = None

    def loss(self) -> Tensor:
        """Mean surprise, in nats, that a right candidate is chosen."""
        right = self._known()
        if right.ndim == 1:
            return F.cross_entropy(self.logits, right)
        return -self.logits.log_softmax(-1).masked_fill(~right, -torch.inf).logsumexp(-1).mean()

    def top_k_accuracy(self, first: int = 1) -> float:
        """Share of the rows with a right candidate among the `first` best."""
        found = self.logits.topk(min(first, self.logits.shape[-1]), dim=-1).indices
        right = self._known()
        hits = right.unsqueeze(-1) == found if right.ndim == 1 else right.gather(-1, found)
        return hits.any(-1).float().mean().item()

    def _known(self) -> Tensor:
        if self.right is None:
            raise ValueError("nobody said which candidates are right")
        return self.right


class Task:
    """Names of outputs are those of the transformers class; they are the names in ONNX graphs as well.

    outputs: what a graph hands out. judged: those that an export must get right. metric: the one that counts.
    """

    name: str
    metric: str
    has_negatives = False  # whether pairs that do not match are of use
    paired_inputs = False  # whether the model takes one text for each image
    relative = True  # whether an export's errors are judged in units of the largest number
    prompt = "{}"  # what a text is put into
    has_answers = False  # whether texts are questions, and pairs need their answers
    new_tokens = 0  # of the longest text that is written to be judged; 0 where none is

    @property
    def outputs(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def judged(self) -> tuple[str, ...]:
        return self.outputs

    @property
    def compares(self) -> str:
        """What a user's pairs are good for."""
        return "nothing is labelled: the compact model is compared with the dense one"

    def of(self, topology: Topology) -> Self:
        """The task for models of a shape, where it has to know how they are built."""
        return self

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        """Run a model over a batch, and take of its outputs what the rankings are made of."""
        raise NotImplementedError

    def subsample(self, parts: Outputs, samples: int) -> Outputs:
        """Of the outputs of so many samples, and of their labels, the rows that are kept when batches are joined."""
        return parts

    def features(self, outputs: Outputs) -> Tensor:
        """What the decisions are made of, (rows, dim)."""
        raise NotImplementedError

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        raise NotImplementedError

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(rows,) integers, of pairs and the inputs made of them; None where nobody said."""
        raise NotImplementedError

    def shared(self, labels: Tensor | None) -> int:
        """How many samples have a text that is right for several images, where a text is an image's own."""
        return 0

    def predictions(self, outputs: Outputs) -> Tensor:
        """The model's own decisions as labels, for pairs that have none."""
        raise NotImplementedError

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        raise NotImplementedError

    def decisions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (rows, candidates) of the outputs of exported graphs."""
        return outputs[self.outputs[0]].flatten(0, -2)

    def said(self, outputs: Outputs) -> str | None:
        """What a model says of one sample, in words; None where it is no answer that can be read."""
        return None

    def accepts(self, pair: Pair) -> bool:
        return (self.has_negatives or pair.label != 0) and (not self.has_answers or pair.answer is not None)


def unwrapped(model: nn.Module) -> nn.Module:
    """A model out of DistributedDataParallel."""
    return getattr(model, "module", model)
