"""The report of `comp prune` with several ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import PruneOptions
from .base import Report, Sizes, Threads, Values, if_known

ROUNDING = 1e-9  # heights above a line that are none


@dataclass(frozen=True)
class Point:
    """One ratio of a sweep. What no model was made to measure is null.

    Attributes:
        ratio: FLOPs reduction that was asked for.
        reached: FLOPs reduction of the compact model.
        flops: FLOPs of one sample at the reference input.
        params: parameters; shared ones count once.
        size_bytes: size of the folders, bytes.
        metric: the metric that counts, of both models, on pairs that calibration never saw; null where nothing is labelled.
        agreement: share of these samples on which both predict the same.
        folder: the folder that was written, in that of the sweep.
        failed: why none was written.
    """

    ratio: float
    reached: float | None = None
    flops: Sizes | None = None
    params: Sizes | None = None
    size_bytes: Sizes | None = None
    metric: Values | None = None
    agreement: float | None = None
    folder: str | None = None
    failed: str | None = None

    @classmethod
    def of(cls, ratio: float, document: dict[str, Any], folder: str | None, failed: str | None = None) -> "Point":
        """Of the report of `comp prune` as JSON has it; an empty one where it came to none."""
        sizes = {name: Sizes(**document[name]) for name in ("flops", "params", "size_bytes") if name in document}
        quality = document.get("quality") or {}
        metrics = quality.get("metrics")
        return cls(
            ratio=ratio,
            reached=document.get("ratio"),
            **sizes,
            metric=Values(**metrics[quality["metric"]]) if metrics else None,
            agreement=quality.get("agreement"),
            folder=folder,
            failed=failed,
        )


def knee(points: Sequence[Point]) -> float | None:
    """The ratio at the knee of a trade-off: of the largest distance above the chord, the straight line from the dense model to
    the point of the largest reduction. Distances to one line are in the order of heights above it, whatever the units. None
    where fewer than three points were measured, or none lies above."""
    labelled = any(point.metric is not None for point in points)
    measured = []  # (FLOPs reduction, metric that counts, ratio); agreement where nothing is labelled
    for point in points:
        worth = point.metric.compact if point.metric is not None else None if labelled else point.agreement
        if worth is not None and point.reached:
            measured.append((point.reached, worth, point.ratio))
    if len(measured) < 3:
        return None
    dense = next((point.metric.dense for point in points if point.metric is not None), 1.0)
    end, last, _ = max(measured)
    heights = {ratio: worth - (dense + (last - dense) * reached / end) for reached, worth, ratio in measured}
    best = max(heights, key=lambda ratio: heights[ratio])
    return best if heights[best] > ROUNDING else None


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """What several ratios cost in accuracy: one compact model each, of one calibration.

    Attributes:
        comp_version: version of comp.
        torch_version: version of PyTorch.
        base_model: the dense model: Hub id, name of the folder, or "demo".
        base_revision: its commit, for a model from the Hub.
        architecture: transformers class.
        task: evaluation task.
        options: what was asked for, with the defaults of the model's size filled in, of the first ratio; local paths as names
            only.
        metric: name of the metric that counts; left out after a dry run.
        samples: pairs that were judged on; left out after a dry run.
        data: where they come from; left out after a dry run.
        points: one for each ratio, in the order that was asked for.
        threads: CPU threads that it worked with.
        knee: the ratio of the largest distance above the straight line from the dense model to the largest ratio; left out
            where fewer than three were measured, or none lies above.
        seconds: duration of the whole run, s.
        output: the folder that holds the folders; null after a dry run.
    """

    comp_version: str
    torch_version: str
    base_model: str
    base_revision: str | None
    architecture: str
    task: str
    options: PruneOptions
    metric: str | None = if_known()
    samples: int | None = if_known()
    data: str | None = if_known()
    points: tuple[Point, ...]
    threads: Threads | None = if_known()
    knee: float | None = if_known()
    seconds: float | None = if_known()
    output: Path | None = None
