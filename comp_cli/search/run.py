"""From a dense model to a plan and the weights of its model: training-free, or with fine-tuning."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ..data.batches import Batch, fingerprint
from ..engine import allocation, flops, schedule, stages
from ..engine.leaving import Leaving
from ..engine.methods import METHODS
from ..engine.scoring import Key
from ..engine.statistics import even_prices
from ..engine.token_ranking import with_score_rule
from ..errors import DeadEnd, UsageError
from ..models.dense import Dense
from ..models.described import Described, image_shape
from ..models.pairs import Pairs, batches_of, cut_texts, warn_cut_texts
from ..models.plan_file import PlanFile
from ..models.streamed import StreamedDense
from ..options import ATTENTION, TOKEN_METHOD, ResolvedOptions
from ..plan import Plan
from ..progress import Progress
from ..report.base import Texts
from ..topology import input_sizes
from .journal import Journal
from .layer_by_layer import Streaming
from .once import Once
from .processes import from_main
from .reach import nearest_in_reach, out_of_reach, repeated
from .training_free import State, TrainingFree
from .uniform_plans import check_uniform, compare_uniform, uniform_plans
from .with_training import Trained

LEAVES_FROM: tuple[float, ...] = (0.0, 1 / 4)  # how deep in a decoder descents begin: image tokens may leave from there on


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with: the plan, the stages that led to it or the plans that were compared, and its model."""

    plan: Plan
    stages: list[stages.Stage]
    looks: list[allocation.Look]
    model: nn.Module
    seconds: float | None  # that the search took; None where it began before a kill
    texts: Texts  # of the calibration, and how many of them were cut, see `pairs.cut_texts`
    state: State
    pairs: str  # fingerprint of the calibration pairs


@dataclass(frozen=True)
class Sought:
    """A plan that was found, and what makes its model. known: whether it, or some of it, was found before."""

    state: State
    way: Trained | TrainingFree | Streaming
    texts: Texts
    known: bool
    pairs: str  # fingerprint of the calibration pairs


def search(
    dense: Dense,
    pairs: Pairs,
    options: ResolvedOptions,
    journal: Journal | None,
    progress: Progress,
    once: Once | None = None,
    decided: PlanFile | None = None,
) -> SearchResult:
    """The plan and the model of a method; goes on from the journal where there is one, which the first of several processes
    has. once: what searches of other ratios have made, with options that are the same but for the ratio. decided: a plan that
    was found before: nothing is searched for, and what the model of the plan needs is gathered."""
    begin = time.perf_counter()
    found = seek(dense, pairs, options, journal, progress, once or Once(), decided=decided)
    state, model = found.state, found.way.build(found.state.plan)
    seconds = None if found.known else time.perf_counter() - begin
    taken = state.stages if isinstance(state, stages.SearchState) else []
    looks = state.looks if isinstance(state, allocation.AllocationState) else []
    model = found.way.finish(state, model, progress)
    return SearchResult(state.plan, taken, looks, model, seconds, found.texts, state, found.pairs)


def seek(
    dense: Dense,
    pairs: Pairs,
    options: ResolvedOptions,
    journal: Journal | None,
    progress: Progress,
    once: Once,
    *,
    advises: bool = True,
    decided: PlanFile | None = None,
) -> Sought:
    """The plan of a method, as `search` does it. What was found for a ratio before stands in `once`, unless its weights were
    trained on the way. advises: whether the error of a ratio out of reach names one that is not, which takes a while. decided:
    see `search`."""
    ready = prepare(dense, pairs, options, journal, progress, once, decided)
    dense, way, saved = ready.dense, ready.way, ready.saved
    done = once("plans that were found", dict[float, State])
    known = decided.state_for(dense) if decided else None if saved else done.get(options.ratio)
    state = known or state_of(dense, options, saved)
    if saved:
        way.restore(saved, state.plan)
    if not way.is_over and known is None:
        if isinstance(state, allocation.AllocationState):
            compare_plans(dense, options, way, state, ready.batches, progress, advises=advises)
        else:
            run_stages(dense, options, way.measure, state, lambda: way.save(state), progress, advises=advises)
    if not options.training.stage_steps:
        done[options.ratio] = state
    return Sought(state, way, ready.texts, known=saved is not None or known is not None, pairs=ready.content)


