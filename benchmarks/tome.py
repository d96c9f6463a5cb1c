"""Token merging in the manner of ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), for BLIP's vision tower.

Written from the formulas of the paper: bipartite soft matching on the keys, between attention and feed-forward layer of
every layer, `r` tokens merged each time, size-weighted means, and attention in proportion to the sizes. Training-free.
"""

import types

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens to merge into which. keys: (batch, tokens, dim), the mean over heads.

    Tokens at even positions look for the most similar one (cosine) at the odd positions; the `r` best pairs merge. [CLS] at
    position 0 never does. Returns indices into the even tokens that stay (batch, evens - r) and that merge (batch, r), and
    for the latter their partner among the odd tokens (batch, r).
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)
    best, partner = similarity.max(-1)
    best[:, 0] = torch.inf * -1
    order = best.argsort(dim=-1, descending=True)
    merged, stay = order[:, :r], order[:, r:].sort(dim=-1).values
    return stay, merged, partner.gather(1, merged)


def merge(states: Tensor, sizes: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(batch, tokens, dim), (batch, tokens) -> r tokens fewer: the even ones that stay, then the odd ones."""
    r = min(r, (states.shape[1] - 1) // 2)
    if r <= 0:
        return states, sizes
    stay, merged, partner = match(keys, r)

    def reduce(values: Tensor) -> Tensor:  # sums (batch, tokens, n)
        evens, odds = values[:, ::2], values[:, 1::2]
        wide = (-1, -1, values.shape[-1])
        taken = evens.gather(1, merged.unsqueeze(-1).expand(wide))
        odds = odds.scatter_add(1, partner.unsqueeze(-1).expand(wide), taken)
        return torch.cat([evens.gather(1, stay.unsqueeze(-1).expand(wide)), odds], dim=1)

    sums = reduce(states * sizes.unsqueeze(-1))
    sizes = reduce(sizes.unsqueeze(-1)).squeeze(-1)
    return sums / sizes.unsqueeze(-1), sizes


def attend(attention: nn.Module, states: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional attention, softmax(QK / sqrt(d) + log size), on the fused kernel. Returns output and mean keys."""
    split = attention.qkv(states).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    query, key, value = split.unbind(0)  # (batch, heads, tokens, head_dim)
    bias = sizes.log()[:, None, None, :].expand(-1, 1, states.shape[1], -1)
    context = F.scaled_dot_product_attention(query, key, value, bias, scale=attention.scale)
    return attention.projection(context.transpose(1, 2).flatten(2)), key.mean(1)


def apply(model: nn.Module, r: int) -> nn.Module:
    """Merge `r` tokens in every vision layer of a stock BLIP, in place."""
    encoder = model.vision_model.encoder
    sizes: list[Tensor] = []  # of the tokens of this pass, handed from layer to layer

    def forward(layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if layer is encoder.layers[0]:
            sizes[:] = [hidden_states.new_ones(hidden_states.shape[:2])]
        attended, keys = attend(layer.self_attn, layer.layer_norm1(hidden_states), sizes[0])
        hidden_states, sizes[0] = merge(hidden_states + attended, sizes[0], keys, r)
        return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))

    for layer in encoder.layers:
        layer.forward = types.MethodType(forward, layer)
    return model
