"""From a dense model to a plan and the weights of its model: training-free, or with fine-tuning."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from ..data.batches import Batch, fingerprint
from ..engine import schedule, stages
from ..engine.methods import METHODS
from ..engine.token_ranking import with_score_rule
from ..models.dense import Dense
from ..models.pairs import Pairs, batches_of, cut_texts, warn_cut_texts
from ..options import ResolvedOptions
from ..plan import Plan
from ..progress import Progress
from ..report.base import Texts
from ..topology import input_sizes
from .journal import Journal
from .training_free import TrainingFree
from .with_training import Trained


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with: the plan, the stages that led to it, and its model."""

    plan: Plan
    stages: list[stages.Stage]
    model: nn.Module
    seconds: float | None  # that the search took; None where it began before a kill
    texts: Texts  # of the calibration, and how many of them were cut, see `pairs.cut_texts`


def search(dense: Dense, pairs: Pairs, options: ResolvedOptions, journal: Journal | None, progress: Progress) -> SearchResult:
    """The plan and the model of a method; goes on from the journal where there is one."""
    begin = time.perf_counter()
    method = METHODS[options.method]
    dense = replace(dense, plan=with_score_rule(dense.plan, method.tokens, dense.family))
    batches = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, progress, dense.longest)
    if method.removes("tokens"):
        warn_short_texts(dense, batches, progress)
    judges = batches
    if method.phases is None and options.stage_samples != options.num_samples:
        judges = batches_of(dense, pairs, "calibration", options.stage_samples, options.batch_size, options.seed)
    if journal:
        journal.settings["content of the calibration pairs"] = fingerprint(batches)
    saved = journal.load() if journal else None
    state = stages.SearchState.from_json(saved) if saved else stages.SearchState.start(dense.plan, options.seed)
    way: Trained | TrainingFree
    if options.training.steps:
        way = Trained(dense, pairs, options, batches, judges, journal, progress, saved)
    else:
        way = TrainingFree(dense, options, batches, judges, journal, progress)
    if saved:
        way.restore(saved, state.plan)
    if not way.is_over:
        run_stages(dense, options, way.measure, state, lambda: way.save(state), progress)
    model = way.build(state.plan)
    seconds = None if saved else time.perf_counter() - begin
    return SearchResult(state.plan, state.stages, way.finish(state, model, progress), seconds, texts)


def warn_short_texts(dense: Dense, batches: list[Batch], progress: Progress) -> None:
    """Language tokens are pruned only where the calibration texts are as long as the reference (see schedule)."""
    longest = max(input_sizes(batch.inputs).tokens for batch in batches)
    if 0 < longest < dense.text_tokens:
        progress.say(f"texts have {longest} tokens at most, --text-tokens is {dense.text_tokens}: language tokens stay")


def run_stages(
    dense: Dense,
    options: ResolvedOptions,
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


def strategy_of(options: ResolvedOptions) -> stages.Strategy:
    """The paper's rule where a bad stage heals, looking first where it does not; without what was switched off."""
    strategy = stages.Strategy(stages=options.stages, measure_first=not options.training.stage_steps)
    explore, history = strategy.explore * options.explore, strategy.history * options.history
    return replace(strategy, explore=explore, history=history)
