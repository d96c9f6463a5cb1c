"""Files in and out: JSON and tensors that may be broken, output folders that appear whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import FAILED, REFUSED, USAGE, CompError

if TYPE_CHECKING:
    from torch import Tensor

MARKERS = ("comp_report.json", "export.json")  # a folder with one of them was written by comp
WEIGHT_SUFFIXES = ({".safetensors"}, {".onnx", ".data"}, {".bin"})  # the first kind that a folder holds is its weights
SEARCH_DEPTH = 3
JSON_LIMIT = 64 * 2**20  # bytes; the largest tokenizers take a quarter


class TensorHeader(NamedTuple):
    """What a safetensors file says about a tensor, e.g. ("F32", (768, 768))."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Exit 4 where the file is missing, is no plain file of up to 64 MiB (a device, a pipe), is not JSON, or
    holds something else than an object."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CompError(f"{path}: not a plain file (a device, a pipe or a socket).", code=REFUSED)
        with path.open("rb") as file:
            read = file.read(JSON_LIMIT + 1)
        if len(read) > JSON_LIMIT:
            raise CompError(f"{path}: larger than {JSON_LIMIT // 2**20} MiB, which no such file is.", code=REFUSED)
        content = json.loads(read.decode("utf-8"))
    except OSError as error:
        raise CompError(f"{path}: cannot be read ({error.strerror}).", code=REFUSED) from error
    except (ValueError, RecursionError) as error:
        raise CompError(f"{path}: not valid JSON ({error}).", code=REFUSED, hint="Fetch or write it again.") from error
    if not isinstance(content, dict):
        raise CompError(f"{path}: expected a JSON object, found {type(content).__name__}.", code=REFUSED)
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Exit 4 where it is missing or broken."""
    return read_json(folder / "config.json")


def read_tensors_header(path: Path) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes of a safetensors file, without its values. Exit 4 where it is corrupt or truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CompError(
            f"{path}: not a whole safetensors file ({error}).",
            code=REFUSED,
            hint="It is missing, cut off or damaged: fetch or write it again.",
        ) from error


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Write a safetensors file; slices are made contiguous. Tensors must not share memory. Exit 1 on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise _write_failed(path, error) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def check_output(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuse, before any work is done, an output folder that could not be written or would destroy something.

    Exit 2 where it is a file, overlaps `source`, cannot be written, or holds something and `overwrite` is not given or
    comp did not write it. Exit 1 while another process writes it. What killed runs left beside it is settled.
    """
    output = output.resolve()
    if source is not None:
        _check_apart(output, source.resolve())
    _check_writable(output)
    _settle_leftovers(output)
    _check_replaceable(output, overwrite)


@contextmanager
def atomic_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    Files are synced and follow the umask; with `overwrite` the old folder stays until the new one is complete.
    Exit codes are those of `check_output`, and 1 on a full disk.
    """
    output = output.resolve()
    check_output(output, overwrite=overwrite, source=None)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(output, "partial")
    partial.mkdir()
    try:
        yield partial
        _finish(partial)
        _check_replaceable(output, overwrite)
        _take_place(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and _is_full(error):
            raise _write_failed(output, error) from error
        raise


def _sibling(output: Path, role: str) -> Path:
    return output.with_name(f".{output.name}.{role}-{os.getpid()}")


def _check_apart(output: Path, source: Path) -> None:
    if output == source:
        relation = "is"
    elif source in output.parents:
        relation = "lies inside"
    elif output in source.parents:
        relation = "contains"
    else:
        return
    hint = "Choose another -o/--output."
    raise CompError(f"The output {output} {relation} the input {source}.", code=USAGE, hint=hint)


def _check_writable(output: Path) -> None:
    """Try it with a name as long as the real one: permissions, read-only disks and length limits all answer."""
    parent = output.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.partial-", dir=parent):
            pass
    except OSError as error:
        raise CompError(f"Cannot write {output}: {parent}: {error.strerror}.", code=USAGE) from error


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise CompError(f"The output {output} is a file.", code=USAGE, hint="Give a folder to -o/--output.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise CompError(
            f"The output {output} exists and is not empty.",
            code=USAGE,
            hint="--overwrite replaces it once the new one is complete.",
        )
    if not any((output / marker).is_file() for marker in MARKERS):
        raise CompError(
            f"The output {output} was not written by comp (no {' or '.join(MARKERS)}), so --overwrite leaves it alone.",
            code=USAGE,
            hint="Choose another -o/--output, or remove the folder yourself.",
        )


def _settle_leftovers(output: Path) -> None:
    """Remove the partial folders of dead processes; put an old folder back where a swap was cut in the middle."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(old|partial)-(\d{{1,9}})")
    siblings = sorted(output.parent.iterdir()) if output.parent.is_dir() else []
    for folder in siblings:
        if not (match := pattern.fullmatch(folder.name)):
            continue
        role, pid = match[1], int(match[2])
        if _is_alive(pid):
            raise CompError(
                f"Process {pid} is writing {output}.",
                code=FAILED,
                hint=f"Wait for it or choose another -o/--output. If that process is not comp, move {folder} away.",
            )
        if role == "old" and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether another process has this id; our own on a leftover means that a dead one had it before (containers)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        pass
    return True


def _finish(folder: Path) -> None:
    """Sync everything, with the modes that open() would give: safetensors writes 0600, mkdir has followed the umask."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(root, name)
            os.chmod(path, mode & 0o666)
            _fsync(path)
        os.chmod(root, mode)
        _fsync(root)


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(partial: Path, output: Path) -> None:
    """Rename the new folder into place; the old one is removed last, and put back if the new one cannot come."""
    old = _sibling(output, "old")
    try:
        if output.exists():
            output.rename(old)
        partial.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    _fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _write_failed(path: Path, error: Exception) -> CompError:
    if _is_full(error):
        return CompError(f"Cannot write {path}: the disk is full.", hint="Free some space and run it again.")
    return CompError(f"Cannot write {path}: {error}.")
