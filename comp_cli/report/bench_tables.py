"""The tables of `comp bench`."""

from ..options import flag
from .bench import BenchReport, Factor, GateOutcome, Latency, Speedup
from .numbers import Printer, change, gflops, mib, millions, percent

BACKEND_NAMES = {"torch": "torch", "onnx": "ONNX Runtime", "compile": "torch.compile"}
GATES = {"min_speedup": ("speed-up", "x"), "max_latency_ms": ("latency", " ms"), "max_memory_mb": ("memory", " MiB")}
STOCK = {"torch": "stock transformers", "onnx": "plain export", "compile": "stock transformers"}


def side_name(backend: str, side: str) -> str:
    return {"dense": STOCK[backend], "own_dense": "dense (comp runtime)", "compact": "compact"}[side]


def times(factor: Factor) -> str:
    return f"{factor.value:.2f}x"


def interval(factor: Factor) -> str:
    return f"{factor.low:.2f} - {factor.high:.2f}"


def print_benchmark(report: BenchReport, out: Printer) -> None:
    """Latency, where the speed-up comes from, cost, gates, and the conditions."""
    where = report.machine
    title = f"{report.compact} vs {report.baseline} on {where.name} ({where.device})"
    unit = "pairs / s" if report.generation is None else "prompts / s"
    out.table(title, ["", "median ms", "p90", "p99", unit], [_latency(row) for row in report.timings])
    title = f"Speed-up of the compact model over stock, same backend; FLOPs fall {report.flops_reduction:.2f}x"
    rows = [row for found in report.speedups for row in _speedup(found)]
    out.table(title, ["", "speed-up", "95 % interval", "efficiency"], rows)
    if report.generation is not None:
        out.table("Writing", ["", "first token, ms", "ms a token", "tokens / s", "keys and values, MiB"], _writing(report))
    out.table("Cost", ["", "dense", "compact", "change"], _costs(report))
    for side, found in report.providers.items():
        ran = ", ".join(f"{percent(share.node_share)} of {name}" for name, share in found.shares.items())
        out.line(f"ONNX Runtime, {side_name('onnx', side)}: {found.first} first; nodes that ran: {ran}.")
    baselines = {row.backend: row.baseline_bytes for row in report.peak_memory_bytes if row.baseline_bytes}
    if baselines:
        held = ", ".join(f"{BACKEND_NAMES[backend]} {mib(size)}" for backend, size in baselines.items())
        out.line(f"Peak memory: above what Python and its libraries hold before a model is loaded ({held}).")
    if report.generation is None:
        out.line(
            "From kernels: stock over dense (comp runtime); from pruning: that over compact. "
            "Efficiency: the speed-up from pruning over the fall of the FLOPs."
        )
    else:
        out.line(
            "The first tables are of the whole prompt, image and text, up to the logits of its last token. Both models run the "
            "stock kernels. Efficiency: the speed-up over the fall of the FLOPs, of which causal kernels skip some."
        )
    images = "" if report.image_tokens is None else f"{report.image_tokens} image and "
    out.line(
        f"{report.threads}, {images}{report.text_tokens} text tokens, torch {where.torch}, transformers "
        f"{where.transformers}, onnxruntime {where.onnxruntime}, TF32 {'on' if where.tf32 else 'off'}. "
        f"{min(row.runs for row in report.timings)} interleaved rounds, medians."
    )
    for outcome in report.gates:
        out.line(gate_sentence(outcome))


def _latency(row: Latency) -> list[str]:
    label = f"{BACKEND_NAMES[row.backend]}, {side_name(row.backend, row.side)}, batch {row.batch}"
    return [label, *(f"{value:.1f}" for value in (row.median, row.p90, row.p99, row.pairs_per_second))]


def _speedup(row: Speedup) -> list[list[str]]:
    """Over stock, what of it comes from what, and over stock in torch where that is another backend."""
    whole, efficiency = f"{BACKEND_NAMES[row.backend]}, batch {row.batch}", f"{row.flops_efficiency:.2f}"
    if row.by_kernels is None:  # of both sides on stock kernels, all comes from pruning
        return [[whole, times(row.speedup), interval(row.speedup), efficiency]]
    rows = [
        [whole, times(row.speedup), interval(row.speedup), ""],
        ["  from kernels", times(row.by_kernels), interval(row.by_kernels), ""],
        ["  from pruning", times(row.by_pruning), interval(row.by_pruning), efficiency],
    ]
    if row.against_stock_torch is not None and row.backend != "torch":
        rows.append(["  over stock torch", times(row.against_stock_torch), interval(row.against_stock_torch), ""])
    return rows


def _writing(report: BenchReport) -> list[list[str]]:
    """A row for each side and batch, and the speed-ups behind those of a batch."""
    rows = []
    for faster in report.generation_speedups or ():
        for found in report.generation or ():
            if found.batch == faster.batch:
                numbers = [f"{found.first_token_ms:.1f}", f"{found.token_ms:.2f}", f"{found.tokens_per_second:.1f}"]
                label = f"{side_name('torch', found.side)}, batch {found.batch}"
                rows.append([label, *numbers, mib(found.kv_cache_bytes)])
        said = f"{times(faster.decoding)}, efficiency {faster.decoding_flops_efficiency:.2f}"
        rows.append([f"speed-up, batch {faster.batch}", times(faster.first_token), said, "", ""])
    return rows


def _costs(report: BenchReport) -> list[list[str]]:
    rows = [
        ("parameters", millions, report.params.dense, report.params.compact),
        (
            "FLOPs per pair" if report.step_flops is None else "FLOPs of a prompt",
            gflops,
            report.flops.dense,
            report.flops.compact,
        ),
        ("weights on disk", mib, report.size_bytes.dense, report.size_bytes.compact),
    ]
    if report.step_flops is not None:
        rows.insert(2, ("FLOPs of a token behind it", gflops, report.step_flops.dense, report.step_flops.compact))
    peaks: dict[str, dict[str, int]] = {}
    for row in report.peak_memory_bytes:
        label = f"peak memory, {BACKEND_NAMES[row.backend]}, batch {row.batch}"
        peaks.setdefault(label, {})[row.side] = row.bytes - row.baseline_bytes
    rows += [(label, mib, found["dense"], found["compact"]) for label, found in peaks.items()]
    return [[name, shown(dense), shown(compact), change(dense, compact)] for name, shown, dense, compact in rows]


def gate_sentence(outcome: GateOutcome) -> str:
    """The outcome for people."""
    what, unit = GATES[outcome.gate]
    verdict = "passed" if outcome.passed else "not met"
    where = f"{outcome.backend}, batch {outcome.batch}"
    return f"{flag(outcome.gate)} {outcome.limit:g} {verdict}: the worst {what} is {outcome.found:.2f}{unit} ({where})."
