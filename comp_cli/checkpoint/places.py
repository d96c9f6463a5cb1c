"""What settings tell of the machine that wrote them, which is nobody's business elsewhere. Light to import."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..files.store import read_json

FLAGS = ("is_local", "local_files_only")  # what a tokenizer remembers of where it came from
NAMES = ("_or_path", "_file")  # endings of what may be a path: name_or_path, special_tokens_map_file
ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")


def without_places(settings: Any) -> Any:
    """The same settings without paths of a machine; names on the hub and of files beside them stay."""
    if isinstance(settings, list):
        return [without_places(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {name: without_places(value) for name, value in settings.items() if not tells_place(name, value)}


def tells_place(name: object, value: Any) -> bool:
    """Whether a setting is of the machine alone. Names of labels are numbers, in what was not read from JSON."""
    return name in FLAGS or (isinstance(value, str) and str(name).endswith(NAMES) and ABSOLUTE.match(value) is not None)


def copy_settings(source: Path, target: Path) -> None:
    """A copy of a file, byte for byte; of JSON that tells of a place, what is left without."""
    if source.suffix == ".json" and source.name.endswith("config.json"):
        known = read_json(source)
        if (kept := without_places(known)) != known:
            target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, target)
