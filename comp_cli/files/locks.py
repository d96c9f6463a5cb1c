"""Who writes an output: a lock beside it, from a command's start to its end.

The kernel holds the lock on the file `.NAME.lock` and gives it up when the process dies, in whatever container of the machine
it runs; process ids, which mean something else in every container, decide nothing. Other machines on a shared disk may not see
that lock. For them the file says who holds it, and its time shows that the holder lives: it is renewed every BEAT seconds,
and a holder that gave no sign for STALE seconds is taken for dead.
"""

import errno
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import signals
from ..errors import CompError, UsageError, is_full

BEAT, STALE = 15, 120  # seconds
NO_KERNEL_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # some network disks
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one for a machine and all containers on it, another after a restart

_held: dict[tuple[Path, int], "_Lock"] = {}  # by the thread that has it: to another one of the process it is taken


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output, whose parent folder exists; a thread may hold it several times.

    Raises CompError, naming the holder, where another process or thread holds it, UsageError where the lock cannot be written.
    """
    if holds(output):
        yield
        return
    key = _key(output)
    with signals.held():
        _held[key] = _Lock(lock_path(output), output)
    try:
        yield
    finally:
        with signals.held():
            _held.pop(key).release()


def holds(output: Path) -> bool:
    """Whether this thread has the lock."""
    return _key(output) in _held


def confirm(output: Path) -> None:
    """Raises CompError where the lock was lost meanwhile: another machine took this process for dead, or somebody removed the
    file."""
    if not _held[_key(output)].is_there():
        raise CompError(
            f"The lock of {output} is gone: another process may be writing it.",
            hint="Run it again once no other command writes there.",
        )


def lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _key(output: Path) -> tuple[Path, int]:
    return lock_path(output), threading.get_ident()


class _Lock:
    def __init__(self, path: Path, output: Path):
        self.path = path
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self.handle = self._open(output)
        try:
            self._write()
        except OSError as error:
            self.release()
            raise CompError(f"Cannot write {output}: {self.path}: {_why(error)}.") from error
        self._beating.start()

    def _open(self, output: Path) -> int:
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except OSError as error:
                kind = CompError if is_full(error) else UsageError
                raise kind(f"Cannot write {output}: {self.path}: {_why(error)}.") from error
            try:
                kernel = _try_lock(handle)
                self._refuse_others(handle, kernel, output)
            except BaseException:
                os.close(handle)
                raise
            if self._is(handle):
                return handle
            os.close(handle)  # its holder has just removed it

    def _refuse_others(self, handle: int, kernel: bool | None, output: Path) -> None:
        """`kernel`: whether the kernel gave us the lock; None where it cannot say."""
        content = _content(handle)
        holder = _read(content)
        if kernel is False:
            raise _busy(output, holder, "Wait for it or choose another -o/--output.")
        if content and holder is None:
            hint = "Choose another -o/--output, or move that file away."
            raise UsageError(f"{self.path} stands where comp's lock would be, and is not one.", hint=hint)
        elsewhere = holder and (kernel is None or holder["boot"] != boot_id())
        silent = time.time() - os.fstat(handle).st_mtime
        if elsewhere and silent < STALE:
            hint = f"Its last sign is {max(silent, 0):.0f} s old; after {STALE} s it counts as dead."
            raise _busy(output, holder, f"{hint} If it is dead, wait so long or remove {self.path}.")

    def _write(self) -> None:
        record = {"comp": "lock", "pid": os.getpid(), "host": platform.node(), "boot": boot_id(), "since": time.time()}
        self.content = json.dumps(record | {"command": shlex.join(["comp", *sys.argv[1:]])}).encode()
        os.ftruncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, self.content)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                os.utime(self.handle if os.utime in os.supports_fd else self.path)
            except OSError:
                pass  # `confirm` tells

    def _is(self, handle: int) -> bool:
        """Whether the path still leads to the file that was opened."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(handle))
        except FileNotFoundError:
            return False

    def is_there(self) -> bool:
        return self._is(self.handle) and _content(self.handle) == self.content

    def release(self) -> None:
        """Remove the file while the lock is held: who opened it meanwhile sees that it is gone, and makes a new one."""
        self._ended.set()
        if self._beating.is_alive():
            self._beating.join()
        if self._is(self.handle) and os.name != "nt":
            self.path.unlink(missing_ok=True)
        os.close(self.handle)
        if os.name == "nt":  # where an open file stays
            self.path.unlink(missing_ok=True)


def _why(error: OSError) -> str:
    return "the disk is full" if is_full(error) else error.strerror or str(error)


def boot_id() -> str:
    """The machine, since it was started; elsewhere than on Linux the machine's name."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def _try_lock(handle: int) -> bool | None:
    """Whether the kernel gives us the lock; None where the disk knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 2**30, os.SEEK_SET)  # behind the text, which others shall read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_KERNEL_LOCK else False
    return True


def _content(handle: int) -> bytes:
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, 100_000)


def _read(content: bytes) -> dict[str, Any] | None:
    """What a lock file says; None for none that comp wrote."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and found.get("comp") == "lock" and {"pid", "host", "boot"} <= found.keys()
    return found if whole else None


def _busy(output: Path, holder: dict[str, Any] | None, hint: str) -> CompError:
    who = f"Process {holder['pid']} on {holder['host']}" if holder else "Another process"
    command = f" ({holder['command']})" if holder and holder.get("command") else ""
    return CompError(f"{who} is writing {output}{command}.", hint=hint)
