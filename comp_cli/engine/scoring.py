"""Runs a model over calibration batches and gathers the importance of everything that can be removed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families import Family, Tower
from ..modeling_comp import CompactAttention, kept_tokens
from ..plan import Plan
from . import importance

Key = tuple[str, int, str]  # tower, layer, "attention" | "cross" | "ffn"


@dataclass
class Scores:
    """units: one score per head or channel of a layer's part. tokens: per (tower, layer), one row per sample and token,
    relative to uniform (1 is the mean of the ordinary tokens), [CLS] as inf, padding as nan."""

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
def recording(model: nn.Module, family: Family, plan: Plan) -> Iterator[Recorder]:
    """Record activations and token scores of every layer while the context is open.

    Layers score as they do at inference: with the rows that the plan gives their tower.
    """
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
            attention.score_rows = plan.tower(tower.name).score_rows
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
    rule: str = "cip",
    seed: int = 0,
    hear: Callable[[object], None] = lambda outputs: None,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Importance of heads, channels and tokens on calibration batches of model inputs; `hear` gets the model's outputs.

    `rule` is one of PARAMETER_RULES.
    """
    energies: dict[Key, Tensor] = {}
    tokens: dict[tuple[str, int], list[Tensor]] = {}
    model.eval()
    with torch.inference_mode(), recording(model, family, plan) as recorder:
        for batch in batches:
            hear(model(**batch))
            for key, activations in recorder.inputs.items():
                weights = weights_of(recorder, family.tower(key[0]), plan, key, weighted=rule == "cip")
                energies[key] = energies.get(key, 0) + importance.energy(activations, weights)
            for key, scores in recorder.scores.items():
                tokens.setdefault(key, []).extend(_relative(scores, "first" in family.tower(key[0]).protected).cpu())
            advance()
    units = {}
    for key, found in energies.items():
        tower, index, part = family.tower(key[0]), key[1], key[2]
        weight = tower_layers(model, tower)[index].get_submodule(layer_parts(tower)[part]).weight.detach()
        scores = PARAMETER_RULES[rule](weight, found, _seed(seed, key)).cpu()
        if part != "ffn":
            scores = importance.head_importance(scores, getattr(plan.tower(tower.name).layers[index], part).head_dim)
        units[key] = scores
    padded = {key: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan) for key, rows in tokens.items()}
    return Scores(units, padded)


def _chance(weight: Tensor, energy: Tensor, seed: int) -> Tensor:
    return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))


def _seed(seed: int, key: Key) -> int:
    return zlib.crc32(f"{seed} {key}".encode())


# How channels are scored: output projection (outputs, channels), energy of its inputs (channels,), seed -> (channels,).
# "cip" and "wanda" differ in the token weights behind the energy.
PARAMETER_RULES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "cip": lambda weight, energy, seed: importance.channel_importance(weight, energy),
    "wanda": lambda weight, energy, seed: importance.channel_importance(weight, energy),
    "magnitude": lambda weight, energy, seed: weight.float().abs().mean(0),
    "random": _chance,
}


def weights_of(recorder: Recorder, tower: Tower, plan: Plan, key: Key, weighted: bool) -> Tensor:
    """Token weights of a part's activations, (batch, tokens); without `weighted` 1 for every token but padding.

    Attention is weighted by its own layer's token scores, the parts behind it by the next layer's (CoMP, Eq. 5); the last
    layer has only its own.
    """
    _, index, part = key
    scores = recorder.scores[tower.name, index]
    if part != "attention":
        following = recorder.scores.get((tower.name, index + 1))
        keep = plan.tower(tower.name).layers[index].keep
        if following is not None:
            scores = following
        elif keep is not None and keep < scores.shape[1]:
            scores = scores.gather(1, kept_tokens(scores, keep, tower.protected))
    valid = (scores >= 0).float()
    return importance.token_weights(scores, "first" in tower.protected) * valid if weighted else valid


def _relative(scores: Tensor, has_class_token: bool) -> Tensor:
    """Scores of the ordinary tokens relative to uniform, padding as nan, [CLS] as inf. (batch, tokens) -> the same."""
    valid = scores >= 0
    first = int(has_class_token)
    relative = importance.normalised(scores[:, first:]) * valid[:, first:].sum(-1, keepdim=True)
    return F.pad(relative, (first, 0), value=torch.inf).masked_fill(~valid, torch.nan)
