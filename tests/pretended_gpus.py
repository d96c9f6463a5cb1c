"""GPUs for machines without one: tensors that say `cuda:N` and are computed on the CPU.

Noticed is what a GPU would refuse: tensors of two devices that meet in one operation, the CPU's random generator asked for
numbers on a GPU, `.numpy()` of a tensor that is not in the machine's memory, a GPU that is not there. Memory is counted: bytes
alive and their peak, of each device. Not noticed is all that kernels are: their speed, rounding and order of sums, what they do
not support, streams that were not waited for, fragmented memory.

A tensor on a GPU is a wrapper around one on the CPU. Torch's own C++ takes it for a tensor on `meta:N`, which needs no driver
where gradients are made; Python sees `cuda:N`. Every operation is computed on what is wrapped. What C++ would ask CUDA before
it comes to that, a device without a number and autocast, is settled where Python calls.
"""

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
ROOM = 80 * 2**30  # bytes of each, unless a test says otherwise
MAY_CROSS = (aten.copy_.default, aten._to_copy.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
WHOLE = (aten.stack.default, aten.cat.default, aten.index_select.default, aten.gather.default)
CPU = torch.device("cpu")
LOWER = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "__matmul__"}
LOWER |= {"scaled_dot_product_attention"}  # what autocast computes in lower precision, and in fp32
EXACT = {"softmax", "log_softmax", "layer_norm", "cross_entropy", "nll_loss", "cumsum", "sum", "prod", "pow", "exp", "log"}


class Memory:
    """What is alive on each pretended GPU, by storage."""

    def __init__(self) -> None:
        self.holders: Counter[tuple[int, int]] = Counter()
        self.alive: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()

    def hold(self, gpu: int, storage: Any) -> "Block":
        """Count a storage as long as somebody has the block that is given back."""
        block, place, size = Block(), (gpu, storage._cdata), storage.nbytes()
        self.holders[place] += 1
        if self.holders[place] == 1:
            self.alive[gpu] += size
            self.peak[gpu] = max(self.peak[gpu], self.alive[gpu])
        weakref.finalize(block, self.let_go, place, size, storage)
        return block

    def let_go(self, place: tuple[int, int], size: int, storage: Any) -> None:  # storage: alive as long as its address counts
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.alive[place[0]] -= size

    def forget_peak(self, gpu: int) -> None:
        self.peak[gpu] = self.alive[gpu]


class Block:
    """Of a tensor; torch swaps no tensors that a weak reference knows."""


memory = Memory()


def as_seen(device: Any) -> Any:
    """The name in C++ of a device that Python has given: cuda:N is meta:N."""
    device = numbered(device)
    return torch.device("meta", device.index) if isinstance(device, torch.device) and device.type == "cuda" else device


