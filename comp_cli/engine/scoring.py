"""Runs a model over calibration batches and gathers the importance of everything that can be removed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..families import Family, Part, Stream, Tower
from ..plan import Plan
from ..runtime.modeling_comp import CompactAttention, TokenScores, kept_tokens, unmasked
from . import decoder_scores, importance

Key = tuple[str, int, str]  # tower, layer, part
ByStream = dict[tuple[str, int], Tensor]  # stream and layer -> token scores of a batch


@dataclass
class Scores:
    """units: one score per head or channel of a layer's part, comparable across layers. tokens: per (stream, layer), one row
    per sample and token, relative to uniform (1 is the mean of the ordinary tokens), [CLS] as inf, padding as nan; none of
    streams that share a tower."""

    units: dict[Key, Tensor]
    tokens: dict[tuple[str, int], Tensor]


@dataclass
class Recorder:
    """What one forward pass leaves behind: inputs of output projections, (batch, tokens, channels), and token scores of every
    self-attention, (batch, tokens), padding negative."""

    inputs: dict[Key, Tensor] = field(default_factory=dict)
    scores: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    prompts: decoder_scores.Prompts | None = None  # of a decoder that reads images


def tower_layers(model: nn.Module, tower: Tower) -> nn.ModuleList:
    return getattr(model.get_submodule(tower.encoder), tower.layers)


def reader_of(layer: nn.Module, part: Part) -> nn.Linear:
    """The layer that reads a part's inner channels. Raises RefusedError where it is none of torch's own: others, as that of
    GPT-2, may hold their matrix the other way round."""
    linear = layer.get_submodule(part.column)
    if not isinstance(linear, nn.Linear):
        said = f"{part.column} of a {type(layer).__name__} is a {type(linear).__name__}, expected torch's Linear."
        raise RefusedError(said, hint="comp prunes matrices of nn.Linear.")
    return linear


def output_weight(model: nn.Module, family: Family, key: Key) -> Tensor:
    """The matrix that reads a part's inner channels, (outputs, channels)."""
    tower = family.tower(key[0])
    return reader_of(tower_layers(model, tower)[key[1]], tower.part(key[2])).weight.detach()


@contextmanager
def recording(model: nn.Module, family: Family, plan: Plan) -> Iterator[Recorder]:
    """Record activations and token scores of every layer while the context is open.

    Layers score as they do at inference: with the rows and the rule that the plan gives their stream. Stock layers score
    nothing: there, tokens of a stream that ranks them all alike ("even") have one score, and those of a decoder what its last
    instruction token pays them. Raises RefusedError for another rule.
    """
    recorder = Recorder()
    hooks, before = [], []

    def remember_input(key: Key) -> Callable[..., None]:
        return lambda module, args: recorder.inputs.__setitem__(key, in_batches(args[0].detach()))

    def remember_scores(key: tuple[str, int]) -> Callable[..., None]:
        return lambda module, args, output: recorder.scores.__setitem__(key, output[1].detach())

    def remember_valid(key: tuple[str, int]) -> Callable[..., None]:
        return lambda module, args, kwargs: recorder.scores.__setitem__(key, even_scores(args, kwargs))

    def remember_paid(name: str) -> Callable[[int, Tensor], None]:
        return lambda index, paid: recorder.scores.__setitem__((name, index), paid)

    heard = ExitStack()
    try:
        for tower in family.towers:
            layers = tower_layers(model, tower)
            if tower.writes:
                ears = decoder_scores.listening(model, tower, layers, remember_paid(tower.name))
                recorder.prompts = heard.enter_context(ears)
            for index, layer in enumerate(layers):
                attention, key = layer.get_submodule(tower.self_attention.module), (tower.name, index)
                if isinstance(attention, CompactAttention):
                    (ranked,) = plan.tower(tower.name).streams.values()
                    before.append((attention, attention.token_scores))
                    skip_first = tower.streams[0].skips_first
                    attention.token_scores = TokenScores(ranked.score_rule, ranked.score_rows, skip_first)
                    hooks.append(attention.register_forward_hook(remember_scores(key)))
                elif not tower.writes:
                    _check_even(plan, tower)
                    hooks.append(layer.register_forward_pre_hook(remember_valid(key), with_kwargs=True))
                for part in tower.parts:
                    remember = remember_input((tower.name, index, part.name))
                    hooks.append(reader_of(layer, part).register_forward_pre_hook(remember))
        yield recorder
    finally:
        heard.close()
        for hook in hooks:
            hook.remove()
        for attention, token_scores in before:
            attention.token_scores = token_scores


