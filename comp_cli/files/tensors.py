"""Tensors of safetensors files, read without mapping the files: a header, a place, and as many bytes as are wanted.

The safetensors library maps whole files, which a limit on the address space forbids. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RefusedError

if TYPE_CHECKING:
    from torch import Tensor, dtype

HEADER_LIMIT = 100 * 2**20  # bytes of a safetensors header, as the library itself has it
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8}
BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}
PIECE = 4 * 2**20  # bytes that are read at once


LAST_FIRST = ("BOOL", "F16", "BF16", "F32", "F64", "I64")  # the types in which the library writes tensors, the last one first


class Place(NamedTuple):
    """Where a tensor lies in a file: its first byte and the one behind its last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row(self) -> int:
        """Bytes of a row of the first axis."""
        return (self.end - self.begin) // max(self.shape[0], 1)


def file_size(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the file that the library writes of tensors, name -> type and shape, with its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in sorted(kinds.items(), key=lambda item: (-LAST_FIRST.index(item[1][0]), item[0])):
        size = math.prod(shape) * BITS[kind] // 8
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    told = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + told + -told % 8 + at


def read_places(path: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are. Raises RefusedError where it is corrupt or truncated, by the same rules as
    the library: the header says of every byte whose it is."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(HEADER_LIMIT, size - 8):
                raise ValueError("its header is cut off or too large")
            told = json.loads(file.read(length).decode("utf-8"))
        told.pop("__metadata__", None)
        found = {name: _place(entry, 8 + length) for name, entry in told.items()}
        end = 8 + length
        for name, place in sorted(found.items(), key=lambda item: item[1][2:]):
            if place.begin != end:
                raise ValueError(f"{name} begins at byte {place.begin}, expected {end}")
            end = place.end
        if end != size:
            raise ValueError(f"its header describes {end} bytes, it has {size}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError(
            f"{path}: not a whole safetensors file ({error}).",
            hint="It is missing, cut off or damaged: fetch or write it again.",
        ) from error
    return found


def _place(entry: Mapping[str, Any], start: int) -> Place:
    kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError(f"a tensor of shape {shape} from byte {begin} to {end}")
    if kind in BITS and math.prod(shape) * BITS[kind] != 8 * (end - begin):
        raise ValueError(f"a tensor of shape {shape} of {kind} in {end - begin} bytes")
    return Place(kind, shape, start + begin, start + end)


def torch_dtype(kind: str) -> "dtype":
    """Of the floating-point types that weights are computed in. Raises KeyError for others."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]


def read_rows(path: Path, place: Place, first: int = 0, last: int | None = None) -> "Tensor":
    """Rows of the first axis, from `first` to before `last`, in the precision of the file; a whole tensor where none are
    named. Raises RefusedError where the file ends too early."""
    import torch

    shape = place.shape
    if shape:
        shape = ((shape[0] if last is None else last) - first, *shape[1:])
    found = torch.empty(shape, dtype=torch_dtype(place.dtype))
    fill(found, path, place.begin + (first * place.row if shape else 0))
    return found


def raw(tensor: "Tensor") -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    import torch

    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(numbers).cast("B")


def fill(tensor: "Tensor", path: Path, begin: int = 0) -> None:
    """Fill a contiguous tensor with the bytes of a file from `begin` on. Raises RefusedError where the file ends too early."""
    view, done = raw(tensor), 0
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise RefusedError(f"{path}: cut off.", hint="It changed while it was read: fetch or write it again.")
            done += count


def read_pieces(path: Path, place: Place, size: int = PIECE) -> "Iterator[tuple[int, Tensor]]":
    """A tensor with rows in pieces of about `size` bytes: the number of the first row, and the rows."""
    step = max(1, size // max(place.row, 1))
    for first in range(0, place.shape[0], step):
        yield first, read_rows(path, place, first, min(first + step, place.shape[0]))
