"""`comp prune`: from a dense model to a folder with a compact one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..checkpoint.loading import pick_dtype, untied_state_dict
from ..checkpoint.precision import checkpoint_dtypes, in_precision, of_the_whole, round_as_written
from ..checkpoint.weight_files import files_of
from ..engine import flops
from ..engine.allocation import Look
from ..engine.methods import DECODER, METHODS, check_fits
from ..errors import CompError, DeadEnd, GateError, UsageError
from ..families import Family
from ..files.outputs import atomic_folder, check_replaceable, check_room, reserve, resolve
from ..files.store import folder_size, sha256
from ..models.compact import check_reload, told_apart, write_checkpoint, write_report
from ..models.dense import Dense, Found, by_model_size, open_dense
from ..models.described import Described
from ..models.own_texts import at_own_texts, saved, warn_less
from ..models.pairs import Pairs, choose_pairs, pair_counts
from ..models.plan_file import PlanFile, check_plan_output, write_plan
from ..models.samples import Runs, of_scenes
from ..options import (
    EFFORTS,
    HUB_DEFAULTS,
    LEARNING_RATE,
    BySize,
    HubOptions,
    PruneOptions,
    ResolvedOptions,
    ResolvedTraining,
    Training,
)
from ..plan import Plan
from ..progress import Progress
from ..report.base import PairCounts, Reference, Sizes, Texts
from ..report.cards import prune_command, without_places
from ..report.prune import PlanCompared, PruneReport, SearchCost, StageTaken
from ..report.prune_tables import layer_rows
from ..report.token_picture import write_beside_weights
from ..report.token_tables import image_tokens
from ..search.journal import Journal
from ..search.once import Once
from ..search.processes import is_main_process, join, precision, process_device, processes
from ..search.run import SearchResult, search
from ..search.sharding import check_launch, is_sharded
from ..search.trainer import count_steps
from . import threads
from .judging import check_drop, compare
from .prune_options import check

# Of each weight in a journal: itself and two moments in fp32, as they are and as they were at the last step.
BYTES_OF_TRAINING = 2 * 3 * 4
Work = Callable[..., PruneReport]  # as `prune_in_memory`
Verify = Callable[[Dense, nn.Module, PruneReport], None]  # of the dense model, the compact one, and what is known of them


def resolve_defaults(dense: Dense, pairs: Pairs, options: PruneOptions, progress: Progress) -> ResolvedOptions:
    """The options with a number wherever the effort and the size of the model decide it."""
    return numbers_of(dense, replace(options, training=count_steps(options.training, dense.task, pairs, progress)))


def numbers_of(dense: Dense | Described, options: PruneOptions) -> ResolvedOptions:
    """The same where the steps of the training are counted."""
    effort = EFFORTS[options.effort]

    def usual(default: BySize) -> Any:
        large = default.large if dense.task.paired_inputs or default.retrieval is None else default.retrieval
        return by_model_size(dense, default.small, large)

    num_samples = options.num_samples or max(usual(effort.num_samples), options.stage_samples or 0)
    numbers = {
        "stages": options.stages or usual(effort.stages),
        "num_samples": num_samples,
        "stage_samples": min(options.stage_samples or usual(effort.stage_samples), num_samples),
        "eval_samples": options.eval_samples or usual(effort.eval_samples),
        "training": ResolvedTraining(**vars(options.training) | {"lr": options.training.lr or usual(LEARNING_RATE)}),
    }
    if effort.looks is not None and METHODS[options.method].compares_plans:
        numbers["looks"] = usual(effort.looks) if options.looks is None else options.looks
    return ResolvedOptions(**vars(options) | numbers)


def prune(
    options: PruneOptions,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    plan_only: bool = False,
    resume: bool = True,
    max_drop: float | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
    work: Work | None = None,
    decided: PlanFile | None = None,
) -> PruneReport:
    """Prune a model and write the folder; with `plan_only` a file with the plan. decided: a plan that was found before. work:
    in place of `prune_in_memory`.

    A run that was killed goes on from its journal, unless `resume` is off, and ends with the same weights. Raises GateError
    where the metric falls by more than `max_drop` points: then nothing is left. Raises CompError while another process prunes
    into the folder."""
    check(options, max_drop, "--plan-only" if plan_only else None)
    if plan_only:
        check_plan_only(options, output, overwrite)
    check_launch(Training() if plan_only else options.training)
    join(process_device(options.device))
    pick_dtype(options.dtype)
    how: dict[str, Any] = {"overwrite": overwrite, "plan_only": plan_only, "max_drop": max_drop, "hub_options": hub_options}
    how |= {"decided": decided, "plan_file": output if plan_only else None}
    return prune_once(options, output, progress, Once(), resume=resume, work=work, **how)


def prune_once(
    options: PruneOptions,
    output: Path,
    progress: Progress,
    once: Once,
    *,
    overwrite: bool,
    plan_only: bool,
    resume: bool,
    max_drop: float | None,
    hub_options: HubOptions,
    written: Callable[[], None] = lambda: None,
    work: Work | None = None,
    decided: PlanFile | None = None,
    plan_file: Path | None = None,
) -> PruneReport:
    """What `prune` does with options that are checked. once: what runs of other ratios have made. written: hears that the
    folder is in its place, before the journal goes. work: in the place of `prune_in_memory`, which has the others as well."""
    work = work or prune_in_memory
    how: dict[str, Any] = {"overwrite": overwrite, "plan_only": plan_only, "max_drop": max_drop, "hub_options": hub_options}
    how |= {"written": written, "decided": decided, "plan_file": plan_file}
    if plan_only or not is_main_process():  # of several processes one writes
        return replace(work(options, output, None, progress, once, **how), output=plan_file)
    typed, output = output, resolve(output)
    source = Path(options.model).expanduser()
    with reserve(output, source=source if source.is_dir() else None):
        journal = journal_of(options, output, typed, overwrite=overwrite, resume=resume)
        return replace(work(options, output, journal, progress, once, **how), output=typed)


def journal_of(options: PruneOptions, output: Path, typed: Path, *, overwrite: bool, resume: bool) -> Journal:
    """What a run goes on from. Raises UsageError where the output is not free, or an earlier run was made with other options.
    typed: the output as the user has it."""
    journal = Journal(output, {})
    if not resume:
        journal.remove()
    check_free(journal, output, typed, overwrite)
    journal.compare(early_settings(options))
    return journal


def check_free(journal: Journal, output: Path, typed: Path, overwrite: bool) -> None:
    """Raises UsageError where the output is there, and is not to be replaced. typed: as the user has it."""
    finished = drop_finished(journal, output)
    if finished and not overwrite:
        message = f"The output {typed} is complete: the run that wrote it was stopped before it could say so."
        raise UsageError(message, hint="Use it, or replace it with --overwrite.")
    check_replaceable(output, overwrite)


def drop_finished(journal: Journal, output: Path) -> bool:
    """Whether the journal's run was killed when all was done but removing the journal; it is removed then."""
    written = output / "comp_report.json"
    if not written.is_file() or journal.finished() != sha256(written):
        return False
    journal.remove()
    return True


