"""Search without training: plans are judged as they are sliced, their output projections refitted in closed form."""

from typing import Any

import torch
from torch import nn

from ..data.batches import Batch
from ..engine import allocation, stages
from ..engine.allocation import Judged
from ..engine.methods import METHODS
from ..engine.statistics import keys_of, prices
from ..models.dense import Dense
from ..options import EFFORTS, PruneOptions
from ..plan import Plan
from ..progress import Progress
from .calibration import Calibration, HeldOut, Tensors, gather_statistics, refit
from .journal import Journal
from .once import Once
from .processes import gathered, share

State = stages.SearchState | allocation.AllocationState


class TrainingFree:
    """The search of a run that trains nothing, or begins to train when the plan is found (see with_training.py)."""

    is_over = False  # a journal is gone when the plan is found

    def __init__(
        self,
        dense: Dense,
        options: PruneOptions,
        batches: list[Batch],
        judges: list[Batch],
        journal: Journal | None,
        progress: Progress,
        once: Once | None = None,
        *,
        gathers: bool = True,
        recovers: bool = True,
        searches: bool = True,
    ):
        """batches: calibration pairs. judges: those of them that judge a plan. gathers: whether the dense model
        is looked at. recovers: whether anything may be refitted. searches: whether units need prices. once: what runs
        of other ratios share."""
        self.dense, self.batches, self.judges, self.journal, self.progress = dense, batches, judges, journal, progress
        method, self.effort = METHODS[options.method], EFFORTS[options.effort]
        self.compares_plans = method.compares_plans
        self.recovers = recovers and options.recover
        self.sequential = self.recovers and options.sequential
        priced = method.params == "obs"
        self._once = once or Once()
        self._judge: HeldOut | None = None
        self.grams: Tensors | None = None
        self.prices: Tensors | None = None
        if gathers and (priced or (self.recovers and method.removes("parameters"))):
            weighted = options.cip or not priced
            how = (priced, weighted, options.seed, searches)
            self.grams, self.prices = self._once("statistics", lambda: self._gather(*how))
        rule = None if priced else method.params if options.cip else "wanda"
        self.calibration = Calibration(dense, judges, self.grams, rule, options.seed, self.prices)

    def _gather(self, priced: bool, weighted: bool, seed: int, searches: bool) -> tuple[Tensors | None, Tensors | None]:
        """Gram matrices for who recovers, and prices: one pass of the dense model."""
        dense = self.dense
        found = gather_statistics(dense, self.batches, self.progress, rises=priced, weighted=weighted, seed=seed)
        grams, keys = found.grams if self.recovers else None, keys_of(dense.family, dense.plan)
        if not (priced and searches):
            return grams, None
        with self.progress.track("pricing what can be removed", len(share(keys))) as bar:
            precision = torch.float64 if self.effort.double_prices else torch.float32
            own = prices(dense.whole, dense.family, dense.plan, found, bar.advance, share(keys), precision)
        return grams, dict(zip(keys, gathered(list(own.values())), strict=True))

    def restore(self, saved: dict[str, Any], plan: Plan) -> None:
        """Go on from a journal: in stages what the dense model says is what divergence is measured from."""
        if not self.compares_plans:
            self.calibration.measure(self.dense.plan)

    def measure(self, plan: Plan) -> stages.Measurement:
        """What a plan shows on the calibration pairs."""
        return self.calibration.measure(plan)

    @property
    def thorough(self) -> bool:
        """Whether plans are compared at length: both halves of the pairs judge, and the descent takes its time."""
        return self.effort.is_thorough(self.dense.is_large)

    def held_out_loss(self, plan: Plan, leader: Judged | None = None) -> Judged:
        """What a whole plan loses on pairs that its recovery has not seen, see HeldOut."""
        folds = 2 if self.thorough else 1
        self._judge = self._once("judge", lambda: HeldOut(self.dense, self.judges, self.grams, self.sequential, folds))
        return self._judge.loss(plan, leader)

    def save(self, state: State) -> None:
        """A stage is done, or a plan was looked at."""
        if self.journal:
            self.journal.save(state.to_json())

    def build(self, plan: Plan) -> nn.Module:
        """The model of the plan that was found."""
        model = self.dense.runtime(plan, self.grams)
        if self.sequential:
            layers = sum(len(tower.layers) for tower in plan.towers)
            with self.progress.track("recovering", layers) as bar:
                known = self._judge.known_streams() if self._judge and self.judges is self.batches else None
                refit(self.dense, model, plan, self.batches, bar.advance, known)
        return model

    def finish(self, state: State, model: nn.Module, progress: Progress) -> nn.Module:
        """Nothing is left to do."""
        return model
