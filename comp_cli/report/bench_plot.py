"""The picture of `comp bench`."""

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files.outputs import atomic_file, check_replaced, resolve
from .bench import BenchReport
from .bench_tables import BACKEND_NAMES, side_name

PICTURES = (".png", ".svg", ".pdf")
MARK = b"drawn by comp bench"  # in the pictures that comp drew, which it may replace


def check_plot(path: Path) -> None:
    """Raises UsageError where the picture could not be written in the end."""
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}.")
    check_replaced(path, "--plot", "picture that comp drew", lambda there: MARK in there.read_bytes())
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib.", hint="pip install 'comp-cli[plot]'") from None


def plot(report: BenchReport, path: Path) -> None:
    """Left: latency. Right: the speed-up from pruning against its limit, the fall of the FLOPs. Bars at one batch size, lines
    over several."""
    from matplotlib.figure import Figure  # no pyplot: nothing is shown, no display is looked for

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    backends = list(dict.fromkeys(row.backend for row in report.timings))
    batches = list(dict.fromkeys(row.batch for row in report.timings))
    if len(batches) == 1:
        bars_of_latency(left, report, backends)
        bars_of_speedup(right, report, backends)
    else:
        lines_of_latency(left, report, backends)
        lines_of_speedup(right, report, backends)
        for axes in (left, right):
            axes.set_xlabel("batch")
            axes.set_xscale("log")
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.minorticks_off()
            axes.legend(fontsize=7)
    where, at = report.machine, f", batch {batches[0]}" if len(batches) == 1 else ""
    threads = f"{where.threads} thread{'s' * (where.threads > 1)}"
    figure.suptitle(f"{Path(report.compact).name} on {where.name}, {threads}{at}", fontsize=10)
    name = "Software" if path.suffix.lower() == ".png" else "Creator"
    with atomic_file(resolve(path, "--plot")) as partial:
        figure.savefig(partial, dpi=150, metadata={name: MARK.decode()})


def bars_of_latency(axes: Any, report: BenchReport, backends: list[str]) -> None:
    """One bar for each backend and side, with its number; what is compact is filled, what is dense is not."""
    for place, row in enumerate(report.timings):
        color = f"C{backends.index(row.backend)}"
        fill = {"dense": "white", "own_dense": "white", "compact": color}[row.side]
        hatch = {"own_dense": "///"}.get(row.side)
        axes.barh(place, row.median, color=fill, edgecolor=color, hatch=hatch)
        axes.annotate(number(row.median), (row.median, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    names = [f"{BACKEND_NAMES[row.backend]},\n{side_name(row.backend, row.side)}" for row in report.timings]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="latency, ms (median)", xlim=(0, 1.15 * max(row.median for row in report.timings)))


def bars_of_speedup(axes: Any, report: BenchReport, backends: list[str]) -> None:
    """One bar for each backend, with its 95 % interval, up to where it could be read."""
    most = highest(report)
    for place, row in enumerate(report.speedups):
        value, color = row.by_pruning.value, f"C{backends.index(row.backend)}"
        reach = [[max(0.0, value - row.by_pruning.low)], [max(0.0, row.by_pruning.high - value)]]
        axes.barh(place, value, xerr=reach, color=color, ecolor="black", capsize=3, height=0.5)
        said = f"{value:.2f}x ({row.by_pruning.low:.2f} - {row.by_pruning.high:.2f})"
        axes.annotate(said, (0, place - 0.32), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(report.flops_reduction, color="grey", linestyle="--", label="FLOPs limit")
    axes.set_yticks(range(len(report.speedups)), [BACKEND_NAMES[row.backend] for row in report.speedups], fontsize=8)
    axes.set(xlabel="speed-up from pruning, with its 95 % interval", xlim=(0, most), ylim=(len(report.speedups) - 0.5, -0.6))
    axes.legend(fontsize=7, loc="lower right")


def lines_of_latency(axes: Any, report: BenchReport, backends: list[str]) -> None:
    """Latency against batch, both logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for backend in backends:
        for side, (style, marker) in {"dense": (":", "s"), "own_dense": ("--", "^"), "compact": ("-", "o")}.items():
            rows = [row for row in report.timings if (row.backend, row.side) == (backend, side)]
            if rows:
                label = f"{BACKEND_NAMES[backend]}, {side_name(backend, side)}"
                points = [row.batch for row in rows], [row.median for row in rows]
                axes.plot(*points, style, color=f"C{backends.index(backend)}", marker=marker, markersize=4, label=label)
    axes.set(ylabel="latency, ms (median)", yscale="log")
    least, most = min(row.median for row in report.timings), max(row.median for row in report.timings)
    steps = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]
    axes.yaxis.set_major_locator(FixedLocator([step for step in steps if least / 2.6 <= step <= 2.6 * most]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def lines_of_speedup(axes: Any, report: BenchReport, backends: list[str]) -> None:
    """Speed-up from pruning against batch, with 95 % intervals."""
    for backend in backends:
        rows = [row for row in report.speedups if row.backend == backend]
        values = [row.by_pruning.value for row in rows]
        low = [max(0.0, row.by_pruning.value - row.by_pruning.low) for row in rows]
        high = [max(0.0, row.by_pruning.high - row.by_pruning.value) for row in rows]
        color = f"C{backends.index(backend)}"
        points = [row.batch for row in rows], values
        axes.errorbar(*points, [low, high], color=color, marker="o", capsize=3, label=BACKEND_NAMES[backend])
    axes.axhline(report.flops_reduction, color="grey", linestyle="--", label="FLOPs limit")
    axes.set(ylabel="speed-up from pruning", ylim=(0, highest(report)))


def highest(report: BenchReport) -> float:
    """Where the axis of speed-ups ends: above all of them, whatever their intervals."""
    return 1.3 * max(report.flops_reduction, *(row.by_pruning.value for row in report.speedups))


def number(ms: float) -> str:
    """Three digits, as far as they are behind the point."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
