"""Why token pruning costs CLIP so much: what becomes of the tokens that go. An experiment on stock CLIP, outside of comp.

    python benchmarks/fused_token.py CLIP           # the folder of scripts/train_clip.py

Behind the attention of one layer half of the patches stay. The others are dropped, or stay as one token, their mean (as in
EViT), or as one that later attention counts as often as there are tokens in it: log(number) is added to its logits (as in ToMe,
and now in comp). Recall@1 among scenes of the validation split, a column for each layer; nothing else is pruned.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from comp_cli.data.batches import Collator
from comp_cli.data.scene_pairs import caption_scenes
from comp_cli.families import FAMILIES
from comp_cli.tasks import TASKS

TASK = TASKS["retrieval"]
SEED = 3  # of the validation scenes
AFTERWARDS = ("dropped", "mean", "weighted mean")


def attend(attention: nn.Module, states: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention by hand. states (batch, tokens, dim), bias (tokens,), added to the logits of each key. Returns the output
    and the attention (batch, heads, tokens, tokens)."""
    names = ("q_proj", "k_proj", "v_proj")
    split = (getattr(attention, name)(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for name in names)
    query, key, value = split
    found = (query @ key.transpose(-1, -2) * attention.scale + bias).softmax(-1)
    return attention.out_proj((found @ value).transpose(1, 2).flatten(2)), found


def received(attention: Tensor) -> Tensor:
    """What comp ranks patches by, (batch, patches): attention from other patches, maximum over heads, summed over rows."""
    return attention.amax(1)[:, 1:, 1:].sum(1)


def from_class(attention: Tensor) -> Tensor:
    """Attention from [CLS], mean over heads."""
    return attention[:, :, 0, 1:].mean(1)


def stride(attention: Tensor) -> Tensor:
    """Every other patch."""
    return (torch.arange(attention.shape[-1] - 1) % 2 == 0).float().expand(len(attention), -1)


RULES = {"attention received": received, "attention from [CLS]": from_class, "every other patch": stride}


def shorten(states: Tensor, scores: Tensor, afterwards: str) -> tuple[Tensor, Tensor]:
    """Half of the patches, and what becomes of the others. states (batch, 1 + patches, dim); also returns their biases."""
    patches = scores.shape[1]
    order = scores.argsort(1, descending=True).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    kept, gone = (states[:, 1:].gather(1, part) for part in order.split(patches // 2, dim=1))
    left = torch.cat([states[:, :1], kept], 1)
    if afterwards == "dropped":
        return left, states.new_zeros(left.shape[1])
    weight = math.log(gone.shape[1]) if afterwards == "weighted mean" else 0.0
    return torch.cat([left, gone.mean(1, keepdim=True)], 1), F.pad(states.new_zeros(left.shape[1]), (0, 1), value=weight)


def image_embeds(model: CLIPModel, pixel_values: Tensor, layer: int | None, rule: str, afterwards: str) -> Tensor:
    """(batch, dim), of length 1; tokens go behind the attention of that layer, None for nowhere."""
    tower = model.vision_model
    states = tower.pre_layrnorm(tower.embeddings(pixel_values))
    bias = states.new_zeros(states.shape[1])
    for number, block in enumerate(tower.encoder.layers):
        attended, attention = attend(block.self_attn, block.layer_norm1(states), bias)
        states = states + attended
        if number == layer:
            states, bias = shorten(states, RULES[rule](attention), afterwards)
        states = states + block.mlp(block.layer_norm2(states))
    return F.normalize(model.visual_projection(tower.post_layernorm(states[:, 0])), dim=-1)


@torch.inference_mode()
def main(arguments: argparse.Namespace) -> None:
    model = CLIPModel.from_pretrained(arguments.model).eval()
    processor = CLIPProcessor.from_pretrained(arguments.model)
    longest = processor.tokenizer.model_max_length
    collate = Collator(processor, FAMILIES["clip"].topology, longest, TASK.labels)
    batches = list(collate.batches(caption_scenes("validation", arguments.scenes, SEED), 32))
    labels = torch.cat([batch.labels for batch in batches])
    stock = [model(**batch.inputs) for batch in batches]
    texts, expected = (torch.cat([getattr(out, name) for out in stock]) for name in ("text_embeds", "image_embeds"))

    def embeds(*how) -> Tensor:
        return torch.cat([image_embeds(model, batch.inputs["pixel_values"], *how) for batch in batches])

    def recall(images: Tensor) -> str:
        scale = model.logit_scale.exp().expand(len(images))
        return f"{100 * TASK.metrics(TASK.rankings((images, texts, scale), labels))['recall@1']:.1f}"

    torch.testing.assert_close(embeds(None, "", ""), expected, atol=1e-4, rtol=0)  # by hand it is the same model
    layers = range(len(model.vision_model.encoder.layers) - 1)  # behind the last attention nothing reads a patch
    lines = [
        f"| ranked by | the others are | {' | '.join(f'layer {layer}' for layer in layers)} |",
        "|---" * (2 + len(layers)) + "|",
    ]
    for rule in RULES:
        for afterwards in AFTERWARDS:
            cells = [recall(embeds(layer, rule, afterwards)) for layer in layers]
            lines.append(f"| {rule} | {afterwards} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    said = f"Dense: recall@1 {recall(expected)} % among {arguments.scenes} scenes of the validation split."
    arguments.output.write_text("\n".join([said, "", *lines, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fused_token.md")
    parser.add_argument("--scenes", type=int, default=256)
    main(parser.parse_args())
