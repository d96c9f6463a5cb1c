"""The examples in the code of cards, and what several topologies say of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .base import IMAGE, PIXELS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..tasks import Task

PICTURE = "scene.png"
TEXTS = ["a small red circle", "two blue squares above a large circle"]
LABELS = ["circle", "square"]
QUESTION = "what color is the circle?"
LONGEST = 20  # tokens of a text that is written


def picture_of(document: Mapping[str, Any], made: str = "pixels(picture)") -> str:
    """What a graph takes of a picture, and what is given, as an entry of a dictionary. document: export.json; made: the code
    that makes it."""
    return f'"{IMAGE if document["with_preprocessing"] else PIXELS}": {made}'


def texts_of(task: Task) -> str:
    """The line that names the texts."""
    if task.prompt == "{}":
        return f"texts = {json.dumps(TEXTS)}"
    said = task.prompt.replace("{}", "{label}")
    return f'texts = [f"{said}" for label in {json.dumps(LABELS)}]'
