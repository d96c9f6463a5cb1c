"""`comp compare`: two benchmarks that `comp bench --save` wrote, of one kind and from one machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import GateError, RefusedError, UsageError
from ..files.store import read_json
from ..options import CompareOptions
from ..progress import Progress
from ..report.bench import BenchReport, Factor, GateOutcome
from ..report.compare import Change, CompareReport, Numbers, PeakChange, SpeedupChange
from ..report.compare_tables import coarse_sentence, drift_sentence, regression_sentence
from ..report.reading import read_report

LIBRARIES = ("torch", "transformers", "onnxruntime")
DRIFT = 0.05  # by how much the stock model's time has to change to be spoken of
APART = "Measure both alike, with comp bench --save."
Row = tuple[str, str, str, int]  # figure, backend, side, batch
Times = dict[Row, Factor]  # medians with their intervals, ms

# What has to be the same, or a difference would be one of the machine, the model or the input.
KINDS: dict[str, Any] = {
    "the machine is": lambda report: report.machine.name,
    "the device is": lambda report: report.machine.device,
    "CPU threads are": lambda report: report.machine.threads,
    "TF32 is": lambda report: "on" if report.machine.tf32 else "off",
    "the dense model is": lambda report: report.baseline,
    "the architecture is": lambda report: report.architecture,
    "parameters of the dense model are": lambda report: report.params.dense,
    "text tokens are": lambda report: report.text_tokens,
    "image tokens are": lambda report: report.image_tokens,
}


def compare(before: Path, after: Path, options: CompareOptions, progress: Progress) -> CompareReport:
    """Compare. Raises RefusedError for documents that are none, or of different kinds, and GateError where the gate is not met;
    the error carries the report."""
    first, second = (read_benchmark(path) for path in (before, after))
    check_alike(first, second, before, after)
    earlier = times(first)
    changes = tuple(change(row, earlier[row], found) for row, found in times(second).items())
    stock = (row for row in changes if row.side == "dense" and row.verdict != "alike")
    drift = tuple(row for row in stock if abs(row.ratio.value - 1) >= DRIFT)
    outcomes = gates(changes, options.max_regression)
    versions = {"comp": (first.comp_version, second.comp_version)}
    versions |= {name: (getattr(first.machine, name), getattr(second.machine, name)) for name in LIBRARIES}
    report = CompareReport(
        comp_version=__version__,
        before=str(before),
        after=str(after),
        baseline=second.baseline,
        architecture=second.architecture,
        machine=second.machine,
        versions={name: pair for name, pair in versions.items() if pair[0] != pair[1]},
        changes=changes,
        speedups=speedups(first, second),
        params=Numbers(first.params.compact, second.params.compact),
        flops=Numbers(first.flops.compact, second.flops.compact),
        size_bytes=Numbers(first.size_bytes.compact, second.size_bytes.compact),
        peak_memory_bytes=peaks(first, second),
        drift=drift,
        gates=outcomes,
    )
    if drift:
        progress.warn(drift_sentence(drift))
    if options.max_regression is not None and (coarse := too_coarse(changes, options.max_regression)):
        progress.warn(coarse_sentence(coarse, options.max_regression))
    if missed := [outcome for outcome in outcomes if not outcome.passed]:
        hint = drift_sentence(drift) if drift else None
        raise GateError(regression_sentence(missed[0]), hint=hint, report=report)
    return report


def read_benchmark(path: Path) -> BenchReport:
    """The report of a saved benchmark. Raises UsageError where there is no such file, RefusedError where it holds none."""
    if not path.exists():
        raise UsageError(f"{path}: no such file.", hint=f"comp bench FOLDER --save {path} writes it.")
    document = read_json(path)
    error = document.get("error")
    if "timings" not in document:
        failed = f": the benchmark failed ({error.get('message')})" if isinstance(error, dict) else ""
        raise RefusedError(f"{path}: no benchmark of comp{failed}.", hint=f"comp bench FOLDER --save {path} writes one.")
    if any(isinstance(row, dict) and "low" not in row for row in _list(document["timings"])):
        hint = f"Measure again: comp bench FOLDER --save {path}"
        raise RefusedError(f"{path}: written before version 0.6 of comp, without intervals of the medians.", hint=hint)
    report = read_report(BenchReport, document, str(path))
    if not report.timings:
        raise RefusedError(f"{path}: holds no times.")
    rows = [*times(report).values(), *(row.speedup for row in report.speedups)]
    if wrong := [row for row in rows if not 0 < row.low <= row.value <= row.high]:
        raise RefusedError(f"{path}: a median of {wrong[0].value:g} with the interval {wrong[0].low:g} to {wrong[0].high:g}.")
    return report


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def check_alike(first: BenchReport, second: BenchReport, before: Path, after: Path) -> None:
    """Raises RefusedError where the two are of different kinds, or have other rows."""
    for what, read in KINDS.items():
        found = read(first), read(second)
        if found[0] != found[1]:
            raise RefusedError(f"not comparable: {what} {found[0]} in {before}, {found[1]} in {after}.", hint=APART)
    rows = times(first).keys(), times(second).keys()
    if rows[0] != rows[1]:
        missing = sorted(rows[0] ^ rows[1])[0]
        where = before if missing in rows[0] else after
        _, backend, side, batch = missing
        raise RefusedError(f"not comparable: {backend} at batch {batch} ({side}) is in {where} only.", hint=APART)


def times(report: BenchReport) -> Times:
    """Every median with its interval, ms."""
    found: Times = {}
    for row in report.timings:
        found["latency", row.backend, row.side, row.batch] = Factor(row.median, row.low, row.high)
    for step in report.generation or ():
        first = Factor(step.first_token_ms, step.first_token_low, step.first_token_high)
        found["first_token", "torch", step.side, step.batch] = first
        found["token", "torch", step.side, step.batch] = Factor(step.token_ms, step.token_low, step.token_high)
    return found


def change(row: Row, before: Factor, after: Factor) -> Change:
    """One time before and after, and whether the intervals lie apart."""
    figure, backend, side, batch = row
    ratio = divided(after, before)
    verdict = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else "alike"
    return Change(figure, backend, side, batch, before.value, after.value, ratio, verdict)


def divided(upper: Factor, lower: Factor) -> Factor:
    """A ratio of two measurements that know nothing of each other: its interval reaches from end to end of both."""
    return Factor(upper.value / lower.value, upper.low / lower.high, upper.high / lower.low)


def speedups(first: BenchReport, second: BenchReport) -> tuple[SpeedupChange, ...]:
    known = {(row.backend, row.batch): row.speedup for row in first.speedups}
    return tuple(
        SpeedupChange(row.backend, row.batch, before, row.speedup, divided(row.speedup, before))
        for row in second.speedups
        if (before := known.get((row.backend, row.batch)))
    )


def peaks(first: BenchReport, second: BenchReport) -> tuple[PeakChange, ...]:
    """Of the backends whose memory was measured both times."""
    known = {row.backend: row.bytes for row in first.peak_memory_bytes if row.side == "compact"}
    rows = [row for row in second.peak_memory_bytes if row.side == "compact" and row.backend in known]
    return tuple(PeakChange(row.backend, Numbers(known[row.backend], row.bytes)) for row in rows)


def gates(changes: Sequence[Change], limit: float | None) -> tuple[GateOutcome, ...]:
    """The worst row of the compact model that is slower beyond its intervals, against the percent that are allowed."""
    if limit is None:
        return ()
    compact = [row for row in changes if row.side == "compact"]
    worst = max(compact, key=lambda row: row.ratio.value if row.verdict == "slower" else 0.0)
    found = 100 * (worst.ratio.value - 1) if worst.verdict == "slower" else 0.0
    return (GateOutcome("max_regression", limit, found <= limit, found, worst.backend, worst.batch),)


def too_coarse(changes: Sequence[Change], limit: float) -> list[Change]:
    """Rows of the compact model that may be slower by more than is allowed: their intervals are too wide to tell."""
    compact = (row for row in changes if row.side == "compact" and row.verdict == "alike")
    return [row for row in compact if row.ratio.high > 1 + limit / 100]
