"""How many threads a command works with: as many as pay for its model on the cores that the process has.

PyTorch works inside an operation with so many threads, and so does ONNX Runtime (`onnx.sessions`). Operations are run one after
the other: the pools of both for operations side by side have no work.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ..files import cores
from ..report.base import Threads

# Operations of a smaller batch are over before a second thread has begun; on a busy machine they wait for one another then.
FLOPS_OF_A_THREAD = 1e9
WISHES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables that PyTorch reads when it is imported


@dataclass(frozen=True)
class _Command:
    """A command that runs. before: PyTorch's number when it began; asked: --threads."""

    before: int
    asked: int
    used: Threads


_running: ContextVar[_Command | None] = ContextVar("running", default=None)


def choose(asked: int, before: int, flops: float | None = None) -> Threads:
    """What was asked for, by option or else by a variable of the environment; else at most what PyTorch has, what there are
    cores for, and what the FLOPs of a batch pay for (None: not known yet)."""
    if asked:
        return Threads(asked, "--threads")
    for name in WISHES:
        wish = re.match(r"\s*(\d+)", os.environ.get(name, ""))
        if wish and int(wish[1]) == before:
            return Threads(before, name)
    number, because = cores.available()
    if (side_by_side := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        number, because = max(1, number // side_by_side), "processes"
    if before < number:
        number, because = before, "torch"
    if flops is not None and (paid := max(1, int(flops / FLOPS_OF_A_THREAD))) < number:
        number, because = paid, "model size"
    return Threads(number, because)


@contextmanager
def at_work(asked: int) -> Iterator[None]:
    """A command works with `asked` threads, 0 for as many as there are cores for; see `fit`. PyTorch has afterwards what it had
    before."""
    before = torch.get_num_threads()
    token = _running.set(_Command(before, asked, choose(asked, before)))
    try:
        torch.set_num_threads(in_use().number)
        yield
    finally:
        torch.set_num_threads(before)
        _running.reset(token)


def fit(flops: float) -> None:
    """Now the model is known: no more threads than pay for so many FLOPs of a batch. Nothing outside of a command."""
    if (command := _running.get()) is not None:
        used = choose(command.asked, command.before, flops)
        _running.set(_Command(command.before, command.asked, used))
        torch.set_num_threads(used.number)


def in_use() -> Threads:
    """What the command that runs works with, for its report."""
    command = _running.get()
    return Threads(torch.get_num_threads(), "torch") if command is None else command.used
