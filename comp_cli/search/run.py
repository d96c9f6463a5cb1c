"""From a dense model to a plan and the weights of its model: training-free, or with fine-tuning."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from ..data.batches import Batch, fingerprint
from ..engine import flops, schedule, stages
from ..engine.methods import METHODS
from ..models.dense import SCORE_ROWS, DataOptions, Dense, Pairs, batches_of, cut_texts, warn_cut_texts, with_score_rule
from ..plan import Plan
from ..progress import Progress
from .calibration import Calibration, gather_grams
from .journal import Journal
from .trainer import Trainer, Training, is_main_process, training_batches


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
    task: str | None = None
    training: Training = Training()
    # Ablations of the method comp.
    cip: bool = True
    cit: bool = True
    explore: bool = True
    history: bool = True


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with: the plan, the stages that led to it, and its model."""

    plan: Plan
    stages: list[stages.Stage]
    model: nn.Module
    seconds: float | None  # that the search took; None where it began before a kill
    texts: dict[str, int]  # of the calibration, and how many of them were cut, see workbench.cut_texts


def search(dense: Dense, pairs: Pairs, options: Options, journal: Journal | None, progress: Progress) -> SearchResult:
    """The plan and the model of a method; goes on from the journal where there is one."""
    begin = time.perf_counter()
    method, training = METHODS[options.method], options.training
    dense = replace(dense, plan=with_score_rule(dense.plan, method.tokens, dense.family))
    batches = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, progress, dense.longest)
    if method.removes("tokens"):
        warn_short_texts(dense, batches, progress)
    if journal:
        journal.settings["content of the calibration pairs"] = fingerprint(batches)
    saved = journal.load() if journal else None
    tuning = bool(saved and "steps" in saved)
    trainer = None
    if training.steps:
        read = partial(training_batches, dense, pairs, training, options.seed)
        trainer = Trainer(dense, training, options.ratio, read, cit=options.cit, seed=options.seed)
    recovers = (
        options.recover and method.removes("parameters") and not training.stage_steps and not tuning and is_main_process()
    )
    grams = gather_grams(dense, batches, progress) if recovers else None
    judges = batches
    if method.phases is None and options.stage_samples != options.num_samples:
        judges = batches_of(dense, pairs, "calibration", options.stage_samples, options.batch_size, options.seed)
    calibration = Calibration(dense, judges, grams, method.params if options.cip else "wanda", options.seed)

    state = stages.SearchState.from_json(saved) if saved else stages.SearchState.start(dense.plan, options.seed)
    if trainer and tuning:
        trainer.restore(state.plan, saved["steps"], journal.tensors(saved))

    def save() -> None:
        if journal and trainer is None:
            journal.save(state.to_json())
        elif journal and is_main_process():
            trained = trainer.done or training.stage_steps
            tensors = trainer.to_tensors() if trained else None
            journal.save(state.to_json() | ({"steps": trainer.done} if trained else {}), tensors)

    measure = calibration.measure
    if trainer:
        measure = partial(trainer.measure, calibration) if training.stage_steps else trainer.together(calibration.measure)
    if not (tuning and trainer.done > training.stage_steps):
        if saved and is_main_process():
            calibration.measure(dense.plan)  # what the dense model says is what divergence is measured from
        run_stages(dense, options, measure, state, save, progress)
    if trainer is None or not trainer.done:
        model = dense.runtime(state.plan, grams)
    seconds = None if saved else time.perf_counter() - begin
    if trainer:
        if not trainer.done:
            trainer.take(state.plan, model)
        model = trainer.tune(progress, save)
    return SearchResult(state.plan, state.stages, model, seconds, texts)


def warn_short_texts(dense: Dense, batches: list[Batch], progress: Progress) -> None:
    """Language tokens are pruned only where the calibration texts are as long as the reference (see schedule)."""
    longest = max((batch.inputs["input_ids"].shape[1] for batch in batches if "input_ids" in batch.inputs), default=None)
    if longest is not None and longest < dense.text_tokens:
        progress.say(f"texts have {longest} tokens at most, --text-tokens is {dense.text_tokens}: language tokens stay")


def run_stages(
    dense: Dense,
    options: Options,
    measure: stages.Measure,
    state: stages.SearchState,
    save: Callable[[], None],
    progress: Progress,
) -> None:
    """The stages of a method, told as they pass."""
    method, floors = METHODS[options.method], schedule.Floors()
    each = max(1, options.stages // len(method.phases)) if method.phases and options.training.stage_steps else 1
    expected = each * len(method.phases) if method.phases else options.stages
    with progress.track("pruning", expected) as bar:
        if done := len(state.stages):
            progress.say(f"going on after stage {done} of about {expected} (--no-resume starts anew)")
            bar.advance(by=done)

        def tell(stage: stages.Stage) -> None:
            save()
            bar.advance(f"ratio {stage.ratio:.3f} by {stage.mode}, metric {stage.metric:.3f}")

        if method.phases:
            rest = (method.phases, each, floors, state, tell)
            stages.prune_in_phases(dense.plan, dense.reference, options.ratio, measure, *rest)
        else:
            stages.search(dense.plan, dense.reference, options.ratio, measure, strategy_of(options), floors, state, tell)


def strategy_of(options: Options) -> stages.Strategy:
    """The paper's rule where a bad stage heals, looking first where it does not; without what was switched off."""
    off = {"explore": 0.0} if not options.explore else {}
    off |= {"history": 0.0} if not options.history else {}
    return replace(stages.Strategy(stages=options.stages, measure_first=not options.training.stage_steps), **off)
