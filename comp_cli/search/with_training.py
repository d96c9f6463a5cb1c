"""Search with fine-tuning: inside the stages, while units fade, or after a training-free search (see trainer.py)."""

from functools import partial
from typing import Any

from torch import nn

from ..data.batches import Batch
from ..engine import stages
from ..engine.allocation import Judged
from ..models.dense import Dense
from ..models.pairs import Pairs
from ..options import ResolvedOptions
from ..plan import Plan
from ..progress import Progress
from .calibration import Tensors
from .journal import Journal
from .once import Once
from .trainer import Trainer, training_batches
from .training_free import State, TrainingFree


class Trained:
    """The search of a run that trains. Where the stages train, to measure a plan is to train into it. Weights are in the
    journal as soon as one step is done."""

    def __init__(
        self,
        dense: Dense,
        pairs: Pairs,
        options: ResolvedOptions,
        batches: list[Batch],
        judges: list[Batch],
        journal: Journal | None,
        progress: Progress,
        saved: dict[str, Any] | None,
        once: Once,
        *,
        searches: bool = True,
    ):
        """saved: what the journal holds. The others as in TrainingFree."""
        training = options.training
        self.journal, self.stage_steps = journal, training.stage_steps
        self.is_trained = saved is not None and "steps" in saved
        read = partial(training_batches, dense, pairs, training, options.seed)
        self.trainer = Trainer(dense, training, options.ratio, read, cit=options.cit, seed=options.seed)
        self.is_over = saved is not None and saved.get("steps", 0) > self.stage_steps  # the plan is found, and only tuned
        gathers = not self.is_over
        recovers = gathers and not self.stage_steps
        how = {"gathers": gathers, "recovers": recovers, "searches": searches}
        self.free = TrainingFree(dense, options, batches, judges, None, progress, once, **how)

    def restore(self, saved: dict[str, Any], plan: Plan) -> None:
        """Go on from a journal, which the first process reads."""
        if self.is_trained:
            self.trainer.restore(plan, saved["steps"], self.journal.tensors(saved) if self.journal is not None else {})
        if not self.is_over:
            self.free.restore(saved, plan)

    def measure(self, plan: Plan) -> stages.Measurement:
        """What a plan shows on the calibration pairs."""
        return self.trainer.measure(self.free.calibration, plan) if self.stage_steps else self.free.measure(plan)

    @property
    def prices(self) -> Tensors | None:
        """Of what can be removed."""
        return self.free.prices

    @property
    def thorough(self) -> bool:
        """Whether plans are compared at length."""
        return self.free.thorough

    def held_out_loss(self, plan: Plan, leader: Judged | None = None) -> Judged:
        """See TrainingFree."""
        return self.free.held_out_loss(plan, leader)

    def save(self, state: State) -> None:
        """A stage is done, or a part of the tuning."""
        steps = {"steps": self.trainer.done} if self.trainer.done or self.stage_steps else {}
        tensors = self.trainer.to_tensors() if steps else None  # all processes put them together
        if self.journal is not None:
            self.journal.save(state.to_json() | steps, tensors)

    def build(self, plan: Plan) -> nn.Module:
        """The model of the plan that was found."""
        return self.trainer.dense.build(plan, self.trainer.state) if self.trainer.done else self.free.build(plan)

    def finish(self, state: State, model: nn.Module, progress: Progress) -> nn.Module:
        """Tune it for the steps that are left."""
        if not self.trainer.done:
            self.trainer.take(state.plan, model)
        return self.trainer.tune(progress, partial(self.save, state))
