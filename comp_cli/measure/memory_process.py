"""Peak memory of one model in a process of its own (see memory.measure).

Arguments: torch|onnx PATH INPUTS.npz DEVICE FAMILY [--allow-pickle]. It ends when its stdin does, that is with its parent.
"""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np

from ..files import memory

Found = tuple[int, int]  # bytes at most, and of those what was there before the model: Python, and the libraries


def run_torch(path: Path, inputs: dict[str, np.ndarray], device: str, family: str, allow_pickle: bool) -> Found:
    import torch
    import transformers

    from ..checkpoint.loading import load_model
    from ..engine.methods import DECODER
    from ..families import FAMILIES
    from ..files.store import read_config
    from . import decoding

    getattr(transformers, read_config(path)["architectures"][0], None)  # which brings the module of the class
    before = 0 if device.startswith("cuda") else memory.resident()
    described, given = FAMILIES[family], {name: torch.from_numpy(array) for name, array in inputs.items()}
    writes = described.topology.drops_in == DECODER
    dtype = decoding.precision(torch.device(device)) if writes else torch.float32
    model = load_model(path, family=described, dtype=dtype, allow_pickle=allow_pickle).to(device)
    if writes:
        decoding.read(model, given)
    else:
        with torch.inference_mode():
            model(**{name: tensor.to(device) for name, tensor in given.items()})
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else memory.peak(), before


def run_onnx(path: Path, inputs: dict[str, np.ndarray], threads: int) -> Found:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    before = memory.resident()
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    return memory.peak(), before


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    backend, path, example, device, family = sys.argv[1:6]
    inputs = dict(np.load(example))
    if backend == "torch":
        peak, before = run_torch(Path(path), inputs, device, family, "--allow-pickle" in sys.argv)
    else:
        peak, before = run_onnx(Path(path), inputs, int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps({"bytes": peak, "baseline": before}), flush=True)


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)