@dataclass(frozen=True)
class Ready:
    """What a search begins with. dense: as it is searched. saved: what the journal holds. content: fingerprint of the pairs."""

    dense: Dense
    way: Trained | TrainingFree | Streaming
    batches: list[Batch]
    texts: Texts
    saved: dict[str, Any] | None
    content: str


def prepare(
    dense: Dense,
    pairs: Pairs,
    options: ResolvedOptions,
    journal: Journal | None,
    progress: Progress,
    once: Once,
    decided: PlanFile | None = None,
) -> Ready:
    """The calibration. Of options without a ratio (0) it is that of any; of a plan that was `decided` without prices."""
    method = METHODS[options.method]
    dense = with_modes(dense, options.modes)
    check_asked(dense, options)
    dense = replace(dense, plan=with_score_rule(dense.plan, method.tokens, dense.family))
    batches = once("calibration pairs", lambda: calibration_pairs(dense, pairs, options, options.num_samples))
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, progress, dense.longest)
    if method.removes("tokens"):
        warn_short_texts(dense, batches, progress)
    judges = batches
    if method.phases is None and options.stage_samples != options.num_samples:
        judges = once("pairs that judge", lambda: calibration_pairs(dense, pairs, options, options.stage_samples))
    content = fingerprint(batches)
    if journal:
        journal.settings["content of the calibration pairs"] = content
    if decided is not None and decided.pairs != content:
        progress.warn(f"{decided.path} was found on other calibration pairs: the model will not be that of its search.")
    saved = from_main(lambda: journal.load() if journal else None)
    way: Trained | TrainingFree | Streaming
    if isinstance(dense, StreamedDense):
        way = Streaming(dense, options, batches, judges, journal, progress, searches=decided is None)
    elif options.training.steps:
        way = Trained(dense, pairs, options, batches, judges, journal, progress, saved, once, searches=decided is None)
    else:
        way = TrainingFree(dense, options, batches, judges, journal, progress, once, searches=decided is None)
    return Ready(dense, way, batches, texts, saved, content)


def calibration_pairs(dense: Dense, pairs: Pairs, options: ResolvedOptions, samples: int) -> list[Batch]:
    """So many of the calibration pairs, in batches."""
    return batches_of(dense, pairs, "calibration", samples, options.batch_size, options.seed)


D = TypeVar("D", Dense, Described)


def with_modes(dense: D, modes: tuple[str, ...] | None) -> D:
    """The dense model with those modes on that were asked for, None for the usual ones. Raises UsageError for unknown ones."""
    if modes is None:
        return dense
    known = dense.family.every_mode
    if unknown := [name for name in modes if name not in known]:
        raise UsageError(f"--modes {','.join(modes)}: this model has no {unknown[0]}.", hint=f"Its modes: {', '.join(known)}.")
    family = replace(dense.family, asked=modes)
    return replace(dense, family=family, reference=replace(dense.reference, family=family))


def check_asked(dense: Dense | Described, options: ResolvedOptions) -> None:
    """Raises UsageError where modes, or a way for image tokens to leave, do not fit the method or the model. Before data is
    read."""
    method = METHODS[options.method]
    if not any(method.removes(mode.kind) for mode in dense.family.modes.values()):
        raise UsageError(f"--method {options.method}: none of what it removes is among the modes that are on.")
    if options.uniform:
        check_uniform(dense, options, method.compares_plans)
        if options.ratio:
            uniform_plans(dense, space_of(dense, options, even_prices(dense.plan)), options.ratio)  # whether there are any
    leaves = leaving_of(dense, options) if method.compares_plans else None
    if options.tokens_method and leaves is None:
        said = (
            f"image tokens by {options.tokens_method}: --method {options.method} of a {dense.architecture} knows no such way."
        )
        raise UsageError(said, hint="It is for --method comp of an image-text decoder.")


