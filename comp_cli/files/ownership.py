"""Whose a folder is: what comp wrote into it, by the hashes in its own reports, and what it did not."""

import os
from pathlib import Path
from typing import Any

from ..errors import CompError
from .store import departs, read_json, sha256

MARKERS = ("comp_report.json", "export.json")  # a file that lists, with hashes, what else comp wrote into its folder
Facts = dict[str, Any]  # of a file, see store.departs
Judged = dict[str, tuple[int, int, int]]  # name -> inode, bytes, time of the last change in ns


def strangers(folder: Path) -> list[str] | None:
    """What a folder holds that comp did not write there, or that was changed since, as text; None where no marker of comp
    says what it wrote: then all of it is foreign."""
    known = written(folder)
    if known is None:
        return None
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() or not entry.is_file():
            found.append(f"{entry.name}{'/' if entry.is_dir(follow_symlinks=False) else ''}")
        elif entry.name not in known:
            found.append(entry.name)
        elif (told := known[entry.name]) is not None and departs(Path(entry.path), told):
            found.append(f"{entry.name} (changed)")
    return found


def written(folder: Path) -> dict[str, Facts | None] | None:
    """Name -> size and hash of what comp's markers in a folder list, and the markers, whose own hash nobody knows; None where
    there is no marker of comp. A file of that name that another program wrote is none."""
    known: dict[str, Facts | None] = {}
    for name in MARKERS:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            content = read_json(path)
        except CompError:
            continue
        files = content.get("files")
        ours = isinstance(content.get("comp_version"), str) and isinstance(content.get("schema_version"), int)
        if ours and isinstance(files, dict) and files:
            known |= {file: told if isinstance(told, dict) else {"sha256": told} for file, told in files.items()} | {name: None}
    return known or None


def seen(folder: Path) -> Judged:
    """What a folder holds, cheaply: two of them are equal if nothing happened in between."""
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    return {name: (info.st_ino, info.st_size, info.st_mtime_ns) for name, info in found.items()}


def discard(folder: Path, successor: Path) -> None:
    """Remove what comp wrote of a folder, and files that its successor holds as well; the marker last; and the folder if that
    was all."""
    known = written(folder) or {}
    foreign = {name.removesuffix(" (changed)") for name in strangers(folder) or ()}
    for name in sorted(os.listdir(folder), key=lambda name: name in MARKERS):
        path, twin = folder / name, successor / name
        if path.is_symlink() or not path.is_file():
            continue
        if (name in known and name not in foreign) or (twin.is_file() and sha256(twin) == sha256(path)):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
