"""The examples in the code of cards, and what several topologies say of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tasks import Task

PICTURE = "scene.png"
TEXTS = ["a small red circle", "two blue squares above a large circle"]
LABELS = ["circle", "square"]
QUESTION = "what color is the circle?"
LONGEST = 20  # tokens of a text that is written


def texts_of(task: Task) -> str:
    """The line that names the texts."""
    if task.prompt == "{}":
        return f"texts = {json.dumps(TEXTS)}"
    said = task.prompt.replace("{}", "{label}")
    return f'texts = [f"{said}" for label in {json.dumps(LABELS)}]'
