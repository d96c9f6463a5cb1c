"""Where an ONNX graph really runs: the providers of its nodes, and their times, from ONNX Runtime's own profile."""

import ctypes
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DeviceError
from . import sessions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_WHEEL = (
    "pip install 'comp-cli[gpu]', then pip install --force-reinstall --no-deps onnxruntime-gpu, whose files must come last; or "
    "use --device cpu."
)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One node of the graph that ran, after ONNX Runtime's own optimisations."""

    name: str
    op: str
    provider: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    ms: float  # the fastest of the runs


@dataclass(frozen=True)
class Profile:
    first: str  # the session's first provider
    tf32: bool  # whether that provider may round the inputs of matmuls to 19 bits
    nodes: tuple[Node, ...]  # in the order in which they ran

    def shares(self) -> dict[str, dict[str, float]]:
        """Per provider: how many of the nodes ran there, as a count and as shares of the nodes and of their time."""
        whole = sum(node.ms for node in self.nodes) or 1.0
        found = {}
        for provider in dict.fromkeys(node.provider for node in self.nodes):
            here = [node.ms for node in self.nodes if node.provider == provider]
            found[provider] = {"nodes": len(here), "node_share": len(here) / len(self.nodes), "time_share": sum(here) / whole}
        return found


def profile(path: Path, inputs: Mapping[str, Tensor], device: str = "cpu", runs: int = 2) -> Profile:
    """Run a graph in a session of its own with profiling on, after one run to warm up.

    Profiling slows small nodes a little: these times are for shares, never for latency.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = sessions.open_session(path, device, profile=Path(scratch) / "profile")
        for _ in range(1 + runs):
            session.run(None, sessions.feeds(inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
    first = session.get_providers()[0]
    tf32 = session.get_provider_options()[first].get("use_tf32") == "1"
    seen = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time") and event["args"].get("provider"):
            seen[event["name"].removesuffix("_kernel_time")].append(event)
    return Profile(first, tf32, tuple(_node(name, found[-runs:]) for name, found in seen.items()))


def _node(name: str, events: list[dict[str, Any]]) -> Node:
    told = events[-1]["args"]
    shapes = ([tuple(s) for entry in told[key] for s in entry.values()] for key in ("input_type_shape", "output_type_shape"))
    inputs, outputs = map(tuple, shapes)
    ms = min(event["dur"] for event in events) / 1000
    return Node(name, told["op_name"], told["provider"], inputs, outputs, ms)


def check_cuda() -> None:
    """Raises DeviceError where ONNX Runtime has no working CUDA provider, with the library that is missing."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        why: str | None = f"onnxruntime {onnxruntime.__version__} is built without it"
        hint = GPU_WHEEL
    else:
        why = missing_library(Path(onnxruntime.__file__).parent / "capi")
        hint = "Install what onnxruntime-gpu needs (CUDA and cuDNN of the version it was built for), or use --device cpu."
    if why:
        raise DeviceError(f"ONNX Runtime has no working {CUDA}: {why}.", hint=hint)


def missing_library(folder: Path) -> str | None:
    """What the loader says when it loads the CUDA provider of the onnxruntime in `folder`; None where it loads."""
    sessions.preload_cuda()
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        library = folder / name
        if library.exists():
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                return str(error)
    return None
