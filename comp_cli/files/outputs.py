"""Output folders: they appear whole or not at all, and replace nothing but what comp wrote.

Beside an output NAME lie, while a command runs and after a kill until the next one: `.NAME.lock` (see locks), the new folder
`.NAME.partial-PID`, the old one `.NAME.old-PID`, and `.NAME.journal` (see journal).
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from .. import signals
from ..errors import CompError, UsageError, is_full
from . import locks
from .ownership import MARKERS, Judged, discard, seen, strangers, written
from .store import departs, write_failed

LAST = (".onnx", ".safetensors", "config.json", *MARKERS)  # files without which a folder is no model, the surest ones last


def resolve(path: Path, option: str = "-o/--output") -> Path:
    """The path without links and dots, as it is used from then on. Raises UsageError where there is none."""
    try:
        str(path).encode()  # names that are no text end up in JSON, in tables and in libraries
        found = path.resolve()
        if found.is_symlink():  # what newer versions of Python make of a loop
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        found.is_dir()
    except UnicodeEncodeError:
        raise UsageError(f"{option} {str(path)!r}: the name is not valid UTF-8.") from None
    except FileNotFoundError:
        raise UsageError("the current folder is gone.", hint="Change to another one.") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{option} {path}: no usable path ({why}).") from None
    if not found.name:
        raise UsageError(f"{option} {path}: expected a folder with a name.")
    return found


def check_output(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Refuse, before any work is done, an output folder that could not be written or would destroy something.

    Raises UsageError where it is a file, overlaps `source`, cannot be written, or holds something and `overwrite` is not given
    or comp did not write all of it. Raises CompError while another process writes it. What killed runs left beside it is
    settled."""
    if resolve(output).parent.is_dir():
        with reserve(output, source=source) as output:
            check_replaceable(output, overwrite)
    else:
        _check_place(resolve(output), source)


@contextmanager
def reserve(output: Path, *, source: Path | None) -> Iterator[Path]:
    """An output that is this process's until the block ends, a place that can be written; what killed runs left beside it is
    settled. Yields its real path. Raises as `check_output`."""
    output = resolve(output)
    if locks.holds(output):
        yield output
        return
    _check_place(output, source)
    missing = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locks.locked(output):
            _settle_leftovers(output)
            yield output
    finally:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def atomic_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A fresh folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    Files are synced and follow the umask; with `overwrite` the old folder stays until the new one is complete.
    Raises as `check_output`, and CompError on a full disk.
    """
    with reserve(output, source=None) as output:
        check_replaceable(output, overwrite)
        partial = sibling(output, "partial")
        try:
            partial.mkdir()
            yield partial
            _finish(partial)
            locks.confirm(output)
            with signals.held():
                _take_place(partial, output, overwrite)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, Exception) and not isinstance(error, CompError) and is_full(error):
                raise write_failed(output, error) from error
            raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes its place when the block ends well. Raises CompError on a full disk."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and is_full(error):
            raise write_failed(path, error) from error
        raise


def check_file(path: Path) -> None:
    """Raises UsageError where a file cannot be written: it is a folder or the like, or its own folder does not let us."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file.")
    _check_writable(path)


def check_replaced(path: Path, option: str, what: str, ours: Callable[[Path], bool]) -> Path:
    """The real path of one file that an option names. Raises UsageError where it could not be written in the end, or something
    lies there that is not `ours`: what a word for those that comp writes."""
    path = resolve(path, option)
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: no such folder.", hint="Create the folder first.")
    check_file(path)
    if path.exists() and not ours(path):
        raise UsageError(f"{option} {path}: exists, and is no {what}.", hint="Choose another name, or remove it yourself.")
    return path


def check_room(place: Path, need: float, what: str) -> None:
    """Raises CompError where the disk of `place`, or of the nearest folder above it that exists, has less than `need` bytes
    free."""
    while not place.is_dir():
        place = place.parent
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < need:  # some network disks tell nothing
        raise CompError(
            f"The disk of {place} has {disk.free / 2**20:.1f} MiB free; {what} needs at least {need / 2**20:.1f} MiB.",
            hint="Free some space, or choose another disk.",
        )


def sibling(output: Path, role: str) -> Path:
    """Named by this process; by the next number that is free where what a user put into an old folder stayed."""
    names = (output.with_name(f".{output.name}.{role}-{number}") for number in count(os.getpid()))
    return next(path for path in names if not os.path.lexists(path))


def _check_place(output: Path, source: Path | None) -> None:
    if source is not None:
        _check_apart(output, resolve(source, "the input"))
    _check_writable(output)
    if os.path.ismount(output):
        hint = f"Name a folder below it: {output / 'compact'}"
        raise UsageError(f"The output {output} is a mount point, which nothing can take the place of.", hint=hint)


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
    raise UsageError(f"The output {output} {relation} the input {source}.", hint=hint)


