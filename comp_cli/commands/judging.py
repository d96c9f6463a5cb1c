"""Dense against compact, on pairs that calibration never saw, and the gate on what may be lost."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..data.batches import Batch
from ..data.rows import Pair
from ..errors import GateError
from ..models.dense import Dense
from ..models.generated_texts import judge
from ..models.pairs import Pairs, cut_texts, warn_cut_texts
from ..options import ResolvedOptions
from ..progress import Progress
from ..report.base import Texts, Values
from ..report.prune import PruneReport, Quality
from ..report.prune_tables import metric_value
from ..search.once import Once
from ..search.processes import gathered, processes, share
from ..tasks import Task, comparison
from ..tasks.base import is_share
from ..tasks.text_metrics import missing, references


@dataclass(frozen=True)
class Judged:
    """What the dense model says on the pairs that calibration never saw. pairs: themselves, where texts are written about them.
    seconds: that one process takes."""

    batches: list[Batch]
    texts: Texts
    pairs: list[Pair]
    found: comparison.Evaluation
    seconds: float


def judge_dense(dense: Dense, pairs: Pairs, options: ResolvedOptions, progress: Progress) -> Judged:
    collate, task = dense.collate_whole, dense.task
    read: Iterable[Pair] = map(collate.seen, pairs.read("evaluation", options.eval_samples, accepts=task.accepts))
    if task.new_tokens:
        read = list(read)  # which are written about as well
    batches = list(collate.batches(read, options.batch_size))
    texts = cut_texts(batches, collate.max_text)
    begin = time.perf_counter()
    found = evaluate(dense.runtime(dense.plan), task, batches, progress, "judging the dense model")
    seconds = (time.perf_counter() - begin) * processes()
    return Judged(batches, texts, list(read) if task.new_tokens else [], found, seconds)


def evaluate(model: nn.Module, task: Task, batches: list[Batch], progress: Progress, title: str) -> comparison.Evaluation:
    """Run a model over batches, each process over its share."""
    own = share(batches)
    with progress.track(title, len(own)) as bar:
        return comparison.judged(task, gathered(comparison.read(model, task, own, bar.advance)))


def compare(
    dense: Dense, compact: nn.Module, pairs: Pairs, options: ResolvedOptions, progress: Progress, once: Once | None = None
) -> tuple[Quality, float]:
    """Dense against compact on pairs that calibration never saw: the task's metrics where there are labels, and agreement.
    And the seconds that the dense model took for a pair. once: what comparisons of the same dense model share."""
    once, task = once or Once(), dense.task
    judged = once("dense model judged", lambda: judge_dense(dense, pairs, options, progress))
    before, batches, texts = judged.found, judged.batches, judged.texts
    warn_cut_texts("evaluation", texts, progress, dense.longest)
    after = evaluate(compact, task, batches, progress, "judging the compact model")
    quality = quality_of(dense, pairs, before, after, texts, progress)
    if task.new_tokens and quality.metrics:
        written = judge_texts(dense, compact, judged.pairs, options.batch_size, progress, once)
        quality = replace(quality, metric=next(iter(written), quality.metric), metrics=written | quality.metrics)
    return quality, judged.seconds / before.samples


def quality_of(
    dense: Dense, pairs: Pairs, before: comparison.Evaluation, after: comparison.Evaluation, texts: Texts, progress: Progress
) -> Quality:
    """What two models say, compared."""
    task = dense.task
    both = [task.rankings(evaluation.outputs, evaluation.labels) for evaluation in (before, after)]
    metrics = {name: Values(value, (after.metrics or {})[name]) for name, value in (before.metrics or {}).items()}
    quality = Quality(
        samples=before.samples,
        data=pairs.describe("evaluation"),
        metric=task.metric,
        metrics=metrics or None,
        agreement=comparison.agreements(*both),
        divergence=comparison.divergence(*both).item(),
        texts=texts,
        shared_texts=task.shared(before.labels),
    )
    if shared := quality.shared_texts:
        progress.say(f"{shared} of {before.samples} texts are those of several images: each of these counts as right")
    return quality


def judge_texts(
    dense: Dense, compact: nn.Module, pairs: list[Pair], batch_size: int, progress: Progress, once: Once
) -> dict[str, Values]:
    """Metrics of the captions or answers that the models write on the pairs; the one that counts first."""
    about, known = references(dense.task, pairs)
    if why := missing(dense.task, about):
        progress.warn(f"{why}; {dense.task.metric} is what counts")
        return {}

    def written(model: nn.Module) -> dict[str, float]:
        with progress.track("writing texts", len(about)) as bar:
            return judge(model, dense, about, known, batch_size, lambda done: bar.advance(by=done), share, gathered)

    before, after = once("texts judged", lambda: written(dense.runtime(dense.plan))), written(compact)
    return {name: Values(value, after[name]) for name, value in before.items()}


def check_drop(report: PruneReport, quality: Quality, allowed: float | None, progress: Progress) -> None:
    """Raises GateError where the metric (without labels the agreement) fell by more points than allowed."""
    if allowed is None:
        return
    if allowed < 100 / quality.samples and is_share(quality.metric):
        progress.warn(f"--max-drop {allowed:g} is less than one of {quality.samples} pairs: --eval-samples gives it more.")
    if not lost(quality) <= allowed:
        hint = "Nothing was written. Try a lower --ratio, or --steps to fine-tune."
        raise GateError(f"{loss_in_words(quality)}; --max-drop allows {allowed:g} points.", hint=hint, report=report)


def counted(quality: Quality) -> tuple[str, Values]:
    """What --max-drop is about: the metric, without labels the agreement with the dense model."""
    metrics = quality.metrics
    return (quality.metric, metrics[quality.metric]) if metrics else ("agreement", Values(1.0, quality.agreement))


def lost(quality: Quality) -> float:
    """Points that it fell by."""
    _, fell = counted(quality)
    return 100 * (fell.dense - fell.compact)


def loss_in_words(quality: Quality) -> str:
    name, fell = counted(quality)
    return f"{name} falls from {metric_value(name, fell.dense)} to {metric_value(name, fell.compact)}"
