"""Plans run over calibration pairs: what matters in them, how much they lose, and what recovery needs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import tasks
from ..data.batches import Batch
from ..engine import scoring, stages
from ..engine.allocation import Judged
from ..engine.recover import Fitted
from ..engine.sequential_refit import Streams, answered, refit_in_sequence
from ..engine.statistics import Statistics, collect, per_flops
from ..models.dense import Dense
from ..plan import Plan
from ..progress import Progress
from ..tasks import comparison
from .processes import from_main, gathered, processes, share, summed, summed_numbers

Tensors = dict[scoring.Key, Tensor]

REMEMBERED = 2**30  # bytes of the dense model's residual streams that are kept for the next plan
HOPELESS = 1.3  # times what the leader loses on the first half: of 77 plans of the demo none above 1.22 was the better one
PROBED = 8  # pairs that are differentiated at once: all that their layers hold is in memory


def gather_statistics(
    dense: Dense, batches: list[Batch], progress: Progress, *, rises: bool, weighted: bool = True, seed: int = 0
) -> Statistics:
    """What the dense model shows of its parts, Gram matrices in fp32; `rises`: also how much the loss rises where they err, in
    nats a pair, which takes a pass back."""
    task = dense.task
    ready = [piece for batch in batches for piece in (split(batch, PROBED) if rises else [batch])]
    numbers = iter(share(range(len(ready))))

    def run(inputs: dict[str, Tensor]) -> tasks.Outputs:
        return task.subsample(task.forward(dense.whole, inputs), len(next(iter(inputs.values()))))

    def draw(read: tasks.Outputs) -> Tensor:
        return probe(task, drawn_by(seed, next(numbers)), read)

    own = share(ready)
    with progress.track("gathering activations", len(own)) as bar:
        found = collect(
            dense.whole,
            dense.family,
            dense.plan,
            dense.on_device(own),
            run,
            draw=draw if rises else None,
            weighted=weighted,
            advance=bar.advance,
        )
    total, grams = summed(found.grams), {}
    for key in list(total):
        grams[key] = total.pop(key).float()
    pairs = sum(batch.samples for batch in batches)
    return Statistics(grams, summed_numbers(found.rises), summed_numbers(found.energies)).over(pairs)


def drawn_by(seed: int, number: int) -> torch.Generator:
    """What a piece of the calibration pairs is drawn with, whoever draws."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def split(batch: Batch, samples: int) -> Iterator[Batch]:
    """A batch in pieces of so many samples, without its labels."""
    for begin in range(0, batch.samples, samples):
        yield batch.piece(begin, begin + samples)


def probe(task: tasks.Task, random: torch.Generator, read: tasks.Outputs) -> Tensor:
    """A number whose squared change under a small error is, in the mean over draws, the loss that the error adds: the distance
    of the features (Gauss-Newton, by Hutchinson's draws) and the divergence of the decisions (half their Fisher
    information)."""
    features = task.features(read)
    scale = (features.detach().var().clamp(min=1e-6) * features.shape[-1]).sqrt()
    noise = torch.randn(features.shape, generator=random).to(features.device)
    drawn = (noise * features).sum() / scale
    rankings = task.rankings(read, None)
    for ranking in rankings:
        surprise = ranking.logits.log_softmax(-1)
        chosen = torch.multinomial(surprise.detach().exp().cpu(), 1, generator=random).to(surprise.device)
        drawn = drawn + surprise.gather(-1, chosen).sum() * (0.5 / len(rankings)) ** 0.5
    return drawn


class Calibration:
    """Runs plans over the same pairs: what is important in them, and how much they lose.

    The loss is the task's where the pairs are labelled, else the divergence from the dense model; plus the distance of the
    features behind the decisions from the dense model's. Few of the pairs move the former, all of them the latter, so that
    a choice by it holds on other pairs too.
    """

    def __init__(
        self,
        dense: Dense,
        batches: list[Batch],
        grams: Tensors | None,
        rule: str | None,
        seed: int = 0,
        prices: Tensors | None = None,
    ):
        """rule: of the scores, see scoring.PARAMETER_RULES; None where units have `prices`."""
        self.dense, self.batches, self.grams, self.rule, self.seed = dense, batches, grams, rule, seed
        self.prices = prices
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
        numbers = share(range(len(self.batches)))
        captured: list[tasks.Outputs] = []

        def run(inputs: dict[str, Tensor]) -> Tensor:
            number = numbers[len(captured)]
            read = task.subsample(task.forward(model, inputs), self.batches[number].samples)
            captured.append(tuple(part.detach().cpu() for part in read))
            return comparison.loss(task.rankings(read, self._right(number, captured[-1]).to(read[0].device)))

        batches = self.dense.on_device(share(self.batches))
        how: dict[str, Any] = {"rule": self.rule, "seed": self.seed, "run": run}
        scores = scoring.collect(model, self.dense.family, plan, batches, **how, summed=summed, gathered=gathered)
        if self.prices is not None:
            scores = replace(scores, units=per_flops(self.prices, plan, self.dense.plan, self.dense.reference))
        every = gathered(captured)
        self.expected = self.expected or every
        dense, found = comparison.concatenate(self.expected), comparison.concatenate(every)
        return from_main(lambda: self._measured(scores, dense, found))

    def _measured(self, scores: scoring.Scores, dense: tasks.Outputs, found: tasks.Outputs) -> stages.Measurement:
        """What was read of the dense model, and of the one that is judged, as numbers."""
        task = self.dense.task
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


