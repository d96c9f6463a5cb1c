"""Peak memory of models, each in a process of its own (memory_process.py), so that nothing of this process counts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CompError
from ..families import Family
from ..onnx import sessions
from ..progress import Progress
from ..report.bench import PeakMemory
from .timing import Inputs

# -P: what lies in the current folder is no library. This very comp, wherever Python found it.
START = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import comp_cli
del sys.path[0]
from comp_cli.measure import memory_process
memory_process.main()
"""


def peak_memory(
    places: dict[tuple[str, str], Path],
    inputs: Inputs,
    family: Family,
    device: torch.device,
    allow_pickle: bool,
    progress: Progress,
) -> tuple[PeakMemory, ...]:
    """Bytes, per (backend, side): peak resident memory (on CUDA: peak allocated) of a process that loads and runs the model.

    Not known for what is made on the fly (torch.compile, own dense in torch), nor for ONNX Runtime on a GPU.
    """
    if device.type == "cuda":
        places = {key: path for key, path in places.items() if key[0] == "torch"}
    rows = []
    with tempfile.TemporaryDirectory() as scratch, progress.track("measuring peak memory", len(places)) as bar:
        example = Path(scratch) / "inputs.npz"
        arrays: dict[str, Any] = sessions.feeds(inputs)
        np.savez(example, **arrays)
        for (backend, side), path in places.items():
            given = [backend, str(path), str(example), str(device), family.name]
            given += ["--allow-pickle"] if allow_pickle and side == "dense" else []
            batch = len(next(iter(inputs.values())))
            rows.append(PeakMemory(backend, side, batch, *measure(given)))
            bar.advance()
    return tuple(rows)


def measure(given: list[str]) -> tuple[int, int]:
    """Bytes at most, and before the model, by memory_process.py, which has as many threads as this process. Its stdin is a pipe
    that ends with this process, whatever ends that."""
    command = [sys.executable, "-P", "-c", START, str(Path(__file__).parents[2]), *given]
    ending, lifeline = os.pipe()
    try:
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, stdin=ending, capture_output=True, text=True, env=environment)
    finally:
        os.close(ending)
        os.close(lifeline)
    if done.returncode:
        why = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise CompError(f"measuring the memory of {given[1]} failed: {why}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], found["baseline"]
