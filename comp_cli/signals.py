"""Ctrl-C, SIGTERM and SIGHUP end a command in one way: by an exception, so that what is half written goes."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
GRACE = 10  # seconds after a signal in which further ones are not heard: that is when things are put away


class Interrupted(BaseException):
    """A signal asks the command to end. It is no KeyboardInterrupt, which libraries and the parser catch."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number  # what a shell shows of a process that the signal ended
        self.said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


_heard_at = -float(GRACE)
_holding = 0
_waiting: int | None = None


def install() -> None:
    """From now on the signals raise `Interrupted`, but those that are ignored already (nohup, jobs in the background)."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hear)


def ignore() -> None:
    """All is told: while Python takes itself down, which it does without our handlers, a signal changes nothing."""
    for name in ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is _hear:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until the block has ended well: for steps that belong together."""
    global _holding, _waiting
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
    if not _holding and _waiting is not None:
        number, _waiting = _waiting, None
        raise Interrupted(number)


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard_at, _waiting
    if time.monotonic() - _heard_at < GRACE:
        return
    _heard_at = time.monotonic()
    if _holding:
        _waiting = number
        return
    raise Interrupted(number)
