"""Train the small CLIP that benchmarks/accuracy.py prunes: it finds the description of a generated scene, and the reverse.

    python scripts/train_clip.py --output CLIP --log benchmarks/results/clip_training.jsonl

From scratch, with the contrastive loss and helper heads that are thrown away in the end: image patches say what covers them
and how manyth from the left that is, and both embeddings name all things from left to right. Every scene comes with a twin that
differs in one thing. Same seed, threads, versions: same weights.
"""

import argparse
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from train_demo import GRID, KINDS, PATCH, covered, patch_labels
from transformers import AttentionInterface, CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from comp_cli import tasks
from comp_cli.data import scenes
from comp_cli.data.batches import Collator
from comp_cli.data.scene_pairs import caption_scenes
from comp_cli.families import FAMILIES
from comp_cli.tasks import comparison

TASK = tasks.TASKS["retrieval"]
THINGS = 5  # in a scene at most
LONGEST = 26  # tokens of the longest description
CLASSES = {kind: len(names) for kind, names in KINDS.items()}
PAD, UNKNOWN, START, END = range(4)
WORDS = ["a", "and", ",", *scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES]


def build_processor(words: Sequence[str] = WORDS, longest: int = LONGEST, side: int = scenes.IMAGE_SIZE) -> CLIPProcessor:
    """For texts of these words, up to `longest` tokens, and pictures `side` pixels wide and high."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", "<end>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [("<start>", START), ("<end>", END)]
    made.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=around)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **special)
    size = {"height": side, "width": side}
    return CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size), tokenizer)


def build_model(tokenizer, side: int = scenes.IMAGE_SIZE) -> CLIPModel:
    common = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8}
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}  # 2 would mean: read at the highest id
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text = common | ids | sizes | {"num_hidden_layers": 4}
    vision = common | {"num_hidden_layers": 6, "image_size": side, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def attention_in_fp32(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest, **options):
    """On a CPU the fused kernel is the faster one in fp32, and the other matmuls are in bf16."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *rest, **options)


class Helpers(nn.Module):
    """Heads that exist during training only."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.patch = nn.ModuleDict({kind: nn.Linear(width, 1 + many) for kind, many in (CLASSES | {"rank": THINGS}).items()})
        self.named = nn.ModuleDict({kind: nn.Linear(embedding, THINGS * (1 + many)) for kind, many in CLASSES.items()})

    def patch_loss(self, patches: torch.Tensor, scene_list: list[scenes.Scene]) -> torch.Tensor:
        """What covers each patch, and the how manyth thing from the left is it? patches (images, patches, width)."""
        labels = {kind: patch_labels(scene_list, kind) for kind in KINDS} | {"rank": patch_ranks(scene_list)}
        return sum(F.cross_entropy(head(patches).flatten(0, 1), labels[kind].flatten()) for kind, head in self.patch.items())

    def named_loss(self, embeds: torch.Tensor, scene_list: list[scenes.Scene]) -> torch.Tensor:
        """What are the things of a scene, from left to right? embeds (scenes, embedding), of images or texts."""
        return sum(
            F.cross_entropy(head(embeds).unflatten(-1, (THINGS, -1)).flatten(0, 1), thing_labels(scene_list, kind).flatten())
            for kind, head in self.named.items()
        )


def from_left(scene: scenes.Scene) -> list[scenes.Thing]:
    """In the order of a description."""
    return sorted(scene, key=lambda thing: (thing.x, thing.y))


def patch_ranks(scene_list: list[scenes.Scene]) -> torch.Tensor:
    """(images, patches) number from the left, from 1, of the thing that covers each patch, 0 for background."""
    labels = torch.zeros(len(scene_list), GRID, GRID, dtype=torch.long)
    for image, scene in enumerate(scene_list):
        for rank, thing in enumerate(from_left(scene), 1):
            labels[image][covered(thing)] = rank
    return labels.flatten(1)


def thing_labels(scene_list: list[scenes.Scene], kind: str) -> torch.Tensor:
    """(scenes, THINGS) class of each thing from left to right, 0 behind the last."""
    labels = torch.zeros(len(scene_list), THINGS, dtype=torch.long)
    for row, scene in enumerate(scene_list):
        for place, thing in enumerate(from_left(scene)):
            labels[row, place] = 1 + KINDS[kind].index(getattr(thing, kind))
    return labels


def draw_batch(rng: random.Random, processor, pairs: int) -> tuple[list[scenes.Scene], dict[str, torch.Tensor], torch.Tensor]:
    """Scenes, each with a twin; the model's inputs; labels for `tasks.Retrieval`."""
    scene_list, images = [], []
    for _ in range(pairs):
        scene = scenes.random_scene(rng)
        background = rng.getrandbits(32)
        for twin in (scene, scenes.edit_scene(rng, scene, rng.choice(scenes.FAMILIES))):
            scene_list.append(twin)
            images.append(scenes.render(twin, background))
    texts = [scenes.describe(scene) for scene in scene_list]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return scene_list, dict(inputs), torch.tensor([zlib.crc32(text.encode()) for text in texts])


