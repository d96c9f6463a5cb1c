"""Latency of a plan that has no model yet: every distinct shape of layer is timed once.

Of the dense and of the compact model a short one is built, of random weights: each tower has one layer of every shape, in
their order. A pass through it says what each layer takes, and by the rest of it what lies outside of the layers. The whole
model takes that rest, and of each shape so many times what its layer takes.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from ..checkpoint import loading
from ..data.batches import random_inputs
from ..engine import flops
from ..engine.scoring import tower_layers
from ..engine.slicing import slice_state
from ..files import memory
from ..models.dense import Dense
from ..models.described import Described
from ..plan import LayerPlan, Plan
from ..report.base import Values
from .timing import rounds
from .variants import torch_runner

ROUNDS, SECONDS = 7, 0.2  # at least: of a small model many, which a busy moment of the machine does not move
MOST = 200  # rounds
SPREAD = 0.02  # standard deviation of random weights

Model = Dense | Described


@dataclass(frozen=True)
class Short:
    """A plan with one layer of every shape. times: tower -> how often the model has each of its layers."""

    plan: Plan
    times: Mapping[str, tuple[int, ...]]


def shorten(plan: Plan, ref: flops.Reference, config: Mapping[str, Any]) -> Short:
    """One layer of every shape, in their order: of as many units that as many tokens enter and leave. Towers that one part of
    the config describes get as many layers as the longest of them."""
    rows = {(row.tower, row.layer): row for row in flops.count(plan, ref).layers}
    first: dict[str, dict[Any, int]] = {}
    often: dict[str, list[int]] = {}
    before = {stage.layer for stage in plan.stages}
    for tower in plan.towers:
        shown, times = first.setdefault(tower.name, {}), often.setdefault(tower.name, [])
        writes = ref.family.tower(tower.name).writes
        for index, layer in enumerate(tower.layers):
            row, drops = rows[tower.name, index], writes and index in before
            shape = (_sizes(layer), tuple(row.entering.items()), tuple(row.handed_on.items()), drops)
            if shape not in shown:
                shown[shape] = index
                times.append(0)
            times[list(shown).index(shape)] += 1
    for section in {ref.family.tower(name).config for name in often}:
        together = [name for name in often if ref.family.tower(name).config == section]
        depth = max(len(often[name]) for name in together)
        for name in together:
            often[name] += [0] * (depth - len(often[name]))
    towers = []
    for tower in plan.towers:
        chosen = list(first[tower.name].values())
        chosen += chosen[-1:] * (len(often[tower.name]) - len(chosen))
        towers.append(replace(tower, layers=tuple(tower.layers[index] for index in chosen)))
    writing = next((list(first[t.name].values()) for t in plan.towers if ref.family.tower(t.name).writes), [])
    stages = tuple(replace(stage, layer=writing.index(stage.layer)) for stage in plan.stages)
    return Short(replace(plan, towers=tuple(towers), stages=stages), {name: tuple(found) for name, found in often.items()})


def _sizes(layer: LayerPlan) -> tuple[Any, ...]:
    return tuple((name, layer.built(name)) for name in layer.parts)


def short_config(model: Model, short: Short) -> transformers.PretrainedConfig:
    """The config of the dense model with as many layers as a short plan has."""
    document = model.hf_config.to_dict()
    for tower in short.plan.towers:
        described, depth = model.family.tower(tower.name), len(tower.layers)
        section = document[described.config] if described.config else document
        section[described.depth] = depth
        for name in ("layer_types", "no_rope_layers"):
            if isinstance(section.get(name), list):
                section[name] = section[name][:depth]
    return model.hf_config.__class__.from_dict(document)


def build(model: Model, short: Short, *, stock: bool) -> nn.Module:
    """A short model of random weights: of the stock class, or of the runtime's."""
    config = short_config(model, short)
    with no_init_weights(), loading.quiet_libraries():
        whole: Any = getattr(transformers, model.architecture)(config)
        whole.tie_weights()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=SPREAD)
    whole.requires_grad_(False).eval()
    if stock:
        return whole
    state = slice_state(loading.untied_state_dict(whole), model.family, short.plan)
    config.comp = short.plan.comp_block(model.family, config.to_dict())
    return loading.build_compact(config, model.family, model.architecture, state)


def short_bytes(model: Model, short: Short) -> int:
    """Bytes of a short model in fp32."""
    every = sum(tensor.numel() for tensor in model.state.values())
    for tower in short.plan.towers:
        described = model.family.tower(tower.name)
        root = f"{described.encoder}.{described.layers}."
        inside = sum(tensor.numel() for name, tensor in model.state.items() if name.startswith(root))
        depth = len(model.plan.tower(tower.name).layers)
        every -= inside * max(depth - len(tower.layers), 0) // depth
    return 4 * every


def latencies(model: Model, plan: Plan, device: torch.device) -> Values | str:
    """Milliseconds of a pass of one sample of the reference input through the stock dense model and the compact one of a plan,
    medians of interleaved rounds; or why they were not timed, in a sentence."""
    shorts = [shorten(each, model.reference, model.hf_config.to_dict()) for each in (model.plan, plan)]
    needed, room = sum(2 * short_bytes(model, short) for short in shorts), memory.allowed()
    if device.type == "cpu" and room is not None and needed > room:
        return f"a layer of each shape takes {needed / 2**30:.1f} GiB, and {room / 2**30:.1f} GiB are free"
    inputs = random_inputs(model.hf_config, model.family, 1, max(model.text_tokens, 1))
    models = [build(model, short, stock=number == 0).to(device) for number, short in enumerate(shorts)]
    clock = Clock(device)
    with clock.watching(model, zip(models, shorts, strict=True)), loading.quiet_libraries():
        runners = {number: torch_runner(own, device) for number, own in enumerate(models)}
        found, begun = [], clock.now()
        for taken in islice(rounds(runners, inputs, clock), MOST):
            found.append(taken)
            if len(found) >= ROUNDS and clock.now() - begun >= SECONDS:
                break
    return Values(*(round(statistics.median(each[number] for each in found), 3) for number in range(2)))


class Clock:
    """Seconds, in which each layer of a short model has taken as long as all of its shape. On one thread of a CPU they are
    those of the process, which other work on the machine does not move."""

    def __init__(self, device: torch.device):
        self.device, self.ahead = device, 0.0
        self.now = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now() + self.ahead

    @contextmanager
    def watching(self, model: Model, shorts: Iterable[tuple[nn.Module, Short]]) -> Iterator[None]:
        """While the context is open, the clock goes on for the layers that these models do not have."""
        begun, hooks = 0.0, []

        def begin(module: nn.Module, args: Any) -> None:
            nonlocal begun
            begun = self()

        def end(often: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.ahead += (often - 1) * (self() - begun)

            return hook

        try:
            for own, short in shorts:
                for name, times in short.times.items():
                    for layer, often in zip(tower_layers(own, model.family.tower(name)), times, strict=True):
                        hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end(often))]
            yield
        finally:
            for hook in hooks:
                hook.remove()
