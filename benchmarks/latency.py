"""The speed table of docs/performance.md: full-size BLIP ITM (random weights), stock against compact, on one pinned thread.

    python benchmarks/latency.py --work out/speed --core 1

Every variant runs once per round, and every round is one JSON line, so it can be stopped and started at will. The table is
made of medians over rounds, of the CPU time of the process: with one thread that is the latency on a core of its own, also
where another process took the core for a while. Wall time is in the lines as well (`--clock wall`).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import prepared
import torch

from comp_cli.commands import bench
from comp_cli.data.batches import random_inputs
from comp_cli.measure import timing, variants

RATIOS = ("0.5", "0.85")
TORCH = ("stock", "own", *RATIOS)
ONNX = ("stock", "own", *RATIOS, *(f"int8 {ratio}" for ratio in RATIOS))
ROUNDS = {1: 11, 8: 5}
CLOCKS = ("wall", "cpu")
ROWS = {
    "torch own": "torch, dense (comp runtime)",
    "torch 0.5": "torch, compact at 0.5",
    "torch 0.85": "torch, compact at 0.85",
    "onnx stock": "ONNX Runtime, plain export of the stock model",
    "onnx own": "ONNX Runtime, dense (comp runtime)",
    "onnx 0.5": "ONNX Runtime, compact at 0.5",
    "onnx 0.85": "ONNX Runtime, compact at 0.85",
    "onnx int8 0.5": "ONNX Runtime, compact at 0.5, int8",
    "onnx int8 0.85": "ONNX Runtime, compact at 0.85, int8",
}


def clocks() -> np.ndarray:
    """Wall clock and CPU time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def build(work: Path) -> dict[str, timing.Runner]:
    runners = {f"torch {name}": variants.torch_runner(prepared.model(work, name), torch.device("cpu")) for name in TORCH}
    return runners | {f"onnx {name}": variants.onnx_runner(prepared.graph(work, name), prepared.TASK, "cpu") for name in ONNX}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(runners: dict[str, timing.Runner], config, path: Path, batch: int, rounds: int, done: int) -> None:
    """Append rounds until there are so many."""
    where = bench.machine(torch.device("cpu"))
    inputs = random_inputs(config, prepared.FAMILY, batch, prepared.TEXT_TOKENS)
    with path.open("a") as file:
        for number, taken in enumerate(timing.rounds(runners, inputs, clocks, warm_up=1), start=done + 1):
            ms = {name: {c: round(float(t), 2) for c, t in zip(CLOCKS, times, strict=True)} for name, times in taken.items()}
            print(json.dumps({"batch": batch, "round": number, "machine": where, "ms": ms}), file=file, flush=True)
            print(f"batch {batch}, round {number} of {rounds}", flush=True)
            if number >= rounds:
                return


def series(lines: list[dict], batch: int, clock: str) -> dict[str, list[float]]:
    """Per variant: ms, one per round."""
    found = [line["ms"] for line in lines if line["batch"] == batch]
    return {name: [row[name][clock] for row in found] for name in (found[0] if found else {})}


def table(work: Path, lines: list[dict], clock: str) -> str:
    """Markdown. Speed-up against stock torch; efficiency: that against our own dense model on the same backend over the
    fall of the FLOPs."""
    batches = sorted({line["batch"] for line in lines})
    flops = {r: json.loads((work / f"compact-{r}" / "comp_report.json").read_text())["flops"] for r in RATIOS}
    fall = {ratio: count["dense"] / count["compact"] for ratio, count in flops.items()}
    head = " | ".join(f"batch {b}, ms | vs stock torch (95 % interval) | FLOPs efficiency" for b in batches)
    out = [f"FLOPs fall {', '.join(f'{fall[r]:.3f}x at {r}' for r in RATIOS)}.", "", f"| | {head} |"]
    out.append("|---" * (1 + 3 * len(batches)) + "|")
    times = {batch: series(lines, batch, clock) for batch in batches}
    stock = " | ".join(f"{np.median(times[batch]['torch stock']):.0f} | 1.00x | " for batch in batches)
    out.append(f"| torch, stock transformers | {stock} |")
    for name, label in ROWS.items():
        cells = []
        for batch in batches:
            ms = times[batch]
            faster = timing.speedup(ms["torch stock"], ms[name])
            efficiency = ""
            if name.split()[-1] in RATIOS and "int8" not in name:
                own = timing.speedup(ms[f"{name.split()[0]} own"], ms[name]).value
                efficiency = f"{own / fall[name.split()[-1]]:.2f}"
            median = np.median(ms[name])
            cells.append(f"{median:.0f} | {faster.value:.2f}x ({faster.low:.2f} - {faster.high:.2f}) | {efficiency}")
        out.append(f"| {label} | " + " | ".join(cells) + " |")
    where = lines[-1]["machine"]
    rounds = ", ".join(f"{len(times[b]['torch stock'])} at batch {b}" for b in batches)
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "onnxruntime"))
    out += ["", f"{where['name']}, threads: {where['threads']}, {versions}; medians of {clock} time, rounds: {rounds}."]
    return "\n".join(out) + "\n"


def complete(arguments: argparse.Namespace, build: Callable[[], dict[str, timing.Runner]], rounds: dict[int, int]) -> None:
    """Measure the rounds that the output lacks, on one thread. `rounds`: of each batch size, unless --rounds says."""
    runners: dict[str, timing.Runner] = {}
    for batch in arguments.batches:
        done = sum(line.get("batch") == batch for line in read(arguments.output))
        wanted = arguments.rounds or rounds.get(batch, min(rounds.values()))
        if done < wanted:
            runners = runners or build()
            measure(runners, prepared.model(arguments.work, "stock").config, arguments.output, batch, wanted, done)


def settle(arguments: argparse.Namespace) -> None:
    """One thread (or --threads), on the core that was asked for; the folders that are written to."""
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(getattr(arguments, "threads", 1))
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)


def main(arguments: argparse.Namespace) -> None:
    settle(arguments)
    complete(arguments, lambda: build(arguments.work), ROUNDS)
    text = table(arguments.work, read(arguments.output), arguments.clock)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="models and graphs, made once (7 GB)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latency.jsonl"))
    parser.add_argument("--batches", nargs="+", type=int, default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="per batch; else 11 at batch 1, 5 at batch 8")
    parser.add_argument("--core", type=int, help="CPU core to stay on (Linux)")
    parser.add_argument("--threads", type=int, default=1, help="take --clock wall for more than one")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    main(parser.parse_args())
