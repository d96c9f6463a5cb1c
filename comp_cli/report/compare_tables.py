"""The tables of `comp compare`."""

from collections.abc import Sequence

from ..options import flag
from .bench import Factor, GateOutcome
from .bench_tables import BACKEND_NAMES, side_name, times
from .compare import Change, CompareReport
from .numbers import Printer, change, gflops, mib, millions

FIGURES = {"latency": "", "first_token": "first token, ", "token": "a token, "}


def print_comparison(report: CompareReport, out: Printer) -> None:
    """Times, speed-ups, cost, what else changed, and the gate."""
    where = report.machine
    threads = f"{where.threads} thread{'s' * (where.threads != 1)}"
    title = f"{report.before} -> {report.after}: {report.baseline} on {where.name} ({where.device}, {threads})"
    columns = ["", "before, ms", "after, ms", "after / before", "95 % interval", "verdict"]
    out.table(title, columns, [_change(row) for row in report.changes])
    rows = [
        [f"{BACKEND_NAMES[row.backend]}, batch {row.batch}", times(row.before), times(row.after), *_ratio(row.ratio)]
        for row in report.speedups
    ]
    columns = ["speed-up vs stock", "before", "after", "after / before", "95 % interval"]
    out.table("Speed-up of the compact model, in which the machine's moments cancel", columns, rows)
    out.table("Cost of the compact model", ["", "before", "after", "change"], _costs(report))
    for name, (before, after) in report.versions.items():
        out.line(f"{name} {before} before, {after} after.")
    out.line(
        "Slower and faster are rows whose intervals lie apart. They hold what varied inside of each run; what differs from run "
        "to run, such as the load of the machine, moves stock rows as well."
    )
    for outcome in report.gates:
        out.line(regression_sentence(outcome))


def _change(row: Change) -> list[str]:
    name = f"{BACKEND_NAMES[row.backend]}, {FIGURES[row.figure]}{side_name(row.backend, row.side)}, batch {row.batch}"
    return [name, f"{row.before:.2f}", f"{row.after:.2f}", *_ratio(row.ratio), row.verdict]


def _ratio(ratio: Factor) -> list[str]:
    return [f"{ratio.value:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}"]


def _costs(report: CompareReport) -> list[list[str]]:
    rows = [
        ("parameters", millions, report.params),
        ("FLOPs", gflops, report.flops),
        ("weights on disk", mib, report.size_bytes),
        *((f"peak memory, {BACKEND_NAMES[row.backend]}", mib, row.bytes) for row in report.peak_memory_bytes),
    ]
    return [[name, shown(n.before), shown(n.after), change(n.before, n.after)] for name, shown, n in rows]


def regression_sentence(outcome: GateOutcome) -> str:
    """The outcome for people."""
    asked = f"{flag(outcome.gate)} {outcome.limit:g}"
    if not outcome.found:
        return f"{asked} passed: no row of the compact model is slower beyond its intervals."
    verdict = "passed" if outcome.passed else "not met"
    where = f"{BACKEND_NAMES[outcome.backend]}, batch {outcome.batch}"
    return f"{asked} {verdict}: the compact model takes {outcome.found:.1f} % longer ({where})."


def drift_sentence(rows: Sequence[Change]) -> str:
    """Of the stock model, which is the same in both."""
    worst = max(rows, key=lambda row: abs(row.ratio.value - 1))
    said = f"{side_name(worst.backend, worst.side)} at batch {worst.batch}"
    return (
        f"The machine or a library changed: {said}, which is the same in both, takes {worst.ratio.value:.2f} times as long "
        "as before. Measure again while nothing else runs, and look at the speed-ups."
    )


def coarse_sentence(rows: Sequence[Change], limit: float) -> str:
    """Of rows that a gate cannot judge."""
    worst = max(rows, key=lambda row: row.ratio.high)
    return (
        f"{BACKEND_NAMES[worst.backend]}, batch {worst.batch}: the intervals reach from {worst.ratio.low:.2f} to "
        f"{worst.ratio.high:.2f} times as long, too wide to see {limit:g} %. Measure longer, with --duration or --iterations."
    )
