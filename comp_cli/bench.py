"""`comp bench`: the dense and the compact model side by side, in one run, interleaved.

Dense means what a user would otherwise run: the stock transformers model in torch, and its plain ONNX export.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__, export, hub, tasks
from .data import random_inputs
from .engine import flops
from .errors import REFUSED, USAGE, CompError
from .families import find_family
from .loading import load_model, load_processor, pick_device
from .output import Output
from .report import change, gflops, mib, millions
from .store import folder_size, read_config

BACKENDS = ("torch", "onnx")
SIDES = ("dense", "compact")


@dataclass(frozen=True)
class Options:
    device: str = "auto"
    backends: tuple[str, ...] = BACKENDS
    batches: tuple[int, ...] = (1, 8)
    iterations: int = 10
    duration: float = 5.0
    threads: int = 0
    text_tokens: int = flops.TEXT_TOKENS


@dataclass(frozen=True)
class Timing:
    """Milliseconds per forward pass of a whole batch."""

    backend: str
    side: str
    batch: int
    runs: int
    median: float
    p90: float
    p99: float
    pairs_per_second: float


def parse_backends(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise CompError(f"--backend {text}: expected {' or '.join(BACKENDS)}, or both with a comma.", code=USAGE)
    return names


def parse_batches(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise CompError(f"--batch {text}: expected numbers from 1, with commas, such as 1,8.", code=USAGE)
    return sizes


def bench(folder: Path, baseline: str | None, options: Options, out: Output, **hub_options: Any) -> dict[str, Any]:
    """Measure and print; returns the report."""
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = read_config(folder)
    baseline = baseline or config["comp"].get("base_address")
    if baseline is None:
        raise CompError(
            f"{folder} does not say what it was made of.", code=USAGE, hint="Name the dense model: --baseline MODEL"
        )
    source = hub.resolve(baseline, out=out, **hub_options)
    dense_config = read_config(source.folder)
    if "comp" in dense_config:
        raise CompError(f"--baseline {baseline} is a compact model.", code=REFUSED, hint="Name the dense model.")
    family, architecture = find_family(config)
    if find_family(dense_config)[1] != architecture:
        raise CompError(f"--baseline {baseline} is not a {architecture}.", code=REFUSED)
    task = tasks.TASKS[family.architectures[architecture]]
    folders = {"dense": source.folder, "compact": folder}
    out.say(f"loading {source.name} and {folder} ...")
    models = {side: load_model(path, dtype=torch.float32) for side, path in folders.items()}
    same_inputs(models, source.name)
    longest = getattr(load_processor(folder).tokenizer, "model_max_length", options.text_tokens)
    text_tokens = min(options.text_tokens, longest, models["dense"].config.text_config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {}
        if "onnx" in options.backends:
            for side in SIDES:
                out.say(f"exporting the {side} model ...")
                graphs[side] = Path(scratch) / f"{side}.onnx"
                export.write_graph(models[side], task, graphs[side])
        runners, providers = build_runners(models, graphs, task, device, options)
        timings = []
        for batch in options.batches:
            inputs = random_inputs(models["dense"].config, batch, text_tokens)
            timings += time_interleaved(runners, inputs, batch, options, out)
        memory = peak_memory(folders, graphs, models["dense"], text_tokens, device, options, out)
    document = {
        "comp_version": __version__,
        "compact": str(folder),
        "baseline": source.name,
        "architecture": architecture,
        "machine": machine(device),
        "providers": providers,
        "text_tokens": text_tokens,
        "params": {side: sum(p.numel() for p in model.parameters()) for side, model in models.items()},
        "flops": {side: count_flops(model, text_tokens) for side, model in models.items()},
        "size_bytes": {side: folder_size(path) for side, path in folders.items()},
        "timings": [asdict(timing) for timing in timings],
        "speedups": speedups(timings),
        "peak_memory_bytes": memory,
    }
    print_bench(document, out)
    return document


def same_inputs(models: dict[str, torch.nn.Module], name: str) -> None:
    """Exit 4 unless both models take images of the same size and know the same words."""
    seen = {
        side: (model.config.vision_config.image_size, model.config.text_config.vocab_size) for side, model in models.items()
    }
    if seen["dense"] != seen["compact"]:
        raise CompError(f"--baseline {name} takes other inputs (image size, vocabulary) than the compact model.", code=REFUSED)


def count_flops(model: torch.nn.Module, text_tokens: int) -> int:
    """FLOPs of one pair, counted from what runs (the math attention kernel shows its matmuls to the counter)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    inputs = random_inputs(model.config, 1, text_tokens)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.cpu()(**inputs)
    return counter.get_total_flops()


Runner = Callable[[dict[str, Tensor]], None]


def build_runners(
    models: dict[str, torch.nn.Module], graphs: dict[str, Path], task: tasks.Task, device: torch.device, options: Options
) -> tuple[dict[tuple[str, str], Runner], dict[str, str]]:
    """One callable for each (backend, side), and the provider that each ONNX session really runs on."""
    runners: dict[tuple[str, str], Runner] = {}
    providers = {}
    for side, path in graphs.items():
        session = export.open_session(path, str(device), torch.get_num_threads())
        providers[side] = session.get_providers()[0]
        runners["onnx", side] = lambda inputs, session=session: session.run([task.output], export.feeds(inputs))
    if "torch" in options.backends:
        for side, model in models.items():
            runners["torch", side] = _torch_runner(model.to(device), device)
    return runners, providers


