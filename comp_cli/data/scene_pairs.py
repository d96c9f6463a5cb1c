"""Generated scenes as a set of pairs: what calibrates and evaluates where nobody gave pairs of their own."""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from . import scenes
from .rows import Accepts, Pair, every
from .splits import Purpose


def scene_pairs(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes with captions. Unlabelled for models that were never trained on them."""
    for example in scenes.examples(split, count, seed):
        label = example.label if labelled else None
        yield Pair(scenes.render(example.scene, example.background), example.caption.text, label)


def caption_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes, each with a description of all that is in it."""
    for scene, background in scenes.images(split, count, seed):
        text = scenes.describe(scene)  # what is described alike counts as one image
        yield Pair(scenes.render(scene, background), text, image_id=zlib.crc32(text.encode()), known=labelled)


def vqa_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes, each with a question about it and the answer."""
    for number, (scene, background) in enumerate(scenes.images(split, count, seed)):
        question, answer = scenes.ask(random.Random(background), scene)
        yield Pair(scenes.render(scene, background), question, image_id=number, answers=(answer,), known=labelled)


@dataclass(frozen=True)
class ScenePairs:
    """Generated scenes as a set of pairs: with captions that match or do not, or (`described`) with descriptions that match, or
    (`asked`) with questions and answers. Labelled for models that were trained on them only."""

    labelled: bool
    described: bool = False
    asked: bool = False

    SPLITS: ClassVar = {"calibration": "train", "evaluation": "test"}

    def describe(self, purpose: Purpose) -> str:
        return f"generated scenes, split {self.SPLITS[purpose]}"

    def counts(self) -> dict[str, dict[str, Any]]:
        """Nothing is skipped."""
        return {}

    def read(self, purpose: Purpose, limit: int | None = None, seed: int = 0, accepts: Accepts = every) -> Iterator[Pair]:
        """Up to `limit` pairs, of which there are more than anybody asks for. All are taken."""
        count = 10**8 if limit is None else limit
        make = vqa_scenes if self.asked else caption_scenes if self.described else scene_pairs
        return make(self.SPLITS[purpose], count, seed, self.labelled)
