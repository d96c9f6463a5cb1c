"""Train the `demo` model that ships inside the package: a small BLIP that matches generated scenes with captions.

    python scripts/train_demo.py --output comp_cli/demo --log benchmarks/results/demo_training.jsonl

From scratch, image-text matching alone stays at chance for a long time. Five parts make it learn within an hour: (1) the
vision tower learns to say what covers each patch; (2) the text tower learns to match captions about single things with
unrelated scenes; (3) all families of captions, the two scenes of a pair more and more alike, (4) relations and (5) counts
more often than the rest. Meanwhile nouns are taught to look at their things (the cross-attention of the lower half of the text
tower), to say where they are and how far apart. The helper heads are thrown away. Same seed, threads, versions: same weights.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from training import cosine, in_parts, save, take_step
from transformers import BertTokenizerFast, BlipConfig, BlipForImageTextRetrieval, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from comp_cli.data import scenes

PATCH = 8
GRID = scenes.IMAGE_SIZE // PATCH
LONGEST, POSITIONS = 10, 16  # tokens of the longest caption; positions that the model has
NOUNS = [word for noun in (*scenes.SHAPES, "shape") for word in (noun, scenes.plural(noun))]
KINDS = {"colour": tuple(scenes.COLOURS), "shape": scenes.SHAPES, "size": tuple(scenes.SIZES)}


def build_processor() -> BlipProcessor:
    words = [*scenes.COLOURS, *scenes.SIZES, *scenes.NUMBERS, "a", "an", "and", *NOUNS]
    words += sorted({word for relation in scenes.RELATIONS for word in relation.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    tokenizer = BertTokenizerFast(vocab={t: i for i, t in enumerate(tokens)}, model_max_length=LONGEST)
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def build_model(tokenizer) -> BlipForImageTextRetrieval:
    common = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8, "initializer_range": 0.02}
    ids = {"bos_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id, "eos_token_id": None}
    text = common | ids | {"num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
    text["initializer_range"] = 0.05
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
        self.apart = nn.Linear(width, 2)

    def patch_loss(self, patches: torch.Tensor, scene_list: list[scenes.Scene]) -> torch.Tensor:
        """What covers each patch? patches (images, patches, width); class 0 is background."""
        return sum(
            F.cross_entropy(head(patches).flatten(0, 1).float(), patch_labels(scene_list, kind).flatten())
            for kind, head in self.patch.items()
        )

    def text_loss(self, text, targets: dict) -> torch.Tensor:
        """Do nouns look at their things, and say where they are (half way up)? How far apart are two things (at [CLS],
        a layer before the end), and how many are there (at [CLS])?"""
        half = len(text.cross_attentions) // 2
        looked = torch.stack(text.cross_attentions[:half]).float().mean(2)  # (layers, captions, tokens, 1 + patches)
        on_thing = (looked[..., 1:] * targets["patches"]).sum(-1).clamp(min=1e-4)
        nouns = targets["patches"].any(-1).expand_as(on_thing)
        loss = -on_thing.log()[nouns].mean()
        loss = loss + known_error(self.place(text.hidden_states[half]), targets["place"])
        loss = loss + 4 * known_error(self.apart(text.hidden_states[-2][:, 0]), targets["apart"])
        counted = targets["number"] >= 0
        if not counted.any():
            return loss
        number = self.number(text.last_hidden_state[counted, 0]).float()
        return loss + 0.3 * F.cross_entropy(number, targets["number"][counted])


def known_error(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared distance where the target is known (not nan). (..., 2) each."""
    known = ~target.isnan().any(-1)
    return (found.float()[known] - target[known]).square().sum(-1).mean() if known.any() else found.sum() * 0


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
    """Every caption meets both scenes of its pair, so labels are balanced for each caption and for each image.

    Captions are in the order of their images, as many for each: row r belongs to image r // (2 * captions).
    """
    scene_list, caption_list, labels, backgrounds = [], [], [], []
    for _ in range(pairs):
        two, found = draw_pair(rng, easy, captions, families)
        scene_list += two
        backgrounds += [rng.getrandbits(32)] * 2
        for image in (0, 1):
            for side, captions_of_side in enumerate(found):
                caption_list += captions_of_side
                labels += [int(image == side)] * len(captions_of_side)
    images = [scenes.render(s, b) for s, b in zip(scene_list, backgrounds, strict=True)]
    batch = {"scenes": scene_list, **processor.image_processor(images, return_tensors="pt")}
    if not caption_list:
        return batch
    texts = [caption.text for caption in caption_list]
    text = processor.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    of_caption = [scene for scene in scene_list for _ in range(2 * captions)]
    targets = text_targets(processor.tokenizer, text["input_ids"], caption_list, of_caption)
    return batch | {"text": text, "labels": torch.tensor(labels), "targets": targets}


