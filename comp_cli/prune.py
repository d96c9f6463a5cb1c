"""`comp prune`: from a dense model to a folder with a compact one."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import __version__, modeling_comp, report, tasks
from .data import Batch
from .engine import flops, schedule, scoring, stages
from .engine.methods import METHODS
from .engine.recover import collect_grams
from .errors import FAILED, USAGE, CompError
from .journal import Journal
from .loading import load_model, pick_device, pick_dtype, quiet_libraries
from .output import Output
from .plan import Plan
from .store import atomic_folder, check_output, folder_size, save_tensors, sha256
from .workbench import Dense, batches_for, open_dense, warn_about_scenes


@dataclass(frozen=True)
class Options:
    """What `comp prune` was asked for; goes into the report as it is."""

    model: str
    ratio: float
    method: str = "comp"
    recover: bool = True
    stages: int = 40
    stage_samples: int = 16
    seed: int = 0
    num_samples: int = 64
    eval_samples: int = 1000
    batch_size: int = 8
    text_tokens: int = flops.TEXT_TOKENS
    device: str = "auto"
    dtype: str | None = None


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
    device, save_dtype = pick_device(options.device), pick_dtype(options.dtype)
    if not dry_run:
        check_output(output, overwrite=overwrite, source=Path(options.model) if Path(options.model).is_dir() else None)
    started = time.perf_counter()
    dense = open_dense(options.model, out, text_tokens=options.text_tokens, device=device, **hub_options)
    warn_about_scenes(dense, out)
    journal = None if dry_run else Journal(output, settings_of(dense, options))
    if journal and not resume:
        journal.remove()
    plan, grams, passed = find_plan(dense, options, journal, out)
    document = describe(dense, plan, options) | {"stages": [asdict(stage) for stage in passed]}
    if dry_run:
        report.print_plan(document, out)
        return document
    compact = dense.runtime(plan, grams)
    document |= {"quality": compare(dense, compact, options, out)}
    with atomic_folder(output, overwrite=overwrite) as folder:
        out.say(f"writing {output} ...")
        write_checkpoint(folder, dense, compact, plan, document, save_dtype)
        check_reload(folder, dense, compact, save_dtype)
        document["size_bytes"] = {"dense": _dense_bytes(dense, save_dtype), "compact": folder_size(folder)}
        write_report(folder, document, plan)
    journal.remove()
    document["seconds"] = round(time.perf_counter() - started, 1)
    report.print_pruned(document, output, out)
    return document


def find_plan(
    dense: Dense, options: Options, journal: Journal | None, out: Output
) -> tuple[Plan, dict[scoring.Key, Tensor] | None, list[stages.Stage]]:
    """The plan, the Gram matrices for its recovery, and the stages that led to it (none for one-shot methods)."""
    method = METHODS[options.method]
    batches = batches_for(dense, "train", options.num_samples, options.batch_size, options.seed)
    grams = gather_grams(dense, batches, out) if options.recover else None
    floors = schedule.Floors()
    if method.token_share is None:
        calibration = Calibration(dense, batches[: -(-options.stage_samples // options.batch_size)], grams, method.params)
        plan, passed = run_stages(dense, options, calibration, floors, journal, out)
        return plan, grams, passed
    with out.progress("scoring heads, channels and tokens", len(batches)) as bar:
        whole = Calibration(dense, batches, None, method.params or "cip", options.seed)
        scores, _ = whole.look(dense.plan, bar.advance)
    plan = schedule.joint_plan(
        dense.plan, scores, dense.reference, options.ratio, token_share=method.token_share, floors=floors
    )
    return plan, grams, []


def gather_grams(dense: Dense, batches: list[Batch], out: Output) -> dict[scoring.Key, Tensor]:
    model = dense.runtime(dense.plan)
    with out.progress("gathering activations for recovery", len(batches)) as bar:
        return collect_grams(model, dense.family, dense.plan, dense.on_device(batches), bar.advance)


class Calibration:
    """Runs plans over the same pairs: what is important in them, and how much they lose.

    The loss is the task's where the pairs are labelled, else the divergence from the dense model.
    """

    def __init__(self, dense: Dense, batches: list[Batch], grams, rule: str, seed: int = 0):
        self.dense, self.batches, self.grams, self.rule, self.seed = dense, batches, grams, rule, seed
        labels = [batch.labels for batch in batches]
        self.labels = torch.cat(labels) if all(label is not None for label in labels) else None
        self.expected: Tensor | None = None  # logits of the first plan that is looked at: the dense one

    def look(self, plan: Plan, advance: Callable[[], None] = lambda: None) -> tuple[scoring.Scores, float]:
        heard: list[Tensor] = []
        name = self.dense.task.output
        scores = scoring.collect(
            self.dense.runtime(plan, self.grams),
            self.dense.family,
            plan,
            self.dense.on_device(self.batches),
            rule=self.rule,
            seed=self.seed,
            hear=lambda outputs: heard.append(getattr(outputs, name).float().cpu()),
            advance=advance,
        )
        logits = torch.cat(heard)
        if self.expected is None:
            self.expected = logits
        if self.labels is not None:
            return scores, F.cross_entropy(logits, self.labels).item()
        return scores, tasks.divergence(self.expected, logits)


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
        plan = stages.search(dense.plan, reference, options.ratio, calibration.look, strategy, floors, progress, tell)
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
        "architecture": dense.architecture,
        "task": dense.task.name,
        "options": asdict(options),
        "ratio": round(ratio, 5),
        "reference": {"tokens": dense.reference.tokens, "flops": "2 x multiply-accumulates, one image-text pair"},
        "flops": {"dense": before.total, "compact": after.total},
        "params": {"dense": _params(dense, dense.plan), "compact": _params(dense, plan)},
        "layers": report.layer_rows(dense, plan),
    }


def _params(dense: Dense, plan: Plan) -> int:
    from .engine.slicing import slice_state

    shared = {tensor.data_ptr(): tensor.numel() for tensor in slice_state(dense.state, dense.family, plan).values()}
    return sum(shared.values())


def compare(dense: Dense, compact: nn.Module, options: Options, out: Output) -> dict[str, Any]:
    """Dense against compact on pairs that calibration never saw: accuracy where there are labels, else agreement."""
    labelled = dense.source.kind == "demo"
    count = options.eval_samples if labelled else min(options.eval_samples, options.num_samples)
    batches = batches_for(dense, "test", count, options.batch_size)
    found = {}
    with out.progress("comparing dense and compact", 2 * len(batches)) as bar:
        for name, model in (("dense", dense.runtime(dense.plan)), ("compact", compact)):
            found[name] = tasks.evaluate(model, dense.task, batches, bar.advance)
    both = found["dense"].logits, found["compact"].logits
    return {
        "samples": count,
        "data": "generated scenes, test split",
        "accuracy": {name: evaluation.accuracy for name, evaluation in found.items()} if labelled else None,
        "agreement": tasks.agreement(*both),
        "divergence": tasks.divergence(*both),
    }


def write_checkpoint(
    folder: Path, dense: Dense, compact: nn.Module, plan: Plan, document: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """config.json, weights, runtime and processor files."""
    dtype = dtype or _own_dtype(dense)
    facts = {key: document[key] for key in ("comp_version", "base_model", "base_revision", "ratio")}
    block = plan.comp_block(dense.family, method=document["options"]["method"], **facts)
    auto_map = {"AutoModel": f"{Path(modeling_comp.__file__).stem}.Compact{dense.architecture}"}
    config = dense.config | {"comp": block, "auto_map": auto_map, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in compact.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")
    shutil.copyfile(modeling_comp.__file__, folder / "modeling_comp.py")
    with quiet_libraries():
        dense.processor.save_pretrained(folder)
    (folder / "README.md").write_text(report.model_card(document))


def write_report(folder: Path, document: dict[str, Any], plan: Plan) -> None:
    """comp_report.json, last: sizes and hashes of every file, and the plan with all kept indices."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir()) if path.is_file()
    }
    whole = {"schema_version": 1} | document | {"files": files, "plan": plan.to_json()}
    (folder / "comp_report.json").write_text(json.dumps(whole) + "\n")


