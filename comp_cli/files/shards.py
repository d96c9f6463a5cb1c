"""Tensors that are larger than memory together: written as safetensors files of which no more than a piece is held, and kept on
disk for a while."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompError
from .store import write_failed
from .tensors import BITS, Place, fill, raw, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 2 * 10**9  # bytes of a file that is written: libraries map a whole file to read it
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Safetensors files whose tensors arrive one after the other, in any order, whole or in pieces. Headers are written first:
    sizes are known. Several files get an index, as transformers' loaders read it."""

    def __init__(self, folder: Path, kinds: Mapping[str, tuple[str, tuple[int, ...]]], shard: int = SHARD):
        """kinds: name -> type and shape of every tensor, in the order of the files. Raises CompError on a full disk."""
        self.folder, self._places = folder, dict[str, tuple[Path, Place]]()
        self._left = {name: math.prod(shape) * BITS[kind] // 8 for name, (kind, shape) in kinds.items()}
        groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        held = 0
        for name, kind in kinds.items():
            if groups[-1] and held + self._left[name] > shard:
                groups.append({})
                held = 0
            groups[-1][name] = kind
            held += self._left[name]
        names = [f"model-{number + 1:05}-of-{len(groups):05}.safetensors" for number in range(len(groups))]
        names = names if len(groups) > 1 else ["model.safetensors"]
        for name, group in zip(names, groups, strict=True):
            self._begin(folder / name, group)
        if len(groups) > 1:
            weights = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
            index = {"metadata": {"total_size": sum(self._left.values())}, "weight_map": weights}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _begin(self, path: Path, group: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, (kind, shape) in group.items():
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + self._left[name]]}
            at += self._left[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name, (kind, shape) in group.items():
            begin, end = header[name]["data_offsets"]
            self._places[name] = path, Place(kind, shape, start + begin, start + end)
        try:
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(start + at)
        except OSError as error:
            raise write_failed(path, error) from error

    def write(self, name: str, tensor: "Tensor", first: int = 0) -> None:
        """A tensor, or the rows of it from `first` on, in the type of its place. Raises CompError on a full disk, and
        ValueError for a shape that was not announced."""
        path, place = self._places[name]
        rows = place.shape and (tensor.shape[0], *place.shape[1:])
        if tuple(tensor.shape) != rows or (place.shape and first + tensor.shape[0] > place.shape[0]):
            raise ValueError(f"{name}: rows of shape {tuple(tensor.shape)} from {first} on, of {place.shape}")
        view, done = raw(tensor.detach().to("cpu", torch_dtype(place.dtype)).contiguous()), 0
        try:
            with path.open("r+b", buffering=0) as file:
                file.seek(place.begin + (first * place.row if place.shape else 0))
                while done < len(view):
                    done += file.write(view[done:])
        except OSError as error:
            raise write_failed(path, error) from error
        self._left[name] -= len(view)

    def close(self) -> None:
        """Raises CompError where a tensor did not arrive whole."""
        if lacking := sorted(name for name, left in self._left.items() if left):
            hint = "Please report this with the command and the model."
            raise CompError(f"{lacking[0]} was not written whole ({len(lacking)} tensors).", hint=hint)


class Spool:
    """Tensors on disk that a run needs again: raw numbers, one file each, read back as they were, on the device where they
    were."""

    def __init__(self, folder: Path):
        self.folder, self._held = folder, dict[Any, tuple[Path, Any, Any, tuple[int, ...]]]()

    def put(self, key: Any, tensor: "Tensor") -> None:
        """Raises CompError on a full disk."""
        path = self._held[key][0] if key in self._held else self.folder / f"{len(self._held)}.bin"
        tensor = tensor.detach().contiguous()
        try:
            path.write_bytes(raw(tensor.cpu()))
        except OSError as error:
            raise write_failed(path, error) from error
        self._held[key] = path, tensor.device, tensor.dtype, tuple(tensor.shape)

    def __getitem__(self, key: Any) -> "Tensor":
        import torch

        path, device, kind, shape = self._held[key]
        found = torch.empty(shape, dtype=kind)
        fill(found, path)
        return found.to(device)

    def drop(self, key: Any) -> None:
        """Forget what is not needed any more, and give its room on the disk back."""
        with self._held[key][0].open("wb"):
            pass