def text_targets(tokenizer, input_ids: torch.Tensor, captions: list, scene_list: list) -> dict:
    """For each noun the patches of its things, and their place in [-1, 1] where there is one; for two things how far they
    are apart; for counts the number. nan and -1 where there is nothing to say."""
    is_noun = torch.isin(input_ids, torch.tensor(tokenizer.convert_tokens_to_ids(NOUNS)))
    place = torch.full((*input_ids.shape, 2), torch.nan)
    apart = torch.full((len(captions), 2), torch.nan)
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
        if len(found) == 2 and all(len(things) == 1 for things in found):
            (a,), (b,) = found
            apart[row] = torch.tensor([a.x - b.x, a.y - b.y]) / (scenes.IMAGE_SIZE / 2)
    return {"place": place, "apart": apart, "number": number, "patches": patches}


def step_loss(model, helpers, batch: dict, matching: bool) -> torch.Tensor:
    image = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    loss = helpers.patch_loss(image[:, 1:], batch["scenes"])
    if not matching:
        return loss
    text = read_captions(model, image, **batch["text"])
    logits = model.itm_head(text.last_hidden_state[:, 0]).float()
    return F.cross_entropy(logits, batch["labels"]) + 0.3 * loss + 0.5 * helpers.text_loss(text, batch["targets"])


def read_captions(model, image: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
    """The text tower's outputs for each caption. All captions of an image go through as one sequence that a mask keeps
    apart, so that the keys and values of the image tokens are made once for all of them."""
    images, (captions, tokens) = len(image), input_ids.shape
    each = captions // images
    caption_of = torch.arange(each).repeat_interleave(tokens)
    seen = (caption_of[:, None] == caption_of) & attention_mask.view(images, 1, 1, -1).bool()
    text = model.text_encoder(
        input_ids=input_ids.view(images, -1),
        attention_mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min),
        position_ids=torch.arange(tokens).repeat(each).unsqueeze(0),
        encoder_hidden_states=image,
        output_hidden_states=True,
        output_attentions=True,
    )
    maps = [m.unflatten(2, (each, tokens)).transpose(1, 2).flatten(0, 1) for m in text.cross_attentions]
    states = [s.reshape(captions, tokens, -1) for s in text.hidden_states]
    return SimpleNamespace(last_hidden_state=states[-1], hidden_states=states, cross_attentions=maps)


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
    """One part of the training; `easy` is the share of pairs of unrelated scenes at its start and at its end. The rate is
    a cosine from `lr`, that would reach zero after `horizon` steps, with a warm-up."""

    name: str
    steps: int
    pairs: int
    captions: int
    easy: tuple[float, float]
    lr: float
    horizon: int
    families: tuple[str, ...] = scenes.FAMILIES

    def rate(self, step: int) -> float:
        return cosine(self.lr, step, self.horizon)


SLOW = ("attribute", "binding", "count", "count", "relation", "relation", "relation")  # what takes longest, more often
COUNTS = ("attribute", "binding", "count", "count", "count", "relation")
PARTS = (
    Part("patches", 1000, pairs=24, captions=0, easy=(1, 1), lr=7e-4, horizon=4400),
    Part("single things", 428, pairs=12, captions=4, easy=(1, 1), lr=6e-4, horizon=3400, families=("attribute",)),
    Part("everything", 1700, pairs=16, captions=4, easy=(0.9, 0.1), lr=5.5e-4, horizon=3000),
    Part("the hard ones", 900, pairs=16, captions=4, easy=(0.1, 0.1), lr=5e-4, horizon=2400, families=SLOW),
    Part("settling", 700, pairs=16, captions=4, easy=(0.1, 0.1), lr=4e-4, horizon=700, families=COUNTS),
)


def train_part(
    part: Part, model, processor, rng: random.Random, args: argparse.Namespace, tell: Callable[[dict], None]
) -> None:
    """Train, with helper heads and an optimiser of the part's own."""
    helpers = Helpers(model.config.vision_config.hidden_size)
    weights = [*model.parameters(), *helpers.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=part.lr, weight_decay=0.02, betas=(0.9, 0.98))
    running = 0.0
    for step in range(1, part.steps + 1):
        # From unrelated scenes to scenes with one difference, within the first 1200 steps.
        easy = part.easy[0] + (part.easy[1] - part.easy[0]) * min(1.0, step / 1200)
        batch = draw_batch(rng, processor, part.pairs, easy, part.captions, part.families)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(model, helpers, batch, matching=part.captions > 0)
        take_step(loss, weights, optimiser, part.rate(step))
        running += loss.item()
        if step % args.every == 0 or step == part.steps:
            line = {"part": part.name, "step": step, "loss": round(running / args.every, 4)}
            tell(line | ({"validation": accuracy(model, processor, "validation", 512)} if part.captions else {}))
            running = 0.0
            save(model, processor, args.output)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    if args.go_on_after:
        model = BlipForImageTextRetrieval.from_pretrained(args.output)
    in_parts(args, PARTS, model, processor, train_part, accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--go-on-after", choices=[part.name for part in PARTS[:-1]], help="start from what --output holds")
    parser.add_argument("--every", type=int, default=100)
    train(parser.parse_args())