def check_reload(folder: Path, dense: Dense, compact: nn.Module, dtype: torch.dtype | None) -> None:
    """The written folder must load and say what the model in memory says."""
    batch = batches_for(dense, "train", 2, 2)[0]
    weight = next(compact.parameters())
    batch = batch.to(weight.device, weight.dtype)
    again = load_model(folder, dtype=torch.float32).to(weight.device)
    with torch.inference_mode():
        expected, found = (dense.task.logits(model, batch.inputs) for model in (compact, again))
    exact = (dtype or _own_dtype(dense)) == torch.float32
    if not torch.allclose(expected, found, atol=1e-5 if exact else 0.1, rtol=1e-3 if exact else 0.1):
        raise CompError(
            f"the written model differs from the one in memory by {(expected - found).abs().max():.2e}.",
            code=FAILED,
            hint="Nothing was kept. Please report this with the command and the model.",
        )


def _own_dtype(dense: Dense) -> torch.dtype:
    named = dense.config.get("dtype") or dense.config.get("torch_dtype") or "float32"
    return getattr(torch, str(named).removeprefix("torch."))


def _dense_bytes(dense: Dense, dtype: torch.dtype | None) -> int:
    return _params(dense, dense.plan) * torch.empty(0, dtype=dtype or _own_dtype(dense)).element_size()
