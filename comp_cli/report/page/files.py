"""Where a page is written."""

from pathlib import Path

from ...errors import UsageError
from ...files.outputs import atomic_file, check_replaced, resolve
from .shell import MARK

OPTION = "--html"


def check_page(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError where the page could not be written in the end, or would replace a file that is not to be replaced."""
    ours = check_replaced(path, OPTION, "page that comp wrote", lambda there: MARK.encode() in there.read_bytes())
    if ours.exists() and not overwrite:
        raise UsageError(f"{OPTION} {path}: exists.", hint="--overwrite replaces a page that comp wrote.")


def write_page(path: Path, text: str) -> None:
    """The page in its place, whole or not at all. Raises CompError on a full disk."""
    with atomic_file(resolve(path, OPTION)) as partial:
        partial.write_text(text, encoding="utf-8")
