"""Compact checkpoints of stock classes: config.json says the sizes, and neither comp nor code beside the weights is needed."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from ..checkpoint.header_check import on_meta
from ..checkpoint.loading import quiet_libraries
from ..engine.slicing import slice_state
from ..families import Tower
from ..plan import LayerPlan, Plan
from .dense import Dense
from .described import Described

Shapes = dict[str, tuple[int, ...]]


class Unsayable(Exception):
    """A config has no number for what a plan keeps."""


def written_sizes(dense: Dense | Described, plan: Plan) -> dict[str, dict[str, int]]:
    """What a stock config says of a plan: part of the config -> name -> number, of towers that lost something. Raises Unsayable
    where the config has no such number, or the plan no one number for all layers."""
    found = {}
    for tower in dense.family.towers:
        layers = plan.tower(tower.name).layers
        if layers == dense.plan.tower(tower.name).layers:
            continue
        numbers = [_numbers(tower, layer) for layer in layers]
        if any(other != numbers[0] for other in numbers):
            raise Unsayable(f"layers of the {tower.name} tower keep different numbers of units")
        before = _numbers(tower, dense.plan.tower(tower.name).layers[0])
        changed = {name: number for name, number in numbers[0].items() if number != before[name]}
        heads = tower.self_attention
        if heads.queries in changed and heads.head_dim:  # which follows from the number of heads where nobody says it
            changed[heads.head_dim] = numbers[0][heads.head_dim]
        made = [name for name, _ in tower.sizes if name in changed]
        if made:
            raise Unsayable(f"the config of its {tower.name} tower has no {made[0]}")
        found[tower.config] = changed
    return found


def _numbers(tower: Tower, layer: LayerPlan) -> dict[str, int]:
    """Name in the config -> number, of the parts of a layer."""
    found = {}
    for part in tower.parts:
        units = layer.parts[part.name]
        found[part.units] = len(units.units)
        if part.is_attention:
            heads: Any = units
            found[part.queries] = heads.group * len(heads.units)
            if part.head_dim:
                found[part.head_dim] = heads.head_dim
    return found


def changed_config(config: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """A config.json with other sizes. Older ones have those of the language model among those of the whole (Qwen2-VL)."""
    made = dict(config)
    for section, numbers in sizes.items():
        own = made.get(section)
        made |= numbers if own is None else {section: own | dict(numbers)}
    return made


def stock_document(dense: Dense | Described, plan: Plan) -> dict[str, Any]:
    """config.json of the stock class with the sizes of a plan."""
    config = changed_config(dense.config, written_sizes(dense, plan)) | {"architectures": [dense.architecture]}
    config.pop("auto_map", None)
    return config


def stock_config(dense: Dense | Described, plan: Plan) -> transformers.PretrainedConfig:
    """The config of the stock class with the sizes of a plan. Raises what transformers raises of sizes that cannot be."""
    return type(dense.hf_config).from_dict(changed_config(dense.hf_config.to_dict(), written_sizes(dense, plan)))


def config_refuses(dense: Dense | Described, plan: Plan) -> str | None:
    """Why the config of the stock class does not take the sizes of a plan; None where it does. Quick."""
    try:
        with quiet_libraries():
            stock_config(dense, plan)
    except Exception as error:  # of many kinds
        return _reason(error)
    return None


def class_refuses(dense: Dense | Described, plan: Plan) -> str | None:
    """Why the stock class with that config would not hold the weights of a plan; None where it does. Built without memory."""
    try:
        with quiet_libraries():
            model = on_meta(getattr(transformers, dense.architecture), stock_config(dense, plan))
    except Exception as error:
        return _reason(error)
    expected = shapes_of(dense, plan)
    found: Shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name, shape in expected.items() if found.get(name) != shape)
    if wrong:
        return f"it makes {wrong[0]} {found.get(wrong[0])}, and the plan has {expected[wrong[0]]}"
    return None


def shapes_of(dense: Dense | Described, plan: Plan) -> Shapes:
    """Shapes of the weights of a plan's model."""
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in dense.state.items()}
    return {name: tuple(tensor.shape) for name, tensor in slice_state(empty, dense.family, plan).items()}


def _reason(error: Exception) -> str:
    """The last line of what was said, where libraries say first that something was not valid."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().removeprefix("ValueError: ") if lines else type(error).__name__