def in_batches(states: Tensor) -> Tensor:
    """(batch, tokens, dim), also of a tower whose images stand one behind the other in one sequence (Qwen2-VL)."""
    return states if states.dim() == 3 else states.unsqueeze(0)


def even_scores(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """1 for every token that a stock layer is given, -1 for padding: (batch, tokens). Padding is what the last token does not
    see. Raises RefusedError for a mask that is not (batch, 1, tokens, tokens)."""
    hidden = in_batches(args[0] if args else kwargs["hidden_states"])
    mask = kwargs.get("attention_mask")
    scores = hidden.new_ones(hidden.shape[:2], dtype=torch.float32)
    if mask is None:
        return scores
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise RefusedError(
            f"a layer was given an attention mask that is {type(mask).__name__}, expected (batch, 1, tokens, tokens).",
            hint='Load the model with attn_implementation="sdpa" or "eager".',
        )
    return scores.masked_fill(~unmasked(mask)[:, 0, -1], -1.0)


def _check_even(plan: Plan, tower: Tower) -> None:
    """Raises RefusedError where tokens would have to be ranked, and the layers are stock ones, which do not."""
    for name, stream in plan.tower(tower.name).streams.items():
        if stream.score_rule != "even":
            said = f'tokens of {name} are ranked by "{stream.score_rule}", and stock layers ({tower.name} tower) rank none.'
            raise RefusedError(said, hint="Build the model with the runtime of comp, or give the stream the rule even.")


@contextmanager
def gated(model: nn.Module, family: Family) -> Iterator[dict[Key, Tensor]]:
    """Multiply every inner channel with a gate of one, (channels,) for each part, to be differentiated by."""
    gates: dict[Key, Tensor] = {}
    hooks = []

    def multiply(key: Key) -> Callable[..., tuple[Tensor]]:
        return lambda module, args: (args[0] * gates[key],)

    for tower in family.towers:
        for index, layer in enumerate(tower_layers(model, tower)):
            for part in tower.parts:
                linear, key = reader_of(layer, part), (tower.name, index, part.name)
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
    rule: str | None = "cip",
    seed: int = 0,
    run: Callable[[dict[str, Tensor]], Tensor | None] | None = None,
    advance: Callable[[], None] = lambda: None,
    summed: Callable[[dict[Key, Tensor]], dict[Key, Tensor]] = dict,
    gathered: Callable[[list[ByStream]], list[ByStream]] = list,
) -> Scores:
    """Importance of heads, channels and tokens on calibration batches of model inputs.

    `rule` is one of PARAMETER_RULES; None scores tokens only. `run` runs the model over a batch in place of the model itself;
    for rules that read gradients it returns the loss. Where the batches are some of those that several processes share,
    `summed` makes the sums of all, and `gathered` the token scores of all, batch by batch.
    """
    how = PARAMETER_RULES[rule] if rule else None
    found: dict[Key, Tensor] = {}
    heard: list[ByStream] = []
    model.eval()
    differentiated = gated(model, family) if how and how.reads in ("gradient", "squared gradient") else nullcontext()
    # The recorder's hooks come first: what they see is not gated.
    with recording(model, family, plan) as recorder, differentiated as gates, torch.inference_mode(gates is None):
        for batch in batches:
            loss: Any = run(batch) if run else model(**batch)
            if how and gates is not None:  # nothing reads what some layers say, see statistics.collect
                slopes = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
                for key, slope in zip(gates, slopes, strict=True):
                    found[key] = found.get(key, 0) + (slope if how.reads == "gradient" else slope.square()).double()
            elif how:
                for key, activations in recorder.inputs.items():
                    weights = weights_of(recorder, family.tower(key[0]), plan, key, how.reads == "weighted energy")
                    found[key] = found.get(key, 0) + importance.energy(activations, weights).double()
            heard.append(_of_streams(recorder, family))
            advance()
    units: dict[Key, Tensor] = {}
    if how:
        for key, statistic in summed(found).items():
            name, index, part = key
            scores = how.score(output_weight(model, family, key), statistic.float(), _seed(seed, key)).cpu()
            units[key] = how.pool(scores, plan.tower(name).layers[index].parts[part].width)
        units = how.compare(units, family)
    tokens: dict[tuple[str, int], list[Tensor]] = {}
    for batch_scores in gathered(heard):
        for stream, scores in batch_scores.items():
            tokens.setdefault(stream, []).extend(scores)
    padded = {key: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan) for key, rows in tokens.items()}
    return Scores(units, padded)


