"""`comp prune`: from a dense model to a folder with a compact one."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, report, tasks
from .calibration import Calibration, Grams, gather_grams
from .checkpoint import check_reload, own_dtype, write_checkpoint, write_report
from .data import fingerprint, random_inputs
from .engine import flops, schedule, stages
from .engine.methods import METHODS
from .errors import FAILED, USAGE, CompError
from .journal import Journal
from .loading import pick_device, pick_dtype
from .output import Output
from .plan import Plan
from .store import atomic_folder, check_output, folder_size, sha256
from .workbench import SCORE_ROWS, DataOptions, Dense, Pairs, affordable, batches_of, choose_pairs, open_dense


@dataclass(frozen=True)
class Options:
    """What `comp prune` was asked for; goes into the report as it is."""

    model: str
    ratio: float
    method: str = "comp"
    recover: bool = True
    seed: int = 0
    # None: 40 stages on 256, 256 and 1000 pairs, or 10 on 64, 8 and 64 for models of more than 10 GFLOPs.
    stages: int | None = None
    num_samples: int | None = None
    stage_samples: int | None = None
    eval_samples: int | None = None
    batch_size: int = 8
    text_tokens: int = flops.TEXT_TOKENS
    score_rows: int = SCORE_ROWS
    device: str = "auto"
    dtype: str | None = None
    data: DataOptions = DataOptions()


def check_ratio(ratio: float) -> None:
    """Exit 2 unless 0 < ratio < 1."""
    if not 0 < ratio < 1:
        raise CompError(
            f"--ratio {ratio}: expected a number between 0 and 1.",
            code=USAGE,
            hint="The ratio is the share of the FLOPs that goes: 0.5 halves them.",
        )


def prune(
    options: Options,
    output: Path,
    out: Output,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    resume: bool = True,
    **hub_options: Any,
) -> dict[str, Any]:
    """Prune a model and write the folder; returns the report. With `dry_run` nothing is written.

    A run that was killed goes on from its journal, unless `resume` is off, and ends with the same weights.
    """
    check_ratio(options.ratio)
    if options.method not in METHODS:
        raise CompError(f"--method {options.method}: unknown.", code=USAGE, hint=f"Use one of {', '.join(METHODS)}.")
    device, wanted_dtype = pick_device(options.device), pick_dtype(options.dtype)
    if not dry_run:
        check_output(output, overwrite=overwrite, source=Path(options.model) if Path(options.model).is_dir() else None)
    started = time.perf_counter()
    sizes = {"text_tokens": options.text_tokens, "score_rows": options.score_rows}
    dense = open_dense(options.model, out, device=device, **sizes, **hub_options)
    options = replace(
        options,
        stages=options.stages or affordable(dense, 40, 10),
        num_samples=options.num_samples or affordable(dense, 256, 64),
        stage_samples=options.stage_samples or affordable(dense, 256, 8),
        eval_samples=options.eval_samples or affordable(dense, 1000, 64),
    )
    save_dtype = wanted_dtype or own_dtype(dense)
    pairs = choose_pairs(dense, options.data, out, hub_options.get("cache_dir"))
    journal = None if dry_run else Journal(output, settings_of(dense, options))
    if journal and not resume:
        journal.remove()
    plan, grams, passed = find_plan(dense, pairs, options, journal, out)
    document = describe(dense, plan, options) | {"stages": [asdict(stage) for stage in passed]}
    if dry_run:
        report.print_plan(document, out)
        return document
    compact = dense.runtime(plan, grams).to(save_dtype).to(torch.float32)  # judged with the weights that are written
    document |= {"quality": compare(dense, compact, pairs, options, out)}
    with atomic_folder(output, overwrite=overwrite) as folder:
        out.say(f"writing {output} ...")
        write_checkpoint(folder, dense, compact, plan, document, save_dtype)
        check_reload(folder, dense, compact, random_inputs(dense.hf_config, 2, 4))
        document["size_bytes"] = {"dense": folder_size(dense.source.folder), "compact": folder_size(folder)}
        write_report(folder, document, plan)
    journal.remove()
    document["seconds"] = round(time.perf_counter() - started, 1)
    report.print_pruned(document, output, out)
    return document


def find_plan(
    dense: Dense, pairs: Pairs, options: Options, journal: Journal | None, out: Output
) -> tuple[Plan, Grams | None, list[stages.Stage]]:
    """The plan, the Gram matrices for its recovery, and the stages that led to it (none for one-shot methods)."""
    method = METHODS[options.method]
    batches = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    if journal:
        journal.settings["content of the calibration pairs"] = fingerprint(batches)
    grams = gather_grams(dense, batches, out) if options.recover else None
    floors = schedule.Floors()
    if method.token_share is None:
        judges = batches
        if options.stage_samples != options.num_samples:
            judges = batches_of(dense, pairs, "calibration", options.stage_samples, options.batch_size, options.seed)
        calibration = Calibration(dense, judges, grams, method.params)
        plan, passed = run_stages(dense, options, calibration, floors, journal, out)
        return plan, grams, passed
    with out.progress("scoring heads, channels and tokens", len(batches)) as bar:
        whole = Calibration(dense, batches, None, method.params or "cip", options.seed)
        scores, _ = whole.look(dense.plan, bar.advance)
    plan = schedule.joint_plan(dense.plan, scores, dense.reference, options.ratio, method, floors)
    return plan, grams, []


def run_stages(
    dense: Dense, options: Options, calibration: Calibration, floors: schedule.Floors, journal: Journal | None, out: Output
) -> tuple[Plan, list[stages.Stage]]:
    """CoMP's stages, told as they pass and kept in the journal."""
    saved = journal.load() if journal else None
    progress = stages.Progress.from_json(saved) if saved else stages.Progress.start(dense.plan, options.seed)
    with out.progress("pruning", options.stages) as bar:
        if saved:
            calibration.look(dense.plan)  # what the dense model says is what divergence is measured from
            done = len(progress.stages)
            out.say(f"going on after stage {done} of about {options.stages} (--no-resume starts anew)")
            bar.advance(by=done)

        def tell(stage: stages.Stage) -> None:
            if journal:
                journal.save(progress.to_json())
            bar.advance(f"ratio {stage.ratio:.3f} by {stage.mode}")

        strategy = stages.Strategy(stages=options.stages)
        reference = dense.reference
        try:
            plan = stages.search(dense.plan, reference, options.ratio, calibration.look, strategy, floors, progress, tell)
        except CompError:  # out of reach: there is nothing to go on with
            if journal:
                journal.remove()
            raise
    return plan, progress.stages


