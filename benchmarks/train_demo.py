"""Train the `demo` model that ships inside the package: a small BLIP that matches generated scenes with captions.

    python benchmarks/train_demo.py --output comp_cli/demo --log benchmarks/results/demo_training.jsonl

From scratch, image-text matching alone stays at chance for a long time. Three parts make it learn within an hour: (1) the
vision tower learns to say what covers each patch; (2) the text tower learns to match captions about single things with
unrelated scenes; (3) all families of captions, the two scenes of a pair more and more alike. Meanwhile nouns are taught to
look at their things (the cross-attention of the lower half of the text tower) and to say where they are. The helper heads
are thrown away. Same seed, same threads, same versions: same weights.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizerFast, BlipConfig, BlipForImageTextRetrieval, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from comp_cli import scenes

PATCH = 8
GRID = scenes.IMAGE_SIZE // PATCH
MAX_TEXT = 16
NOUNS = [word for noun in (*scenes.SHAPES, "shape") for word in (noun, scenes.plural(noun))]
KINDS = {"colour": tuple(scenes.COLOURS), "shape": scenes.SHAPES, "size": tuple(scenes.SIZES)}


def build_processor() -> BlipProcessor:
    words = [*scenes.COLOURS, *scenes.SIZES, *scenes.NUMBERS, "a", "an", "and", *NOUNS]
    words += sorted({word for relation in scenes.RELATIONS for word in relation.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    tokenizer = BertTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, model_max_length=MAX_TEXT)
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def build_model(tokenizer) -> BlipForImageTextRetrieval:
    common = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "initializer_range": 0.02}
    ids = {"bos_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": None}
    text = (
        common
        | ids
        | {"initializer_range": 0.05, "num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TEXT}
    )
    vision = common | {"num_hidden_layers": 6, "image_size": scenes.IMAGE_SIZE, "patch_size": PATCH}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=64)
    return BlipForImageTextRetrieval(config)


class Helpers(nn.Module):
    """Heads that exist during training only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleDict({kind: nn.Linear(width, 1 + len(names)) for kind, names in KINDS.items()})
        self.place = nn.Linear(width, 2)
        self.number = nn.Linear(width, len(scenes.NUMBERS))

    def patch_loss(self, patches: torch.Tensor, scene_list: list[scenes.Scene]) -> torch.Tensor:
        """What covers each patch? patches (images, patches, width); class 0 is background."""
        return sum(
            F.cross_entropy(head(patches).flatten(0, 1).float(), patch_labels(scene_list, kind).flatten())
            for kind, head in self.patch.items()
        )

    def text_loss(self, text, targets: dict) -> torch.Tensor:
        """Do nouns look at their things, and say where they are (half way up)? How many are there (at [CLS])?"""
        half = len(text.cross_attentions) // 2
        looked = torch.stack(text.cross_attentions[:half]).float().mean(2)  # (layers, captions, tokens, 1 + patches)
        on_thing = (looked[..., 1:] * targets["patches"]).sum(-1).clamp(min=1e-4)
        nouns = targets["patches"].any(-1).expand_as(on_thing)
        loss = -on_thing.log()[nouns].mean()
        known = targets["known"].unsqueeze(-1)
        place = self.place(text.hidden_states[half]).float()
        loss = loss + ((place - targets["place"]).square() * known).sum() / known.sum().clamp(min=1)
        counted = targets["number"] >= 0
        if not counted.any():
            return loss
        number = self.number(text.last_hidden_state[counted, 0]).float()
        return loss + 0.3 * F.cross_entropy(number, targets["number"][counted])


def covered(thing: scenes.Thing) -> torch.Tensor:
    """(GRID, GRID), True for the patches that a thing covers."""
    centres = (torch.arange(GRID) + 0.5) * PATCH
    reach = scenes.SIZES[thing.size] + 1
    return ((centres - thing.y).abs() < reach)[:, None] & ((centres - thing.x).abs() < reach)[None, :]


def patch_labels(scene_list: list[scenes.Scene], kind: str) -> torch.Tensor:
    """(images, patches) class of the thing that covers each patch, 0 for background."""
    labels = torch.zeros(len(scene_list), GRID, GRID, dtype=torch.long)
    for image, scene in enumerate(scene_list):
        for thing in scene:
            labels[image][covered(thing)] = 1 + KINDS[kind].index(getattr(thing, kind))
    return labels.flatten(1)


def draw_pair(rng: random.Random, easy: float, captions: int, families: Sequence[str]) -> tuple[list, list]:
    """Two scenes and, for each, `captions` captions that hold in it and not in the other."""
    left = scenes.random_scene(rng)
    if rng.random() < easy:
        right = scenes.random_scene(rng)
    else:
        families = [rng.choice(families)]
        right = scenes.edit_scene(rng, left, families[0])
    found = [
        [scenes.distinguishing(rng, a, b, rng.choice(families)) for _ in range(captions)]
        for a, b in ((left, right), (right, left))
    ]
    if not all(all(side) for side in found):
        return draw_pair(rng, easy, captions, families)
    return [left, right], found


