"""Search without training: plans are judged as they are sliced, their output projections refitted in closed form."""

from typing import Any

from torch import nn

from ..data.batches import Batch
from ..engine import stages
from ..engine.methods import METHODS
from ..models.dense import Dense
from ..options import PruneOptions
from ..plan import Plan
from ..progress import Progress
from .calibration import Calibration, gather_grams
from .journal import Journal


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
        *,
        recovers: bool = True,
    ):
        """batches: calibration pairs. judges: those of them that judge a stage. recovers: whether anything may be refitted."""
        self.dense, self.journal = dense, journal
        method = METHODS[options.method]
        recovers = recovers and options.recover and method.removes("parameters")
        self.grams = gather_grams(dense, batches, progress) if recovers else None
        self.calibration = Calibration(dense, judges, self.grams, method.params if options.cip else "wanda", options.seed)

    def restore(self, saved: dict[str, Any], plan: Plan) -> None:
        """Go on from a journal: what the dense model says is what divergence is measured from."""
        self.calibration.measure(self.dense.plan)

    def measure(self, plan: Plan) -> stages.Measurement:
        """What a plan shows on the calibration pairs."""
        return self.calibration.measure(plan)

    def save(self, state: stages.SearchState) -> None:
        """A stage is done."""
        if self.journal:
            self.journal.save(state.to_json())

    def build(self, plan: Plan) -> nn.Module:
        """The model of the plan that was found."""
        return self.dense.runtime(plan, self.grams)

    def finish(self, state: stages.SearchState, model: nn.Module, progress: Progress) -> nn.Module:
        """Nothing is left to do."""
        return model
