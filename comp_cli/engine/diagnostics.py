"""The two findings that CoMP starts from (arXiv 2604.02956, section 1), measured on a model.

(a) The tokens that drive the importance of parameters are not the important tokens: why CIP weights them.
(b) Heads of little importance still decide which tokens rank high: why CIT masks them.

Both look at ordinary tokens only: [CLS] and padding neither rank nor count.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Family, Tower
from ..plan import Plan
from ..runtime.modeling_comp import TOKEN_RULES, CompactAttention
from . import importance, scoring

TOP = 0.3  # (a): share of a sample's tokens that count as top tokens
LEAST = 0.3  # (b): share of a layer's heads that count as least important, rounded up
KEPT = 0.5  # (b): share of a sample's tokens that would be kept
STRONG = 0.05  # (b): a head influences strongly if without it this share of the kept tokens is another


def contributions(activations: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """What each token adds to the plain importance of a part's channels (Eq. 3), summed over the channels.

    S_i = mean_j |W_ji| ||X_{:,i}|| is homogeneous in X, so sum_n X_{n,i} dS_i/dX_{n,i} = S_i splits it over the tokens of a
    sample without remainder: C_n = sum_i mean_j |W_ji| X_{n,i}^2 / ||X_{:,i}||, and sum_n C_n = sum_i S_i.

    activations: (batch, tokens, channels); weight: the output projection, (outputs, channels); valid: (batch, tokens), 0 for
    padding. Returns (batch, tokens).
    """
    squares = activations.float().square() * valid.unsqueeze(-1)
    norms = squares.sum(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.einsum("bnc,bc->bn", squares, weight.float().abs().mean(0) / norms)


def ranks(scores: Tensor, ordinary: Tensor) -> Tensor:
    """0 for the best ordinary token of each sample, 1 for the next; what is not ordinary comes last. (batch, tokens)."""
    return scores.masked_fill(~ordinary, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def overlap(first: Tensor, second: Tensor, ordinary: Tensor, share: float) -> Tensor:
    """|top k by first & top k by second| / k for each sample, k the share of its ordinary tokens. (batch, tokens) -> (batch,).

    By chance it is the share.
    """
    k = top_count(ordinary, share).unsqueeze(1)
    both = (ranks(first, ordinary) < k) & (ranks(second, ordinary) < k)
    return both.sum(1) / k.squeeze(1)


def top_count(ordinary: Tensor, share: float) -> Tensor:
    """How many ordinary tokens of each sample are a share of them, at least one. (batch, tokens) -> (batch,)."""
    return (share * ordinary.sum(1)).round().long().clamp(min=1)


def rank_correlation(first: Tensor, second: Tensor, ordinary: Tensor) -> Tensor:
    """Spearman's, over the ordinary tokens of each sample: 1 where both rank alike. (batch, tokens) -> (batch,)."""
    distance = (ranks(first, ordinary) - ranks(second, ordinary)).masked_fill(~ordinary, 0).double().square().sum(1)
    n = ordinary.sum(1)
    return 1 - 6 * distance / (n * (n.square() - 1)).clamp(min=1)


def head_influence(
    query: Tensor, key: Tensor, scale: float, *, rule: str = "attention", **options: Any
) -> tuple[Tensor, Tensor]:
    """What masking one head after the other by CIT (Eq. 7) does to the token scores: (changed, correlation).

    changed: share of the kept tokens that is another without the head. correlation: Spearman's between the rankings with and
    without it. query, key: (batch, heads, tokens, head_dim); options as of `token_scores`. Both returned (batch, heads).
    """
    score = TOKEN_RULES[rule].score
    scores = score(query, key, scale, **options)
    ordinary = scores >= 0
    ordinary[:, : int(options["skip_first"])] = False
    changed, correlation = [], []
    for head in range(query.shape[1]):
        mask = torch.ones(query.shape[1], device=query.device)
        mask[head] = 0
        without = score(query, key, scale, head_mask=mask, **options)
        changed.append(1 - overlap(scores, without, ordinary, KEPT))
        correlation.append(rank_correlation(scores, without, ordinary))
    return torch.stack(changed, 1), torch.stack(correlation, 1)


@dataclass(frozen=True)
class Influence:
    """Of the heads of one layer on its token ranking, means over samples and heads (see `head_influence`)."""

    least_heads: list[int]  # those of least plain importance (Eq. 3)
    changed_by_least: float
    changed_by_all: float
    correlation_without_least: float
    strong: float  # share of the least important heads that influence strongly


