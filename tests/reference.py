"""BLIP image-text matching written out again with masks: slow, eager, every weight dense. What slicing must equal.

Nothing is removed here. Pruned heads and channels are multiplied by zero, dropped tokens stay in the tensors and are only
hidden from all queries and from the scores. Shares no code with comp.
"""

import torch
from torch.nn import functional as F


def masked_logits(model, plan, inputs) -> torch.Tensor:
    """itm_score, (batch, 2), of a stock model under the masks of a plan."""
    vision, language = plan.towers
    image, alive = vision_tower(model.vision_model, vision, inputs["pixel_values"])
    return text_tower(model, language, inputs, image, alive)


def attend(q, k, v, heads, plan, alive):
    """Eager attention. q (b, n, h*d); alive: keys that exist (b, m). Returns context (b, n, h*d) and the maps."""

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    logits = split(q) @ split(k).transpose(-1, -2) * plan.scale
    maps = logits.masked_fill(~alive[:, None, None, :], -torch.inf).softmax(-1)
    kept = torch.zeros(heads)
    kept[list(plan.units)] = 1
    maps = maps * kept.view(1, -1, 1, 1)
    return (maps @ split(v)).transpose(1, 2).flatten(2), maps


def drop(maps, alive, keep, protect_last):
    """Tokens that stay: the `keep` highest column sums of the maximum over heads, [CLS] and maybe [SEP] always."""
    if keep is None:
        return alive
    received = maps.amax(1)[:, 1:]  # without the row of [CLS]
    scores = (received * alive[:, 1:, None]).sum(1).masked_fill(~alive, -1)
    stay = torch.zeros_like(alive)
    for sample in range(len(scores)):
        score = scores[sample].clone()
        score[0] = torch.inf
        existing = alive[sample].nonzero().flatten()
        if protect_last:
            score[existing[-1]] = torch.inf
        best = sorted(existing.tolist(), key=lambda i: -score[i].item())[:keep]
        stay[sample, best] = True
    return stay


def masked_ffn(x, first, second, kept):
    mask = torch.zeros(first.out_features)
    mask[list(kept)] = 1
    return second(F.gelu(first(x)) * mask)


def vision_tower(model, plan, pixel_values):
    x = model.embeddings(pixel_values)
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer, wanted in zip(model.encoder.layers, plan.layers, strict=True):
        q, k, v = layer.self_attn.qkv(layer.layer_norm1(x)).chunk(3, -1)
        context, maps = attend(q, k, v, layer.self_attn.num_heads, wanted.parts["attention"], alive)
        x = x + layer.self_attn.projection(context)
        alive = drop(maps, alive, wanted.keep.get("vision"), protect_last=False)
        x = x + masked_ffn(layer.layer_norm2(x), layer.mlp.fc1, layer.mlp.fc2, wanted.kept("ffn"))
    return model.post_layernorm(x), alive


def text_tower(model, plan, inputs, image, image_alive):
    encoder = model.text_encoder
    x = encoder.embeddings(input_ids=inputs["input_ids"])
    alive = inputs["attention_mask"].bool()
    for layer, wanted in zip(encoder.encoder.layer, plan.layers, strict=True):
        own, cross = layer.attention, layer.crossattention
        heads = own.self.num_attention_heads
        q, k, v = own.self.query(x), own.self.key(x), own.self.value(x)
        context, maps = attend(q, k, v, heads, wanted.parts["attention"], alive)
        x = own.output.LayerNorm(own.output.dense(context) + x)
        alive = drop(maps, alive, wanted.keep.get("language"), protect_last=True)
        q, k, v = cross.self.query(x), cross.self.key(image), cross.self.value(image)
        context, _ = attend(q, k, v, heads, wanted.parts["cross"], image_alive)
        x = cross.output.LayerNorm(cross.output.dense(context) + x)
        hidden = masked_ffn(x, layer.intermediate.dense, layer.output.dense, wanted.kept("ffn"))
        x = layer.output.LayerNorm(hidden + x)
    return model.itm_head(x[:, 0])
