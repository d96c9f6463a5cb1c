"""`comp prune --dry-run`: what a run will end with, within seconds, from config.json, the headers of the weights, and layers
that are timed. Where searching takes no longer than that, the plan is that of the search; else it is assumed, and neither data
nor weights are read."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .. import __version__
from ..checkpoint.loading import pick_device, pick_dtype
from ..engine import allocation, flops
from ..engine.methods import METHODS
from ..engine.token_ranking import with_score_rows, with_score_rule
from ..errors import CompError, DeadEnd
from ..files.store import folder_size
from ..measure.layer_times import latencies
from ..models.dense import Found
from ..models.described import Described, describe_dense
from ..options import HUB_DEFAULTS, HubOptions, PruneOptions, ResolvedOptions, ResolvedTraining
from ..progress import Bar, Progress, Silent
from ..report.base import Sizes, Values
from ..report.cards import without_places
from ..report.prune import Estimate, PruneReport
from ..report.sweep import Point, SweepReport
from ..report.token_tables import image_tokens
from ..search.assumed import Assumed, assumed
from ..search.once import Once
from ..search.processes import processes
from ..search.run import check_asked, seek, with_modes
from . import prune_streamed, threads
from .prune import describe, numbers_of, open_all
from .prune_options import check

TIMED = "medians of interleaved passes of one sample, put together from one timed layer of each shape"
# A search is made where it takes less work than this, which a core does in about ten seconds; one that takes long is left.
FLOPS_OF_A_SEARCH, SECONDS_OF_A_SEARCH = 5e11, 30.0


def estimate(
    options: PruneOptions, progress: Progress, *, max_drop: float | None = None, hub_options: HubOptions = HUB_DEFAULTS
) -> PruneReport:
    """The report of a run that is only estimated: its sizes, FLOPs and latency, and what was assumed.

    Raises UsageError and RefusedError as the run would by config.json and headers, and DeadEnd for a ratio out of reach."""
    check(options, max_drop, "--dry-run")
    begun = time.perf_counter()
    known = prune_streamed.find_by_ratio(options, progress, hub_options)
    dense = described(known, options, progress, hub_options)
    report = estimated(dense, known, options, progress, hub_options, Once())
    return replace(report, seconds=round(time.perf_counter() - begun, 1))


def estimate_several(
    options: PruneOptions,
    ratios: Sequence[float],
    progress: Progress,
    *,
    max_drop: float | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
) -> SweepReport:
    """The same of several ratios. One out of reach fails alone; where all are, DeadEnd is raised."""
    for ratio in ratios:
        check(replace(options, ratio=ratio), max_drop, "--dry-run")
    begun = time.perf_counter()
    known = prune_streamed.find_for_several(options, min(ratios), progress, hub_options, prune_streamed.SEVERAL)
    dense = described(known, options, progress, hub_options)
    points, errors, once = [], [], Once()
    for ratio in ratios:
        try:
            found = estimated(dense, known, replace(options, ratio=ratio), progress, hub_options, once)
            points.append(Point.of(ratio, found.to_json(), None))
        except DeadEnd as error:
            errors.append(error)
            progress.warn(f"ratio {ratio:g}: {error.message}")
            points.append(Point(ratio, failed=error.message))
    report = SweepReport(
        comp_version=__version__,
        torch_version=str(torch.__version__),
        base_model=dense.source.name,
        base_revision=dense.source.revision,
        architecture=dense.architecture,
        task=dense.task.name,
        options=without_places(options),
        points=tuple(points),
        threads=threads.in_use(),
        seconds=round(time.perf_counter() - begun, 1),
    )
    if errors:
        missed = CompError("; ".join(f"ratio {point.ratio:g}: {point.failed}" for point in points if point.failed))
        missed.report = report
        raise missed
    return report


def described(known: Found, options: PruneOptions, progress: Progress, hub_options: HubOptions) -> Described:
    """The dense model by its headers."""
    sizes: dict[str, Any] = {"text_tokens": options.text_tokens, "task": options.task}
    dense = describe_dense(options.model, progress, **sizes, hub_options=hub_options, found=known)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    return dense


def estimated(
    dense: Described, known: Found, options: PruneOptions, progress: Progress, hub_options: HubOptions, once: Once
) -> PruneReport:
    """The report of one ratio. once: what searches of other ratios have made."""
    method = METHODS[options.method]
    dense = with_modes(dense, options.modes)
    resolved = numbers_of(dense, replace(options, training=ResolvedTraining()))
    check_asked(dense, resolved)
    plan = with_score_rule(with_score_rows(dense.plan, options.score_rows, dense.family), method.tokens, dense.family)
    dense = replace(dense, plan=plan)
    streamed = prune_streamed.exceeds(known, options, hub_options)
    if streamed is not None:
        prune_streamed.check_streamable(options, streamed)
    alone = processes() == 1 and streamed is None and not options.training.stage_share  # which trains while it searches
    quick = alone and work_of_a_search(dense, resolved) <= FLOPS_OF_A_SEARCH
    found = (quick and searched(known, options, progress, hub_options, once)) or assumed(dense, resolved)
    plan = found.plan.told_apart(dense.plan)
    params = Sizes(dense.params, dense.params_of(plan))
    report = describe(dense, plan, resolved, params)
    if dense.family.topology.drops_in == "decoder":
        left = image_tokens(plan, dense.plan, dense.reference, dense.bytes_of_a_number)
        report = replace(report, image_tokens=left)
    device = pick_device(options.device)
    progress.say("timing one layer of each shape ...")
    timed = latencies(dense, plan, device)
    many = [params.compact, *map(dense.params_of, found.others)]
    sizes = [written_size(dense, each, options.dtype) for each in many]
    return replace(
        report,
        size_bytes=Sizes(folder_size(dense.source.folder), sizes[0]),
        estimate=Estimate(
            assumed=found.words,
            params=(min(many), max(many)),
            size_bytes=(min(sizes), max(sizes)),
            latency_ms=timed if isinstance(timed, Values) else None,
            latency=TIMED if isinstance(timed, Values) else timed,
            device=str(device),
            peak_weights_bytes=largest_layers(dense) if streamed is not None else 4 * (params.dense + params.compact),
        ),
    )


def work_of_a_search(dense: Described, options: ResolvedOptions) -> float:
    """FLOPs that a search takes, about: passes of the dense model over the calibration pairs, two for each plan or stage."""
    looks = allocation.EXPECTED if options.looks is None else options.looks
    steps = looks if METHODS[options.method].compares_plans else options.stages
    pairs = options.num_samples + 2 * steps * options.stage_samples
    return flops.count(dense.plan, dense.reference).total * pairs


class _TooLong(Exception):
    """A search has taken its time."""


class _Hurried(Silent):
    """Progress of searches, and its bar, until their time is over: raises _TooLong then. The user hears warnings alone."""

    def __init__(self, progress: Progress, end: float):
        self.progress, self.end = progress, end

    def warn(self, message: str) -> None:
        self.progress.warn(message)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Bar]:
        yield self

    def advance(self, title: str | None = None, by: int = 1) -> None:
        if time.monotonic() > self.end:
            raise _TooLong


def searched(known: Found, options: PruneOptions, progress: Progress, hub_options: HubOptions, once: Once) -> Assumed | None:
    """The plan that the run will find; None where it takes too long to be found, all ratios together. Raises what the run would
    of its data."""
    progress.say("searching for the plan ...")
    hurried = _Hurried(progress, once("end of searches", lambda: time.monotonic() + SECONDS_OF_A_SEARCH))
    try:
        opened = once("dense model", lambda: open_all(options, hurried, hub_options, known))
        wanted = replace(opened.resolved, ratio=options.ratio or 0.0, training=ResolvedTraining())
        return Assumed(seek(opened.dense, opened.pairs, wanted, None, hurried, once).state.plan, (), None)
    except _TooLong:
        return None


def written_size(dense: Described, params: int, dtype: str | None) -> int:
    """Bytes of the weights that are written. Of the checkpoint's precision: what the dense ones have, less what goes."""
    wanted = pick_dtype(dtype)
    if wanted is not None:
        return params * wanted.itemsize + header_size(dense)
    return folder_size(dense.source.folder) - dense.bytes_of_a_number * (dense.params - params)


def header_size(dense: Described) -> int:
    """Bytes of the header of a safetensors file, about: name, type, shape and place of each tensor."""
    return sum(len(name) + 64 for name in dense.state)


def largest_layers(dense: Described) -> int:
    """Bytes in fp32 of what is held of a decoder that is worked on layer by layer, at most: two layers, dense and compact, and
    what lies outside of the layers."""
    _, tower = dense.family.decoder_of_images
    root = f"{tower.encoder}.{tower.layers}."
    layers: dict[str, int] = {}
    for name, tensor in dense.state.items():
        place = name.removeprefix(root).partition(".")[0] if name.startswith(root) else ""
        layers[place] = layers.get(place, 0) + tensor.numel()
    outside = layers.pop("", 0)
    return 4 * (outside + 2 * max(layers.values()))