@dataclass(frozen=True)
class Opened:
    """What runs of all ratios begin with. ratio: of none of them."""

    dense: Dense
    pairs: Pairs
    resolved: ResolvedOptions


def open_all(options: PruneOptions, progress: Progress, hub_options: HubOptions, known: Found | None = None) -> Opened:
    """The dense model, its pairs, and the options with all numbers. known: the model, where it was looked for already."""

    def accepts(config: dict[str, Any], family: Family, architecture: str) -> None:
        check_fits(options.method, family, architecture, by_ratio=True)

    sizes: dict[str, Any] = {"text_tokens": options.text_tokens, "score_rows": options.score_rows}
    device = process_device(options.device)
    dense = open_dense(
        options.model,
        progress,
        device=device,
        task=options.task,
        accepts=accepts,
        hub_options=hub_options,
        found=known,
        **sizes,
    )
    pairs = choose_pairs(dense, options.data, progress, hub_options.cache_dir)
    resolved = resolve_defaults(dense, pairs, options, progress)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    return Opened(dense, pairs, resolved)


def prune_in_memory(
    options: PruneOptions,
    output: Path,
    journal: Journal | None,
    progress: Progress,
    once: Once,
    *,
    overwrite: bool,
    plan_only: bool,
    max_drop: float | None,
    hub_options: HubOptions,
    written: Callable[[], None],
    known: Found | None = None,
    decided: PlanFile | None = None,
    plan_file: Path | None = None,
    verify: Verify = lambda dense, compact, report: None,
) -> PruneReport:
    """The work, with the output reserved; without a journal it ends with the plan, or is one of several processes' that do not
    write. known: the model, where it was looked for already. decided: a plan that was found before. plan_file: where the plan
    goes that it ends with. verify: raises GateError where the model is not to be written."""
    started = time.perf_counter()
    opened = once("dense model", lambda: open_all(options, progress, hub_options, known))
    dense, pairs, resolved = opened.dense, opened.pairs, replace(opened.resolved, ratio=options.ratio or 0.0)
    wanted_dtype, own = pick_dtype(options.dtype), checkpoint_dtypes(dense.source.folder, dense.state)
    command = prune_command(options, revision=hub_options.revision, allow_pickle=hub_options.allow_pickle, max_drop=max_drop)
    if plan_only and resolved.training.steps:
        progress.say("--plan-only: without the training.")
        resolved = replace(resolved, training=ResolvedTraining())
    if journal:
        journal.settings = settings_of(dense, resolved)
        check_disk(dense, resolved, wanted_dtype or of_the_whole(own, dense.state), output)
    try:
        found = search(dense, pairs, resolved, journal, progress, once, decided)
        plan = found.plan.told_apart(dense.plan)
        held, decodes = wanted_dtype or of_the_whole(own, dense.state), dense.family.topology.drops_in == DECODER
        report = replace(
            describe(dense, plan, resolved, Sizes(dense.params(dense.plan), dense.params(plan))),
            image_tokens=image_tokens(plan, dense.plan, dense.reference, held.itemsize) if decodes else None,
            stages=tuple(StageTaken(**asdict(stage)) for stage in found.stages),
            compared=tuple(map(compared, found.looks)),
            texts={"calibration": found.texts},
            pairs=counts(pairs, resolved),
        )
        if plan_only:
            save_plan(plan_file, dense, options, found)
            return with_own_texts(report, dense, plan, "calibration", found.texts, progress)
        compact = told_apart(dense, found.model, plan)
        dtypes = in_precision(own, untied_state_dict(compact), wanted_dtype) if wanted_dtype else own
        round_as_written(compact, dtypes)  # judged with the weights that are written
        quality, per_pair = compare(dense, compact, pairs, resolved, progress, once)
        address = dense.source.address_from(output)
        report = replace(report, command=command, base_address=address, quality=quality, pairs=counts(pairs, resolved))
        report = with_own_texts(report, dense, plan, "evaluation", quality.texts, progress)
        check_drop(report, quality, max_drop, progress)
        verify(dense, compact, report)
    except (DeadEnd, GateError):
        if journal:
            journal.remove()
        raise
    if journal is None:
        return report
    samples, pictures = of_scenes(compact, Runs(dense.family, dense.task, dense.collate_whole), progress)
    report = replace(report, kept_samples=samples, pictures=pictures)
    with atomic_folder(output, overwrite=overwrite) as folder:
        progress.say("writing ...")
        write_beside_weights(samples, pictures, folder)
        write_checkpoint(folder, dense, compact, plan, report.to_json(), dtypes)
        check_reload(folder, dense, compact, dense.random_inputs(2, 4))
        size = Sizes(folder_size(dense.source.folder), folder_size(folder))
        report = replace(report, size_bytes=size)
        write_report(folder, kept_with_folder(report), plan, pictures=report.pictures)
        journal.finish(folder / "comp_report.json")
    written()
    journal.remove()
    seconds = round(time.perf_counter() - started, 1)
    cost = search_cost(found.seconds, per_pair * resolved.num_samples) if found.seconds else None
    return replace(report, seconds=seconds, cost=cost)


