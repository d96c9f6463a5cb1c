"""Numbers as people read them. Light: `comp env` prints where torch is broken."""

from collections.abc import Sequence
from typing import Any, Protocol


class Printer(Protocol):
    """Where tables go."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """The first column is text, the others are numbers."""

    def line(self, message: str) -> None:
        """A line of the result."""


def millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M"


def gflops(number: float) -> str:
    return f"{number / 1e9:,.2f} G"


def mib(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "-"
