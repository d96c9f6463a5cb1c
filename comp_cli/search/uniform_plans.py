"""The search of a plan that a stock class takes: the few uniform plans of a ratio are compared by what they lose."""

import math
from collections.abc import Iterator

from ..engine import allocation, flops
from ..engine.schedule import TOLERANCE
from ..engine.uniform import Sizes, Uniform, spread
from ..errors import RefusedError, UsageError
from ..models.dense import Dense
from ..models.described import Described
from ..models.stock import class_refuses, config_refuses
from ..options import ResolvedOptions
from ..plan import Plan
from ..progress import Progress
from .layer_by_layer import Streaming
from .reach import nearest, out_of_reach
from .training_free import TrainingFree
from .with_training import Trained


def check_uniform(dense: Dense | Described, options: ResolvedOptions, compares_plans: bool) -> None:
    """Raises UsageError where no uniform plan can be asked for."""
    if not any(tower.writes for tower in dense.family.towers):
        raise UsageError(f"--uniform is for image-text decoders, and this model is a {dense.architecture}.")
    if not compares_plans:
        raise UsageError(f"--uniform: --method {options.method} makes no such plans.", hint="Use --method comp.")
    if options.tokens_method or any(mode.stream for mode in dense.family.modes.values() if options.modes):
        said = "--uniform makes a folder that needs no code of its own, and image tokens leave by such code."
        raise UsageError(said, hint="Leave image_tokens out of --modes, and --tokens-method out.")
    parts = {part for mode in dense.family.modes.values() for part in mode.parts}
    if not any(tower.writes and (tower.name, tower.self_attention.name) in parts for tower in dense.family.towers):
        raise UsageError("--uniform prunes the language model.", hint="Name language_params in --modes.")


def uniform_plans(dense: Dense | Described, space: allocation.Space, ratio: float) -> list[tuple[Sizes, Plan]]:
    """The plans of a ratio that the stock class takes, a few of them. Raises DeadEnd where there are none of the ratio, and
    RefusedError where the class takes none."""
    uniform = Uniform(space)
    every = [(sizes, uniform.plan(sizes)) for sizes in uniform.of_ratio(ratio)]
    if not every:
        works = nearest(ratio, lambda each: any(takes(dense, uniform, each)), uniform.most + TOLERANCE)
        raise out_of_reach(ratio, uniform.most, works)
    said = [config_refuses(dense, plan) for _, plan in every]
    some = spread([found for found, why in zip(every, said, strict=True) if why is None])
    later = [class_refuses(dense, plan) for _, plan in some]
    taken = [found for found, why in zip(some, later, strict=True) if why is None]
    if not taken:
        why = next(why for why in (*later, *said) if why is not None)
        works = nearest(ratio, lambda each: any(takes(dense, uniform, each)), uniform.most + TOLERANCE)
        another = "" if works is None else f"--ratio {works:g} has one; "
        raise RefusedError(
            f"--uniform: no plan of ratio {ratio} is one that {dense.architecture} takes: {why}.",
            hint=f"{another}without --uniform every layer has its own size, and the folder brings code.",
        )
    return taken


def takes(dense: Dense | Described, uniform: Uniform, ratio: float) -> Iterator[bool]:
    """Of the plans of a ratio that are looked at, whether the stock class takes them."""
    plans = [(sizes, uniform.plan(sizes)) for sizes in uniform.of_ratio(ratio)]
    fit = spread([found for found in plans if config_refuses(dense, found[1]) is None])
    return (class_refuses(dense, plan) is None for _, plan in fit)


def compare_uniform(
    dense: Dense,
    options: ResolvedOptions,
    way: TrainingFree | Trained | Streaming,
    state: allocation.AllocationState,
    space: allocation.Space,
    progress: Progress,
) -> None:
    """All of them, told as they pass; `state` ends with the one that loses least."""
    plans = uniform_plans(dense, space, options.ratio)
    with progress.track("comparing plans", len(plans)) as bar:
        for number, (sizes, plan) in enumerate(plans):
            if number >= len(state.looks):
                ratio = 1 - flops.count(plan, space.ref).total / space.total
                units = {f"{tower} {part}": count for (tower, part), count in sizes.items()}
                judged = way.held_out_loss(plan, state.leader)
                state.looks.append(allocation.Look({}, {}, ratio, judged, units))
                way.save(state)
            bar.advance(state.looks[number].in_words())
    losses = [math.inf if look.loss is None else look.loss for look in state.looks]
    state.plan = plans[losses.index(min(losses))][1]
