"""The picture of `comp bench`."""

from pathlib import Path

from ..errors import UsageError
from ..files.outputs import atomic_file, check_file, resolve
from .bench import BenchReport
from .bench_tables import BACKEND_NAMES, side_name

PICTURES = (".png", ".svg", ".pdf")
MARK = b"drawn by comp bench"  # in the pictures that comp drew, which it may replace


def check_plot(path: Path) -> None:
    """Raises UsageError where the picture could not be written in the end."""
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}.")
    path = resolve(path, "--plot")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: no such folder.", hint="Create the folder first.")
    check_file(path)
    if path.exists() and MARK not in path.read_bytes():
        hint = "Choose another name, or remove it yourself."
        raise UsageError(f"--plot {path}: exists, and is no picture that comp drew.", hint=hint)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib.", hint="pip install 'comp-cli[plot]'") from None


def plot(report: BenchReport, path: Path) -> None:
    """Left: latency against batch. Right: the speed-up from pruning against its limit, the fall of the FLOPs."""
    from matplotlib.figure import Figure  # no pyplot: nothing is shown, no display is looked for
    from matplotlib.ticker import LogFormatter, NullLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"dense": ":", "own_dense": "--", "compact": "-"}
    backends = list(dict.fromkeys(row.backend for row in report.timings))
    for index, backend in enumerate(backends):
        color = f"C{index}"
        for side, style in styles.items():
            rows = [row for row in report.timings if (row.backend, row.side) == (backend, side)]
            if not rows:
                continue
            batches, medians = [row.batch for row in rows], [row.median for row in rows]
            label = f"{BACKEND_NAMES[backend]}, {side_name(backend, side)}"
            left.plot(batches, medians, style, color=color, marker="o", markersize=4, label=label)
        speedups = [row for row in report.speedups if row.backend == backend]
        values = [row.by_pruning.value for row in speedups]
        reach = [[v - r.by_pruning.low for v, r in zip(values, speedups, strict=True)]]
        reach += [[r.by_pruning.high - v for v, r in zip(values, speedups, strict=True)]]
        batches = [row.batch for row in speedups]
        right.errorbar(batches, values, reach, color=color, marker="o", capsize=3, label=BACKEND_NAMES[backend])
    right.axhline(report.flops_reduction, color="grey", linestyle="--", label="FLOPs limit")
    highest = max(report.flops_reduction, *(row.by_pruning.high for row in report.speedups))
    left.set(xlabel="batch", ylabel="latency, ms (median)", xscale="log", yscale="log")
    right.set(xlabel="batch", ylabel="speed-up from pruning", xscale="log", ylim=(0, 1.15 * highest))
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers; between the powers of ten where there is room
    every = [row.batch for row in report.speedups if row.backend == backends[0]]
    for axes in (left, right):
        axes.set_xticks(every, [str(batch) for batch in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=7)
    where = report.machine
    figure.suptitle(f"{Path(report.compact).name} on {where.name}, threads: {where.threads}", fontsize=10)
    name = "Software" if path.suffix.lower() == ".png" else "Creator"
    with atomic_file(resolve(path, "--plot")) as partial:
        figure.savefig(partial, dpi=150, metadata={name: MARK.decode()})
