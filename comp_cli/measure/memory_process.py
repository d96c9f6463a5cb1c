"""Peak memory of one model in a process of its own (see memory.measure).

Arguments: torch|onnx PATH INPUTS.npz DEVICE FAMILY [--allow-pickle]. It ends when its stdin does, that is with its parent.
"""

import json
import os
import resource
import sys
import threading
from pathlib import Path

import numpy as np


def run_torch(path: Path, inputs: dict[str, np.ndarray], device: str, family: str, allow_pickle: bool) -> int:
    import torch

    from ..checkpoint.loading import load_model
    from ..engine.methods import DECODER
    from ..families import FAMILIES
    from . import decoding

    described, given = FAMILIES[family], {name: torch.from_numpy(array) for name, array in inputs.items()}
    writes = described.topology.drops_in == DECODER
    dtype = decoding.precision(torch.device(device)) if writes else torch.float32
    model = load_model(path, family=described, dtype=dtype, allow_pickle=allow_pickle).to(device)
    if writes:
        decoding.read(model, given)
    else:
        with torch.inference_mode():
            model(**{name: tensor.to(device) for name, tensor in given.items()})
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_peak()


def run_onnx(path: Path, inputs: dict[str, np.ndarray]) -> int:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    return resident_peak()


def resident_peak() -> int:
    """Bytes. Linux: VmHWM, which starts anew with the process (ru_maxrss would remember the parent's size)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    backend, path, example, device, family = sys.argv[1:6]
    inputs = dict(np.load(example))
    if backend == "torch":
        peak = run_torch(Path(path), inputs, device, family, "--allow-pickle" in sys.argv)
    else:
        peak = run_onnx(Path(path), inputs)
    print(json.dumps({"bytes": peak}), flush=True)


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)
