"""Peak memory of models, each in a process of its own (peak.py), so that nothing of this process counts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import sessions
from .errors import CompError
from .families import Family
from .output import Output
from .timing import Inputs


def peak_memory(
    places: dict[tuple[str, str], Path], inputs: Inputs, family: Family, device: torch.device, allow_pickle: bool, out: Output
) -> list[dict[str, Any]]:
    """Bytes, per (backend, side): peak resident memory (on CUDA: peak allocated) of a process that loads and runs the model.

    Not known for what is made on the fly (torch.compile, own dense in torch), nor for ONNX Runtime on a GPU.
    """
    if device.type == "cuda":
        places = {key: path for key, path in places.items() if key[0] == "torch"}
    rows = []
    with tempfile.TemporaryDirectory() as scratch, out.progress("measuring peak memory", len(places)) as bar:
        example = Path(scratch) / "inputs.npz"
        np.savez(example, **sessions.feeds(inputs))
        for (backend, side), path in places.items():
            command = [sys.executable, "-m", "comp_cli.peak", backend, str(path), str(example), str(device), family.name]
            command += ["--allow-pickle"] if allow_pickle and side == "dense" else []
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
            if done.returncode:
                raise CompError(f"measuring the memory of {path} failed: {done.stderr.strip().splitlines()[-1:]}")
            batch = len(next(iter(inputs.values())))
            rows.append({"backend": backend, "side": side, "batch": batch, "bytes": json.loads(done.stdout)["bytes"]})
            bar.advance()
    return rows
