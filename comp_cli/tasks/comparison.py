"""How far a compact model strays from the dense one, and what either is worth on labelled batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Batch
from .base import Outputs, Ranking, Task

CHUNK = 1024  # rows of logits that are compared at once


def concatenate(collected: Sequence[Outputs]) -> Outputs:
    """The outputs of several batches, as if of one."""
    return tuple(torch.cat(parts) for parts in zip(*collected, strict=True))


@dataclass(frozen=True)
class Read:
    """Of a batch: the outputs that a task reads, the labels, and how many samples it has."""

    outputs: Outputs
    labels: Tensor | None
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """Over `samples` samples: the outputs, the labels, the task's metrics and mean surprise (None without labels)."""

    outputs: Outputs
    labels: Tensor | None
    samples: int
    metrics: dict[str, float] | None
    loss: float | None

    def metric(self, task: Task) -> float | None:
        """The metric that counts."""
        return self.metrics[task.metric] if self.metrics else None


def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None) -> Evaluation:
    """Run a model over batches. Deterministic for a given order of the batches."""
    return judged(task, read(model, task, batches, advance))


def read(model: nn.Module, task: Task, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None) -> list[Read]:
    """What a task reads of a model, batch by batch, on the CPU."""
    weight = next(model.parameters())
    found = []
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(weight.device, weight.dtype)
            outputs = tuple(part.cpu() for part in task.subsample(task.forward(model, batch.inputs), batch.samples))
            found.append(Read(outputs, subsampled_labels(task, batch), batch.samples))
            advance()
    return found


def judged(task: Task, parts: Sequence[Read]) -> Evaluation:
    """Several batches as one."""
    outputs, samples = concatenate([part.outputs for part in parts]), sum(part.samples for part in parts)
    return judged_as_one(task, outputs, [part.labels for part in parts], samples)


def judged_as_one(task: Task, outputs: Outputs, labels: Sequence[Tensor | None], samples: int) -> Evaluation:
    """Outputs of several batches that are joined already. labels: of each batch, None where nobody said."""
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return Evaluation(outputs, None, samples, None, None)
    target = torch.cat(known)
    rankings = task.rankings(outputs, target)
    return Evaluation(outputs, target, samples, task.metrics(rankings), loss(rankings).item())


def subsampled_labels(task: Task, batch: Batch) -> Tensor | None:
    """The labels of the rows that a task keeps."""
    return None if batch.labels is None else task.subsample((batch.labels.cpu(),), batch.samples)[0]


def loss(rankings: list[Ranking]) -> Tensor:
    """Mean over the rankings."""
    return torch.stack([ranking.loss() for ranking in rankings]).mean()


def divergence(dense: list[Ranking], compact: list[Ranking]) -> Tensor:
    """Mean KL(dense || compact) of the decisions, in nats."""

    def summed(dense: Tensor, compact: Tensor) -> Tensor:
        return F.kl_div(compact.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)

    found = []
    for d, c in zip(dense, compact, strict=True):
        parts = zip(d.logits.split(CHUNK), c.logits.split(CHUNK), strict=True)
        found.append(torch.stack([summed(*part) for part in parts]).sum() / len(d.logits))
    return torch.stack(found).mean()


def feature_distance(dense: Tensor, compact: Tensor) -> Tensor:
    """Mean squared difference of features in units of the variance of all numbers in the dense ones. (batch, dim) each."""
    return F.mse_loss(compact, dense) / dense.var().clamp(min=1e-6)


def agreement(dense: Tensor, compact: Tensor) -> float:
    """Share of rows in which the best candidate is the same. (rows, candidates) each."""
    return (dense.argmax(-1) == compact.argmax(-1)).float().mean().item()


def agreements(dense: list[Ranking], compact: list[Ranking]) -> float:
    """Mean of `agreement` over the rankings."""
    found = [agreement(d.logits, c.logits) for d, c in zip(dense, compact, strict=True)]
    return sum(found) / len(found)