class HeldOut:
    """Judges whole plans with all of their recovery, on pairs that the recovery has not seen: fitted on one half of the pairs
    and judged on the other, and the other way round."""

    def __init__(self, dense: Dense, batches: list[Batch], grams: Tensors | None, sequential: bool, folds: int = 2):
        """grams: None where nothing is refitted. sequential: whether it is refitted in sequence as well. folds: 1 to judge on
        the second half only."""
        self.dense, self.grams, self.sequential = dense, grams, sequential
        self.fitted: Fitted = {}
        self.halves = halved(batches)
        self.whole = self.halves[0][0] is batches[0]  # every other batch, not a half of each
        self.folds = [self.halves, self.halves[::-1]][:folds]
        self.streams = [streams_of_dense(dense, fitted_on, REMEMBERED // folds) for fitted_on, _ in self.folds]
        self.expected: dict[int, Tensor] = {}  # number of a half -> features of the dense model

    def loss(self, plan: Plan, leader: Judged | None = None) -> Judged:
        """Mean squared distance of the features behind the decisions from the dense model's, in units of their variance. Of
        what was tried it ranks plans best as other pairs do: docs/methods.md. leader: see `judged`."""
        return judged([partial(self._loss_of_fold, plan, number) for number in range(len(self.folds))], leader)

    def _loss_of_fold(self, plan: Plan, number: int) -> float:
        fitted_on, judged_on = self.folds[number]
        model = self.dense.runtime(plan, self.grams, self.fitted)
        if self.sequential:
            refit(self.dense, model, plan, fitted_on, streams=self.streams[number])
        features, expected = self._features(model, judged_on), self._expected(1 - number)  # by all processes
        return from_main(lambda: comparison.feature_distance(expected, features).item())

    def known_streams(self) -> Streams | None:
        """Of the dense model on all batches in their order; None where they are not known of whole batches."""
        known = self.sequential and self.whole and len(self.streams) == 2 and processes() == 1
        return self.streams[0].taking_turns(self.streams[1]) if known else None

    def _expected(self, half: int) -> Tensor:
        """What the dense model says on a half, which is not taken through what it went through for the refits."""
        if half not in self.expected:
            passed = self.streams[half].passed if half < len(self.streams) else []
            with answered(self.dense.whole, passed):
                self.expected[half] = self._features(self.dense.whole, self.halves[half])
        return self.expected[half]

    def _features(self, model: nn.Module, batches: list[Batch]) -> Tensor:
        """Of the pairs of all processes, in their order."""
        task = self.dense.task
        own = [task.features(part.outputs) for part in comparison.read(model, task, share(batches))]
        return torch.cat(gathered(own))


def judged(halves: Sequence[Callable[[], float]], leader: Judged | None) -> Judged:
    """The mean of what a plan loses on the halves of the pairs, or on the only one that judges. leader: the plan of the lowest
    loss before. One that loses far more on the first half is not judged on the second: its loss is the leader's and the
    difference on the first."""
    first = halves[0]()
    rest = halves[1:]
    if rest and leader is not None and first > HOPELESS * leader.first:
        return Judged(leader.loss + first - leader.first, 1, first)
    losses = [first, *(half() for half in rest)]
    return Judged(sum(losses) / len(losses), len(losses), first)


def halved(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Two halves of the pairs: every other batch, or where that makes no halves half of every batch; a lone pair is in both."""
    first, second = batches[::2], batches[1::2]
    if sum(batch.samples for batch in first) == sum(batch.samples for batch in second):
        return first, second
    pieces = [piece for batch in batches for piece in split(batch, max(1, (batch.samples + 1) // 2))]
    return (pieces[::2], pieces[1::2]) if len(pieces) > 1 else (pieces, pieces)


def streams_of_dense(dense: Dense, batches: Sequence[Batch], room: int = 0) -> Streams:
    """What the dense model holds of these batches, those of all processes; room: bytes of it that may be kept."""
    return Streams(dense.whole, list(dense.on_device(share(batches))), dense.task.forward, room)


def refit(
    dense: Dense,
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    advance: Callable[[], None] = lambda: None,
    streams: Streams | None = None,
) -> None:
    """Refit the output projections of a plan's model in sequence (see sequential_refit.py), in place. `batches`: those of all
    processes. streams: of the dense model on them, where they are known."""
    streams = streams or streams_of_dense(dense, batches)
    how = (streams.batches, dense.task.forward, advance, summed, streams)
    refit_in_sequence(model, dense.whole, dense.family, plan, dense.plan, *how)
