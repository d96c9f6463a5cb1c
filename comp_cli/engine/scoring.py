"""Runs a model over calibration batches and gathers the importance of everything that can be removed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..families import Family, Tower
from ..plan import Plan
from ..runtime.modeling_comp import CompactAttention, TokenScores, kept_tokens
from . import importance

Key = tuple[str, int, str]  # tower, layer, "attention" | "cross" | "ffn"


@dataclass
class Scores:
    """units: one score per head or channel of a layer's part, comparable across layers. tokens: per (tower, layer), one row
    per sample and token, relative to uniform (1 is the mean of the ordinary tokens), [CLS] as inf, padding as nan."""

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


def output_weight(model: nn.Module, family: Family, key: Key) -> Tensor:
    """The matrix that reads a part's inner channels, (outputs, channels)."""
    tower = family.tower(key[0])
    return tower_layers(model, tower)[key[1]].get_submodule(layer_parts(tower)[key[2]]).weight.detach()


@contextmanager
def recording(model: nn.Module, family: Family, plan: Plan) -> Iterator[Recorder]:
    """Record activations and token scores of every layer while the context is open.

    Layers score as they do at inference: with the rows and the rule that the plan gives their tower.
    """
    recorder = Recorder()
    hooks, before = [], []

    def remember_input(key: Key) -> Callable:
        return lambda module, args: recorder.inputs.__setitem__(key, args[0].detach())

    def remember_scores(key: tuple[str, int]) -> Callable:
        return lambda module, args, output: recorder.scores.__setitem__(key, output[1].detach())

    for tower in family.towers:
        planned, skip_first = plan.tower(tower.name), "first" in tower.protected
        for index, layer in enumerate(tower_layers(model, tower)):
            attention: CompactAttention = layer.get_submodule(tower.attention.module)
            before.append((attention, attention.token_scores))
            attention.token_scores = TokenScores(planned.score_rule, planned.score_rows, skip_first)
            hooks.append(attention.register_forward_hook(remember_scores((tower.name, index))))
            for part, path in layer_parts(tower).items():
                hook = remember_input((tower.name, index, part))
                hooks.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for attention, token_scores in before:
            attention.token_scores = token_scores


@contextmanager
def gated(model: nn.Module, family: Family) -> Iterator[dict[Key, Tensor]]:
    """Multiply every inner channel with a gate of one, (channels,) for each part, to be differentiated by."""
    gates: dict[Key, Tensor] = {}
    hooks = []

    def multiply(key: Key) -> Callable:
        return lambda module, args: (args[0] * gates[key],)

    for tower in family.towers:
        for index, layer in enumerate(tower_layers(model, tower)):
            for part, path in layer_parts(tower).items():
                linear, key = layer.get_submodule(path), (tower.name, index, part)
                gates[key] = torch.ones(linear.in_features, device=linear.weight.device, requires_grad=True)
                hooks.append(linear.register_forward_pre_hook(multiply(key)))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def collect(
    model: nn.Module,
    family: Family,
    plan: Plan,
    batches: Iterable[dict[str, Tensor]],
    *,
    rule: str = "cip",
    seed: int = 0,
    run: Callable[[dict[str, Tensor]], Tensor | None] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Importance of heads, channels and tokens on calibration batches of model inputs.

    `rule` is one of PARAMETER_RULES. `run` runs the model over a batch in place of the model itself; for rules that read
    gradients it returns the loss.
    """
    how = PARAMETER_RULES[rule]
    found: dict[Key, Tensor] = {}
    tokens: dict[tuple[str, int], list[Tensor]] = {}
    model.eval()
    differentiated = gated(model, family) if how.reads in ("gradient", "squared gradient") else nullcontext()
    # The recorder's hooks come first: what they see is not gated.
    with recording(model, family, plan) as recorder, differentiated as gates, torch.inference_mode(gates is None):
        for batch in batches:
            loss = run(batch) if run else model(**batch)
            if gates is not None:
                for key, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                    found[key] = found.get(key, 0) + (slope if how.reads == "gradient" else slope.square())
            else:
                for key, activations in recorder.inputs.items():
                    weights = weights_of(recorder, family.tower(key[0]), plan, key, how.reads == "weighted energy")
                    found[key] = found.get(key, 0) + importance.energy(activations, weights)
            for key, scores in recorder.scores.items():
                tokens.setdefault(key, []).extend(_relative(scores, family.tower(key[0])).cpu())
            advance()
    units = {}
    for key, statistic in found.items():
        tower, index, part = key
        scores = how.score(output_weight(model, family, key), statistic, _seed(seed, key)).cpu()
        if part != "ffn":
            scores = how.pool(scores, getattr(plan.tower(tower).layers[index], part).head_dim)
        units[key] = scores
    padded = {key: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan) for key, rows in tokens.items()}
    return Scores(how.compare(units), padded)


def _within_layers(units: dict[Key, Tensor]) -> dict[Key, Tensor]:
    return {key: importance.relative_to_layer(scores) for key, scores in units.items()}


def _over_layers(units: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """UPop's: standardised over all heads, and over all feed-forward channels, of the model."""
    found = {}
    for wanted in (True, False):
        group = {key: scores for key, scores in units.items() if (key[2] == "ffn") == wanted}
        whole = torch.cat(list(group.values()))
        found |= {key: (scores - whole.mean()) / whole.std().clamp(min=1e-12) for key, scores in group.items()}
    return found


def _seed(seed: int, key: Key) -> int:
    return zlib.crc32(f"{seed} {key}".encode())


@dataclass(frozen=True)
class Rule:
    """How channels are scored. `reads` is the statistic that is summed over the calibration pairs; `score` makes channel
    scores of it: output projection (outputs, channels), statistic (channels,), seed -> (channels,); `compare` makes the
    scores of all parts comparable."""

    reads: str  # "weighted energy" (by tokens, CIP), "energy", "gradient", "squared gradient"
    score: Callable[[Tensor, Tensor, int], Tensor]
    compare: Callable[[dict[Key, Tensor]], dict[Key, Tensor]] = _within_layers
    pool: Callable[[Tensor, int], Tensor] = importance.head_importance  # of a head's channels, to its score


def _by_energy(weight: Tensor, energy: Tensor, seed: int) -> Tensor:
    return importance.channel_importance(weight, energy)


def _chance(weight: Tensor, statistic: Tensor, seed: int) -> Tensor:
    return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))