def state_of(dense: Dense, options: ResolvedOptions, saved: dict[str, Any] | None) -> State:
    """What a journal holds, or where a method begins."""
    if METHODS[options.method].compares_plans:
        return allocation.AllocationState.from_json(saved) if saved else allocation.AllocationState(dense.plan)
    return stages.SearchState.from_json(saved) if saved else stages.SearchState.start(dense.plan, options.seed)


def compare_plans(
    dense: Dense,
    options: ResolvedOptions,
    way: TrainingFree | Trained | Streaming,
    state: allocation.AllocationState,
    batches: list[Batch],
    progress: Progress,
    *,
    advises: bool = True,
) -> None:
    """Whole plans of the ratio, told as they pass; `state` ends with the best one. Raises DeadEnd where the ratio is out of
    reach."""
    space = space_of(dense, options, way.prices or {})
    if options.uniform:
        return compare_uniform(dense, options, way, state, space, progress)
    streams, steps = descent_of(dense, way, batches, space)
    if options.looks == 0:
        state.plan = allocation.unseen(space, options.ratio, streams)
        return way.save(state)

    def look(cuts: dict[str, allocation.Cut]) -> allocation.Look:
        plan = space.candidate(options.ratio, cuts)
        if plan is None:
            return allocation.Look(cuts, {}, 0.0, None)
        kept = {stream: (cut.layer, space.kept(plan, stream, cut.layer)) for stream, cut in cuts.items()}
        ratio = 1 - flops.count(plan, space.ref).total / space.total
        return allocation.Look(cuts, kept, ratio, way.held_out_loss(plan, state.leader))

    expected = min(allocation.EXPECTED, options.looks or allocation.EXPECTED)
    with progress.track("comparing plans", expected) as bar:
        if state.looks:
            progress.say(f"going on after {len(state.looks)} plans (--no-resume starts anew)")
            bar.advance(by=len(state.looks))

        def tell(found: allocation.Look) -> None:
            state.looks.append(found)
            way.save(state)
            bar.advance(found.in_words())

        most = options.looks or math.inf
        best = allocation.descend(look, streams, tell, list(state.looks), steps, most)
    plan = space.candidate(options.ratio, best.cuts) if best else None
    if plan is None:
        works, reached = nearest_in_reach(options.ratio, space, streams, steps) if advises else (None, space.most(streams))
        raise out_of_reach(options.ratio, reached, works)
    state.plan = plan


def descent_of(
    dense: Dense, way: Trained | TrainingFree | Streaming, batches: list[Batch], space: allocation.Space
) -> tuple[allocation.Streams, Sequence[float]]:
    """Where descents begin, and in which steps they go: where looks are dear, from one start in long ones."""
    streams = streams_of(dense, space.leaving, short=longest_text(batches) < dense.text_tokens)
    if way.thorough:
        return streams, allocation.STEPS
    return {name: (layers, depths[-1:]) for name, (layers, depths) in streams.items()}, allocation.STEPS[:1]


def space_of(dense: Dense | Described, options: ResolvedOptions, prices: Mapping[Key, Tensor]) -> allocation.Space:
    """What plans are made of: parts of no mode that is on stay whole."""
    floors, modes = schedule.Floors.of(dense.family, dense.plan), dense.family.modes.values()
    on = {part for mode in modes for part in mode.parts}
    stay = {key for key in prices if (key[0], key[2]) not in on}
    return allocation.Space(dense.plan, dense.reference, prices, floors, frozenset(stay), leaving_of(dense, options))


