"""Importance of tokens, heads and feed-forward channels. Pure functions of tensors.

CoMP's collaborative metric (arXiv 2604.02956): parameters are scored on the tokens that will stay (CIP, Eq. 4), tokens by
the heads that will stay (CIT, Eq. 7; `modeling_comp.token_scores`, because pruned models need it at inference too).
"""

import torch
from torch import Tensor


def normalised(scores: Tensor) -> Tensor:
    """Token scores that sum to one for each sample; padding (negative) becomes zero. (batch, tokens) -> the same."""
    scores = scores.clamp(min=0).float()
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def token_weights(scores: Tensor, class_token: Tensor, special: Tensor) -> Tensor:
    """CIP's weights, Eq. 4: 1 for [CLS], and for the ordinary tokens their scores, which sum to one.

    So all ordinary tokens together weigh as much as [CLS], and layers with different numbers of tokens compare.
    scores: (batch, tokens), padding negative; class_token, special: (batch, tokens) booleans, where [CLS] is, and all tokens
    that are not ordinary. Returns (batch, tokens).
    """
    return normalised(scores.masked_fill(special, 0)) + class_token.float()


def energy(activations: Tensor, weights: Tensor) -> Tensor:
    """Sum_n w_n X_{n,i}^2 for every channel i. (batch, tokens, channels), (batch, tokens) -> (channels,)."""
    return torch.einsum("bnc,bn->c", activations.float().square(), weights.float())


def channel_importance(weight: Tensor, channel_energy: Tensor) -> Tensor:
    """Wanda made structural, Eq. 3: mean_j |W_ji| times the norm of input channel i.

    weight: the output projection, (outputs, channels); channel_energy: (channels,). Returns (channels,).
    """
    return weight.float().abs().mean(0) * channel_energy.sqrt()


def unit_importance(channel_scores: Tensor, width: int) -> Tensor:
    """Mean over the channels of each unit, a head or one channel. (units * width,) -> (units,)."""
    return channel_scores.unflatten(0, (-1, width)).mean(1)


def relative_to_layer(scores: Tensor) -> Tensor:
    """Scores divided by their layer's mean, so that layers with larger activations do not win by their scale."""
    return scores / scores.mean().clamp(min=torch.finfo(torch.float32).tiny)


def gini(scores: Tensor) -> float:
    """How unequal scores are: 0 where all are alike, towards 1 where one has everything. (units,) of numbers >= 0."""
    ordered = scores.double().flatten().sort().values
    n = ordered.numel()
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    total = ordered.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((2 * rank - n - 1) * ordered).sum() / (n * total))