def check_plan_only(options: PruneOptions, output: Path, overwrite: bool) -> None:
    """Raises UsageError where a plan cannot be made without its model, or not be written."""
    if options.training.stage_share:
        raise UsageError(
            "--plan-only with --stage-share: stages train while the plan is searched for, and weights are no plan."
        )
    check_plan_output(output, overwrite)


def save_plan(file: Path | None, dense: Dense, options: PruneOptions, found: SearchResult) -> None:
    """Write the file of a plan, if one is wanted; several processes have found the same."""
    if file is not None and is_main_process():
        write_plan(file, dense, without_places(options), found.state, found.pairs)


def kept_with_folder(report: PruneReport) -> dict[str, Any]:
    """The report in comp_report.json: nothing of the run itself, so that one that was resumed ends with the same bytes."""
    return {name: value for name, value in report.to_json().items() if name not in ("output", "warnings")}


def settings_of(dense: Dense, options: PruneOptions) -> dict[str, Any]:
    """What a journal must agree on: the options, the weights, the place, and the versions that numbers depend on."""
    weights = [sha256(path) for path in files_of(dense.source.folder)]
    config = sha256(dense.source.folder / "config.json")
    device = next(iter(dense.state.values())).device
    return {**compared_options(options), "weights": [config, *weights], "device": str(device), **surroundings(options)}


