"""`comp prune` with a target in the place of a ratio: the ratio is searched for, and what was asked for is measured.

The search asks few whole plans, each as `comp prune --ratio` finds it, and between them plans that are made as the last whole
one was, which cost nothing to find. All of them share one calibration. What is written is what `comp prune --ratio` writes of
the ratio that was found. What was measured stands in a journal of its own, `.NAME.target.journal`, so that a search that was
killed goes on.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.loading import pick_dtype
from ..data.batches import fingerprint
from ..engine import allocation
from ..engine.crossing import DIGITS, Curve, crossing, settle
from ..engine.methods import METHODS
from ..errors import CompError, DeadEnd, GateError, RefusedError, UsageError
from ..files.outputs import reserve, resolve
from ..models.dense import Dense
from ..options import HUB_DEFAULTS, HubOptions, PruneOptions, Target, Training
from ..plan import Plan
from ..progress import Progress, Recorder
from ..report.base import Sizes
from ..report.prune import PruneReport, RatioTried, Reading, TargetReached
from ..search.journal import Journal
from ..search.once import Once
from ..search.processes import from_main, is_main_process, join, process_device
from ..search.reach import nearest, reached
from ..search.run import calibration_pairs, descent_of, prepare, seek, space_of, state_of
from ..search.sharding import check_launch
from ..search.training_free import State
from .prune import Opened, check_free, describe, early_settings, open_all, prune_in_memory, prune_once, settings_of
from .prune_streamed import find_for_several
from .target_meters import ClockMeter, DropMeter, Meter, SizeMeter

LARGEST = 0.95  # ratio that is tried
TOLERANCE = {"max_drop": 0.02}  # of the ratio: between one that does and one that does not
USUAL_TOLERANCE = 0.01
WHOLE = 6  # plans that are searched for as a whole
STEP = 0.02  # of the ratio, where a model misses when it is measured anew
BESIDE = (0.01, -0.01, 0.02, -0.02)  # where a plan is looked for that a method in stages does not find
BACK = 3  # steps back from a loss that is too large on pairs that the choice has not seen


class Missed(GateError):
    """A model that was made misses the target when it is measured anew."""


class Unwarned(Recorder):
    """Progress of work that is done several times: warnings come with the last one."""

    def warn(self, message: str) -> None:
        pass


def prune_to_target(
    options: PruneOptions,
    target: Target,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    resume: bool = True,
    max_drop: float | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
) -> PruneReport:
    """Prune a model by as much as a target asks for. Of options that were checked (`prune_options.choose_target`).

    Raises DeadEnd for a target out of reach, with what is in reach, and GateError where the model that was made misses it, or
    `max_drop`, after another step: nothing is written then."""
    check_launch(Training() if dry_run else options.training)
    join(process_device(options.device))
    pick_dtype(options.dtype)
    how: dict[str, Any] = {"overwrite": overwrite, "plan_only": dry_run, "max_drop": max_drop, "hub_options": hub_options}
    if dry_run or not is_main_process():
        return TargetRun(options, target, output, None, progress, how).run()
    typed, output = output, resolve(output)
    source = Path(options.model).expanduser()
    with reserve(output, source=source if source.is_dir() else None):
        journal, of_the_model = Journal(output.with_name(f"{output.name}.target"), {}), Journal(output, {})
        if not resume:
            journal.remove()
            of_the_model.remove()
        check_free(of_the_model, output, typed, overwrite)
        if of_the_model.path.exists() and not journal.path.exists():
            hint = "Let that run end, start anew with --no-resume, or change the output."
            raise UsageError(f"the journal {of_the_model.path} is of a run with --ratio.", hint=hint)
        journal.compare(_settings(early_settings(options), target, max_drop))
        try:
            report = TargetRun(options, target, output, journal, progress, how).run()
        except (DeadEnd, GateError):
            journal.remove()
            raise
        return replace(report, output=typed)


def _settings(found: dict[str, Any], target: Target, max_drop: float | None) -> dict[str, Any]:
    """What the journal of a search must agree on; it has no ratio."""
    return {name: value for name, value in found.items() if name != "ratio"} | {
        "target": [target.kind, target.wanted],
        "max_drop": max_drop,
    }


class TargetRun:
    """A search for a ratio and the model of it, the output reserved; without a journal a dry run, or one of several processes'
    that do not write."""

    def __init__(
        self,
        options: PruneOptions,
        target: Target,
        output: Path,
        journal: Journal | None,
        progress: Progress,
        how: dict[str, Any],
    ):
        """how: arguments of `prune_once`."""
        self.options, self.target, self.output, self.journal, self.progress = options, target, output, journal, progress
        self.how, self.once = how, Once()
        self.tolerance = TOLERANCE.get(target.kind, USUAL_TOLERANCE)
        self.tried: dict[str, RatioTried] = {}  # by ratio and cuts
        self.states: dict[str, Any] = {}  # ratio -> what its search ended with, as JSON
        self.dense: Reading | None = None  # of the dense model, where that is no measure of itself
        self.cuts: dict[str, allocation.Cut] = {}  # of the last whole plan
        self.largest = LARGEST
        self.in_reach: Callable[[float], float | None] = lambda ratio: ratio  # the nearest ratio that a search finds a plan of

    def run(self) -> PruneReport:
        """The ratio, then its model."""
        opened: Opened = self.once("dense model", self._open)
        self.opened, self.resolved = opened, opened.resolved
        self._restore(from_main(lambda: self._saved(opened)))
        quiet = Unwarned(self.progress)
        self.ready = prepare(opened.dense, opened.pairs, self.resolved, None, quiet, self.once)
        self.meter = self._meter(opened)
        self._check_needed()
        return self._written(self._ratio())

    def _open(self) -> Opened:
        hub_options = self.how["hub_options"]
        known = find_for_several(self.options, LARGEST, self.progress, hub_options, self.target.option)
        return open_all(self.options, self.progress, hub_options, known)

    def _saved(self, opened: Opened) -> dict[str, Any] | None:
        """What a killed run left. Raises UsageError where it had other settings."""
        if self.journal is None:
            return None
        dense, pairs, resolved = opened.dense, opened.pairs, opened.resolved
        batches = self.once("calibration pairs", lambda: calibration_pairs(dense, pairs, resolved, resolved.num_samples))
        self.journal.settings = _settings(settings_of(dense, resolved), self.target, self.how["max_drop"])
        self.journal.settings["content of the calibration pairs"] = fingerprint(batches)
        return self.journal.load()

    def _restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from there: what was measured is not measured again, so that the search goes the same way."""
        if saved is None:
            return
        self.dense = None if saved["dense"] is None else Reading(**saved["dense"])
        for key, found in saved["tried"].items():
            reading = None if found["found"] is None else Reading(**found["found"])
            self.tried[key] = RatioTried(found["ratio"], reading, found["whole"])
        self.states = saved["states"]
        done = self.once("plans that were found", dict[float, Any])
        searched = self.opened.dense, self.resolved
        done |= {float(ratio): state_of(*searched, state) for ratio, state in self.states.items()}
        self.progress.say(f"going on after {len(self.tried)} measurements (--no-resume starts anew)")

    def _meter(self, opened: Opened) -> Meter:
        dense, dtype = opened.dense, pick_dtype(self.options.dtype)
        if self.target.kind == "target_size":
            return SizeMeter(self.target, dense, dtype)
        if self.target.kind == "max_drop":
            return DropMeter(self.target, dense, opened.pairs, self.resolved, dtype, self.progress)
        pickled = self.how["hub_options"].allow_pickle
        return ClockMeter(self.target, dense, self.resolved, pickled, self.progress)

    def _check_needed(self) -> None:
        """Raises UsageError where the dense model has what is asked for."""
        self.dense = self.dense or self.meter.dense()
        if self.dense is not None and self.meter.excess(self.dense, aimed=False) <= 0:
            said = f"{self.target.option}: the dense model has that, {self.meter.in_words(self.dense)}."
            raise UsageError(said, hint="Ask for less, or say how much to remove: --ratio 0.5.")

    def _ratio(self) -> float:
        """The ratio that the target asks for. Raises DeadEnd or GateError where there is none."""
        least, over = self.target.is_least, self._at_zero()
        settled = self.resolved.uniform or self.resolved.looks == 0  # by the ratio alone
        if settled or not METHODS[self.resolved.method].compares_plans:  # plans cost what they cost
            found = crossing(self._whole, 0.0, LARGEST, self.tolerance, over)
        else:
            guide = self._guide()
            found = settle(self._whole, guide, 0.0, self.largest, self.tolerance, over, least=least, most=WHOLE)
        chosen = found.below if least else found.above
        if not chosen:
            raise self._unreached()
        return chosen

    def _at_zero(self) -> float:
        """The excess of the dense model, about."""
        if self.target.kind == "max_drop":
            return max(self.target.wanted, 1e-9)
        return math.log(self.target.wanted) if self.dense is None else self.meter.excess(self.dense, aimed=True)

    def _guide(self) -> Curve:
        """A curve that is cheap: of plans whose tokens go as those of the last whole plan."""
        ready = self.ready
        space = space_of(ready.dense, self.resolved, ready.way.prices or {})
        streams, steps = descent_of(ready.dense, ready.way, ready.batches, space)
        self.largest = round(min(LARGEST, space.most(streams)), DIGITS)
        begins = {name: min(round(depths[0] * layers), layers - 1) for name, (layers, depths) in streams.items()}
        self.cuts = {name: allocation.Cut(layer, allocation.START) for name, layer in begins.items()}
        self.in_reach = lambda ratio: nearest(
            ratio, lambda each: reached(each, space, streams, steps) is not None, LARGEST, 1000
        )

        def guide(ratio: float) -> tuple[float, float] | None:
            plan = space.nearest(ratio, self.cuts) or space.nearest(ratio, {})
            if plan is None:
                return None
            cuts = ",".join(f"{name}:{cut.layer}:{cut.share}" for name, cut in sorted(self.cuts.items()))
            return ratio, self._measured(ratio, f"{ratio} {cuts}", plan, whole=False)

        return guide

    def _whole(self, ratio: float) -> tuple[float, float] | None:
        """What a plan is worth that is searched for as `comp prune --ratio` does it, or where there is none, one beside it;
        None where there is none near."""
        near = self.in_reach(ratio)
        if near is None:
            return None
        found = self._searched(near)
        if isinstance(found, DeadEnd):
            beside = (found.reached, *(near + step for step in BESIDE))
            near = next((each for each in beside if not isinstance(self._searched(round(each, DIGITS)), DeadEnd)), 0.0)
            found = self._searched(near := round(near, DIGITS))
        if isinstance(found, DeadEnd):
            return None
        seen = found.looks if isinstance(found, allocation.AllocationState) else []
        if judged := [look for look in seen if look.loss is not None]:
            self.cuts = min(judged, key=lambda look: look.loss or 0).cuts
        return near, self._measured(near, f"{near}", found.plan, whole=True)

    def _searched(self, ratio: float) -> State | DeadEnd:
        """What the search of a ratio ends with."""
        key, opened = f"{ratio}", self.opened
        if not 0 < ratio <= LARGEST or (key in self.tried and self.tried[key].found is None):
            return DeadEnd(f"ratio {ratio} has no plan.")
        self.progress.say(f"ratio {ratio:g} ...")
        options, quiet = replace(self.resolved, ratio=ratio), Unwarned(self.progress)
        try:
            found = seek(opened.dense, opened.pairs, options, None, quiet, self.once, advises=False).state
        except (DeadEnd, RefusedError) as error:
            if isinstance(error, RefusedError) and not self.resolved.uniform:  # or a ratio whose plans the stock class refuses
                raise
            self.tried[key] = RatioTried(ratio, None, True)
            self._save()
            return error if isinstance(error, DeadEnd) else DeadEnd(error.message)
        if key not in self.states:
            self.states[key] = found.to_json()
            self._save()
        return found

    def _measured(self, ratio: float, key: str, plan: Plan, *, whole: bool) -> float:
        """The excess of a plan's model, recovered where the weights matter; read once."""
        if key not in self.tried:
            model = self.ready.way.build(plan) if self.meter.recovered else self.ready.dense.runtime(plan)
            found = self.meter.read(model, plan.told_apart(self.opened.dense.plan))
            self.tried[key] = RatioTried(ratio, found, whole)
            self._save()
            self.progress.say(f"ratio {ratio:g}{'' if whole else ' as the last plan'}: {self.meter.in_words(found)}")
        known = self.tried[key].found
        if known is None:
            raise ValueError("a ratio that no plan has was not measured")
        return self.meter.excess(known, aimed=True)

    def _save(self) -> None:
        if self.journal is not None:
            tried = {key: asdict(found) for key, found in self.tried.items()}
            dense = None if self.dense is None else asdict(self.dense)
            self.journal.save({"dense": dense, "tried": tried, "states": self.states})

    def _unreached(self) -> CompError:
        """Why no ratio has the target, and what is in reach."""
        wholes = [tried for tried in self.tried.values() if tried.found is not None and tried.whole]
        if not wholes:
            return DeadEnd(f"{self.target.option}: no plan was found.", hint="Give a --ratio, which says why.")
        if self.target.is_least:
            best = min(wholes, key=lambda tried: self.meter.excess(tried.found, aimed=False) if tried.found else 0.0)
            reached = self.meter.in_words(best.found) if best.found else ""
            said = f"{self.target.option} cannot be reached: the nearest is {reached}, at ratio {best.ratio:g}."
            return DeadEnd(
                said, hint="Ask for less. For other runtimes see comp bench, for smaller files comp export --quantize."
            )
        least = min(wholes, key=lambda tried: tried.ratio)
        fell = least.found.value if least.found else 0.0
        said = f"{self.target.option}: at ratio {least.ratio:g}, the smallest that was tried, it falls by {fell:.2f} points"
        report = self._report_of_plan(least.ratio)
        return GateError(f"{said} on {self.meter.on}.", hint="Nothing was written. Allow more, or give --data.", report=report)

    def _report_of_plan(self, ratio: float) -> PruneReport:
        """Of a plan whose model was not made."""
        dense, options = self.ready.dense, replace(self.resolved, ratio=ratio)
        state = self.once("plans that were found", dict[float, Any])[ratio]
        plan = state.plan.told_apart(dense.plan)
        return describe(dense, plan, options, Sizes(dense.params(dense.plan), dense.params(plan)))

    def _written(self, ratio: float) -> PruneReport:
        """The model of a ratio, measured anew, and of the next one where it misses. Raises GateError where that misses, too."""
        missed: list[float] = []
        while True:
            self.progress.say(f"{self.target.option}: ratio {ratio:g}")
            try:
                return self._attempt(ratio, missed)
            except Missed as error:
                missed.append(ratio)
                self.progress.say(f"ratio {ratio:g}: {error.message}")
                following = self._following(ratio, len(missed))
                if following is None:
                    raise
                ratio = following

    def _holds(self, found: Reading) -> bool:
        excess = self.meter.excess(found, aimed=False)
        return excess <= 0 if self.target.is_least else excess > 0

    def _following(self, ratio: float, missed: int) -> float | None:
        """The ratio to try behind one that missed: a step more, once; of a loss the next smaller one that held on the way, or a
        step less, a few times."""
        if missed > (1 if self.target.is_least else BACK):
            return None
        held = [each.ratio for each in self.tried.values() if each.whole and each.found and self._holds(each.found)]
        if not self.target.is_least and (smaller := [each for each in held if each < ratio]):
            return max(smaller)
        step = STEP if self.target.is_least else -2 * self.tolerance
        if not self.tolerance < (wanted := round(ratio + step, DIGITS)) <= self.largest:
            return None
        found = self._whole(wanted)
        return found[0] if found is not None and (found[0] - ratio) * step > 0 else None

    def _attempt(self, ratio: float, missed: list[float]) -> PruneReport:
        """Prune to a ratio, and write what has the target. Raises Missed."""
        measured: list[Reading] = []

        def verify(dense: Dense, compact: nn.Module, report: PruneReport) -> None:
            measured.append(self.meter.final(compact, report))
            if not self._holds(measured[0]):
                reached = self._reached(ratio, measured[0], missed)
                said = f"{self.target.option} is missed when it is measured anew: {self.meter.in_words(measured[0])}."
                hint = f"Nothing was written. {self._measured_on(report)} Ask for less, or give a --ratio."
                raise Missed(said, hint=hint, report=replace(report, target=reached))

        options = replace(self.options, ratio=ratio)
        work = partial(prune_in_memory, verify=verify)
        written = self.journal.remove if self.journal is not None else lambda: None
        report = prune_once(options, self.output, self.progress, self.once, resume=True, written=written, work=work, **self.how)
        if self.target.kind == "target_size" and report.output is not None:
            measured = [self._size_of_file(report.output, measured[0])]
        found = measured[0] if measured else self.tried[f"{ratio}"].found
        if found is None:
            raise ValueError("the ratio that is taken was measured")
        return replace(report, target=self._reached(ratio, found, missed))

    def _measured_on(self, report: PruneReport) -> str:
        """A sentence on what a model that was made was measured on."""
        if self.target.is_least or report.quality is None:
            return f"Measured: {self.meter.on}."
        return f"Judged on {report.quality.samples} pairs of {report.quality.data}; the ratio was chosen on {self.meter.on}."

    def _size_of_file(self, folder: Path, expected: Reading) -> Reading:
        """Raises CompError where a file has not the size that was calculated."""
        size = (folder / "model.safetensors").stat().st_size
        if size != expected.value:
            said = f"{folder}: model.safetensors has {size} bytes, and {expected.value:.0f} were calculated."
            raise CompError(said, hint="Please report this with the command and the model.")
        return expected

    def _reached(self, ratio: float, found: Reading, missed: list[float]) -> TargetReached:
        return TargetReached(
            kind=self.target.kind,
            wanted=self.target.wanted,
            measured=found,
            dense=self.dense,
            ratio=ratio,
            on=self.meter.on,
            tried=tuple(self.tried.values()),
            missed=tuple(missed),
        )
