"""What a model is for: its decisions, its metric, and how far a compact model strays from the dense one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Batch


@dataclass(frozen=True)
class Task:
    """`logits` runs the model: inputs -> (batch, classes)."""

    name: str
    output: str  # name of the model output that holds the decision; also the name in ONNX graphs
    feature: str  # name of the model output whose first token the decision is read from, (batch, tokens, dim)

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return getattr(model(**inputs), self.output).float()

    def read(self, outputs: object) -> tuple[Tensor, Tensor]:
        """Of a model's outputs the decisions (batch, classes) and the features behind them (batch, dim)."""
        return getattr(outputs, self.output).float(), getattr(outputs, self.feature)[:, 0].float()


TASKS = {"itm": Task("itm", output="itm_score", feature="question_embeds")}


@dataclass(frozen=True)
class Evaluation:
    """Over `samples` pairs: share of right decisions and mean cross-entropy (None without labels), and every logit."""

    logits: Tensor
    samples: int
    accuracy: float | None
    loss: float | None


def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None) -> Evaluation:
    """Run a model over batches. Deterministic for a given order of the batches."""
    weight = next(model.parameters())
    logits, labels = [], []
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(weight.device, weight.dtype)
            logits.append(task.logits(model, batch.inputs).cpu())
            labels.append(None if batch.labels is None else batch.labels.cpu())
            advance()
    found = torch.cat(logits)
    if any(label is None for label in labels):
        return Evaluation(found, len(found), None, None)
    target = torch.cat(labels)
    right = (found.argmax(-1) == target).float().mean().item()
    return Evaluation(found, len(found), right, F.cross_entropy(found, target).item())


def divergence(dense: Tensor, compact: Tensor) -> float:
    """Mean KL(dense || compact) of the decisions, in nats. (batch, classes) each."""
    return F.kl_div(compact.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True).item()


def distance(dense: Tensor, compact: Tensor) -> Tensor:
    """Mean squared difference of features in units of the dense ones' variance. (batch, dim) each."""
    return F.mse_loss(compact, dense) / dense.var().clamp(min=1e-6)


def agreement(dense: Tensor, compact: Tensor) -> float:
    """Share of pairs on which both models decide alike."""
    return (dense.argmax(-1) == compact.argmax(-1)).float().mean().item()
