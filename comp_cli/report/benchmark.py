"""What `comp bench` shows: tables for people, and the picture."""

from pathlib import Path
from typing import Any

from ..cli.output import Output
from ..errors import UsageError
from ..files.outputs import atomic_file, check_file, resolve
from ..measure.gates import sentence
from .tables import change, gflops, mib, millions, percent

BACKEND_NAMES = {"torch": "torch", "onnx": "ONNX Runtime", "compile": "torch.compile"}
STOCK = {"torch": "stock transformers", "onnx": "plain export", "compile": "stock transformers"}
PICTURES = (".png", ".svg", ".pdf")
MARK = b"drawn by comp bench"  # in the pictures that comp drew, which it may replace


def side_name(backend: str, side: str) -> str:
    return {"dense": STOCK[backend], "own_dense": "dense on comp's kernels", "compact": "compact"}[side]


def times(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f}x"


def show(document: dict[str, Any], out: Output) -> None:
    """Latency, where the speed-up comes from, cost, gates, and the conditions."""
    where = document["machine"]
    title = f"{document['compact']} against {document['baseline']} on {where['name']} ({where['device']})"
    out.table(title, ["", "median ms", "p90", "p99", "pairs / s"], [_latency(row) for row in document["timings"]])
    columns = [
        "compact, against",
        "stock, same backend",
        "95 % interval",
        "by kernels",
        "by pruning",
        "efficiency",
        "stock torch",
    ]
    limit = document["flops_reduction"]
    out.table(
        f"Speed-up of the compact model; the FLOPs fall {limit:.2f}x", columns, [_speedup(row) for row in document["speedups"]]
    )
    out.table("Cost", ["", "dense", "compact", "change"], _costs(document))
    for side, found in document["providers"].items():
        ran = ", ".join(f"{percent(s['node_share'])} of {name}" for name, s in found["shares"].items())
        out.line(f"ONNX Runtime, {side_name('onnx', side)}: {found['first']} first; nodes that ran: {ran}.")
    out.line(
        "Vs stock: on the same backend. By kernels: stock over dense on comp's kernels; by pruning: that over compact. "
        "Efficiency: the speed-up by pruning over the fall of the FLOPs."
    )
    out.line(
        f"{where['threads']} threads, {document['text_tokens']} text tokens, torch {where['torch']}, transformers "
        f"{where['transformers']}, onnxruntime {where['onnxruntime']}, TF32 {'on' if where['tf32'] else 'off'}. "
        f"{min(row['runs'] for row in document['timings'])} interleaved rounds, medians."
    )
    for outcome in document["gates"]:
        out.line(sentence(outcome))


def _latency(row: dict[str, Any]) -> list[str]:
    label = f"{BACKEND_NAMES[row['backend']]}, {side_name(row['backend'], row['side'])}, batch {row['batch']}"
    return [label, *(f"{row[key]:.1f}" for key in ("median", "p90", "p99", "pairs_per_second"))]


def _speedup(row: dict[str, Any]) -> list[str]:
    interval = f"{row['speedup']['low']:.2f} - {row['speedup']['high']:.2f}"
    return [
        f"{BACKEND_NAMES[row['backend']]}, batch {row['batch']}",
        times(row["speedup"]),
        interval,
        times(row["by_kernels"]),
        times(row["by_pruning"]),
        f"{row['flops_efficiency']:.2f}",
        times(row["against_stock_torch"]) if "against_stock_torch" in row else "-",
    ]


def _costs(document: dict[str, Any]) -> list[list[str]]:
    rows = [("parameters", millions, document["params"]), ("FLOPs per pair", gflops, document["flops"])]
    rows += [("weights on disk", mib, document["size_bytes"])]
    peaks: dict[str, dict[str, float]] = {}
    for row in document["peak_memory_bytes"]:
        label = f"peak memory, {BACKEND_NAMES[row['backend']]}, batch {row['batch']}"
        peaks.setdefault(label, {})[row["side"]] = row["bytes"]
    rows += [(label, mib, found) for label, found in peaks.items()]
    return [
        [name, shown(found["dense"]), shown(found["compact"]), change(found["dense"], found["compact"])]
        for name, shown, found in rows
    ]


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


def plot(document: dict[str, Any], path: Path) -> None:
    """Left: latency against batch. Right: the speed-up by pruning against its limit, the fall of the FLOPs."""
    from matplotlib.figure import Figure  # no pyplot: nothing is shown, no display is looked for
    from matplotlib.ticker import LogFormatter, NullLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"dense": ":", "own_dense": "--", "compact": "-"}
    backends = list(dict.fromkeys(row["backend"] for row in document["timings"]))
    for index, backend in enumerate(backends):
        color = f"C{index}"
        for side, style in styles.items():
            rows = [row for row in document["timings"] if (row["backend"], row["side"]) == (backend, side)]
            batches, medians = [row["batch"] for row in rows], [row["median"] for row in rows]
            label = f"{BACKEND_NAMES[backend]}, {side_name(backend, side)}"
            left.plot(batches, medians, style, color=color, marker="o", markersize=4, label=label)
        rows = [row for row in document["speedups"] if row["backend"] == backend]
        values = [row["by_pruning"]["value"] for row in rows]
        reach = [[v - r["by_pruning"]["low"] for v, r in zip(values, rows, strict=True)]]
        reach += [[r["by_pruning"]["high"] - v for v, r in zip(values, rows, strict=True)]]
        batches = [row["batch"] for row in rows]
        right.errorbar(batches, values, reach, color=color, marker="o", capsize=3, label=BACKEND_NAMES[backend])
    right.axhline(document["flops_reduction"], color="grey", linestyle="--", label="FLOPs limit")
    highest = max(document["flops_reduction"], *(row["by_pruning"]["high"] for row in document["speedups"]))
    left.set(xlabel="batch", ylabel="latency, ms (median)", xscale="log", yscale="log")
    right.set(xlabel="batch", ylabel="speed-up by pruning", xscale="log", ylim=(0, 1.15 * highest))
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers; between the powers of ten where there is room
    every = [row["batch"] for row in document["speedups"] if row["backend"] == backends[0]]
    for axes in (left, right):
        axes.set_xticks(every, [str(batch) for batch in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=7)
    where = document["machine"]
    figure.suptitle(f"{Path(document['compact']).name} on {where['name']}, threads: {where['threads']}", fontsize=10)
    name = "Software" if path.suffix.lower() == ".png" else "Creator"
    with atomic_file(resolve(path, "--plot")) as partial:
        figure.savefig(partial, dpi=150, metadata={name: MARK.decode()})
