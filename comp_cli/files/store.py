"""Files in and out: JSON and tensors that may be broken, hashes, sizes."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CompError, RefusedError, is_full
from .tensors import HEADER_LIMIT, read_places

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_SUFFIXES = ({".safetensors"}, {".onnx", ".data"}, {".bin"})  # the first kind that a folder holds is its weights
SEARCH_DEPTH = 3
JSON_LIMIT = 64 * 2**20  # bytes; the largest tokenizers take a quarter


class TensorHeader(NamedTuple):
    """What a safetensors file says about a tensor, e.g. ("F32", (768, 768))."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RefusedError where the file is missing, is no plain file of up to 64 MiB (a device, a pipe), is not
    JSON, or holds something else than an object."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RefusedError(f"{path}: not a plain file (a device, a pipe or a socket).")
        with path.open("rb") as file:
            read = bytearray()  # piece by piece: what is asked for at once is taken from memory at once
            while len(read) <= JSON_LIMIT and (piece := file.read(2**20)):
                read += piece
        if len(read) > JSON_LIMIT:
            raise RefusedError(f"{path}: larger than {JSON_LIMIT // 2**20} MiB, which no such file is.")
        content = json.loads(read.decode("utf-8"))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path}: not valid JSON ({error}).", hint="Fetch or write it again.") from error
    if not isinstance(content, dict):
        raise RefusedError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises RefusedError where it is missing or broken."""
    return read_json(folder / "config.json")


def read_tensors_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without its values, which are not mapped either. Raises RefusedError
    where it is corrupt or truncated."""
    return {name: TensorHeader(place.dtype, place.shape) for name, place in read_places(path).items()}


def count_weights(folder: Path) -> int:
    """Numbers in the safetensors files of a folder. Raises RefusedError where one is corrupt."""
    headers = (read_tensors_header(path) for path in folder.glob("*.safetensors"))
    return sum(math.prod(header.shape) for file in headers for header in file.values())


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Write a safetensors file; slices are made contiguous. Tensors must not share memory. Raises CompError on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise write_failed(path, error) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """The SHA-256 of the header of a safetensors file: names, dtypes, shapes and places of its tensors, not their values.
    Raises RefusedError where it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(HEADER_LIMIT, path.stat().st_size - 8):
            raise RefusedError(f"{path}: not a whole safetensors file.", hint="Fetch or write it again.")
        return hashlib.sha256(file.read(length)).hexdigest()


def facts(path: Path) -> dict[str, Any]:
    """What a report says of a file: {"bytes": 4175, "sha256": "..."}."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def unread_facts(path: Path) -> dict[str, Any]:
    """The same of a weight file that is too large to be read for a hash: {"bytes": ..., "header_sha256": "..."}."""
    return {"bytes": path.stat().st_size, "header_sha256": header_sha256(path)}


def departs(path: Path, told: Mapping[str, Any]) -> str | None:
    """How a file is not the one that a report tells of, as the middle of a sentence; None where it is. Of weights whose values
    were never hashed, size and header are compared."""
    size = path.stat().st_size
    if "bytes" in told and size != told["bytes"]:
        return f"{size} bytes, and comp wrote {told['bytes']}"
    if "header_sha256" in told and "sha256" not in told:
        try:
            alike = header_sha256(path) == told["header_sha256"]
        except RefusedError:
            alike = False
        return None if alike else "not the weights that comp linked: their header is another one"
    return None if sha256(path) == told.get("sha256") else "not the bytes that comp wrote: their SHA-256 is another one"


def folder_size(folder: Path) -> int:
    """Bytes of a folder's weights: *.safetensors, else *.onnx with *.data, else *.bin."""
    files = [path for path in folder.iterdir() if path.is_file()]
    sizes = (sum(path.stat().st_size for path in files if path.suffix in kind) for kind in WEIGHT_SUFFIXES)
    return next((size for size in sizes if size), 0)


def find_last(marker: str, below: Path) -> Path | None:
    """The folder at or below `below` whose file `marker` was written last; three levels deep, hidden ones skipped."""
    found = []
    for root, folders, files in os.walk(below):
        depth = len(Path(root).relative_to(below).parts)
        folders[:] = sorted(name for name in folders if depth < SEARCH_DEPTH and not name.startswith("."))
        if marker in files:
            found.append(Path(root))
    return max(found, key=lambda folder: (folder / marker).stat().st_mtime_ns, default=None)


def write_failed(path: Path, error: Exception) -> CompError:
    if is_full(error):
        return CompError(f"Cannot write {path}: the disk is full.", hint="Free some space and run it again.")
    return CompError(f"Cannot write {path}: {error}.")
