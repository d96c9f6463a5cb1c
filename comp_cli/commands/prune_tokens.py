"""`comp prune` where image tokens leave a decoder: a folder with the dense model's own weights and a schedule, in seconds.

Weights are loaded only where there are pairs to measure on, and changed only where they are to be refitted or trained.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from ..checkpoint.loading import untied_state_dict
from ..checkpoint.precision import as_written, checkpoint_dtypes, round_as_written
from ..data.batches import fingerprint
from ..engine import flops, token_schedules
from ..engine.methods import check_fits
from ..errors import DeadEnd, GateError, UsageError
from ..families import Family
from ..files.outputs import atomic_folder, check_replaceable, check_room, reserve, resolve
from ..files.store import folder_size
from ..models.compact import write_report
from ..models.dense import Dense, find_dense, open_dense
from ..models.described import Described, ImageShape, describe_dense, image_shape
from ..models.pairs import Pairs, choose_pairs, cut_texts, pair_counts, warn_cut_texts
from ..models.samples import Runs, of_scenes
from ..models.token_folder import check_folder_loads, write_folder
from ..options import HUB_DEFAULTS, HubOptions, PruneOptions, ResolvedOptions, TokenOptions, Training
from ..plan import Plan, TokenStage
from ..progress import Progress
from ..report.base import Sizes, Streamed
from ..report.cards import prune_command
from ..report.numbers import mib
from ..report.prune import ImageTokens, PruneReport
from ..report.token_picture import write_beside_weights
from ..report.token_tables import image_tokens
from ..search.calibration import refit
from ..search.journal import Journal
from ..search.processes import from_main, is_main_process, join, process_device
from ..search.run import calibration_pairs
from ..search.sharding import check_launch
from ..search.trainer import Trainer, training_batches
from . import threads
from .judging import check_drop, compare
from .prune import BYTES_OF_TRAINING, describe, journal_of, kept_with_folder, resolve_defaults, settings_of
from .prune_options import changes_weights, check_tokens, has_pairs
from .prune_streamed import ended, exceeds, measure

SCENES = 256  # that a built-in model is measured on, where nobody says how many


def prune_tokens(
    options: PruneOptions,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    link: bool = False,
    resume: bool = True,
    max_drop: float | None = None,
    hub_options: HubOptions = HUB_DEFAULTS,
) -> PruneReport:
    """Write a folder with the weights of a decoder and the stages at which image tokens leave it. With `dry_run` nothing is
    written; with `link` the weights are hard links. A run that trains and was killed goes on from its journal, unless `resume`
    is off.

    Raises UsageError and RefusedError for what cannot be, and GateError where the metric falls by more than `max_drop` points
    on the pairs of `options.data`: then nothing is left."""
    check_tokens(options, max_drop, dry_run, link)
    check_launch(Training() if dry_run else options.training)
    join(process_device(options.device))
    if dry_run or not is_main_process():  # of several processes one writes, and all measure
        report, _, plan = _report(options, progress, hub_options)
        measures = has_pairs(options) and not dry_run
        return measured(report, options, plan, None, progress, hub_options).report if measures else report
    started, typed, output = time.perf_counter(), output, resolve(output)
    source = Path(options.model).expanduser()
    with reserve(output, source=source if source.is_dir() else None):
        journal = journal_of(options, output, typed, overwrite=overwrite, resume=resume) if options.training.tunes else None
        if journal is None:
            check_replaceable(output, overwrite)
        report, dense, plan = _report(options, progress, hub_options)
        found = Measured(report)
        more = {"revision": hub_options.revision, "max_drop": max_drop, "link": link}
        address = dense.source.address_from(output)
        report = replace(report, command=prune_command(options, **more), base_address=address)
        weights = folder_size(dense.source.folder)
        if journal:
            room = weights + report.params.dense * BYTES_OF_TRAINING
            check_room(output, room, "the weights, with the journal of their training,")
        elif not link:
            check_room(output, weights, "a copy of the weights (--link makes none)")
        if has_pairs(options):
            try:
                found = measured(report, options, plan, journal, progress, hub_options)
                report = found.report
                assert report.quality is not None  # just measured
                check_drop(report, report.quality, max_drop, progress)
            except (DeadEnd, GateError):
                if journal:
                    journal.remove()
                raise
        how = "linked" if link else "copied" if found.weights is None else "tuned" if options.training.tunes else "refitted"
        report = replace(report, image_tokens=_with_weights(report, how))
        report = replace(report, size_bytes=Sizes(weights, weights))
        with atomic_folder(output, overwrite=overwrite) as folder:
            progress.say("writing ...")
            write_beside_weights(report.kept_samples, report.pictures, folder)
            known = write_folder(folder, dense, plan, report.to_json(), found.weights, linked=link, progress=progress)
            check_folder_loads(folder, dense)
            if found.weights is not None:
                report = replace(report, size_bytes=Sizes(weights, folder_size(folder)))
            write_report(folder, kept_with_folder(report), plan, known, report.pictures)
            if journal:
                journal.finish(folder / "comp_report.json")
        if journal:
            journal.remove()
    return replace(ended(report, found.streamed), output=typed, seconds=round(time.perf_counter() - started, 1))


def _report(options: PruneOptions, progress: Progress, hub_options: HubOptions) -> tuple[PruneReport, Described, Plan]:
    """The plan, and what is known of it without weights."""
    wanted = options.image_tokens or TokenOptions()

    def accepts(config: dict[str, Any], family: Family, architecture: str) -> None:
        check_fits(options.method, family, architecture, by_ratio=False)
        try:
            full = getattr(transformers, architecture).config_class.from_dict(config).to_dict()
            images = image_shape(full, family)
        except Exception:  # a broken config is refused, with its reason, when the model is opened
            return
        stages_of(images, options.method, wanted, options.seed, family.topology.images_of_one_size)

    dense = describe_dense(
        options.model,
        progress,
        text_tokens=options.text_tokens,
        task=options.task,
        accepts=accepts,
        hub_options=hub_options,
    )
    one_size = dense.family.topology.images_of_one_size
    plan = replace(dense.plan, stages=stages_of(dense.images, options.method, wanted, options.seed, one_size))
    for said in warnings_of(dense, options, wanted):
        progress.warn(said)
    report = describe(dense, plan, options, Sizes(dense.params, dense.params))
    left = image_tokens(plan, dense.plan, dense.reference, dense.bytes_of_a_number)
    return replace(report, image_tokens=left), dense, plan


def stages_of(images: ImageShape, method: str, wanted: TokenOptions, seed: int, one_size: bool) -> tuple[TokenStage, ...]:
    """Where image tokens leave, by what was asked for. one_size: whether all images have as many tokens. Raises UsageError
    where it cannot be."""
    how: dict[str, Any] = images._asdict() | {"compat": wanted.compat, "saliency": wanted.saliency}
    if wanted.tokens is not None and wanted.tokens >= images.image_tokens:
        hint = f"Use --tokens from 1 to {images.image_tokens - 1}."
        raise UsageError(f"--tokens {wanted.tokens}: an image of this model has {images.image_tokens} tokens.", hint=hint)
    if wanted.token_stages is not None:
        found = token_schedules.parse_stages(wanted.token_stages, method, **how)
    else:
        how |= {"tokens": wanted.tokens, "share": wanted.tokens_share}
        found = token_schedules.stages(method, fixed_size=one_size, **how)
    return tuple(replace(stage, settings={"seed": seed}) if stage.rule == "random" else stage for stage in found)


def warnings_of(dense: Described, options: PruneOptions, wanted: TokenOptions) -> list[str]:
    """What the user should know of the method on this model."""
    note = token_schedules.saliency_note(options.method, dense.images.class_token, wanted.saliency)
    found = [] if note is None else [note]
    if not has_pairs(options):
        found.append(
            f"nothing was measured: what {options.method} costs in quality depends on the pictures, and text in them suffers "
            "first (documents, charts). --data with labelled pairs of yours measures it."
        )
    return found


@dataclass(frozen=True)
class Measured:
    """A report with what was measured. streamed: what was read layer by layer. weights: all of them, as they are written, where
    some were refitted or trained."""

    report: PruneReport
    streamed: Streamed | None = None
    weights: dict[str, Tensor] | None = None


def measured(
    report: PruneReport,
    options: PruneOptions,
    plan: Plan,
    journal: Journal | None,
    progress: Progress,
    hub_options: HubOptions,
) -> Measured:
    """The report with the quality of both models on the user's pairs, or on scenes: the weights are loaded now, or where
    they do not fit, read layer by layer. Which tokens of scenes stay is heard where the weights are loaded anyway. journal: of
    the training, which the first process has."""
    if options.data.data is None:
        options = replace(options, eval_samples=options.eval_samples or SCENES)
    known = find_dense(options.model, progress, options.task, lambda config, family, architecture: None, hub_options)
    if found := exceeds(known, options, hub_options):
        if changing := changes_weights(options):
            hint = f"Leave {changing[0]} out: models that are larger than memory keep their weights."
            raise UsageError(f"{changing[0]}: the weights take {mib(found.needed_bytes)}, more than may be used.", hint=hint)
        quality, own = measure(options, plan, known, found, progress, hub_options)
        own_pairs, needed = pair_counts(own), Streamed(found.needed_bytes)
        return Measured(
            replace(report, quality=quality, pairs=own_pairs, streamed=needed, threads=threads.in_use()), streamed=found
        )
    dense = open_dense(
        options.model,
        progress,
        text_tokens=options.text_tokens,
        device=process_device(options.device),
        task=options.task,
        hub_options=hub_options,
        found=known,
    )
    pairs = choose_pairs(dense, options.data, progress, hub_options.cache_dir)
    resolved = resolve_defaults(dense, pairs, options, progress)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    compact, weights = dense.runtime(plan), None
    if changes_weights(options):
        compact = with_other_weights(dense, compact, plan, pairs, replace(resolved, ratio=report.ratio), journal, progress)
        dtypes = checkpoint_dtypes(dense.source.folder, dense.state)
        round_as_written(compact, dtypes)  # judged with the weights that are written
        weights = as_written(untied_state_dict(compact), dtypes)
    quality, _ = compare(dense, compact, pairs, resolved, progress)
    samples, pictures = of_scenes(compact, Runs(dense.family, dense.task, dense.collate_whole), progress)
    report = replace(report, threads=threads.in_use())
    report = replace(report, quality=quality, pairs=pair_counts(pairs), kept_samples=samples, pictures=pictures)
    return Measured(report, weights=weights)


def with_other_weights(
    dense: Dense,
    compact: nn.Module,
    plan: Plan,
    pairs: Pairs,
    options: ResolvedOptions,
    journal: Journal | None,
    progress: Progress,
) -> nn.Module:
    """The model with the output projections behind the first stage fitted anew on calibration pairs (sequential_refit.py), in
    place, and then trained (trainer.py), or one of these; training that is in the journal goes on."""
    if journal:
        journal.settings = settings_of(dense, options)
    batches = calibration_pairs(dense, pairs, options, options.num_samples) if options.refits else []
    warn_cut_texts("calibration", cut_texts(batches, dense.text_tokens), progress, dense.longest)
    if journal and options.refits:
        journal.settings["content of the calibration pairs"] = fingerprint(batches)
    saved = from_main(lambda: journal.load() if journal else None)
    if options.refits and saved is None:
        with progress.track("refitting", len(plan.tower(dense.family.decoder_of_images[1].name).layers)) as bar:
            refit(dense, compact, plan, batches, bar.advance)
    if not options.training.tunes:
        return compact
    read = partial(training_batches, dense, pairs, options.training, options.seed)
    trainer = Trainer(dense, options.training, options.ratio, read, seed=options.seed)
    if saved is None:
        trainer.take(plan, compact)
    else:
        trainer.restore(plan, saved["steps"], journal.tensors(saved) if journal else {})

    def save() -> None:
        tensors = trainer.to_tensors()  # all processes put them together
        if journal:
            journal.save({"steps": trainer.done}, tensors)

    return trainer.tune(progress, save)


def _with_weights(report: PruneReport, how: str) -> ImageTokens:
    assert report.image_tokens is not None  # every report of this command has them
    return replace(report.image_tokens, weights=how)
