"""How long work tells of itself: a protocol that a caller may implement. The library is silent by default."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


class Bar(Protocol):
    """How far a piece of work has come."""

    def advance(self, title: str | None = None, by: int = 1) -> None:
        """So many steps are done; `title` says what the last one reached."""


@runtime_checkable
class Progress(Protocol):
    """What work calls while it runs, in the thread that runs it.

    Attributes:
        shows_bars: whether libraries may show their own bars (of downloads).
    """

    shows_bars: bool

    def say(self, message: str) -> None:
        """A line about what is being done."""

    def warn(self, message: str) -> None:
        """Something that the user should know; reports hold it as well."""

    def track(self, title: str, total: int) -> AbstractContextManager[Bar]:
        """A piece of work of `total` steps, which advances the bar that it gets."""


class NoBar:
    """A bar that nobody sees."""

    def advance(self, title: str | None = None, by: int = 1) -> None:
        pass


class Silent:
    """Tells nobody."""

    shows_bars = False

    def say(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Bar]:
        yield NoBar()


class Recorder:
    """Hands everything on to another one (None: to nobody), and remembers the warnings."""

    def __init__(self, progress: Progress | None):
        self._progress = Silent() if progress is None else progress
        self.shows_bars = self._progress.shows_bars
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        self._progress.say(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._progress.warn(message)

    def track(self, title: str, total: int) -> AbstractContextManager[Bar]:
        return self._progress.track(title, total)
