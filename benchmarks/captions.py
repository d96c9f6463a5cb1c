"""What a caption costs: full-size BLIP (random weights) writes texts of 20 tokens, greedily, stock against compact.

    python benchmarks/captions.py --work out/captions --core 1

Medians over interleaved rounds of the CPU time of the process, batch 1, one thread. Every side writes with `generate`: torch,
and the three graphs in ONNX Runtime through `comp_cli.load_onnx`.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import latency
import prepared
import torch

from comp_cli import load, load_onnx, tasks
from comp_cli.data.batches import random_inputs
from comp_cli.families import FAMILIES
from comp_cli.measure.variants import on_own_kernels
from comp_cli.onnx import write

FAMILY, TASK = FAMILIES["blip_caption"], tasks.TASKS["caption"]
RATIOS = (0.5, 0.85)
TOKENS = 20


def exported(folder: Path, source: Path, model: torch.nn.Module) -> Path:
    """The graphs of a model, unchecked, with the config that they are opened by."""
    if not folder.exists():
        folder.mkdir()
        write.write_graphs(model, TASK, FAMILY, folder, split=False, opset=write.OPSET, target=write.TARGETS[0])
        shutil.copyfile(source / "config.json", folder / "config.json")
    return folder


def writers(work: Path) -> dict[str, torch.nn.Module]:
    """What writes, by its name in the table."""
    dense = prepared.dense_folder(work, "caption")
    stock = load(dense)
    onnx = "ONNX Runtime"
    found = {
        "torch, stock transformers": stock,
        f"{onnx}, export of the stock model": load_onnx(exported(work / "stock-onnx", dense, stock)),
        f"{onnx}, dense (comp runtime)": load_onnx(exported(work / "own-onnx", dense, on_own_kernels(stock))),
    }
    for ratio in RATIOS:
        folder = prepared.compact_folder(work, ratio, dense)
        model = load(folder)
        found[f"torch, compact at {ratio:g}"] = model
        found[f"{onnx}, compact at {ratio:g}"] = load_onnx(exported(work / f"compact-{ratio:g}-onnx", folder, model))
    return found


def measure(found: dict[str, torch.nn.Module], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each caption; the first round warms up."""
    pixels = random_inputs(next(iter(found.values())).config, FAMILY, 1, 4)["pixel_values"]
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(1 + rounds):
        for name, model in found.items():
            begin = time.process_time()
            tokens = model.generate(pixels, min_new_tokens=TOKENS, max_new_tokens=TOKENS, num_beams=1, do_sample=False)
            taken[name].append(1000 * (time.process_time() - begin))
            assert tokens.shape[1] == 1 + TOKENS
    return {name: values[1:] for name, values in taken.items()}


def table(taken: dict[str, list[float]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    stock, *_ = taken.values()
    lines = ["| | ms | vs stock torch |", "|---|---|---|"]
    for name, values in sorted(taken.items(), key=lambda item: not item[0].startswith("torch")):
        ratios = [before / after for before, after in zip(stock, values, strict=True)]
        lines.append(f"| {name} | {statistics.median(values):.0f} | {statistics.median(ratios):.2f}x |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/captions"), help="models and graphs are made here once")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "captions.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--core", type=int, help="pin to this core")
    arguments = parser.parse_args()
    latency.settle(arguments)
    taken = measure(writers(arguments.work), arguments.rounds)
    arguments.output.write_text(json.dumps(taken, indent=1) + "\n")
    print(table(taken))
