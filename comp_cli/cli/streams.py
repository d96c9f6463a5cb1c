"""The standard streams as they come: closed, full, cut, of another encoding. stdout is kept for results."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

MODES = ("human", "json", "markdown", "github", "quiet")  # of output, see Output


class Lenient:
    """A stream for messages. That nobody can read them is no reason to lose the result."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def settle() -> bool:
    """Prepare the streams of a process that has just begun; whether there is a stdout.

    What libraries and child processes print on file descriptor 1 goes to stderr from now on, until the end: C libraries keep
    text back until then. `sys.stdout` leads to what was stdout.
    """
    given = sys.stdout is not None
    for number in (0, 1, 2):  # or the next file that is opened would be taken for a closed one
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    errors = sys.stderr or open(2, "w", closefd=False)
    if isinstance(errors, io.TextIOWrapper):
        errors.reconfigure(errors="backslashreplace")
    sys.stderr = Lenient(errors)
    encoding = sys.stdout.encoding if given else "utf-8"
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(results, "w", encoding=encoding, errors="backslashreplace")
    return given


def close_stdout() -> OSError | None:
    """Write what is still buffered; why that fails, if it does. Python would end with exit code 120."""
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return error
    return None


def asked_mode(arguments: Sequence[str]) -> str:
    """The mode of output that a command line asks for, also where the parser refuses it: `--json`, `--format json`, their
    beginnings; "" where it says nothing. A format that does not exist is a document, which a program asks for rather than a
    person."""
    words = list(arguments)
    words = words[: words.index("--")] if "--" in words else words
    form = "quiet" if {"-q", "--quiet"} & set(words) else ""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, given, value = word.partition("=")
        if len(name) > 3 and "--json".startswith(name):
            return "json"
        if len(name) > 4 and "--format".startswith(name):
            chosen = value if given else following
            form = chosen if chosen in MODES else "json"
    return form
