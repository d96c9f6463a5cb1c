"""Values of options as people type them: lists with commas, and the output that nobody named."""

from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError
from .options import BACKENDS


def default_output(model: str, ratio: float) -> Path:
    """Where a compact model goes if nobody says: beside nothing of the dense one, in the current folder."""
    named = model.split("@")[0] if model.startswith("hf://") else model
    return Path(f"{Path(named).name or 'model'}-comp-{ratio:g}".lstrip("-@"))


def parse_backends(given: str | Sequence[str]) -> tuple[str, ...]:
    """Backends as a text with commas, or several texts. Raises UsageError where one is none."""
    parts = given.split(",") if isinstance(given, str) else given
    names = tuple(dict.fromkeys(str(name).strip() for name in parts if str(name).strip()))
    if not names or not set(names) <= set(BACKENDS):
        raise UsageError(f"--backend {_listed(given)}: expected some of {', '.join(BACKENDS)}, with commas.")
    return names


def parse_batches(given: str | int | Sequence[int]) -> tuple[int, ...]:
    """Batch sizes as a text with commas, a number, or several. Raises UsageError where one is none."""
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in parts))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > 10**5:
        raise UsageError(f"--batch {_listed(given)}: expected numbers from 1 to 100000, with commas, such as 1,8.")
    return sizes


def _listed(given: object) -> str:
    return ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
