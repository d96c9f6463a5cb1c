"""`comp prune --ratio` of an image-text decoder that is larger than memory, the machine's or a GPU's: layer by layer, from its
files into new ones."""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.header_check import read_headers
from ..checkpoint.loading import describe as describe_config
from ..checkpoint.precision import of_the_whole
from ..checkpoint.weight_files import check_checkpoint
from ..engine import flops
from ..engine.methods import DECODER, METHODS, check_fits
from ..errors import DeadEnd, GateError, UsageError
from ..families import Family
from ..files import memory
from ..files.outputs import atomic_folder, check_room
from ..files.shards import Spool
from ..files.store import folder_size
from ..files.tensors import torch_dtype
from ..models.compact import write_beside, write_report
from ..models.dense import Found, find_dense
from ..models.described import describe_dense
from ..models.pairs import Pairs, batches_of, choose_pairs, cut_texts, warn_cut_texts
from ..models.plan_file import PlanFile
from ..models.streamed import StreamedDense, open_streamed
from ..models.streamed_folder import CompactWriter, check_folder, working_set
from ..options import STREAMED_LOOKS, HubOptions, PruneOptions, ResolvedOptions
from ..plan import Plan, TowerPlan, dense_plan
from ..progress import Progress
from ..report.base import Sizes, Streamed
from ..report.cards import prune_command
from ..report.numbers import mib
from ..report.prune import PruneReport, Quality
from ..report.token_tables import image_tokens
from ..search.journal import Journal
from ..search.layer_by_layer import Each, Inputs, leave, outputs_of, through_compact, through_dense
from ..search.once import Once
from ..search.processes import process_device, processes
from ..search.run import search
from ..tasks import comparison
from . import threads
from .judging import check_drop, quality_of
from .prune import (
    compared,
    counts,
    describe,
    kept_with_folder,
    prune_in_memory,
    resolve_defaults,
    save_plan,
    settings_of,
    with_own_texts,
)

SEVERAL = "a search of several ratios"  # which asks for memory, in words
# What is not done where every token that is written takes the weights from disk once more.
LEFT_OUT = "texts are not written with the models, and nothing is generated to be judged: token by token is what counts"


def prune_within_memory(
    options: PruneOptions,
    output: Path,
    journal: Journal | None,
    progress: Progress,
    once: Once,
    *,
    hub_options: HubOptions,
    **how: Any,
) -> PruneReport:
    """The work of `prune.prune_in_memory`, or where the model does not fit, the same layer by layer."""
    known = find_by_ratio(options, progress, hub_options)
    found = exceeds(known, options, hub_options)
    if found is None:
        return prune_in_memory(options, output, journal, progress, once, hub_options=hub_options, known=known, **how)
    check_streamable(options, found)
    begin(options)
    with scratch(output if journal else None) as spool:
        return _prune(options, output, journal, progress, known, found, spool, hub_options, **how)


def find_by_ratio(options: PruneOptions, progress: Progress, hub_options: HubOptions) -> Found:
    """The dense model, before its weights are read. Raises UsageError for a method that is not for it, or goes by number."""

    def accepts(config: dict[str, Any], family: Family, architecture: str) -> None:
        check_fits(options.method, family, architecture, by_ratio=True)

    return find_dense(options.model, progress, options.task, accepts, hub_options)


