"""The processes of a run that `accelerate launch` started: whose part of the work is which, and how parts become one again.

Every process reads all pairs and makes the batches that a process alone would make; each runs some of them. What they find is
put together in the order of the batches, or summed in fp64, where the order of a sum of fp32 numbers is all but without
effect: so the plan is that of a process alone. Where there is one process nothing is started, and nothing is sent.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import Tensor, distributed

from ..checkpoint.loading import pick_device
from ..errors import CompError
from ..options import Training

T = TypeVar("T")
K = TypeVar("K")


def processes() -> int:
    """How many processes `accelerate launch` (or torchrun) started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def process_device(name: str) -> torch.device:
    """The device of this process: each of several has a GPU of its own."""
    device = pick_device(name)
    if device.type == "cuda" and processes() > 1:
        return pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return device


def precision(training: Training) -> str:
    """The precision that a run trains in: what was asked for, else what `accelerate launch` was told."""
    return training.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def join(device: torch.device) -> None:
    """Meet the others, if there are any. They wait long for one another: the first one writes alone. One that has ended is
    noticed at once."""
    if processes() > 1:
        disable_fsdp_ram_efficient_loading()  # transformers would load the weights in the first one only, and all calibrate
        PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))


class OwnState:
    """accelerate has one state a process: the first Accelerator of a program settles precision and device for all, and the last
    one how many batches make a step. A run that is alone has its own while it is open, and leaves to others what they have;
    where processes meet, they share it."""

    KINDS: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)

    def __init__(self) -> None:
        self.states: tuple[dict[str, Any], ...] = tuple({} for _ in self.KINDS)

    @contextmanager
    def opened(self) -> Iterator[None]:
        if processes() > 1:
            yield
            return
        before = tuple(kind._shared_state for kind in self.KINDS)
        self._put(self.states)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, states: tuple[dict[str, Any], ...]) -> None:
        for kind, state in zip(self.KINDS, states, strict=True):
            kind._shared_state = state


def share(items: Sequence[T]) -> list[T]:
    """Those of the items that are this process's: every Nth."""
    return list(items[rank() :: processes()])


def gathered(own: Sequence[T]) -> list[T]:
    """What all processes made of their shares, in the order of the items; tensors must be on the CPU."""
    if processes() == 1:
        return list(own)
    every = _of_each(list(own))
    return [part[number] for number in range(len(every[0])) for part in every if number < len(part)]


def summed(found: dict[K, Tensor]) -> dict[K, Tensor]:
    """The sum over the processes of every tensor, fp64, taken out of `found` one by one, for Gram matrices are large; a process
    that had no share of the work may come without."""
    if processes() == 1:
        return found
    shapes = next((each for each in _of_each({key: tensor.shape for key, tensor in found.items()}) if each), {})
    total = {}
    for key, shape in shapes.items():
        own = found.pop(key) if found else torch.zeros(shape, device=PartialState().device)
        total[key] = own.double().contiguous()
        distributed.all_reduce(total[key])
    return total


def summed_numbers(found: Mapping[K, float]) -> dict[K, float]:
    """The same of plain numbers."""
    device = PartialState().device if processes() > 1 else None
    total = summed({key: torch.tensor(value, dtype=torch.float64, device=device) for key, value in found.items()})
    return {key: value.item() for key, value in total.items()}


def from_main(make: Callable[[], T]) -> T:
    """All processes go on with what the first one made, or with its error."""
    if processes() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_main_process():
        try:
            made[0] = make()
        except CompError as error:
            made[1] = error
    distributed.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    found: T = made[0]
    return found


def tensors_from_main(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of the first process, on the device of each; what the others have is not asked."""
    own = {name: tensor.to(device).contiguous() for name, tensor in tensors.items()}
    if processes() == 1:
        return own
    known = from_main(lambda: {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()})
    found = {}
    for name, (shape, dtype) in known.items():
        found[name] = own[name] if is_main_process() else torch.empty(shape, dtype=dtype, device=device)
        distributed.broadcast(found[name], src=0)
    return found


def own_rows(rows: int) -> slice:
    """Which of the rows of a batch are this process's: the pieces of all processes lie one behind the other."""
    return slice(rows * rank() // processes(), rows * (rank() + 1) // processes())


def joined(own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rows of all processes, (rows, ...), of every tensor: this one's as they are, to be differentiated by, those of the
    others as constants. So each process has the loss of the whole batch, and the part of its slope that comes from its rows."""
    if processes() == 1:
        return own
    counts = _of_each(len(own[0]))
    return tuple(_joined(tensor, counts) for tensor in own)


def _joined(own: Tensor, counts: Sequence[int]) -> Tensor:
    same = own.new_zeros(max(counts), *own.shape[1:])  # what is sent must be of one size
    same[: len(own)] = own.detach()
    parts = [torch.empty_like(same) for _ in counts]
    distributed.all_gather(parts, same)
    rows = [own if number == rank() else part[:count] for number, (part, count) in enumerate(zip(parts, counts, strict=True))]
    return torch.cat(rows)


def _of_each(own: T) -> list[T]:
    """What every process has, by rank."""
    found: list[Any] = [None] * processes()
    distributed.all_gather_object(found, own)
    return found