def settings_of(dense: Dense, options: Options) -> dict[str, Any]:
    """What a journal must agree on: the options, the weights, and the versions that numbers depend on."""
    weights = [sha256(path) for path in sorted(dense.source.folder.glob("*.safetensors"))]
    config = sha256(dense.source.folder / "config.json")
    versions = {"comp": __version__, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    return {**asdict(options), "weights": [config, *weights], **versions}


def describe(dense: Dense, plan: Plan, options: Options) -> dict[str, Any]:
    """The report of a plan: what goes, at which reference input."""
    before, after = flops.count(dense.plan, dense.reference), flops.count(plan, dense.reference)
    ratio = 1 - after.total / before.total
    if ratio <= 0:
        raise CompError("nothing was pruned.", code=FAILED, hint="Raise --ratio.")
    return {
        "comp_version": __version__,
        "torch_version": str(torch.__version__),
        "base_model": dense.source.name,
        "base_revision": dense.source.revision,
        "base_address": dense.source.address,
        "architecture": dense.architecture,
        "task": dense.task.name,
        "options": asdict(options),
        "ratio": round(ratio, 5),
        "reference": {"tokens": dense.reference.tokens, "flops": "2 x multiply-accumulates, one image-text pair"},
        "flops": {"dense": before.total, "compact": after.total},
        "params": {"dense": dense.params(dense.plan), "compact": dense.params(plan)},
        "layers": report.layer_rows(dense, plan),
    }


def compare(dense: Dense, compact: nn.Module, pairs: Pairs, options: Options, out: Output) -> dict[str, Any]:
    """Dense against compact on pairs that calibration never saw: accuracy where there are labels, else agreement."""
    batches = batches_of(dense, pairs, "evaluation", options.eval_samples, options.batch_size)
    found = {}
    with out.progress("comparing dense and compact", 2 * len(batches)) as bar:
        for name, model in (("dense", dense.runtime(dense.plan)), ("compact", compact)):
            found[name] = tasks.evaluate(model, dense.task, batches, bar.advance)
    accuracy = {name: evaluation.accuracy for name, evaluation in found.items()}
    both = found["dense"].logits, found["compact"].logits
    return {
        "samples": found["dense"].samples,
        "data": pairs.describe("evaluation"),
        "accuracy": accuracy if accuracy["dense"] is not None else None,
        "agreement": tasks.agreement(*both),
        "divergence": tasks.divergence(*both),
    }
