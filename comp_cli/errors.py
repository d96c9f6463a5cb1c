"""Exit codes, and the one exception that carries a sentence for the user."""

import errno
from typing import Any

DONE, FAILED, USAGE, GATE, REFUSED, DEVICE = range(6)  # and 128 + its number for a signal, see signals


class CompError(Exception):
    """What went wrong, in a sentence for the user, with the exit code of the command and what to do next.

    Codes: 1 failed, 2 wrong usage, 3 a gate was not met (parity, accuracy, speed), 4 the input is refused (unsafe, corrupt,
    unsupported), 5 the device or provider is missing. `document` is the report of a command that did its work and then
    missed a gate.
    """

    def __init__(self, message: str, *, code: int = FAILED, hint: str | None = None, document: dict[str, Any] | None = None):
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.document = document or {}


class DeadEnd(CompError):
    """The work cannot go on from where it came: its journal is worth nothing."""


def first_line(error: Exception) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
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


def explain(error: Exception) -> CompError:
    """What no command foresaw, as a sentence: exit 1. What the machine lacks is no defect."""
    lines = str(error).strip().splitlines() or ["no message"]
    if is_full(error):
        where = f" ({error.filename})" if getattr(error, "filename", None) else ""
        return CompError(
            f"the disk is full{where}.", hint="Free some space and run it again; TMPDIR names another scratch disk."
        )
    if isinstance(error, MemoryError) or "allocate memory" in lines[0] or type(error).__name__ == "OutOfMemoryError":
        return CompError(f"out of memory ({lines[0]}).", hint="A smaller --batch-size or a larger machine helps.")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return CompError(f"{where}{error.strerror}.", hint="COMP_DEBUG=1 shows where it happened.")
    hint = "This is a defect of comp or of a library. COMP_DEBUG=1 shows where it happened."
    return CompError(f"{type(error).__name__}: {lines[0]}", hint=hint)