def draw_batch(rng: random.Random, processor, pairs: int, easy: float, captions: int, families: Sequence[str]) -> dict:
    """Every caption meets both scenes of its pair, so labels are balanced for each caption and for each image."""
    scene_list, texts, image_of, labels, caption_list = [], [], [], [], []
    backgrounds = []
    for pair in range(pairs):
        two, found = draw_pair(rng, easy, captions, families)
        scene_list += two
        backgrounds += [rng.getrandbits(32)] * 2
        for side, captions_of_side in enumerate(found):
            for caption in captions_of_side:
                for image in (0, 1):
                    texts.append(caption.text)
                    caption_list.append(caption)
                    image_of.append(2 * pair + image)
                    labels.append(int(image == side))
    images = [scenes.render(s, b) for s, b in zip(scene_list, backgrounds, strict=True)]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    if not texts:
        return {"pixel_values": pixel_values, "scenes": scene_list}
    text = processor.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return {
        "pixel_values": pixel_values,
        "text": text,
        "image_of": torch.tensor(image_of),
        "labels": torch.tensor(labels),
        "scenes": scene_list,
        "targets": text_targets(processor.tokenizer, text["input_ids"], caption_list, [scene_list[i] for i in image_of]),
    }


def text_targets(tokenizer, input_ids: torch.Tensor, captions: list, scene_list: list) -> dict:
    """For each noun the patches of its things, and their place in [-1, 1] where there is one; for counts the number."""
    is_noun = torch.isin(input_ids, torch.tensor(tokenizer.convert_tokens_to_ids(NOUNS)))
    place = torch.zeros(*input_ids.shape, 2)
    known = torch.zeros(input_ids.shape)
    patches = torch.zeros(*input_ids.shape, GRID * GRID, dtype=torch.bool)
    number = torch.full((len(captions),), -1)
    for row, (caption, scene) in enumerate(zip(captions, scene_list, strict=True)):
        found = [caption.matching(scene, wanted) for wanted in caption.things]
        if caption.family == "count":
            number[row] = len(found[0])
        for column, things in zip(is_noun[row].nonzero().flatten().tolist(), found, strict=True):
            for thing in things:
                patches[row, column] |= covered(thing).flatten()
            if len(things) == 1:
                place[row, column] = torch.tensor([things[0].x, things[0].y]) / (scenes.IMAGE_SIZE / 2) - 1
                known[row, column] = 1
    return {"place": place, "known": known, "number": number, "patches": patches}


def step_loss(model, helpers, batch: dict, matching: bool) -> torch.Tensor:
    image = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    loss = helpers.patch_loss(image[:, 1:], batch["scenes"])
    if not matching:
        return loss
    wanted = {"output_hidden_states": True, "output_attentions": True}
    text = model.text_encoder(**batch["text"], encoder_hidden_states=image[batch["image_of"]], **wanted)
    logits = model.itm_head(text.last_hidden_state[:, 0]).float()
    return F.cross_entropy(logits, batch["labels"]) + 0.3 * loss + 0.5 * helpers.text_loss(text, batch["targets"])


@torch.no_grad()
def accuracy(model, processor, split: str, count: int) -> dict[str, float]:
    """Share of right decisions per family and over all, on the hard pairs of a split, in fp32."""
    model.eval()
    right: dict[str, list[bool]] = {family: [] for family in scenes.FAMILIES}
    chosen = list(scenes.examples(split, count))
    for start in range(0, count, 64):
        part = chosen[start : start + 64]
        images = [scenes.render(e.scene, e.background) for e in part]
        inputs = processor(images=images, text=[e.caption.text for e in part], padding=True, return_tensors="pt")
        decided = model(**inputs).itm_score.argmax(-1).tolist()
        for example, decision in zip(part, decided, strict=True):
            right[example.caption.family].append(decision == example.label)
    model.train()
    return {f: round(sum(r) / len(r), 4) for f, r in right.items()} | {"all": round(sum(map(sum, right.values())) / count, 4)}


@dataclass(frozen=True)
class Part:
    """One part of the training; `easy` is the share of pairs of unrelated scenes at its start and at its end."""

    name: str
    steps: int
    pairs: int
    captions: int
    easy: tuple[float, float]
    families: tuple[str, ...] = scenes.FAMILIES


def learning_rate(step: int, parts: Sequence[Part]) -> float:
    """A cosine to zero over the whole training, with a warm-up at the start of each part."""
    into, total = step, sum(part.steps for part in parts)
    for part in parts:
        if into < part.steps:
            break
        into -= part.steps
    return min(1.0, (into + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / total))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    helpers = Helpers(model.config.vision_config.hidden_size)
    weights = [*model.parameters(), *helpers.parameters()]
    parts = (
        Part("patches", args.steps // 7, pairs=24, captions=0, easy=(1, 1)),
        Part("single things", args.steps // 7, pairs=12, captions=4, easy=(1, 1), families=("attribute",)),
        Part("everything", args.steps, pairs=16, captions=4, easy=(0.9, 0.1)),
    )
    optimiser = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, parts))
    start = time.time()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:

        def tell(line: dict) -> None:
            line["minutes"] = round((time.time() - start) / 60, 2)
            for where in (sys.stdout, log):
                print(json.dumps(line), file=where, flush=True)

        for part in parts:
            running = 0.0
            for step in range(1, part.steps + 1):
                # From unrelated scenes to scenes with one difference, within the first 40 % of the part.
                easy = part.easy[0] + (part.easy[1] - part.easy[0]) * min(1.0, step / (0.4 * part.steps))
                batch = draw_batch(rng, processor, part.pairs, easy, part.captions, part.families)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step_loss(model, helpers, batch, matching=part.captions > 0)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimiser.step()
                schedule.step()
                running += loss.item()
                if step % args.every == 0 or step == part.steps:
                    line = {"part": part.name, "step": step, "loss": round(running / args.every, 4)}
                    if part.captions:
                        line["validation"] = accuracy(model, processor, "validation", 512)
                    tell(line)
                    running = 0.0
                    save(model, processor, args.output)
        tell({"test": accuracy(model, processor, "test", 4000)})


def save(model, processor, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3200, help="of the last part; the others follow from it")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--every", type=int, default=100)
    train(parser.parse_args())
