"""`comp prune` with several ratios: a folder each, of one calibration, and what each ratio costs.

In the folder OUT lie `ratio-0.3` and so on, each exactly what `comp prune --ratio 0.3` writes, and the trade-off as
`comp_sweep.json`, `tradeoff.md` and `tradeoff.html`. Which folders are finished stands in the journal of OUT; every run has its
own as well.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.loading import pick_dtype
from ..data.batches import fingerprint
from ..errors import CompError, DeadEnd, GateError, UsageError
from ..files.outputs import atomic_file, check_replaceable, reserve, resolve
from ..files.store import departs, facts, read_json, sha256
from ..options import HUB_DEFAULTS, HubOptions, PruneOptions
from ..progress import Progress
from ..report.cards import without_places
from ..report.page.pages import sweep_page
from ..report.sweep import Point, SweepReport, knee
from ..report.sweep_tables import markdown
from ..search.journal import Journal
from ..search.once import Once
from ..search.processes import from_main, is_main_process, join, process_device
from ..search.run import calibration_pairs
from ..search.sharding import check_launch
from . import threads
from .prune import Opened, early_settings, open_all, prune_once, settings_of
from .prune_options import check
from .prune_streamed import SEVERAL, find_for_several

REPORT, TABLE, PAGE, MARKER = "comp_sweep.json", "tradeoff.md", "tradeoff.html", "comp_report.json"
PLACE = "-o/--output"


def sweep(
    options: PruneOptions,
    ratios: Sequence[float],
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    resume: bool = True,
    max_drop: float | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
) -> SweepReport:
    """Prune a model to several ratios, and write a folder each.

    A sweep that was killed goes on where it was. A ratio that misses `max_drop`, or that no plan reaches, has no folder; the
    others go on, and the error, which has the report, comes last: GateError where all that failed missed `max_drop`, else
    CompError."""
    if options.max_memory is not None:
        said = "--max-memory: several ratios share one calibration in memory."
        raise UsageError(said, hint="Give one --ratio, or leave --max-memory out.")
    for ratio in ratios:
        check(replace(options, ratio=ratio), max_drop, None)
    check_launch(options.training)
    join(process_device(options.device))
    pick_dtype(options.dtype)
    how: dict[str, Any] = {"overwrite": overwrite, "plan_only": False, "max_drop": max_drop, "hub_options": hub_options}
    if not is_main_process():
        return Sweep(options, ratios, output, None, progress, resume=resume, **how).run()
    typed, output = output, resolve(output)
    source = Path(options.model).expanduser()
    with reserve(output, source=source if source.is_dir() else None):
        journal = Journal(output, {})
        if not resume:
            journal.remove()
        journal.compare(_settings(early_settings(options), ratios, max_drop))
        check_free(output, ratios, journal, overwrite)
        try:
            report = Sweep(options, ratios, output, journal, progress, resume=resume, **how).run()
        except Exception:
            if not output.exists():  # nothing to go on from
                journal.remove()
            raise
        return replace(report, output=typed)


class Sweep:
    """A run of several ratios, its output reserved; without a journal one of several processes' that do not write."""

    def __init__(
        self,
        options: PruneOptions,
        ratios: Sequence[float],
        output: Path,
        journal: Journal | None,
        progress: Progress,
        **how: Any,
    ):
        """how: arguments of `prune_once`."""
        self.options, self.ratios, self.output, self.journal, self.progress = options, ratios, output, journal, progress
        self.how, self.once = how, Once()
        self.documents: list[dict[str, Any]] = []  # reports of `comp prune`, as JSON has them
        self.errors: list[CompError] = []

    def run(self) -> SweepReport:
        """All ratios, the report and its files. Raises the error of those that failed, behind it all."""
        started = time.perf_counter()
        opened = self.once("dense model", self._open)
        finished = from_main(lambda: self._finished(opened))
        points = []
        for ratio in self.ratios:
            self.progress.say(f"ratio {ratio:g}" + ": finished before" * (ratio in finished))
            points.append(self._point(ratio, finished[ratio]) if ratio in finished else self._attempt(ratio))
        report = self._report(opened, points, time.perf_counter() - started)
        if self.journal is not None:
            if any(point.folder for point in points):
                write_files(self.output, report)
            self.journal.remove()
        if self.errors:
            raise failure(report, self.errors)
        return report

    def _open(self) -> Opened:
        hub_options = self.how["hub_options"]
        known = find_for_several(self.options, min(self.ratios), self.progress, hub_options, SEVERAL)
        return open_all(self.options, self.progress, hub_options, known)

    def _finished(self, opened: Opened) -> dict[float, dict[str, Any]]:
        """The reports of the ratios that a killed run finished. Raises UsageError where it had other settings."""
        if self.journal is None:
            return {}
        batches = self.once(
            "calibration pairs",
            lambda: calibration_pairs(opened.dense, opened.pairs, opened.resolved, opened.resolved.num_samples),
        )
        self.journal.settings = _settings(settings_of(opened.dense, opened.resolved), self.ratios, self.how["max_drop"])
        self.journal.settings["content of the calibration pairs"] = fingerprint(batches)
        self.journal.save(self.journal.load() or {"written": {}})
        folders = {ratio: self.output / folder_name(ratio) for ratio in self.ratios}
        finished = {ratio: folder for ratio, folder in folders.items() if is_finished(folder, self.journal)}
        for folder in finished.values():
            self._note(folder)
            Journal(folder, {}).remove()
        return {ratio: read_json(folder / MARKER) for ratio, folder in finished.items()}

    def _note(self, folder: Path) -> None:
        """A folder is written."""
        if self.journal is not None:
            self.journal.save({"written": written_by(self.journal) | {folder.name: sha256(folder / MARKER)}})

    def _attempt(self, ratio: float) -> Point:
        """Prune to a ratio. One that is missed or out of reach fails alone."""
        folder = self.output / folder_name(ratio)
        options, note = replace(self.options, ratio=ratio), partial(self._note, folder)
        try:
            report = prune_once(options, folder, self.progress, self.once, **self.how, written=note)
        except (DeadEnd, GateError) as error:
            self.errors.append(error)
            self.progress.warn(f"ratio {ratio:g}: {error.message}")
            return self._point(ratio, error.document, error)
        return self._point(ratio, report.to_json())

    def _point(self, ratio: float, document: dict[str, Any], error: CompError | None = None) -> Point:
        self.documents.append(document)
        folder = None if error else folder_name(ratio)
        return Point.of(ratio, document, folder, error.message if error else None)

    def _report(self, opened: Opened, points: list[Point], seconds: float) -> SweepReport:
        dense = opened.dense
        quality: dict[str, Any] = next((found["quality"] for found in self.documents if found.get("quality")), {})
        return SweepReport(
            comp_version=__version__,
            torch_version=str(torch.__version__),
            base_model=dense.source.name,
            base_revision=dense.source.revision,
            architecture=dense.architecture,
            task=dense.task.name,
            options=without_places(opened.resolved),
            metric=quality.get("metric"),
            samples=quality.get("samples"),
            data=quality.get("data"),
            points=tuple(points),
            threads=threads.in_use(),
            knee=knee(points),
            seconds=round(seconds, 1),
        )


