"""Tiny decoders that read images, as stock models and as what a description makes of them; no processor, no folder."""

from dataclasses import dataclass
from functools import cache

import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from comp_cli.checkpoint.loading import build_compact, untied_state_dict
from comp_cli.engine import flops
from comp_cli.engine.slicing import slice_state
from comp_cli.families import Family, find_family
from comp_cli.plan import Plan, dense_plan

NAMES = list(tiny.DECODERS)


@dataclass(frozen=True)
class Made:
    """A tiny stock model, and what is known of it."""

    stock: nn.Module
    config: dict
    family: Family
    plan: Plan
    reference: flops.Reference
    state: dict

    def compact(self, plan: Plan) -> nn.Module:
        config = type(self.stock.config).from_dict(self.stock.config.to_dict())
        config.comp = plan.comp_block(self.family, self.config)
        model = build_compact(config, self.family, plan.architecture, slice_state(self.state, self.family, plan))
        model.set_attn_implementation("eager")
        return model

    def inputs(self, batch: int = 1, text_tokens: int = 12, **options) -> dict[str, torch.Tensor]:
        made = self.family.topology.random_inputs(self.family, self.config, batch, text_tokens, **options)
        return {name: value for name, value in made.items() if name != "labels"}


@cache
def made(name: str) -> Made:
    torch.manual_seed(0)
    return known(tiny.DECODERS[name][0]())


def known(stock: nn.Module) -> Made:
    stock.eval().requires_grad_(False)
    stock.set_attn_implementation("eager")
    stock.config.architectures = [type(stock).__name__]
    config = stock.config.to_dict()
    family, architecture, _ = find_family(config)
    state = untied_state_dict(stock)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan = dense_plan(config, family, architecture)
    return Made(stock, config, family, plan, flops.reference(config, family, shapes, 12), state)


def uneven(plan: Plan) -> Plan:
    """Other heads, key-value groups and channels in every layer of every tower."""
    generator = torch.Generator().manual_seed(3)

    def some(units: int) -> list[int]:
        kept = int(torch.randint(1, units + 1, (1,), generator=generator))
        return sorted(torch.randperm(units, generator=generator)[:kept].tolist())

    for tower in plan.towers:
        for index, layer in enumerate(tower.layers):
            for part in layer.parts:
                layer = layer.keeping(part, some(len(layer.kept(part))))
            plan = plan.with_layer(tower.name, index, layer)
    return plan


def counted(model: nn.Module, inputs: dict, **options) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, **options)
    return counter.get_total_flops()


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits
