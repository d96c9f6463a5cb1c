"""Files of a model that are handed on as they are: hard links, or copies that are hashed on the way."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CompError, UsageError, is_full
from .store import unread_facts, write_failed

PIECE = 16 * 2**20  # bytes
UNLINKABLE = {
    errno.EXDEV: "they lie on different disks, where no file can have two names",
    errno.EPERM: "this disk, or its owner, allows no second name of it",
    errno.EACCES: "this disk, or its owner, allows no second name of it",
    errno.EMLINK: "it has as many names as the disk allows",
    errno.EOPNOTSUPP: "this disk knows no second names",
}


def link(source: Path, target: Path) -> dict[str, Any]:
    """A second name of the same bytes, and what a report says of it (see `store.unread_facts`). Of a link in a cache of the hub
    its blob gets the name. Raises UsageError where disk or owner do not allow it: nothing else is done in its place."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        said = f"--link: {real} cannot be linked to {target.parent}: {UNLINKABLE[error.errno]}."
        raise UsageError(
            said, hint="Choose an --output on the disk of the model, or leave --link out: then it is copied."
        ) from error
    return unread_facts(target)


def copy(source: Path, target: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    """A copy, and its size and SHA-256, of the bytes as they went through. Raises CompError on a full disk."""
    digest, size = hashlib.sha256(), 0
    piece = memoryview(bytearray(PIECE))
    try:
        with source.open("rb") as read, target.open("wb") as written:
            while count := read.readinto(piece):
                digest.update(piece[:count])
                written.write(piece[:count])
                size += count
                advance(count)
    except OSError as error:
        if is_full(error):
            raise write_failed(target, error) from error
        raise CompError(f"{source} cannot be copied to {target}: {error.strerror or error}.") from error
    return {"bytes": size, "sha256": digest.hexdigest()}