def exceeds(known: Found, options: PruneOptions, hub_options: HubOptions) -> Streamed | None:
    """What is streamed, and why: where dense and compact weights in fp32 are more than this process may take, or on a GPU, with
    Gram matrices, more than is free there; where the dense ones alone, on their way to a GPU, are more than the machine's
    memory. None where they fit, and for other models than decoders that read images, which are small. Raises UsageError where a
    limit is named for one of those, or one is too large for a GPU."""
    source, _, (family, architecture, _) = known
    device, decodes = device_of(options), family.topology.drops_in == DECODER
    if options.max_memory is not None and not decodes:
        said = f"--max-memory is for image-text decoders, and this model is a {architecture}, which is held in memory."
        raise UsageError(said, hint="Leave it out.")
    if not decodes and device.type == "cpu":
        return None
    files = check_checkpoint(source.folder, allow_pickle=hub_options.allow_pickle)
    shared = options.max_memory is None and processes() > 1  # each would decide by itself
    if shared or not all(file.endswith(".safetensors") for file in files):
        return None
    numbers = sum(math.prod(header.shape) for header in read_headers(source.folder, files).values())
    whole, both = 4 * numbers, round(4 * numbers * (2 - (options.ratio or 1)))
    room = memory.allowed_on(device) if options.max_memory is None else options.max_memory
    if device.type == "cpu":
        return Streamed(both, room) if both > room else None
    config, _ = describe_config(source.folder)  # with its defaults
    grams = gram_numbers(dense_plan(config.to_dict(), family, architecture).towers) if gathers_grams(options) else 0
    needed = max(whole + 8 * grams, both + 4 * grams)  # in fp64 while they are summed
    if needed <= room and whole <= (own := memory.allowed()):
        return None
    found = Streamed(needed, room, device=str(device)) if needed > room else Streamed(whole, own)
    if decodes:
        return found
    said = f"{architecture}: a run takes {mib(found.needed_bytes)} in fp32, and {mib(found.limit_bytes or 0)} are free on"
    hint = "Use --device cpu: only image-text decoders go through a GPU layer by layer."
    if found.device is None:  # nor would it fit where --device cpu computes
        hint = "Give the process more memory, or use a machine that has it."
    raise UsageError(f"{said} {found.device or 'this machine, through which it gets to the GPU'}.", hint=hint)


def find_for_several(options: PruneOptions, ratio: float, progress: Progress, hub_options: HubOptions, what: str) -> Found:
    """The dense model of a run of several ratios, which share it in memory. ratio: that takes most of it, or that is surely
    tried. what: asks for them, in words. Raises UsageError where that is more than a GPU has free."""
    known = find_by_ratio(options, progress, hub_options)
    found = None if device_of(options).type == "cpu" else exceeds(known, replace(options, ratio=ratio), hub_options)
    if found is not None:
        said = f"{what} takes {mib(found.needed_bytes)}, and {mib(found.limit_bytes or 0)} are free on"
        hint = "Use --device cpu, or --method comp with one --ratio: that goes through a GPU layer by layer."
        if found.device is None:
            hint = "Give --method comp and one --ratio, which is worked on layer by layer, or the process more memory."
        raise UsageError(f"{said} {found.device or 'this machine, through which weights get to the GPU'}.", hint=hint)
    return known


def device_of(options: PruneOptions) -> torch.device:
    """The device of a run, as its tensors name it: a GPU with its number."""
    device = process_device(options.device)
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def gathers_grams(options: PruneOptions) -> bool:
    """Whether a search in memory has the Gram matrices of all parts, see TrainingFree."""
    method = METHODS[options.method]
    return options.ratio is not None and (method.params == "obs" or (options.recover and method.removes("parameters")))


def gram_numbers(towers: Iterable[TowerPlan]) -> int:
    """Of the Gram matrices of all parts of towers."""
    layers = [layer for tower in towers for layer in tower.layers]
    return sum((len(units.units) * units.width + 1) ** 2 for layer in layers for units in layer.parts.values())


def check_streamable(options: PruneOptions, found: Streamed) -> None:
    """Raises UsageError for what is not done layer by layer."""
    cure = "Leave it out, or give the process more memory (--max-memory, ulimit -v)."
    if found.device is not None:
        cure = "Leave it out, or use --device cpu, where there may be more memory."
    beyond = {
        f"--method {options.method}": options.method != "comp",
        "--steps, --epochs": options.training.tunes,
        "--uniform": options.uniform,
        "--dtype": options.dtype is not None,
        "vision_params among --modes": "vision_params" in (options.modes or ()),
        "accelerate launch": processes() > 1,
    }
    if name := next((name for name, given in beyond.items() if given), None):
        said = f"{name}: the model is larger than {place_of(found)}, and is worked on layer by layer, where"
        raise UsageError(f"{said} this is not possible.", hint=cure)


def place_of(found: Streamed) -> str:
    """What the model is larger than, in words."""
    return "the memory that this process may use" if found.device is None else f"the memory that is free on {found.device}"


def begin(options: PruneOptions) -> None:
    """Before a model is worked on layer by layer."""
    memory.give_back_large_blocks()
    memory.forget_peak_on(device_of(options))


