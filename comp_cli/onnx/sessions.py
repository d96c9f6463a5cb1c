"""Graphs as ONNX Runtime runs them."""

from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.loading import quiet_libraries
from ..errors import CompError, DeviceError, RefusedError
from ..topology.graph_specs import Run, Values, in_turn


def open_session(path: Path, device: str = "cpu", tf32: bool = True, profile: Path | None = None) -> Any:
    """An ONNX Runtime session with as many threads as torch has, whose first provider is the one that was asked for. Raises
    DeviceError where it is another, or none; RefusedError where the file holds no graph that could run.

    With `profile` the session times its nodes into a file that begins so.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    wanted = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1  # one operation at a time
    options.log_severity_level = 4
    # Idle threads that spin take the cores from what runs next: in `comp bench` that is torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if wanted.startswith("CUDA"):
        preload_cuda()
    cuda = {"device_id": int(device.partition(":")[2] or 0), "use_tf32": int(tf32)}
    providers = [wanted] if wanted.startswith("CPU") else [(wanted, cuda), "CPUExecutionProvider"]
    try:
        with quiet_libraries():
            session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        raise _refused(path, device, error) from error
    first = session.get_providers()[0]
    if first != wanted:
        raise DeviceError(
            f"ONNX Runtime runs on {first}, not on {wanted}.",
            hint="It needs the CUDA and cuDNN libraries of the version that it was built for; comp env says what is missing.",
        )
    return session


def _refused(path: Path, device: str, error: Exception) -> CompError:
    """A sentence for what ONNX Runtime says about a file: broken, or in order but too much for the device."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if type(error).__name__ in ("NotImplemented", "EPFail", "RuntimeException", "MemoryError"):
        return DeviceError(f"ONNX Runtime cannot run {path.name} on {device}: {lines[0]}")
    hint = "It is cut off, damaged, no ONNX graph, or of a newer kind than this ONNX Runtime knows. Export the model again."
    return RefusedError(f"{path}: ONNX Runtime refuses it: {lines[0]}", hint=hint)


def preload_cuda() -> None:
    """Let ONNX Runtime find the CUDA libraries that pip installed. It prints what it misses on stdout: not ours to say."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):
            onnxruntime.preload_dlls()


def feeds(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


class OnnxModel:
    """The graphs of a folder, run as their topology runs them.

    `given` holds what each graph was last given.
    """

    def __init__(self, folder: Path, names: list[str], device: str = "cpu", run: Run = in_turn):
        self.sessions = {name: open_session(folder / name, device, tf32=False) for name in names}
        self.given: dict[str, Values] = {}
        self._run = run

    def run(self, inputs: Mapping[str, Tensor], names: Iterable[str] = ()) -> Values:
        """What the graphs, or those that are named, make of the inputs of the model, by name."""
        return self._run(self.step, names or self.sessions, feeds(inputs))

    def step(self, name: str, values: Values) -> Values:
        """Run one graph on those of the values that it takes; its outputs by name."""
        session = self.sessions[name]
        self.given[name] = {value.name: values[value.name] for value in session.get_inputs()}
        made = session.run(None, self.given[name])
        return dict(zip((value.name for value in session.get_outputs()), made, strict=True))

    def signature(self) -> dict[str, Any]:
        """Names, types and shapes of what goes in and comes out, for each file."""

        def shapes(values: Any) -> dict[str, Any]:
            return {v.name: {"type": v.type.removeprefix("tensor(").removesuffix(")"), "shape": v.shape} for v in values}

        return {
            name: {"inputs": shapes(session.get_inputs()), "outputs": shapes(session.get_outputs())}
            for name, session in self.sessions.items()
        }