def _check_writable(output: Path) -> None:
    """Try it with a name as long as the real one: permissions, read-only disks and length limits all answer."""
    parent = output.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    trial = parent / f".{output.name}.partial-{os.getpid():07}"
    try:
        with signals.held():
            trial.mkdir(exist_ok=True)  # left by a killed process of our id
            trial.rmdir()
    except OSError as error:
        if is_full(error):
            raise write_failed(output, error) from error
        if error.errno != errno.ENOTEMPTY:
            raise UsageError(f"Cannot write {output}: {parent}: {error.strerror}.") from error


def check_replaceable(output: Path, overwrite: bool) -> Judged:
    """Raises UsageError where the output holds anything, unless `overwrite` is given and comp wrote all of it. What was found
    to be comp's, as it was then."""
    if not output.exists():
        return {}
    if not output.is_dir():
        raise UsageError(f"The output {output} is a file.", hint="Give a folder to -o/--output.")
    found = seen(output)
    if not found:
        return {}
    another = "Choose another -o/--output, or "
    if written(output) is None:
        raise UsageError(
            f"The output {output} is not empty, and was not written by comp: no {' or '.join(MARKERS)} lists its files.",
            hint=f"{another}remove the folder yourself.",
        )
    if not overwrite:
        hint = "--overwrite replaces it once the new one is complete."
        raise UsageError(f"The output {output} exists and is not empty.", hint=hint)
    if foreign := strangers(output):
        few = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise UsageError(
            f"The output {output} holds what comp did not write, or what was changed since: {few}. "
            "--overwrite leaves such a folder alone.",
            hint=f"{another}move these files away.",
        )
    return found


def _settle_leftovers(output: Path) -> None:
    """With the lock held, what lies here was left by dead processes: partial folders go; an old folder comes back where a
    swap was cut in the middle, else what comp wrote of it goes. (Version 0.1.0 also left eight letters for a process id.)"""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.(old|partial)-(\d{{1,9}}|[a-z0-9_]{{8}})")
    for folder in sorted(output.parent.iterdir()):
        if not (match := pattern.fullmatch(folder.name)) or folder.is_symlink() or not folder.is_dir():
            continue
        if match[1] == "partial":
            _move_out(output, folder)
            shutil.rmtree(folder, ignore_errors=True)
        elif not output.exists():
            folder.rename(output)
        else:
            discard(folder, output)


def _finish(folder: Path) -> None:
    """Sync everything, with the modes that open() would give: safetensors writes 0600, mkdir has followed the umask. What has
    another name elsewhere is on the disk already, and keeps the mode that it has there."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(root, name)
            if os.stat(path).st_nlink == 1:
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


def _take_place(partial: Path, output: Path, overwrite: bool) -> None:
    """The new folder comes to its place; what comp wrote of the old one is removed last."""
    judged = check_replaceable(output, overwrite)
    if not judged and _is_current(output):
        _move_in(partial, output)
        return
    if old := swap(partial, output, judged):
        discard(old, output)


def swap(partial: Path, output: Path, judged: Judged) -> Path | None:
    """Rename the new folder into place, with signals held back; the old one, if any, lies beside it then. It is put back if the
    new one cannot come, or if it is not any more what it was when it was judged (see `ownership.seen`)."""
    old = sibling(output, "old")
    try:
        if output.exists():
            output.rename(old)
            if seen(old) != judged:
                hint = "Run it again once nothing else writes there."
                raise UsageError(f"The folder {output} was changed while it was replaced.", hint=hint)
        partial.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    _fsync(output.parent)
    return old if old.exists() else None


def _is_current(folder: Path) -> bool:
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:
        return False


def _move_in(partial: Path, output: Path) -> None:
    """Fill an empty folder, file by file. The current folder is not replaced: the user's shell would stand in a deleted one.
    Without its config.json, which comes last but one, no part of it loads."""
    try:
        for name in sorted(os.listdir(partial), key=_rank):
            (partial / name).rename(output / name)
    except BaseException:
        _move_out(output, partial)
        raise
    _fsync(output)
    partial.rmdir()


def _move_out(output: Path, partial: Path) -> None:
    """Undo a `_move_in` that was cut: what the marker, which moves last, lists goes back."""
    known = written(partial)
    if known is None or not output.is_dir() or written(output) is not None:
        return
    for name, told in known.items():
        path = output / name
        if told is not None and path.is_file() and not (partial / name).exists() and not departs(path, told):
            path.rename(partial / name)


def _rank(name: str) -> int:
    return max((place for place, end in enumerate(LAST) if name.endswith(end)), default=-1)