def step_loss(model: CLIPModel, helpers: Helpers, batch: tuple) -> torch.Tensor:
    scene_list, inputs, labels = batch
    out = model(**inputs)
    images = model.visual_projection(out.vision_model_output.pooler_output)  # not yet of length 1
    texts = model.text_projection(out.text_model_output.pooler_output)
    named = helpers.named_loss(images, scene_list) + helpers.named_loss(texts, scene_list)
    patches = helpers.patch_loss(out.vision_model_output.last_hidden_state[:, 1:], scene_list)
    read = (out.image_embeds.float(), out.text_embeds.float(), model.logit_scale.exp().expand(len(images)))
    return comparison.loss(TASK.rankings(read, labels)) + named + patches


def recall(model: CLIPModel, processor, split: str, count: int, seed: int = 0) -> dict[str, float]:
    """Recalls among the first `count` scenes of a split, in fp32."""
    collate = Collator(processor, FAMILIES["clip"].topology, LONGEST, TASK.labels)
    found = comparison.evaluate(model, TASK, collate.batches(caption_scenes(split, count, seed), 64)).metrics
    model.train()
    return {name: round(value, 4) for name, value in found.items()}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    helpers = Helpers(model.config.vision_config.hidden_size, model.config.projection_dim)
    fit(
        model,
        processor,
        helpers,
        args,
        draw=lambda: draw_batch(rng, processor, args.pairs),
        loss_of=lambda batch: step_loss(model, helpers, batch),
        judge=lambda step: {"validation": recall(model, processor, "validation", 256)},
    )


def fit(
    model: CLIPModel,
    processor: CLIPProcessor,
    helpers: nn.Module,
    args: argparse.Namespace,
    *,
    draw: Callable[[], Any],
    loss_of: Callable[[Any], torch.Tensor],
    judge: Callable[[int], dict[str, Any]],
    weight_decay: float = 0.02,
) -> None:
    """`args.steps` steps of AdamW in bf16: warm-up, then a cosine to zero. Every `args.every` steps a line of the log, with
    what `judge` finds at that step, and the model into `args.output`."""
    AttentionInterface.register("fp32", attention_in_fp32)
    model.train().config.vision_config._attn_implementation = "fp32"
    weights = [*model.parameters(), *helpers.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=args.lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    begin, running = time.time(), 0.0
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:
        for step in range(1, args.steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = args.lr * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            batch = draw()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            running += loss.item()
            if step % args.every == 0 or step == args.steps:
                minutes = round((time.time() - begin) / 60, 2)
                line = {"step": step, "loss": round(running / args.every, 4), **judge(step), "minutes": minutes}
                for where in (sys.stdout, log):
                    print(json.dumps(line), file=where, flush=True)
                running = 0.0
                model.save_pretrained(args.output)
                processor.save_pretrained(args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=24, help="twins in a batch")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=50)
    train(parser.parse_args())
