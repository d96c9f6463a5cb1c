"""Models and graphs that the speed benchmarks share, made once in a work folder: full-size BLIP ITM, random weights."""

import functools
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import comp_cli
from comp_cli import tasks
from comp_cli.checkpoint import loading
from comp_cli.families import FAMILIES
from comp_cli.measure import variants
from comp_cli.onnx import rewrite, write

TASK, FAMILY = tasks.TASKS["itm"], FAMILIES["blip"]
TEXT_TOKENS = 35
FULL_SIZE = Path(__file__).parent.parent / "scripts" / "full_size.py"


def dense_folder(work: Path, task: str = "itm") -> Path:
    """The full-size checkpoint."""
    folder = work / "dense"
    if not folder.exists():
        subprocess.run([sys.executable, FULL_SIZE, folder, "--task", task], check=True)
    return folder


def compact_folder(work: Path, ratio: float, base: Path | None = None) -> Path:
    """A real, unequal plan: scores of the method joint on four pairs, no recovery (random weights have no accuracy)."""
    folder = work / f"compact-{ratio:g}"
    if not folder.exists():
        few = {"num_samples": 4, "eval_samples": 2, "batch_size": 2}
        base = base or dense_folder(work)
        comp_cli.prune(base, ratio=ratio, output=folder, method="joint", recover=False, device="cpu", **few)
    return folder


@functools.cache
def model(work: Path, name: str) -> nn.Module:
    """ "stock" transformers, "own" (its weights on comp's kernels), or a ratio: "0.5"."""
    if name == "own":
        return variants.on_own_kernels(model(work, "stock"))
    folder = dense_folder(work) if name == "stock" else compact_folder(work, float(name))
    return loading.load_model(folder, dtype=torch.float32)


def graph(work: Path, name: str) -> Path:
    """The ONNX graph of that model; with "int8 " before the name, dynamically quantized."""
    path = work / f"{name.replace(' ', '-')}.onnx"
    if not path.exists():
        if name.startswith("int8 "):
            rewrite.quantize(graph(work, name.removeprefix("int8 ")), path)
        else:
            write.write_graph(model(work, name), TASK, FAMILY, path)
    return path
