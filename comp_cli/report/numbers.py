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


def short(number: float) -> str:
    """Three digits, with k, M, G or T: 473,300,480 as "473 M"."""
    size, sign = abs(number), "-" if number < 0 else ""
    for power, unit in (12, "T"), (9, "G"), (6, "M"), (3, "k"):
        if size >= 0.9995 * 10**power:
            return f"{sign}{three_digits(size / 10**power)} {unit}"
    return f"{number:,.4g}"


def short_bytes(number: float) -> str:
    """Three digits, with KiB, MiB or GiB: 172,032 as "168 KiB"."""
    for power, unit in (30, "GiB"), (20, "MiB"), (10, "KiB"):
        if number >= 0.9995 * 2**power:
            return f"{three_digits(number / 2**power)} {unit}"
    return f"{number:,.4g} B"


def short_percent(share: float) -> str:
    """A share that is a setting: 30 %, 2.5 %."""
    return f"{100 * share:.3g} %"


def three_digits(number: float) -> str:
    """473.3 as "473", 1.9879 as "1.99"."""
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"
