"""What can go wrong, by meaning: each exception carries a sentence for the user and what to do next."""

import errno
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report.base import Report


class CompError(Exception):
    """The work failed: no room on the disk, no answer from the hub, a defect.

    Attributes:
        message: what went wrong, in a sentence.
        hint: what to do next.
        exit_code: what the command line ends with, by which scripts tell the kinds apart.
        report: that of a command which did its work before it failed.
    """

    exit_code = 1
    report: "Report | None" = None

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int | None = None):
        super().__init__(message)
        self.message, self.hint = message, hint
        if exit_code is not None:  # of a signal
            self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, vars(self))  # from another process as well: keywords are no args

    @property
    def document(self) -> dict[str, Any]:
        """The report as JSON has it; empty where there is none."""
        return {} if self.report is None else self.report.to_json()


def _rebuild(kind: type[CompError], args: tuple[Any, ...], state: dict[str, Any]) -> CompError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class UsageError(CompError):
    """An argument or an option that cannot be, or that contradicts another one."""

    exit_code = 2


class GateError(CompError):
    """The work is done and misses a gate: parity, accuracy, speed, memory. `report` says what was measured."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None, report: "Report"):
        super().__init__(message, hint=hint)
        self.report = report


class RefusedError(CompError):
    """A model, a folder or data that is unsafe, corrupt or unsupported."""

    exit_code = 4


class DeviceError(CompError):
    """A device or a provider that is not there."""

    exit_code = 5


class DeadEnd(CompError):
    """The work cannot go on from where it came: its journal is worth nothing. reached: the FLOPs ratio that it came to."""

    reached = 0.0


COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # that libraries put into their messages for terminals


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    lines = COLOURS.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_full(error: BaseException | None) -> bool:
    """Whether a disk, a quota or a limit on file sizes is behind an exception, in whatever words a library wrapped it."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left", "os error 28", "Disk quota exceeded", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False


# What gloo and NCCL say of a process that is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL", "Broken pipe")


def explain(error: Exception) -> CompError:
    """What no command foresaw, as a sentence. What the machine lacks is no defect."""
    lines = COLOURS.sub("", str(error)).strip().splitlines() or ["no message"]
    if is_full(error):
        where = f" ({filename})" if (filename := getattr(error, "filename", None)) else ""
        return CompError(
            f"the disk is full{where}.", hint="Free some space and run it again; TMPDIR names another scratch disk."
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        hint = "A smaller --batch-size helps, or --device cpu; --max-memory prunes an image-text decoder layer by layer."
        return CompError(f"the GPU is out of memory ({lines[0]}).", hint=hint)
    if type(error).__name__ == "SmallImage":  # of the runtime, which knows nothing of comp
        return UsageError(lines[0])
    if isinstance(error, MemoryError) or "allocate memory" in lines[0]:
        return CompError(f"out of memory ({lines[0]}).", hint="A smaller --batch-size or a larger machine helps.")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
        hint = "What it said tells why. Start them together once more: the run goes on where it was."
        return CompError("another process of this run has ended.", hint=hint)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return CompError(f"{where}{error.strerror}.", hint="COMP_DEBUG=1 shows where it happened.")
    hint = "This is a defect of comp or of a library. COMP_DEBUG=1 shows where it happened."
    return CompError(f"{type(error).__name__}: {lines[0]}", hint=hint)
