"""CoMP's multi-mode strategy: one pruning mode per stage, chosen by what it cost before (arXiv 2604.02956, Eq. 8 to 10).

Every stage removes the same share of FLOPs with one of the modes that the model's description has, up to five today:
parameters of the vision tower, of the language tower, of the cross-attention, image tokens, text tokens. The cost of a
stage is the loss it added per FLOPs removed; the mode with the lowest remembered cost goes next (CAS), now and then another
one (RE), and what is remembered fades with the time since (HI).

The paper trains between stages, so that a bad stage heals. Without training it does not, so here a mode is looked at before
it is taken: its cost is measured anew, and it is taken if no other mode is remembered as cheaper; else that one is looked
at. Exploration only looks, and a mode that was not looked at for so long that its memory has no weight left is looked at
again. (`measure_first` off is the paper's rule: what is chosen is taken.)
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import DeadEnd
from ..families import Mode
from ..plan import Plan
from . import flops
from .schedule import TOLERANCE, Floors, prune_to
from .scoring import Scores

NOTHING = 0.01  # a smaller ratio is none


@dataclass(frozen=True)
class Strategy:
    """The paper's hyper-parameters. `explore` 0 is the ablation without RE, `history` 0 the one without HI."""

    stages: int = 40
    explore: float = 0.2  # rho
    temperature: float = 5.0  # tau
    history: float = 0.4  # lambda_0
    horizon: int = 5  # I_max
    measure_first: bool = True
    mode_share: float = 0.1  # a stage takes no more than this share of what its mode had: small modes take small steps
    modes: tuple[str, ...] | None = None  # names of those that may run; None for all that the family has


@dataclass(frozen=True)
class Stage:
    """A line of the journal."""

    stage: int
    mode: str
    why: str  # "first visit", "forgotten", "lowest cost", "exploration"; with `measure_first` also what was looked at before
    threshold: float  # that the modes were raised to: a quantile of parameters, or a score of tokens, relative to uniform
    ratio: float
    flops: int
    loss: float
    metric: float  # share of the calibration pairs decided rightly; without labels, as the dense model does
    cost: float  # of this stage: loss added per share of the dense FLOPs removed
    remembered: float  # R of the mode after this stage


@dataclass
class Memory:
    """Remembered cost and last stage of every mode that has run."""

    cost: dict[str, float] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    exhausted: set[str] = field(default_factory=set)

    def idle(self, mode: str, stage: int) -> int:
        """Stages since the mode last ran (I_m); the first stage counts from 0."""
        return stage - self.last.get(mode, 0)

    def known(self, mode: str, stage: int, strategy: Strategy) -> float | None:
        """The remembered cost; None where there is none. Where looking is free of consequences a memory whose weight has
        faded to nothing counts as none: the model has changed under it."""
        faded = strategy.measure_first and self.idle(mode, stage) > strategy.horizon
        return None if faded else self.cost.get(mode)

    def remember(self, mode: str, stage: int, cost: float, strategy: Strategy) -> float:
        """HI, Eq. 10: R <- lambda R + (1 - lambda) r; a first visit remembers r."""
        weight = history_weight(self.idle(mode, stage), strategy) if mode in self.cost else 0.0
        self.cost[mode] = weight * self.cost.get(mode, 0.0) + (1 - weight) * cost
        self.last[mode] = stage
        return self.cost[mode]


def history_weight(idle: int, strategy: Strategy) -> float:
    """lambda = max(lambda_0 - (lambda_0 / I_max)(I_m - 1), 0), Eq. 10."""
    return max(strategy.history - strategy.history / strategy.horizon * (idle - 1), 0.0)


def exploration(idle: Sequence[int], temperature: float) -> list[float]:
    """Softmax(I_m / tau), Eq. 9: modes that have waited longer are likelier."""
    weights = [math.exp(i / temperature) for i in idle]
    return [weight / sum(weights) for weight in weights]


