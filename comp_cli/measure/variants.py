"""What the bench times: one model on one backend becomes one callable that returns when the work is done."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import loading
from ..errors import DeviceError
from ..families import Family, find_family
from ..onnx import sessions
from ..plan import dense_plan
from ..tasks import Task
from .timing import Inputs, Runner

SIDES = ("dense", "own_dense", "compact")  # the stock model; the same weights on comp's kernels; what is left of them


def on_own_kernels(stock: Any, family: Family | None = None) -> nn.Module:
    """The stock model's weights, shared, in comp's runtime with a plan that keeps everything: kernels without pruning. As its
    family, or the usual one of its architecture, is described."""
    described = stock.config.to_dict()
    usual, architecture, _ = find_family(described)
    family = family or usual
    config = copy.deepcopy(stock.config)
    config.comp = dense_plan(described, family, architecture).comp_block(family, described)
    return loading.build_compact(config, family, architecture, loading.untied_state_dict(stock))


def torch_runner(model: Callable[..., Any], device: torch.device) -> Runner:
    """On CUDA the copy of the inputs is part of the time, as it is in ONNX Runtime."""

    def run(inputs: Inputs) -> None:
        with torch.inference_mode():
            model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def compiled_runner(model: nn.Module, device: torch.device) -> Runner:
    """torch.compile, once for every batch size: the first run of each compiles."""
    return torch_runner(torch.compile(model, dynamic=False), device)


def onnx_runner(path: Path, task: Task, device: str) -> Runner:
    """ONNX Runtime with as many threads as torch has."""
    session = sessions.open_session(path, device)
    return lambda inputs: session.run([task.outputs[0]], sessions.feeds(inputs))


def check_compiler(device: torch.device) -> None:
    """Raises DeviceError where torch.compile cannot compile: it needs a C++ compiler for CPUs, Triton for GPUs."""
    number = random.Random().random()  # a function of its own, so that no cache of compiled code answers
    try:
        torch.compile(lambda x: (x + number).sin())(torch.ones(8, device=device))
    except Exception as error:  # torch wraps a missing compiler in several kinds; the sentence is what matters
        said = [line for line in str(error).splitlines() if line.strip()]
        raise DeviceError(
            f"--backend compile: torch.compile does not work here ({said[0] if said else type(error).__name__}).",
            hint="It needs a C++ compiler (g++ or clang++) on CPUs and Triton on GPUs; or leave compile out of --backend.",
        ) from None