def _torch_runner(model: torch.nn.Module, device: torch.device) -> Runner:
    def run(inputs: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def time_interleaved(
    runners: dict[tuple[str, str], Runner], inputs: dict[str, Tensor], batch: int, options: Options, out: Output
) -> list[Timing]:
    """Rounds in which every variant runs once, so that a busy moment of the machine hits all of them alike."""
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    for run in runners.values():  # warm-up
        run(inputs)
        run(inputs)
    with out.progress(f"timing batch {batch}", options.iterations) as bar:
        start = time.perf_counter()
        rounds = 0
        while rounds < options.iterations or time.perf_counter() - start < options.duration:
            for key, run in runners.items():
                begin = time.perf_counter()
                run(inputs)
                taken[key].append(1000 * (time.perf_counter() - begin))
            rounds += 1
            bar.advance(by=int(rounds <= options.iterations))
    return [summary(backend, side, batch, times) for (backend, side), times in taken.items()]


def summary(backend: str, side: str, batch: int, times: list[float]) -> Timing:
    median, p90, p99 = statistics.median(times), *np.percentile(times, [90, 99]).tolist()
    return Timing(backend, side, batch, len(times), median, p90, p99, 1000 * batch / median)


def speedups(timings: list[Timing]) -> list[dict[str, Any]]:
    """Median of dense over median of compact, per backend and batch; and over the stock model in torch."""
    medians = {(t.backend, t.side, t.batch): t.median for t in timings}
    rows = []
    for backend, side, batch in medians:
        if side == "dense":
            continue
        row = {"backend": backend, "batch": batch}
        row["speedup"] = medians[backend, "dense", batch] / medians[backend, "compact", batch]
        if ("torch", "dense", batch) in medians:
            row["against_stock_torch"] = medians["torch", "dense", batch] / medians[backend, "compact", batch]
        rows.append(row)
    return rows


def peak_memory(
    folders: dict[str, Path],
    graphs: dict[str, Path],
    model: torch.nn.Module,
    text_tokens: int,
    device: torch.device,
    options: Options,
    out: Output,
) -> list[dict[str, Any]]:
    """Peak resident memory (on CUDA: peak allocated) of a fresh process that loads one model and runs the largest batch."""
    batch = max(options.batches)
    jobs = [("torch", side, folders[side]) for side in SIDES if "torch" in options.backends]
    jobs += [("onnx", side, graphs[side]) for side in graphs]
    if device.type == "cuda":
        jobs = [job for job in jobs if job[0] == "torch"]  # ONNX Runtime does not tell what it holds on the GPU
    rows = []
    with tempfile.TemporaryDirectory() as scratch, out.progress("measuring peak memory", len(jobs)) as bar:
        example = Path(scratch) / "inputs.npz"
        np.savez(example, **export.feeds(random_inputs(model.config, batch, text_tokens)))
        for backend, side, path in jobs:
            command = [sys.executable, "-m", "comp_cli.peak", backend, str(path), str(example), str(device)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
            if done.returncode:
                raise CompError(f"measuring the memory of {path} failed: {done.stderr.strip().splitlines()[-1:]}")
            rows.append({"backend": backend, "side": side, "batch": batch, "bytes": json.loads(done.stdout)["bytes"]})
            bar.advance()
    return rows


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures were taken."""
    import onnxruntime
    import transformers

    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "tf32": device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def print_bench(document: dict[str, Any], out: Output) -> None:
    faster = {(row["backend"], row["batch"]): row for row in document["speedups"]}
    names = {("torch", "dense"): "torch, stock transformers", ("onnx", "dense"): "ONNX Runtime, plain export"}
    rows = []
    for t in document["timings"]:
        label = names.get((t["backend"], t["side"]), "torch, compact" if t["backend"] == "torch" else "ONNX Runtime, compact")
        row = faster.get((t["backend"], t["batch"]), {}) if t["side"] == "compact" else {}
        rows.append(
            [
                f"{label}, batch {t['batch']}",
                *(f"{t[key]:.1f}" for key in ("median", "p90", "p99")),
                f"{t['pairs_per_second']:.1f}",
                f"{row['speedup']:.2f}x" if row else "1.00x",
                f"{row['against_stock_torch']:.2f}x" if "against_stock_torch" in row else "-",
            ]
        )
    columns = ["", "median ms", "p90", "p99", "pairs / s", "vs its dense", "vs stock torch"]
    where = document["machine"]
    out.table(f"{document['compact']} against {document['baseline']} on {where['name']} ({where['device']})", columns, rows)
    rows = [
        [name, *(shown(document[key][side]) for side in SIDES), change(document[key]["dense"], document[key]["compact"])]
        for name, key, shown in (
            ("parameters", "params", millions),
            ("FLOPs per pair", "flops", gflops),
            ("weights on disk", "size_bytes", mib),
        )
    ]
    peaks = {(row["backend"], row["side"]): row["bytes"] for row in document["peak_memory_bytes"]}
    for backend in dict.fromkeys(backend for backend, _ in peaks):
        dense, compact = (peaks[backend, side] for side in SIDES)
        batch = document["peak_memory_bytes"][0]["batch"]
        rows.append([f"peak memory, {backend}, batch {batch}", mib(dense), mib(compact), change(dense, compact)])
    out.table("Cost", ["", "dense", "compact", "change"], rows)
    out.line("Dense is what one would run otherwise; part of the gain is that comp's attention is fused, where stock is eager.")
    out.line(
        f"{where['threads']} threads, {document['text_tokens']} text tokens, torch {where['torch']}, transformers "
        f"{where['transformers']}, onnxruntime {where['onnxruntime']}. Interleaved runs, medians."
    )
