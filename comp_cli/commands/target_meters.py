"""What a target is measured by: bytes of the weights, milliseconds of a forward pass, points of the metric.

A meter reads a model of a plan. `excess` of what it read falls as the ratio rises: above zero a target is missed still, or
there is more that may be lost.
"""

import copy
import math
from typing import Protocol

import torch
from torch import nn

from ..checkpoint.loading import load_model, untied_state_dict
from ..checkpoint.precision import KNOWN, cast, checkpoint_dtypes, in_precision, of_the_whole, round_as_written
from ..data.batches import random_inputs
from ..engine.methods import DECODER
from ..files.tensors import file_size
from ..measure import decoding, timing
from ..measure.variants import torch_runner
from ..models.compact import told_apart
from ..models.dense import Dense
from ..models.pairs import Pairs, pairs_to_choose_on
from ..options import ResolvedOptions, Target
from ..plan import Plan
from ..progress import Progress, Silent
from ..report.prune import PruneReport, Reading
from ..report.prune_tables import target_value
from ..search.once import Once
from ..search.processes import from_main
from ..tasks.base import is_share
from .judging import compare, loss_in_words, lost

ROUNDS = 10  # at least
OFTEN, LONG = (0.5, 5.0), (3.0, 20.0)  # seconds at least and at most: on the way, and of the model that is written
WIDTH = 0.05  # of an interval, as a share of the value: narrow enough
WIDE = 0.15  # so much is told
MARGIN = 0.02  # of a time that is aimed at, so that what is measured anew does not miss by its noise
KINDS = {dtype: kind for kind, dtype in KNOWN.items()} | {torch.int64: "I64", torch.bool: "BOOL", torch.float64: "F64"}


class Meter(Protocol):
    """Attributes: on: what is measured, and on what. recovered: whether the weights matter, or only their shapes."""

    on: str
    recovered: bool

    def dense(self) -> Reading | None:
        """Of the dense model; None where the measurement is relative to it."""

    def read(self, model: nn.Module, plan: Plan) -> Reading:
        """Of a model on the way."""

    def final(self, model: nn.Module, report: PruneReport) -> Reading:
        """Of the model that is to be written, measured anew."""

    def excess(self, found: Reading, *, aimed: bool) -> float:
        """Above zero where the ratio may or must rise. aimed: with a margin for noise."""

    def in_words(self, found: Reading) -> str:
        """What was read."""


class SizeMeter:
    """Bytes of model.safetensors."""

    on, recovered = "model.safetensors", False

    def __init__(self, target: Target, dense: Dense, dtype: torch.dtype | None):
        """dtype: of the written weights; None for that of the checkpoint."""
        self.target, self.source, self.wanted_dtype = target, dense, dtype
        self.own = checkpoint_dtypes(dense.source.folder, dense.state)

    def dense(self) -> Reading:
        return self.read(self.source.whole, self.source.plan)

    def read(self, model: nn.Module, plan: Plan) -> Reading:
        return self._of(told_apart(self.source, model, plan))

    def final(self, model: nn.Module, report: PruneReport) -> Reading:
        return self._of(model)

    def _of(self, model: nn.Module) -> Reading:
        state = untied_state_dict(model)
        dtypes = in_precision(self.own, state, self.wanted_dtype) if self.wanted_dtype else self.own
        kinds = {name: (KINDS[dtypes.get(name, found.dtype)], tuple(found.shape)) for name, found in state.items()}
        return exact(file_size(kinds))

    def excess(self, found: Reading, *, aimed: bool) -> float:
        return math.log(found.value / self.target.wanted)

    def in_words(self, found: Reading) -> str:
        return target_value(self.target.kind, found)