def leaving_of(dense: Dense | Described, options: ResolvedOptions) -> Leaving | None:
    """How image tokens leave a decoder that reads some; None for other models. Raises UsageError for a method that the model
    cannot be pruned by."""
    if not any(tower.writes for tower in dense.family.towers):
        return None
    images, topology = image_shape(dense.hf_config.to_dict(), dense.family), dense.family.topology
    if not any(mode.parts for mode in dense.family.modes.values()):
        hint = "Image tokens alone go by their number: --method pyramiddrop --tokens N, and others."
        raise UsageError(f"--method {options.method} with --ratio removes parameters, and no mode of them is on.", hint=hint)
    one_size = topology.images_of_one_size
    found = Leaving(options.tokens_method or TOKEN_METHOD, **images._asdict(), fixed_size=one_size, seed=options.seed)
    if options.tokens_method == ATTENTION or not (found.possible or options.tokens_method):
        return replace(found, method=None)
    if not found.possible:
        found.stages(0, images.image_tokens // 2)  # which says why
    return found


def streams_of(dense: Dense | Described, leaving: Leaving | None, *, short: bool) -> dict[str, tuple[int, tuple[float, ...]]]:
    """Streams whose tokens may go, the ones with the most FLOPs first: layers of their towers, and how deep to begin. Texts
    only where those of the calibration are as long as the reference, not `short`: what goes would seem to cost nothing."""
    counted = flops.count(dense.plan, dense.reference)
    modes, whole = dense.family.modes, stages.mode_shares(counted, dense.reference)
    large = [mode for mode in whole if modes[mode].stream and whole[mode] >= allocation.LEAST_SHARE * counted.total]
    found = {}
    for name in sorted(large, key=lambda mode: -whole[mode]):
        tower, stream = dense.family.streams[modes[name].stream or ""]
        if leaving is not None:
            if leaving.depths > 0:
                found[stream.name] = (leaving.depths, LEAVES_FROM)
        elif stream.source == "image" or not short:
            begins = allocation.DEPTHS.get(stream.source, allocation.MIDDLE)
            found[stream.name] = (len(dense.plan.tower(tower.name).layers), begins)
    return found


def longest_text(batches: list[Batch]) -> int:
    """Tokens of the longest text."""
    return max(input_sizes(batch.inputs).tokens for batch in batches)


def warn_short_texts(dense: Dense, batches: list[Batch], progress: Progress) -> None:
    """Language tokens are pruned only where the calibration texts are as long as the reference (see schedule)."""
    longest = longest_text(batches)
    if 0 < longest < dense.text_tokens:
        progress.say(f"texts have {longest} tokens at most, --text-tokens is {dense.text_tokens}: language tokens stay")


def run_stages(
    dense: Dense,
    options: ResolvedOptions,
    measure: stages.Measure,
    state: stages.SearchState,
    save: Callable[[], None],
    progress: Progress,
    *,
    advises: bool = True,
) -> None:
    """The stages of a method, told as they pass. Raises DeadEnd where the ratio is out of reach, with one that is not."""
    method, floors = METHODS[options.method], schedule.Floors.of(dense.family, dense.plan)
    each = max(1, options.stages // len(method.phases)) if method.phases and options.training.stage_steps else 1
    expected = each * len(method.phases) if method.phases else options.stages
    with progress.track("pruning", expected) as bar:
        if done := len(state.stages):
            progress.say(f"going on after stage {done} of about {expected} (--no-resume starts anew)")
            bar.advance(by=done)

        def tell(stage: stages.Stage) -> None:
            save()
            bar.advance(f"ratio {stage.ratio:.3f} by {stage.mode}, metric {stage.metric:.3f}")

        def go(ratio: float, state: stages.SearchState, tell: Callable[[stages.Stage], None]) -> None:
            begin = dense.plan, dense.reference, ratio, measure
            if method.phases:
                stages.prune_in_phases(*begin, method.phases, each, floors, state, tell)
            else:
                stages.search(*begin, strategy_of(options), floors, state, tell)

        def again(ratio: float) -> None:
            go(ratio, stages.SearchState.start(dense.plan, options.seed), lambda _: None)

        try:
            go(options.ratio, state, tell)
        except DeadEnd as error:
            works = None
            if advises and not options.training.stage_steps:
                progress.say("looking for a ratio that can be reached ...")
                works = repeated(error, again)
            raise out_of_reach(options.ratio, error.reached, works) from None


def strategy_of(options: ResolvedOptions) -> stages.Strategy:
    """The paper's rule where a bad stage heals, looking first where it does not; without what was switched off."""
    strategy = stages.Strategy(stages=options.stages, measure_first=not options.training.stage_steps)
    explore, history = strategy.explore * options.explore, strategy.history * options.history
    return replace(strategy, explore=explore, history=history)
