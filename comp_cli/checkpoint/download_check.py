"""Downloaded files against what the hub announced: a proxy, a full disk or a broken server may hand over other bytes."""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import RefusedError
from ..files.store import sha256


def check_downloads(
    folder: Path, names: Collection[str], announced: Mapping[str, tuple[str, int]], known: Collection[str], model: str
) -> None:
    """Raises RefusedError at the first of some files of a snapshot whose bytes are not those that the hub announced.

    The cache names every blob by its announced ETag: SHA-256 for large files, git's hash for small ones. `announced` adds the
    SHA-256 and size of large files from the repository's listing. A bad blob that came just now (not in `known`, the names of
    blobs that were there before) is removed; one that lay there is named.
    """
    for path in (folder / name for name in sorted(names)):
        if not path.is_file():  # what is missing is for others to say
            continue
        blob = path.parent / path.readlink() if path.is_symlink() else None
        expected = {blob.name} if blob is not None and is_hash(blob.name) else set()
        digest, size = announced.get(path.name, (None, None))
        expected |= {digest} if digest else set()
        if not all(fits(path, wanted) for wanted in expected) or size not in (None, path.stat().st_size):
            if blob is not None and blob.name not in known:
                blob.resolve().unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                hint = "It was not kept. Try again; if it stays so, a proxy on the way or the server changes files."
            else:
                hint = f"Remove {path.resolve()} and try again: it was changed, or its download went wrong."
            said = f"{path.name} of {model} is not what the hub announced: its bytes have another hash or size."
            raise RefusedError(said, hint=hint)


def is_hash(name: str) -> bool:
    """Whether an ETag says what a file holds: 64 hex digits for SHA-256, 40 for git's hash."""
    return re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) is not None


def fits(path: Path, expected: str) -> bool:
    """Whether a file has this SHA-256, or, of 40 digits, git's hash (mirrors announce the plain SHA-1)."""
    if len(expected) == 64:
        return sha256(path) == expected
    content = path.read_bytes()
    as_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return expected in (as_git.hexdigest(), hashlib.sha1(content, usedforsecurity=False).hexdigest())
