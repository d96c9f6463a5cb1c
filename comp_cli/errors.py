"""Exit codes, and the one exception that carries a sentence for the user."""

DONE, FAILED, USAGE, GATE, REFUSED, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class CompError(Exception):
    """What went wrong, in a sentence for the user, with the exit code of the command and what to do next.

    Codes: 1 failed, 2 wrong usage, 3 a gate was not met (parity, accuracy, speed), 4 the input is refused (unsafe, corrupt,
    unsupported), 5 the device or provider is missing.
    """

    def __init__(self, message: str, *, code: int = FAILED, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
