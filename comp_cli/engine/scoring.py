"""Runs a model over calibration batches and gathers the importance of everything that can be removed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..families import Family, Tower
from ..modeling_comp import CompactAttention, kept_tokens
from ..plan import Plan
from . import importance

Key = tuple[str, int, str]  # tower, layer, "attention" | "cross" | "ffn"


@dataclass
class Scores:
    """units: one score per head or channel of a layer's part. tokens: per (tower, layer), one row per sample and token,
    relative to uniform (1 is the mean), padding as nan."""

    units: dict[Key, Tensor]
    tokens: dict[tuple[str, int], Tensor]


@dataclass
class Recorder:
    """What one forward pass leaves behind: inputs of output projections, and token scores of every attention."""

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    scores: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def tower_layers(model: nn.Module, tower: Tower) -> nn.ModuleList:
    return getattr(model.get_submodule(tower.encoder), tower.layers)


def layer_parts(tower: Tower) -> dict[str, str]:
    """Where the matrix that reads each part's inner channels is: part -> path inside a layer."""
    cross = {"cross": tower.cross.out} if tower.cross else {}
    return {"attention": tower.attention.out, **cross, "ffn": tower.ffn[1]}


@contextmanager
def recording(model: nn.Module, family: Family) -> Iterator[Recorder]:
    """Record activations and token scores (all query rows) of every layer while the context is open."""
    recorder = Recorder()
    hooks, rows_before = [], []

    def remember_input(key: Key) -> Callable:
        return lambda module, args: recorder.inputs.__setitem__(key, args[0].detach())

    def remember_scores(key: tuple[str, int]) -> Callable:
        return lambda module, args, output: recorder.scores.__setitem__(key, output[1].detach())

    for tower in family.towers:
        for index, layer in enumerate(tower_layers(model, tower)):
            attention: CompactAttention = layer.get_submodule(tower.attention.module)
            rows_before.append((attention, attention.score_rows))
            attention.score_rows = 0
            hooks.append(attention.register_forward_hook(remember_scores((tower.name, index))))
            for part, path in layer_parts(tower).items():
                hook = remember_input((tower.name, index, part))
                hooks.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for attention, rows in rows_before:
            attention.score_rows = rows


def collect(
    model: nn.Module,
    family: Family,
    plan: Plan,
    batches: Iterable[dict[str, Tensor]],
    *,
    weighted: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Importance of heads, channels and tokens on calibration batches of model inputs.

    `weighted` scores parameters by the tokens that matter (CIP); without it every token counts the same (Wanda).
    """
    energies: dict[Key, Tensor] = {}
    tokens: dict[tuple[str, int], list[Tensor]] = {}
    model.eval()
    with torch.inference_mode(), recording(model, family) as recorder:
        for batch in batches:
            model(**batch)
            for tower in family.towers:
                for key, found in _energies(recorder, tower, plan, weighted).items():
                    energies[key] = energies.get(key, 0) + found
            for key, scores in recorder.scores.items():
                tokens.setdefault(key, []).extend(_relative(scores).cpu())
            advance()
    units = {}
    for tower in family.towers:
        layers = tower_layers(model, tower)
        for index, layer_plan in enumerate(plan.tower(tower.name).layers):
            for part, path in layer_parts(tower).items():
                weight = layers[index].get_submodule(path).weight.detach()
                scores = importance.channel_importance(weight, energies[tower.name, index, part]).cpu()
                if part != "ffn":
                    scores = importance.head_importance(scores, getattr(layer_plan, part).head_dim)
                units[tower.name, index, part] = scores
    padded = {key: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan) for key, rows in tokens.items()}
    return Scores(units, padded)


def _energies(recorder: Recorder, tower: Tower, plan: Plan, weighted: bool) -> dict[Key, Tensor]:
    """Channel energies of one batch. Attention is weighted by its own layer's token scores, the parts behind it by the
    next layer's (CoMP, Eq. 5); the last layer has only its own."""
    found = {}
    layers = plan.tower(tower.name).layers
    for index, layer in enumerate(layers):
        own = recorder.scores[tower.name, index]
        after = recorder.scores.get((tower.name, index + 1))
        if after is None:
            after = own
            if layer.keep is not None and layer.keep < own.shape[1]:
                after = own.gather(1, kept_tokens(own, layer.keep, tower.protected))
        for part in layer_parts(tower):
            scores = own if part == "attention" else after
            weights = (scores >= 0).float()
            if weighted:
                weights = importance.token_weights(scores, "first" in tower.protected) * weights
            found[tower.name, index, part] = importance.energy(recorder.inputs[tower.name, index, part], weights)
    return found


def _relative(scores: Tensor) -> Tensor:
    """Token scores relative to uniform, padding as nan. (batch, tokens) -> (batch, tokens)."""
    valid = scores >= 0
    relative = importance.normalised(scores) * valid.sum(-1, keepdim=True)
    return relative.masked_fill(~valid, torch.nan)