PARAMETER_RULES = {
    "cip": Rule("weighted energy", _by_energy),
    "wanda": Rule("energy", _by_energy),
    "magnitude": Rule("energy", lambda weight, energy, seed: weight.float().abs().mean(0)),
    # One draw a head: the mean of many would put all heads between the best and the worst channels.
    "random": Rule("energy", _chance, pool=lambda scores, head_dim: scores[::head_dim]),
    # |dL/dgate|: the loss that removing a channel adds, to first order (Molchanov et al. 2017), root mean square over batches.
    "taylor": Rule("squared gradient", lambda weight, squares, seed: squares.sqrt()),
    # UPop sums signed gradients of the masks: where the loss falls as a mask opens, the slope is negative.
    "upop": Rule("gradient", lambda weight, slopes, seed: -slopes, _over_layers),
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
        planned = plan.tower(tower.name)
        keep = planned.layers[index].keep
        if following is not None:
            scores = following
        elif keep is not None and keep < scores.shape[1]:
            fused = int(planned.fuse and keep > 1)  # the last token, which stands for the others
            scores = scores.gather(1, kept_tokens(scores, keep - fused, tower.protected))
            scores = nn.functional.pad(scores, (0, fused))
    return importance.token_weights(scores, *special_tokens(scores, tower)) if weighted else (scores >= 0).float()


def special_tokens(scores: Tensor, tower: Tower) -> tuple[Tensor, Tensor]:
    """Where the class token is, and which tokens are not ordinary: it and a protected first one. (batch, tokens) booleans;
    scores: (batch, tokens), padding negative."""
    position = torch.arange(scores.shape[1], device=scores.device)
    first = (position == 0).expand_as(scores)
    last = position == torch.where(scores >= 0, position, -1).amax(1, keepdim=True)
    class_token = {"first": first, "last": last, None: torch.zeros_like(first)}[tower.class_token]
    return class_token, class_token | first if "first" in tower.protected else class_token


def _relative(scores: Tensor, tower: Tower) -> Tensor:
    """Scores of the ordinary tokens relative to uniform, padding as nan, others as inf. (batch, tokens) -> the same."""
    valid = scores >= 0
    _, special = special_tokens(scores, tower)
    ordinary = (valid & ~special).sum(-1, keepdim=True)
    relative = importance.normalised(scores.masked_fill(special, 0)) * ordinary
    return relative.masked_fill(special, torch.inf).masked_fill(~valid, torch.nan)