@contextmanager
def scratch(output: Path | None) -> Iterator[Spool]:
    """Room on the disk of the output, gone with the run; what a killed run leaves is settled with the output's leftovers. Of a
    dry run where temporary files are."""
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Spool(Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.partial-", dir=output.parent) as folder:
        yield Spool(Path(folder))


def _prune(
    options: PruneOptions,
    output: Path,
    journal: Journal | None,
    progress: Progress,
    known: Found,
    found: Streamed,
    spool: Spool,
    hub_options: HubOptions,
    *,
    overwrite: bool,
    plan_only: bool,
    max_drop: float | None,
    written: Callable[[], None],
    decided: PlanFile | None = None,
    plan_file: Path | None = None,
) -> PruneReport:
    started = time.perf_counter()
    dense, pairs, resolved = opened(options, progress, hub_options, known, found, spool)
    command = prune_command(options, revision=hub_options.revision, max_drop=max_drop)
    if journal:
        journal.settings = settings_of(dense, resolved) | {"device": str(dense.device), "streamed": True}
        left = folder_size(dense.source.folder) * (1 - resolved.ratio)
        check_room(output, left + scratch_size(dense, resolved), "the compact model, with what the search keeps on disk,")
    try:
        result = search(dense, pairs, resolved, journal, progress, decided=decided)
        plan = result.plan.told_apart(dense.plan)
        held = of_the_whole({name: torch_dtype(dense.weights.header(name).dtype) for name in dense.state}, dense.state)
        report = replace(
            describe(dense, plan, resolved, Sizes(dense.params(dense.plan), dense.params(plan))),
            image_tokens=image_tokens(plan, dense.plan, dense.reference, held.itemsize),
            compared=tuple(map(compared, result.looks)),
            texts={"calibration": result.texts},
            pairs=counts(pairs, resolved),
            streamed=Streamed(found.needed_bytes),
        )
        if journal is None:
            save_plan(plan_file, dense, options, result)
            return ended(with_own_texts(report, dense, plan, "calibration", result.texts, progress), found)
        with atomic_folder(output, overwrite=overwrite) as folder:
            writer = CompactWriter(folder, dense, plan)
            quality = recover_and_write(dense, result.plan, pairs, resolved, writer, progress)
            address = dense.source.address_from(output)
            report = replace(report, command=command, base_address=address, quality=quality, pairs=counts(pairs, resolved))
            report = with_own_texts(report, dense, plan, "evaluation", quality.texts, progress)
            check_drop(report, quality, max_drop, progress)
            write_beside(folder, dense, plan, report.to_json(), held)
            check_folder(folder, dense.architecture)
            report = replace(report, size_bytes=Sizes(folder_size(dense.source.folder), folder_size(folder)))
            write_report(folder, kept_with_folder(report), plan, pictures=report.pictures)
            journal.finish(folder / "comp_report.json")
        written()
    except (DeadEnd, GateError):
        if journal:
            journal.remove()
        raise
    journal.remove()
    return replace(ended(report, found), seconds=round(time.perf_counter() - started, 1))


def opened(
    options: PruneOptions, progress: Progress, hub_options: HubOptions, known: Found, found: Streamed, spool: Spool
) -> tuple[StreamedDense, Pairs, ResolvedOptions]:
    """The dense model on disk, pairs and options. Raises UsageError where even a layer at a time is more than may be used."""
    device = device_of(options)
    sizes: dict[str, Any] = {"text_tokens": options.text_tokens, "task": options.task}
    described = describe_dense(options.model, progress, **sizes, hub_options=hub_options, found=known)
    dense = open_streamed(described, spool, options.score_rows, device)
    pairs = choose_pairs(dense, options.data, progress, hub_options.cache_dir)
    resolved = resolve_defaults(dense, pairs, options, progress)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    if METHODS[options.method].compares_plans and resolved.looks is None:  # each takes the weights from disk a few times
        resolved = replace(resolved, looks=STREAMED_LOOKS)
    samples = 2 * resolved.eval_samples + 2 * resolved.num_samples * (options.ratio is not None)
    least = working_set(dense, dense.plan, samples, options.batch_size)
    # Of a GPU whose memory would do it is the machine's that was too little; layers go to the GPU as ever.
    limit = (found.limit_bytes or 0) if str(device) == (found.device or "cpu") else memory.allowed_on(device)
    said = f"{found.needed_bytes / 2**30:.2f} GiB of weights in memory, {(found.limit_bytes or 0) / 2**30:.2f} GiB may be used"
    through = "" if device.type == "cpu" else f", through {device}"
    progress.say(f"layer by layer from its files{through}: a run at once takes {said}")
    if least > limit:
        raise UsageError(
            f"a layer of this model and {samples} states of pairs at a time take about {least / 2**20:.0f} MiB, and "
            f"{limit / 2**20:.0f} MiB may be used.",
            hint="Give more (--max-memory, ulimit -v), or ask for fewer --num-samples, --eval-samples and --batch-size.",
        )
    looks = f"at most {resolved.looks} plans are compared (--looks); " if resolved.looks else ""
    where = "memory" if found.device is None else place_of(found)
    progress.warn(f"the model is larger than {where}: {looks}{LEFT_OUT}.")
    return dense, pairs, resolved


def scratch_size(dense: StreamedDense, options: ResolvedOptions) -> int:
    """Bytes that the search keeps on disk: a Gram matrix of every part, and what enters every layer."""
    layers = dense.plan.tower(dense.decoder.name).layers
    tokens = sum(dense.reference.tokens[stream.name] for stream in dense.decoder.streams)
    states = len(layers) * options.num_samples * tokens * dense.state[dense.embedding].shape[1]
    return 4 * (gram_numbers([dense.plan.tower(dense.decoder.name)]) + states)


def recover_and_write(
    dense: StreamedDense, plan: Plan, pairs: Pairs, options: ResolvedOptions, writer: CompactWriter, progress: Progress
) -> Quality:
    """One pass over all layers: each is recovered on the calibration pairs, written, and judged as it is written."""
    with progress.track("copying what stays", len(writer.unchanged)) as bar:
        for name in writer.unchanged:
            writer.copy(name)
            bar.advance()
    calibration = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    fitted_on = list(dense.on_device(calibration)) if options.recover and options.sequential else []
    quality = judge(dense, plan, pairs, options, progress, fitted_on, recovers=options.recover, each=writer.layer)
    writer.files.close()
    return quality


def judge(
    dense: StreamedDense,
    plan: Plan,
    pairs: Pairs,
    options: ResolvedOptions,
    progress: Progress,
    fitted_on: list[Inputs],
    *,
    recovers: bool,
    each: Each = leave,
) -> Quality:
    """Dense against compact on pairs that calibration never saw, layer by layer; see `through_compact`."""
    task, collate, depth = dense.task, dense.collate_whole, len(dense.model.layers)
    read = map(collate.seen, pairs.read("evaluation", options.eval_samples, accepts=task.accepts))
    batches = list(collate.batches(read, options.batch_size))
    texts = cut_texts(batches, collate.max_text)
    warn_cut_texts("evaluation", texts, progress, dense.longest)
    inputs = list(dense.on_device(batches))
    with progress.track("running the dense model, layer by layer", depth) as bar:
        before = outputs_of(dense, through_dense(dense, inputs, bar.advance))
    with progress.track("running the compact model, layer by layer", depth) as bar:

        def done(index: int, layer: nn.Module) -> None:
            each(index, layer)
            bar.advance()

        after = outputs_of(dense, through_compact(dense, plan, fitted_on, inputs, recovers=recovers, each=done))
    labels = [comparison.subsampled_labels(task, batch) for batch in batches]
    samples = sum(batch.samples for batch in batches)
    first, second = (comparison.judged_as_one(task, found, labels, samples) for found in (before, after))
    return quality_of(dense, pairs, first, second, texts, progress)


def measure(
    options: PruneOptions, plan: Plan, known: Found, found: Streamed, progress: Progress, hub_options: HubOptions
) -> tuple[Quality, Pairs]:
    """Quality of a plan that keeps all parameters, on the user's pairs, and these pairs."""
    begin(options)
    with scratch(None) as spool:
        dense, pairs, resolved = opened(options, progress, hub_options, known, found, spool)
        return judge(dense, plan, pairs, resolved, progress, [], recovers=False), pairs


def ended(report: PruneReport, found: Streamed | None) -> PruneReport:
    """The report with what is of this run alone, if the model was larger than memory: what it might take, and what it took."""
    if found is None:
        return replace(report, streamed=None)
    return replace(report, streamed=replace(found, peak_bytes=memory.peak_on(torch.device(found.device or "cpu"))))