def choose(
    memory: Memory, stage: int, open_modes: Sequence[str], shares: Mapping[str, float], strategy: Strategy, rng: random.Random
) -> tuple[str, str]:
    """The mode of a stage and why: unvisited modes by their share of FLOPs, then exploration, then the lowest cost."""
    unvisited = [mode for mode in open_modes if memory.known(mode, stage, strategy) is None]
    if unvisited:
        mode = max(unvisited, key=lambda mode: shares[mode])
        return mode, "forgotten" if mode in memory.cost else "first visit"
    if rng.random() < strategy.explore:
        weights = exploration([memory.idle(mode, stage) for mode in open_modes], strategy.temperature)
        return rng.choices(open_modes, weights)[0], "exploration"
    return min(open_modes, key=lambda mode: memory.cost[mode]), "lowest cost"


@dataclass
class SearchState:
    """How far a search has come: everything that the next stage depends on, as JSON."""

    plan: Plan
    stages: list[Stage]
    memory: Memory
    rng: random.Random

    @classmethod
    def start(cls, plan: Plan, seed: int) -> "SearchState":
        return cls(plan, [], Memory(), random.Random(seed))

    def to_json(self) -> dict[str, Any]:
        memory = {"cost": self.memory.cost, "last": self.memory.last, "exhausted": sorted(self.memory.exhausted)}
        stages = [asdict(stage) for stage in self.stages]
        return {"stages": stages, "memory": memory, "rng": self.rng.getstate(), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "SearchState":
        version, internal, gauss = found["rng"]
        rng = random.Random()
        rng.setstate((version, tuple(internal), gauss))
        memory = found["memory"]
        remembered = Memory(memory["cost"], memory["last"], set(memory["exhausted"]))
        return cls(Plan.from_json(found["plan"]), [Stage(**line) for line in found["stages"]], remembered, rng)


@dataclass(frozen=True)
class Measurement:
    """What running a plan over the calibration pairs shows: the scores of what is left, the loss, and the metric of Stage."""

    scores: Scores
    loss: float
    metric: float


Measure = Callable[[Plan], Measurement]


def search(
    dense: Plan,
    ref: flops.Reference,
    ratio: float,
    measure: Measure,
    strategy: Strategy,
    floors: Floors,
    state: SearchState,
    tell: Callable[[Stage], None] = lambda stage: None,
) -> Plan:
    """Prune stage by stage until the FLOPs ratio is reached, from wherever `state` is; it is kept up to date.

    `measure` runs a plan over the calibration pairs. `tell` hears of every stage when `state` holds it. Deterministic for a
    seed of `state`.
    """
    counted = flops.count(dense, ref)
    shares, total = mode_shares(counted, ref), counted.total
    allowed = [mode for mode in shares if strategy.modes is None or mode in strategy.modes]
    quantum, target = total * ratio / strategy.stages, total * (1 - ratio)
    memory = state.memory
    measured = measure(state.plan)
    while (before := flops.count(state.plan, ref).total) > target:
        stage = len(state.stages) + 1
        seen: dict[str, Candidate] = {}  # modes looked at since the last stage
        while True:
            open_modes = [mode for mode in allowed if mode not in memory.exhausted]
            if not open_modes and before <= target + TOLERANCE * total:
                return state.plan
            if not open_modes:
                raise out_of_reach(ratio, 1 - before / total)
            unseen = [mode for mode in open_modes if mode not in seen]
            cheapest = min(seen.values(), key=lambda candidate: candidate.cost, default=None)
            remembered = [memory.known(mode, stage, strategy) for mode in unseen]
            if cheapest and all(cost is not None and cheapest.cost <= cost for cost in remembered):
                break
            mode, why = choose(memory, stage, unseen, shares, strategy, state.rng)
            step = min(quantum, strategy.mode_share * shares[mode])
            plan, threshold = prune_to(state.plan, measured.scores, ref, (mode,), max(target, before - step), floors)
            removed = before - flops.count(plan, ref).total
            too_far = before - removed < target - TOLERANCE * total
            if too_far or removed < min(step / 4, before - target):
                memory.exhausted.add(mode)
                continue
            found = measure(plan)
            cost = (found.loss - measured.loss) / (removed / total)
            average = memory.remember(mode, stage, cost, strategy)
            seen[mode] = Candidate(mode, why, plan, threshold, found, before - removed, cost, average)
            if not strategy.measure_first:
                cheapest = seen[mode]
                break
        state.plan, measured = cheapest.plan, cheapest.measured
        others = [mode for mode in seen if mode != cheapest.mode]
        why = cheapest.why + (f", after a look at {', '.join(others)}" if others else "")
        state.stages.append(cheapest.as_stage(stage, why, total))
        tell(state.stages[-1])
    return state.plan


def prune_in_phases(
    dense: Plan,
    ref: flops.Reference,
    ratio: float,
    measure: Measure,
    phases: Sequence[str],
    each: int,
    floors: Floors,
    state: SearchState,
    tell: Callable[[Stage], None] = lambda stage: None,
) -> Plan:
    """Prune without choice: in every phase the modes of its kind together, in `each` stages of equal FLOPs.

    The phases share the logarithm of what is left equally: two of them leave sqrt(1 - ratio) each. Arguments as in `search`.
    """
    total = flops.count(dense, ref).total
    ends = [total * (1 - ratio) ** (number / len(phases)) for number in range(len(phases) + 1)]
    modes = mode_shares(flops.count(dense, ref), ref)
    steps = [
        (kind, start + (end - start) * part / each)
        for kind, start, end in zip(phases, ends, ends[1:], strict=False)
        for part in range(1, each + 1)
    ]
    measured = measure(state.plan)
    for kind, target in steps[len(state.stages) :]:
        before = flops.count(state.plan, ref).total
        together = [mode for mode in modes if ref.family.modes[mode].kind == kind]
        plan, threshold = prune_to(state.plan, measured.scores, ref, together, target, floors)
        found, now = measure(plan), flops.count(plan, ref).total
        cost = (found.loss - measured.loss) / (max(before - now, 1) / total)
        state.plan, measured = plan, found
        taken = Candidate(kind, f"phase of {kind}", plan, threshold, found, now, cost, cost)
        state.stages.append(taken.as_stage(len(state.stages) + 1, taken.why, total))
        tell(state.stages[-1])
    reached = 1 - flops.count(state.plan, ref).total / total
    if abs(reached - ratio) > TOLERANCE:
        raise out_of_reach(ratio, reached)
    return state.plan


@dataclass(frozen=True)
class Candidate:
    """A stage that was looked at."""

    mode: str
    why: str
    plan: Plan
    threshold: float
    measured: Measurement
    flops: int
    cost: float
    remembered: float

    def as_stage(self, number: int, why: str, total: int) -> Stage:
        """Its line in the journal. `total`: FLOPs of the dense model."""
        ratio, seen = 1 - self.flops / total, self.measured
        rest = (ratio, self.flops, seen.loss, seen.metric, self.cost, self.remembered)
        return Stage(number, self.mode, why, self.threshold, *rest)


def out_of_reach(ratio: float, reached: float) -> DeadEnd:
    """What is advised is where this search came to; whether another one comes so far, search/reach.py tries."""
    hint = f"Try --ratio {math.floor(100 * reached) / 100:.2f}."
    if reached < NOTHING:
        hint = "This method finds nothing to remove; for texts, --text-tokens must not be longer than those of --data."
    error = DeadEnd(f"ratio {ratio} cannot be reached: the nearest plan has {reached:.3f}.", hint=hint)
    error.reached = reached
    return error


def mode_shares(counted: flops.Flops, ref: flops.Reference) -> dict[str, int]:
    """FLOPs of the dense model that each of the family's modes could touch, without those that touch none; orders the first
    visits and bounds the steps."""
    shares = {mode.name: _touched(counted, ref, mode) for mode in ref.family.modes.values()}
    return {mode: share for mode, share in shares.items() if share}


def _touched(counted: flops.Flops, ref: flops.Reference, mode: Mode) -> int:
    """Of tokens: what their own tower does to them, and what others do that read them; a cross-attention is the others'."""
    if mode.stream is None:
        return sum(counted.part(tower, part) for tower, part in mode.parts)
    home, _ = ref.family.streams[mode.stream]
    entering = sum(ref.tokens[stream.name] for stream in home.streams)
    own = sum(counted.part(home.name, part.name) for part in home.parts if part.reads is None)
    others = [(tower.name, part.name) for tower in ref.family.towers for part in tower.parts if part.reads == mode.stream]
    return own * ref.tokens[mode.stream] // entering + sum(counted.part(tower, part) for tower, part in others)