def _of_streams(recorder: Recorder, family: Family) -> ByStream:
    """What one forward pass says of tokens, see Scores, on the CPU."""
    found: ByStream = {}
    for (name, index), scores in recorder.scores.items():
        streams = family.tower(name).streams
        if len(streams) == 1:
            found[streams[0].name, index] = _relative(scores, streams[0]).cpu()
    return found


def _within_layers(units: dict[Key, Tensor], family: Family) -> dict[Key, Tensor]:
    return {key: importance.relative_to_layer(scores) for key, scores in units.items()}


def _over_layers(units: dict[Key, Tensor], family: Family) -> dict[Key, Tensor]:
    """UPop's: standardised over all heads, and over all feed-forward channels, of the model."""
    found: dict[Key, Tensor] = {}
    for heads in (False, True):
        group = {key: scores for key, scores in units.items() if family.tower(key[0]).part(key[2]).is_attention == heads}
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
    compare: Callable[[dict[Key, Tensor], Family], dict[Key, Tensor]] = _within_layers
    pool: Callable[[Tensor, int], Tensor] = importance.unit_importance  # of the channels of each unit, to its score


def _by_energy(weight: Tensor, energy: Tensor, seed: int) -> Tensor:
    return importance.channel_importance(weight, energy)


def _chance(weight: Tensor, statistic: Tensor, seed: int) -> Tensor:
    return torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed))


PARAMETER_RULES = {
    "cip": Rule("weighted energy", _by_energy),
    "wanda": Rule("energy", _by_energy),
    "magnitude": Rule("energy", lambda weight, energy, seed: weight.float().abs().mean(0)),
    # One draw a head: the mean of many would put all heads between the best and the worst channels.
    "random": Rule("energy", _chance, pool=lambda scores, width: scores[::width]),
    # |dL/dgate|: the loss that removing a channel adds, to first order (Molchanov et al. 2017), root mean square over batches.
    "taylor": Rule("squared gradient", lambda weight, squares, seed: squares.sqrt()),
    # UPop sums signed gradients of the masks: where the loss falls as a mask opens, the slope is negative.
    "upop": Rule("gradient", lambda weight, slopes, seed: -slopes, _over_layers),
}


def weights_of(recorder: Recorder, tower: Tower, plan: Plan, key: Key, weighted: bool) -> Tensor:
    """Token weights of a part's activations, (batch, tokens); without `weighted` 1 for every token but padding.

    Attention is weighted by its own layer's token scores, the parts behind it by the next layer's (CoMP, Eq. 5); the last
    layer has only its own. Streams that share an encoder are of one weight each token; of those of a decoder see
    decoder_scores.py.
    """
    _, index, part = key
    scores = recorder.scores[tower.name, index]
    if tower.writes and recorder.prompts is not None:
        behind = index if part == tower.self_attention.name else index + 1
        scores = recorder.scores.get((tower.name, behind), scores)
        return decoder_scores.weights(scores, recorder.prompts.pictured, weighted)
    if len(tower.streams) > 1:
        valid = (scores >= 0).float()
        return importance.normalised(valid) if weighted else valid
    (stream,) = tower.streams
    if part != tower.self_attention.name:
        following = recorder.scores.get((tower.name, index + 1))
        planned = plan.tower(tower.name)
        keep = planned.layers[index].keep.get(stream.name)
        if following is not None:
            scores = following
        elif keep is not None and keep < scores.shape[1]:
            fused = int(planned.streams[stream.name].fuse and keep > 1)  # the last token, which stands for the others
            scores = scores.gather(1, kept_tokens(scores, keep - fused, stream.protected))
            scores = nn.functional.pad(scores, (0, fused))
    return importance.token_weights(scores, *special_tokens(scores, stream)) if weighted else (scores >= 0).float()


def special_tokens(scores: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    """Where the class token is, and which tokens are not ordinary: it and a protected first one. (batch, tokens) booleans;
    scores: (batch, tokens), padding negative."""
    position = torch.arange(scores.shape[1], device=scores.device)
    first = (position == 0).expand_as(scores)
    last = position == torch.where(scores >= 0, position, -1).amax(1, keepdim=True)
    class_token = {"first": first, "last": last, None: torch.zeros_like(first)}[stream.class_token]
    return class_token, class_token | first if stream.skips_first else class_token


def _relative(scores: Tensor, stream: Stream) -> Tensor:
    """Scores of the ordinary tokens relative to uniform, padding as nan, others as inf. (batch, tokens) -> the same."""
    valid = scores >= 0
    _, special = special_tokens(scores, stream)
    ordinary = (valid & ~special).sum(-1, keepdim=True)
    relative = importance.normalised(scores.masked_fill(special, 0)) * ordinary
    return relative.masked_fill(special, torch.inf).masked_fill(~valid, torch.nan)