def folder_name(ratio: float) -> str:
    """Of a ratio in the folder of its sweep."""
    return f"ratio-{ratio:g}"


def _settings(found: dict[str, Any], ratios: Sequence[float], max_drop: float | None) -> dict[str, Any]:
    """What the journal of a sweep must agree on."""
    return found | {"ratio": list(ratios), "max_drop": max_drop}


def written_by(journal: Journal) -> dict[str, str]:
    """Which folders the run of a sweep's journal has written, with the hashes of their reports."""
    return dict((journal.peek() or {}).get("written", {}))


def is_finished(folder: Path, journal: Journal) -> bool:
    """Whether the run of a sweep's journal wrote a folder, or was killed when all was done but noting it."""
    report = folder / MARKER
    if journal.peek() is None or not report.is_file():
        return False
    return sha256(report) in (written_by(journal).get(folder.name), Journal(folder, {}).finished())


def check_free(output: Path, ratios: Sequence[float], journal: Journal, overwrite: bool) -> None:
    """Raises UsageError where something is in the way that is not to be replaced; before any work is done."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"The output {output} is a file.", hint=f"Give a folder to {PLACE}.")
    for folder in (output / folder_name(ratio) for ratio in ratios):
        if not is_finished(folder, journal):
            check_replaceable(folder, overwrite)
    found = [name for name in (REPORT, TABLE, PAGE) if (output / name).exists()]
    if found and not overwrite:
        raise UsageError(f"The output {output} holds a {found[0]}.", hint="--overwrite replaces what comp wrote.")
    if found and not _is_ours(output):
        said = f"The output {output} holds a {found[0]} that comp did not write, or that was changed since."
        raise UsageError(f"{said} --overwrite leaves it alone.", hint=f"Move it away, or choose another {PLACE}.")


def _is_ours(output: Path) -> bool:
    """Whether the files beside the folders are as comp wrote them."""
    try:
        told = read_json(output / REPORT)["files"]
        return not any(departs(output / name, told[name]) for name in (TABLE, PAGE) if name in told or (output / name).exists())
    except (CompError, OSError, KeyError, TypeError):
        return False


def write_files(output: Path, report: SweepReport) -> None:
    """The trade-off beside the folders, for people and as JSON, without what differs from run to run."""
    with atomic_file(output / TABLE) as path:
        path.write_text(markdown(report), encoding="utf-8")
    document = {name: value for name, value in report.to_json().items() if name not in ("output", "warnings", "seconds")}
    with atomic_file(output / PAGE) as path:
        path.write_text(sweep_page(document), encoding="utf-8")
    with atomic_file(output / REPORT) as path:
        files = {name: facts(output / name) for name in (TABLE, PAGE)}
        path.write_text(json.dumps(document | {"files": files}) + "\n", encoding="utf-8")


def failure(report: SweepReport, errors: Sequence[CompError]) -> CompError:
    """The error of a sweep: which ratios failed, why, and which folders are there."""
    said = "; ".join(f"ratio {point.ratio:g}: {point.failed.rstrip('.')}" for point in report.points if point.failed)
    there = ", ".join(point.folder for point in report.points if point.folder)
    hint = f"Written: {there or 'nothing'}. For the others try lower ratios, or --steps to fine-tune."
    if all(isinstance(error, GateError) for error in errors):
        return GateError(f"{said}.", hint=hint, report=report)
    error = CompError(f"{said}.", hint=hint)
    error.report = report
    return error
