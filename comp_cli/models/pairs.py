"""The pairs that a model is calibrated and judged on: the user's, or generated scenes; and batches of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.batches import Batch
from ..data.pairset import PairSet
from ..data.rows import Accepts, Columns, Pair, every
from ..data.scene_pairs import ScenePairs
from ..data.sources import open_pairs
from ..data.splits import Purpose
from ..options import DataOptions
from ..progress import Progress, Silent
from ..report.base import PairCounts, Texts
from ..tasks import Task
from .dense import Dense


@dataclass(frozen=True)
class ListedPairs:
    """Pairs that were read already, for every purpose the same. said: where they come from."""

    listed: Sequence[Pair]
    said: str

    def describe(self, purpose: Purpose) -> str:
        return self.said

    def counts(self) -> dict[str, dict[str, Any]]:
        """Whoever read them has counted the rows."""
        return {}

    def read(self, purpose: Purpose, limit: int | None = None, seed: int = 0, accepts: Accepts = every) -> Iterator[Pair]:
        """All of them, in their order."""
        return iter(self.listed)


Pairs = ScenePairs | PairSet | ListedPairs
TRAINED = {"demo": ("itm",), "demo-vlm": ("vqa", "caption")}  # tasks of the built-in models


def choose_pairs(dense: Dense, options: DataOptions, progress: Progress, cache_dir: Path | None = None) -> Pairs:
    """The user's pairs, or generated scenes with a warning for models that do not know them."""
    if options.data is not None:
        progress.say(f"{dense.task.name}: {dense.task.compares}")
        return own_pairs(options, progress, cache_dir)
    known = dense.source.kind == "demo" and dense.task.name in TRAINED[dense.source.name]
    if dense.source.kind != "demo":
        progress.warn(f"{dense.source.name} is calibrated on generated scenes: --data with your own pairs keeps more accuracy.")
    elif not known:
        progress.warn(f"the model {dense.source.name} was never trained for {dense.task.name}: what it says is chance.")
    return generated_pairs(dense.task, labelled=known)


def own_pairs(options: DataOptions, progress: Progress, cache_dir: Path | None = None) -> PairSet:
    """The user's pairs, of options that name some."""
    named = (options.image_column, options.text_column, options.label_column, options.answer_column, options.split_column)
    columns = Columns(*named)
    return open_pairs(str(options.data), progress=progress, split=options.split, columns=columns, cache_dir=cache_dir)


def generated_pairs(task: Task, labelled: bool) -> ScenePairs:
    """Scenes with the texts that a task reads."""
    return ScenePairs(labelled, described=not task.has_negatives, asked=task.has_answers)


def batches_of(dense: Dense, pairs: Pairs, purpose: Purpose, samples: int, batch_size: int, seed: int = 0) -> list[Batch]:
    """Batches of model inputs for a purpose, "calibration" or "evaluation"; the two share no image."""
    return list(dense.collate.batches(pairs.read(purpose, samples, seed, dense.task.accepts), batch_size))


def pairs_to_choose_on(dense: Dense, pairs: Pairs, read: int, most: int, seed: int = 0) -> tuple[ListedPairs, bool]:
    """Up to `most` pairs of the calibration's side, so that the evaluation has seen none of them, and whether the calibration,
    which has read the first `read` pairs, has seen none of them either. Where it took all, its own are all there is."""
    quiet = replace(pairs, told={}, progress=Silent()) if isinstance(pairs, PairSet) else pairs
    seen = pairs.calibrated if isinstance(pairs, PairSet) else set()

    def stream() -> Iterator[Pair]:
        return quiet.read("calibration", None, seed, dense.task.accepts)

    where = pairs.describe("calibration")
    unseen = (pair for pair in islice(stream(), read, None) if not seen or pair.image_id not in seen)
    if found := list(islice(unseen, most)):
        return ListedPairs(found, f"{where}, behind the calibration pairs"), True
    return ListedPairs(list(islice(stream(), min(read, most))), f"{where}, the calibration pairs themselves"), False


def cut_texts(batches: Sequence[Batch], longest: int) -> Texts:
    """How many of the texts were cut, at how many tokens, and how long they are."""
    samples = sum(batch.samples for batch in batches)
    sums: Counter[str] = sum((Counter(batch.text_tokens) for batch in batches), Counter())
    means = {stream: round(total / samples, 2) for stream, total in sums.items()}
    return Texts(sum(batch.cut for batch in batches), samples, longest, means or None)


def warn_cut_texts(purpose: str, texts: Texts, progress: Progress, most: int) -> None:
    """A warning where texts were cut; `most`: tokens that the model takes."""
    if texts.cut:
        more = "--text-tokens takes more" if texts.at < most else "the model takes no more"
        progress.warn(f"{purpose}: {texts.cut} of {texts.of} texts are cut at {texts.at} tokens ({more}).")


def pair_counts(pairs: Pairs) -> dict[str, PairCounts]:
    """What became of the rows of the user's pairs, by purpose; nothing for generated scenes."""
    return {purpose: PairCounts(**found) for purpose, found in pairs.counts().items()}
