"""Plans run over calibration pairs: what matters in them, how much they lose, and what recovery needs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import tasks
from .data import Batch
from .engine import scoring, stages
from .engine.recover import Fitted, collect_grams
from .output import Output
from .plan import Plan
from .workbench import Dense

Grams = dict[scoring.Key, Tensor]


def gather_grams(dense: Dense, batches: list[Batch], out: Output) -> Grams:
    model = dense.runtime(dense.plan)
    with out.progress("gathering activations for recovery", len(batches)) as bar:
        return collect_grams(model, dense.family, dense.plan, dense.on_device(batches), bar.advance)


class Calibration:
    """Runs plans over the same pairs: what is important in them, and how much they lose.

    The loss is the task's where the pairs are labelled, else the divergence from the dense model; plus the distance of the
    features behind the decisions from the dense model's. Few of the pairs move the former, all of them the latter, so that
    a choice by it holds on other pairs too.
    """

    def __init__(self, dense: Dense, batches: list[Batch], grams: Grams | None, rule: str, seed: int = 0):
        self.dense, self.batches, self.grams, self.rule, self.seed = dense, batches, grams, rule, seed
        self.fitted: Fitted = {}
        labels = [batch.labels for batch in batches]
        self.labels = torch.cat(labels) if all(label is not None for label in labels) else None
        self.expected: tuple[Tensor, Tensor] | None = None  # decisions and features of the first plan: the dense one

    def look(self, plan: Plan) -> stages.Sight:
        """What the training-free model of a plan shows."""
        return self.judge(self.dense.runtime(plan, self.grams, self.fitted), plan)

    def judge(self, model: nn.Module, plan: Plan) -> stages.Sight:
        """What any model of a plan shows. The first one is taken for the dense model."""
        heard: list[tuple[Tensor, Tensor]] = []

        def hear(outputs: object) -> Tensor:
            logits, features = self.dense.task.read(outputs)
            start = sum(len(one) for one, _ in heard)
            heard.append((logits.detach().cpu(), features.detach().cpu()))
            return F.cross_entropy(logits, self._right(logits, start))

        batches = self.dense.on_device(self.batches)
        scores = scoring.collect(model, self.dense.family, plan, batches, rule=self.rule, seed=self.seed, hear=hear)
        logits, features = (torch.cat(parts) for parts in zip(*heard, strict=True))
        if self.expected is None:
            self.expected = logits, features
        if self.labels is not None:
            loss = F.cross_entropy(logits, self.labels).item()
        else:
            loss = tasks.divergence(self.expected[0], logits)
        metric = (logits.argmax(-1) == self._right(logits, 0)).float().mean().item()
        return stages.Sight(scores, loss + tasks.distance(self.expected[1], features).item(), metric)

    def _right(self, logits: Tensor, start: int) -> Tensor:
        """The right answers to a batch that begins at pair `start`; without labels what the dense model decides, because
        the divergence from it has no slope where pruning begins."""
        known = self.labels
        if known is None:
            if self.expected is None:
                return logits.detach().argmax(-1)
            known = self.expected[0].argmax(-1)
        return known[start : start + len(logits)].to(logits.device)
