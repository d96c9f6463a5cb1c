"""The report of `comp upgrade`, and its lines."""

from dataclasses import dataclass
from pathlib import Path

from .base import Report
from .numbers import Printer


@dataclass(frozen=True, kw_only=True)
class UpgradeReport(Report):
    """What is new in a folder.

    Attributes:
        folder: the folder.
        comp_version: version of comp.
        changed: how, by what.
    """

    folder: Path
    comp_version: str
    changed: dict[str, str]


def print_upgraded(report: UpgradeReport, out: Printer) -> None:
    """What changed, for people."""
    if not report.changed:
        out.line(f"{report.folder} is as comp {report.comp_version} writes it: nothing to do.")
        return
    for what, how in report.changed.items():
        out.line(f"{what}: {how}")
    out.line(
        f"Upgraded {report.folder}. The weights are the same, and the new folder was loaded before it took the old one's place."
    )
