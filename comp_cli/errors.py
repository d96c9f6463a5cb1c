"""Exit codes, and the one exception that carries a sentence for the user."""

from typing import Any

DONE, FAILED, USAGE, GATE, REFUSED, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


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
