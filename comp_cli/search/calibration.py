"""Plans run over calibration pairs: what matters in them, how much they lose, and what recovery needs."""

import torch
from torch import Tensor, nn

from .. import tasks
from ..data.batches import Batch
from ..engine import scoring, stages
from ..engine.recover import Fitted, collect_grams
from ..models.dense import Dense
from ..plan import Plan
from ..progress import Progress
from ..tasks import comparison

Grams = dict[scoring.Key, Tensor]


def gather_grams(dense: Dense, batches: list[Batch], progress: Progress) -> Grams:
    model = dense.runtime(dense.plan)
    with progress.track("gathering activations for recovery", len(batches)) as bar:
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
        self.known = [comparison.subsampled_labels(dense.task, batch) for batch in batches]
        labels = [label for label in self.known if label is not None]
        self.labels = torch.cat(labels) if len(labels) == len(self.known) else None
        self.expected: list[tasks.Outputs] = []  # of every batch what was read of the first plan: the dense one

    def measure(self, plan: Plan) -> stages.Measurement:
        """What the training-free model of a plan shows."""
        return self.judge(self.dense.runtime(plan, self.grams, self.fitted), plan)

    def judge(self, model: nn.Module, plan: Plan) -> stages.Measurement:
        """What any model of a plan shows. The first one is taken for the dense model."""
        task = self.dense.task
        captured: list[tasks.Outputs] = []

        def run(inputs: dict[str, Tensor]) -> Tensor:
            number = len(captured)
            read = task.subsample(task.forward(model, inputs), self.batches[number].samples)
            captured.append(tuple(part.detach().cpu() for part in read))
            return comparison.loss(task.rankings(read, self._right(number, captured[-1]).to(read[0].device)))

        batches = self.dense.on_device(self.batches)
        scores = scoring.collect(model, self.dense.family, plan, batches, rule=self.rule, seed=self.seed, run=run)
        self.expected = self.expected or captured
        dense, found = comparison.concatenate(self.expected), comparison.concatenate(captured)
        distance = comparison.feature_distance(task.features(dense), task.features(found)).item()
        rankings = task.rankings(found, self.labels)
        if self.labels is not None:
            return stages.Measurement(scores, comparison.loss(rankings).item() + distance, task.metrics(rankings)[task.metric])
        known = task.rankings(dense, None)
        return stages.Measurement(
            scores, comparison.divergence(known, rankings).item() + distance, comparison.agreements(known, rankings)
        )

    def _right(self, number: int, read: tasks.Outputs) -> Tensor:
        """The right answers to a batch; without labels what the dense model decides, because the divergence from it has no
        slope where pruning begins."""
        known = self.known[number]
        return self.dense.task.predictions(self.expected[number] if self.expected else read) if known is None else known