class ClockMeter:
    """Milliseconds of one forward pass in torch at batch 1, beside the stock model's, and how many times fewer these are: what
    `comp bench` calls latency and speed-up of the backend torch. Of decoders that read images a pass is the prompt with its
    image (prefill)."""

    recovered = False

    def __init__(self, target: Target, dense: Dense, options: ResolvedOptions, allow_pickle: bool, progress: Progress):
        self.target, self.seed, self.progress = target, options.seed, progress
        weight = next(iter(dense.state.values()))
        family, self.device = dense.family, weight.device
        self.writes = family.topology.drops_in == DECODER
        self.dtype = decoding.precision(self.device) if self.writes else torch.float32
        stock = load_model(dense.source.folder, family=family, dtype=self.dtype, allow_pickle=allow_pickle)
        self.stock = stock.to(self.device).eval()
        text_tokens = family.topology.text_length(options.text_tokens, dense.longest)
        given = random_inputs(dense.hf_config, family, 1, text_tokens, seed=options.seed)
        self.inputs = decoding.prompt_of(given) if self.writes else given
        self.own = None if self.dtype else of_the_whole(checkpoint_dtypes(dense.source.folder, dense.state), dense.state)
        what = "the prompt with its image (prefill)" if self.writes else "a forward pass"
        number = torch.get_num_threads()
        threads = f" with {number} thread{'s' * (number > 1)}" if self.device.type == "cpu" else ""
        self.on = f"{what} in torch on {self.device}{threads}, batch 1, {text_tokens} text tokens"

    def dense(self) -> Reading | None:
        if self.target.kind == "target_speedup":
            return None
        return self._clocked({"dense": self.stock}, OFTEN)

    def read(self, model: nn.Module, plan: Plan) -> Reading:
        return self._clocked({"dense": self.stock, "compact": model}, OFTEN)

    def final(self, model: nn.Module, report: PruneReport) -> Reading:
        found = self._clocked({"dense": self.stock, "compact": model}, LONG)
        if found.high - found.low > WIDE * found.value:
            said = f"{self.target.option}: times vary here, so that what was measured is {self.in_words(found)}"
            self.progress.warn(f"{said}, 95 % interval. A machine that does nothing else says more.")
        return found

    def _clocked(self, models: dict[str, nn.Module], seconds: tuple[float, float]) -> Reading:
        """Of several processes the first one measures, while the others wait."""

        def measured() -> Reading:
            runners = {side: self._runner(model) for side, model in models.items()}
            return Reading(*timing.time_until(runners, self.inputs, self._of, ROUNDS, WIDTH, seconds))

        return from_main(measured)

    def _of(self, taken: dict[str, list[float]]) -> tuple[float, float, float]:
        if self.target.kind == "target_speedup":
            found = timing.speedup(taken["dense"], taken["compact"], self.seed)
            return found.value, found.low, found.high
        return timing.median_interval(taken.get("compact", taken["dense"]), self.seed)

    def _runner(self, model: nn.Module) -> timing.Runner:
        if not self.writes:
            return torch_runner(model, self.device)
        if model is not self.stock and self.own is not None:  # as it is written; what is in memory stays in fp32
            model = cast(copy.deepcopy(model), self.own)
        return decoding.prefill_runner(model)

    def excess(self, found: Reading, *, aimed: bool) -> float:
        wanted = math.log(self.target.wanted)
        times = wanted - math.log(found.value) if self.target.kind == "target_speedup" else math.log(found.value) - wanted
        return times + MARGIN * aimed

    def in_words(self, found: Reading) -> str:
        return target_value(self.target.kind, found)


class DropMeter:
    """Points that the metric falls by. On the way on pairs that neither the calibration nor the evaluation reads; the final
    figure is the evaluation's."""

    recovered = True

    def __init__(
        self,
        target: Target,
        dense: Dense,
        pairs: Pairs,
        options: ResolvedOptions,
        dtype: torch.dtype | None,
        progress: Progress,
    ):
        """dtype: as in SizeMeter. The calibration pairs must have been read."""
        self.target, self.source, self.options, self.dtype = target, dense, options, dtype
        self.own = checkpoint_dtypes(dense.source.folder, dense.state)
        most, read, seed = options.eval_samples, options.num_samples, options.seed
        self.pairs, unseen = pairs_to_choose_on(dense, pairs, read, most, seed)
        self.once = Once()
        count = len(self.pairs.listed)
        self.on = f"{count} pairs of {self.pairs.said}"
        progress.say(f"the ratio is chosen on {self.on}: one of them is {100 / count:.2g} points")
        if not unseen:
            said = f"--max-drop: the calibration took all pairs of its side, so that the ratio is chosen on {count} of them;"
            progress.warn(f"{said} the evaluation, which has seen none, decides. --num-samples leaves some.")
        if target.wanted < 100 / count and is_share(dense.task.metric):
            progress.warn(f"--max-drop {target.wanted:g} is less than one of the {count} pairs that the ratio is chosen on.")

    def dense(self) -> None:
        return None

    def read(self, model: nn.Module, plan: Plan) -> Reading:
        compact = told_apart(self.source, model, plan)
        state = untied_state_dict(compact)
        round_as_written(compact, in_precision(self.own, state, self.dtype) if self.dtype else self.own)
        self.quality, _ = compare(self.source, compact, self.pairs, self.options, Silent(), self.once)
        return exact(lost(self.quality))

    def final(self, model: nn.Module, report: PruneReport) -> Reading:
        if report.quality is None:
            raise ValueError("a model that is written was compared")
        self.quality = report.quality
        return exact(lost(report.quality))

    def excess(self, found: Reading, *, aimed: bool) -> float:
        left = self.target.wanted - found.value
        return max(left, 1e-9) if found.value <= self.target.wanted else left  # what loses just as much is allowed

    def in_words(self, found: Reading) -> str:
        return f"{loss_in_words(self.quality)}, by {target_value(self.target.kind, found)}"


def exact(value: float) -> Reading:
    return Reading(value, value, value)