@dataclass(frozen=True)
class Diagnosis:
    """overlap, chance: of each part, means over samples. influence: of each layer with more than one head."""

    overlap: dict[scoring.Key, float]
    chance: dict[scoring.Key, float]
    influence: dict[tuple[str, int], Influence]


def diagnose(
    model: nn.Module,
    family: Family,
    plan: Plan,
    batches: Iterable[dict[str, Tensor]],
    advance: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Both findings on batches of model inputs, in towers whose tokens may go. Attention maps live for one layer of one batch
    at a time.

    The top tokens of a part are those that CIP weights it by: the layer's own scores for attention, else the next layer's.
    """
    overlaps: dict[scoring.Key, list[Tensor]] = {}
    chances: dict[scoring.Key, list[Tensor]] = {}
    energies: dict[scoring.Key, Tensor] = {}
    model.eval()
    with torch.inference_mode(), scoring.recording(model, family, plan) as recorder, influences(model, family) as captured:
        for batch in batches:
            model(**batch)
            for key, activations in recorder.inputs.items():
                tower = family.tower(key[0])
                if not ranks_tokens(tower):
                    continue
                valid, weights = (scoring.weights_of(recorder, tower, plan, key, weighted) for weighted in (False, True))
                ordinary = valid > 0
                ordinary[:, : int(tower.streams[0].skips_first)] = False
                found = contributions(activations, scoring.output_weight(model, family, key), valid)
                overlaps.setdefault(key, []).append(overlap(found, weights, ordinary, TOP))
                chances.setdefault(key, []).append(top_count(ordinary, TOP) / ordinary.sum(1))
                if key[2] == tower.self_attention.name:
                    energies[key] = energies.get(key, 0) + importance.energy(activations, valid)
            advance()
    summaries = {}
    for (name, index), (changed, correlation) in captured.items():
        key = (name, index, family.tower(name).self_attention.name)
        channels = importance.channel_importance(scoring.output_weight(model, family, key), energies[key])
        heads = importance.unit_importance(channels, plan.tower(name).layers[index].parts[key[2]].width)
        summaries[name, index] = summarise(heads.cpu(), torch.cat(changed).cpu(), torch.cat(correlation).cpu())
    return Diagnosis(_means(overlaps), _means(chances), summaries)


def _means(table: dict[scoring.Key, list[Tensor]]) -> dict[scoring.Key, float]:
    return {key: torch.cat(rows).mean().item() for key, rows in table.items()}


def summarise(heads: Tensor, changed: Tensor, correlation: Tensor) -> Influence:
    """heads: plain importance, (heads,); changed, correlation: (samples, heads)."""
    least = heads.argsort()[: math.ceil(LEAST * len(heads))]
    by_head = changed.double().mean(0)
    return Influence(
        least_heads=least.tolist(),
        changed_by_least=by_head[least].mean().item(),
        changed_by_all=by_head.mean().item(),
        correlation_without_least=correlation[:, least].mean().item(),
        strong=(by_head[least] >= STRONG).double().mean().item(),
    )


def ranks_tokens(tower: Tower) -> bool:
    """Whether tokens of a tower may go, all of one stream."""
    return len(tower.streams) == 1 and tower.streams[0].prunable


@contextmanager
def influences(model: nn.Module, family: Family) -> Iterator[dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]]:
    """While the context is open, gather `head_influence` of every layer with more than one head, batch by batch."""
    captured: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}

    def hear(key: tuple[str, int]) -> Callable[..., None]:
        def hook(module: CompactAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            query, key_states, _ = map(module.split, module.project(args[0], None))
            ranked, mask = module.token_scores, module.complete(kwargs["attention_mask"], args[0])
            assert ranked is not None  # `scoring.recording`, which is open, gives every layer its own
            how: dict[str, Any] = {"rows": ranked.rows, "skip_first": ranked.skip_first, "attention_mask": mask}
            found = head_influence(query, key_states, module.scale, rule=ranked.rule, **how)
            for rows, new in zip(captured.setdefault(key, ([], [])), found, strict=True):
                rows.append(new)

        return hook

    hooks = []
    for tower in filter(ranks_tokens, family.towers):
        for index, layer in enumerate(scoring.tower_layers(model, tower)):
            attention = layer.get_submodule(tower.self_attention.module)
            if isinstance(attention, CompactAttention) and attention.num_heads > 1:
                hooks.append(attention.register_forward_hook(hear((tower.name, index)), with_kwargs=True))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
