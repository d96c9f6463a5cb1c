"""Where a page is written."""

from pathlib import Path

from ...errors import UsageError
from ...files.outputs import atomic_file, check_file, resolve
from .shell import MARK

OPTION = "--html"


def check_page(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError where the page could not be written in the end, or would replace a file that is not to be replaced."""
    path = resolve(path, OPTION)
    if not path.parent.is_dir():
        raise UsageError(f"{OPTION} {path}: no such folder.", hint="Create the folder first.")
    check_file(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{OPTION} {path}: exists.", hint="--overwrite replaces a page that comp wrote.")
    if path.exists() and MARK.encode() not in path.read_bytes():
        hint = "Choose another name, or remove it yourself."
        raise UsageError(f"{OPTION} {path}: exists, and is no page that comp wrote.", hint=hint)


def write_page(path: Path, text: str) -> None:
    """The page in its place, whole or not at all. Raises CompError on a full disk."""
    with atomic_file(resolve(path, OPTION)) as partial:
        partial.write_text(text, encoding="utf-8")