class OnGPU(torch.Tensor):
    """A tensor on a pretended GPU."""

    inner: Tensor  # on the CPU, without gradients
    gpu: int
    block: Block

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: int) -> "OnGPU":
        how: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        how |= {"device": torch.device("meta", gpu)}
        with torch.inference_mode(inner.is_inference()):  # a view of what was made outside of the mode is none of it
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **how)
        made.inner, made.gpu = inner.detach() if inner.requires_grad else inner, gpu
        made.block = memory.hold(gpu, inner.untyped_storage())
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

    def follow(self) -> None:
        """Take the shape of what is wrapped, where that was changed in place."""
        if self.shape != self.inner.shape or self.stride() != self.inner.stride():
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                self.resize_(self.inner.numel() and self.inner.untyped_storage().nbytes() // self.inner.itemsize)
                self.as_strided_(self.inner.shape, self.inner.stride(), self.inner.storage_offset())

    device = property(lambda self: torch.device("cuda", self.gpu))
    is_cuda, is_meta, is_cpu = (property(lambda self, is_it=is_it: is_it) for is_it in (True, False, False))

    def get_device(self) -> int:
        return self.gpu

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().to(*map(as_seen, args), **{name: as_seen(value) for name, value in kwargs.items()})

    def cuda(self, device: Any = None, **kwargs: Any) -> Tensor:
        return self.to("cuda" if device is None else torch.device(device), **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(CPU, *args, **kwargs)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        how = "Use Tensor.cpu() to copy the tensor to host memory first."
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. {how}")

    __array__ = numpy

    def __format__(self, how: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), how)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = OnGPU(self.inner.clone(), self.gpu).requires_grad_(self.requires_grad)
            made.__dict__ |= {name: value for name, value in self.__dict__.items() if name == "_is_param"}
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnGPU, (self.inner, self.gpu)

    def __repr__(self, **options: Any) -> str:
        return f"{self.inner} on {self.device}"


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; its results are where CUDA would leave them."""
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    wanted = kwargs.get("device")
    if wanted is not None and (wanted.type == "cuda" or (wanted.type == "meta" and wanted.index is not None)):
        gpu, kwargs = wanted.index or 0, kwargs | {"device": CPU}
        if gpu >= torch.cuda.device_count():
            raise RuntimeError("CUDA error: invalid device ordinal")
    else:
        gpu = next((each.gpu for each in tensors if isinstance(each, OnGPU)), None) if wanted is None else None
    check(func, args, tensors, gpu, kwargs.get("generator"))
    bare = [each.inner if isinstance(each, OnGPU) else each for each in tensors]
    inner_args, inner_kwargs = tree_map(lambda each: each.inner if isinstance(each, OnGPU) else each, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if gpu is None:
        return found
    given = {id(inner): outer for inner, outer in zip(bare, tensors, strict=True)}  # what is written into is given back

    def placed(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        known = given.get(id(each))
        if isinstance(known, OnGPU):
            known.follow()
        return OnGPU(each, gpu) if known is None else known

    return tree_map(placed, found)


def check(func: Any, args: Any, tensors: list[Tensor], gpu: int | None, generator: torch.Generator | None) -> None:
    """Raises RuntimeError for what CUDA refuses."""
    if gpu is not None and generator is not None and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if func in MAY_CROSS:
        return
    counted = [each for each in tensors if each.dim() or isinstance(each, OnGPU) or func in WHOLE]  # numbers may be the CPU's,
    if func._schema.is_mutable and isinstance(args[0], Tensor):  # but not what is written into
        counted.insert(0, args[0])
    if func in INDEXED and isinstance(args[0], OnGPU):  # nor is it asked of who says where
        counted = [each for each in counted if all(each is not index for index in args[1]) or isinstance(each, OnGPU)]
    places = list(dict.fromkeys(each.device for each in counted))
    if len(places) > 1:
        found = " and ".join(map(str, places))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {found}! ({func})")


class Pretending(TorchDispatchMode):
    """What makes tensors, and what moves them from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode nobody has taken it apart
                return func.decompose(*args, **kwargs or {})
        return computed(func, args, kwargs or {})


class Calling(TorchFunctionMode):
    """What Python asks of torch: `cuda` is the current device, and autocast is for tensors on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = tuple(map(numbered, args)), {name: numbered(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda and not isinstance(args[0], OnGPU):
            return args[0].to(numbered("cuda" if len(args) < 2 else torch.device("cuda", args[1])))
        if func is torch.tensor and isinstance(args[0], list | tuple):  # whose numbers may be tensors
            numbers = tree_map(lambda each: each.item() if isinstance(each, OnGPU) else each, args[0])
            return func(numbers, *args[1:], **kwargs)
        if torch.is_autocast_enabled("cuda") and (name := getattr(func, "__name__", "")) in LOWER | EXACT:
            dtype = torch.get_autocast_dtype("cuda") if name in LOWER else torch.float32

            def cast(each: Any) -> Any:
                eligible = isinstance(each, OnGPU) and each.is_floating_point() and each.dtype != torch.float64
                return each.to(dtype) if eligible else each

            args, kwargs = tree_map(cast, (args, kwargs))
        return func(*args, **kwargs)


def numbered(device: Any) -> Any:
    """The same device with its number, and whatever else as it is."""
    if isinstance(device, str) and device.startswith("cuda"):
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Event:
    """A moment; operations end before they are waited for."""

    def __init__(self, **options: Any) -> None:
        self.at = 0.0

    def record(self, *args: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


@contextlib.contextmanager
def pretend(count: int = 2, room: int = ROOM) -> Iterator[Memory]:
    """GPUs are there while the context is open: `count` of them, of `room` bytes each. Yielded is what their memory holds."""
    memory.peak.clear()
    current = 0

    def number(device: Any = None) -> int:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        found = current if device.index is None else device.index
        if not 0 <= found < count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return found

    def choose(device: Any) -> None:
        nonlocal current
        current = number(device)

    abouts = [SimpleNamespace(name=f"pretended GPU {i}", total_memory=room, major=9, minor=0) for i in range(count)]
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **options: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: count,
        "memory_reserved": lambda device=None: memory.alive[number(device)],
        "current_device": lambda: current,
        "set_device": choose,
        "synchronize": lambda device=None: number(device) and None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: abouts[number(device)].name,
        "get_device_properties": lambda device=None: abouts[number(device)],
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (room - memory.alive[number(device)], room),
        "memory_allocated": lambda device=None: memory.alive[number(device)],
        "max_memory_allocated": lambda device=None: memory.peak[number(device)],
        "reset_peak_memory_stats": lambda device=None: memory.forget_peak(number(device)),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "Event": Event,
    }
    with pytest.MonkeyPatch.context() as patch, Pretending(), Calling():
        for name, value in said.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.version, "cuda", "13.0")
        lifts, swaps = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU, and moved
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object
        try:
            yield memory
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_swap_module_params_on_conversion(swaps)


@pytest.fixture
def gpus() -> Iterator[Memory]:
    """Two pretended GPUs."""
    with pretend() as found:
        yield found