def compared_options(options: PruneOptions) -> dict[str, Any]:
    """The options that numbers depend on: a run may go on with more of the machine, or less, and go elsewhere."""
    others = ("max_memory", "threads", "push_to_hub", "private")
    return {name: value for name, value in asdict(options).items() if name not in others}


def surroundings(options: PruneOptions) -> dict[str, Any]:
    """What of the place and the versions is known at once."""
    return {
        "processes": processes(),
        "sharded weights": is_sharded(),
        "comp": __version__,
        "torch": str(torch.__version__),
        "precision of the training": precision(options.training),
    }


def early_settings(options: PruneOptions) -> dict[str, Any]:
    """What of `settings_of` is known before model and data are read, and is compared then already: what was given."""
    given = {name: value for name, value in compared_options(options).items() if value is not None}
    given["training"] = {name: value for name, value in given["training"].items() if value is not None}
    if options.training.epochs is not None:
        del given["training"]["steps"]  # still to be counted
    for name in ("stage_samples", "device"):  # still to be settled
        given.pop(name, None)
    return given | surroundings(options)


def compared(look: Look) -> PlanCompared:
    """A plan that was looked at, in a report."""
    halves = None if look.judged is None else look.judged.halves
    return PlanCompared(look.tokens, round(look.ratio, 5), look.loss, halves, look.units or None)


def check_disk(dense: Dense, options: ResolvedOptions, dtype: torch.dtype, output: Path) -> None:
    """Raises CompError where the disk cannot hold what is left of the weights, and what training keeps of them."""
    left = (1 - options.ratio) * dense.params(dense.plan)
    if options.training.steps:
        check_room(output, left * (dtype.itemsize + BYTES_OF_TRAINING), "the compact model, with the journal of its training,")
    else:
        check_room(output, left * dtype.itemsize, "the compact model")


def describe(dense: Dense | Described, plan: Plan, options: PruneOptions, params: Sizes) -> PruneReport:
    """The report of a plan: what goes, at which reference input. Raises CompError where nothing does."""
    sizes, ratio = saved(dense, plan, dense.reference)
    if ratio <= 0:
        raise CompError("nothing was pruned.", hint="Raise --ratio.")
    by_part = (dense.part_params(dense.plan), dense.part_params(plan)) if isinstance(dense, Dense) else None
    return PruneReport(
        comp_version=__version__,
        torch_version=str(torch.__version__),
        base_model=dense.source.name,
        base_revision=dense.source.revision,
        base_address=dense.source.address,
        architecture=dense.architecture,
        task=dense.task.name,
        options=without_places(options),
        ratio=ratio,
        reference=Reference(dense.reference.tokens),
        flops=sizes,
        params=params,
        layers=layer_rows(plan, dense.plan, dense.reference, by_part),
        stages=(),
        compared=(),
        texts={},
        pairs={},
        threads=threads.in_use(),
        plan=plan,
    )


def with_own_texts(
    report: PruneReport, dense: Dense, plan: Plan, purpose: str, texts: Texts, progress: Progress
) -> PruneReport:
    """The report with the FLOPs at the user's texts, if they are of another length than those of the reference input. Those of
    the evaluation are whole, as the model will be fed; a dry run reads none of them."""
    own = at_own_texts(dense, plan, purpose, texts) if report.options.data.data is not None else None
    if own is not None:
        warn_less(dense, own, report.ratio if report.options.ratio is None else report.options.ratio, progress)
    return replace(report, at_own_texts=own)


def counts(pairs: Pairs, options: PruneOptions) -> dict[str, PairCounts]:
    """What became of the rows of the user's pairs, by purpose. Of the training only where it went through all of them."""
    found = pair_counts(pairs)
    return {purpose: rows for purpose, rows in found.items() if purpose != "training" or options.training.epochs}


def search_cost(searched: float, dense_pass: float) -> SearchCost:
    """What the search took, in seconds and in passes of the dense model over the calibration pairs."""
    return SearchCost(*(round(value, 2) for value in (searched, dense_pass, searched / dense_pass)))
