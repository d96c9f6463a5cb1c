"""Train the small CLIP of real pictures: it finds the name of an emoji among all, and the reverse, in a style it never saw.

    python scripts/write_emoji.py out/emoji
    python scripts/train_emoji.py out/emoji --output out/emoji-clip --log benchmarks/results/emoji_training.jsonl

From scratch, with the contrastive loss: a batch has each emoji in several styles, all right for its text, and a table of one
vector an emoji, thrown away in the end, stands in for all that are not in the batch. What style is, augmentation takes away:
pictures are turned, moved, recoloured, and blended with another style. The test split is looked at once, at the end. Same
seed, threads, versions: same weights.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from train_clip import TASK, build_model, build_processor, fit
from transformers import CLIPModel
from write_emoji import IMAGE_SIZE, WORDS, text_of, words

from comp_cli.data.batches import Batch, Collator
from comp_cli.data.rows import Pair, image_number
from comp_cli.families import FAMILIES
from comp_cli.tasks import comparison
from comp_cli.tasks.base import Ranking

LONGEST = WORDS + 2  # tokens of a text, with its start and end


@dataclass(frozen=True)
class Emoji:
    """The training pictures of an emoji, rows of a tensor, one a style, and what it is called."""

    rows: list[int]
    name: str
    tags: list[str]


def read_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def by_emoji(rows: list[dict[str, Any]]) -> list[Emoji]:
    """In the order of their first rows."""
    found = defaultdict(list)
    for number, row in enumerate(rows):
        found[row["emoji"]].append(number)
    return [Emoji(numbers, rows[numbers[0]]["name"], rows[numbers[0]]["tags"]) for numbers in found.values()]


def vocabulary(emoji: list[Emoji]) -> list[str]:
    """All words of all texts; with what follows, a comma may be part of one: "),"."""
    parts = {part for one in emoji for part in (one.name, *one.tags)}
    return sorted({word for part in parts for word in (*words(part), *words(f"{part},"))})


def read_pictures(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """(rows, 3, IMAGE_SIZE, IMAGE_SIZE) bytes."""
    arrays = [numpy.asarray(Image.open(folder / row["file_name"])) for row in rows]
    return torch.from_numpy(numpy.stack(arrays)).movedim(-1, 1).contiguous()


class Table(nn.Module):
    """One vector of length 1 for each emoji, (emoji, width): of its words, and one of its own. Emoji that share rare words are
    neighbours from the start, so that pictures find the kind before the one."""

    def __init__(self, emoji: list[Emoji], width: int):
        super().__init__()
        own = [set(words(" ".join([one.name, *one.tags]))) for one in emoji]
        place = {word: column for column, word in enumerate(sorted(set.union(*own)))}
        rows, columns = zip(*((row, place[word]) for row, found in enumerate(own) for word in sorted(found)), strict=True)
        has = torch.zeros(len(emoji), len(place)).index_put((torch.tensor(rows), torch.tensor(columns)), torch.tensor(1.0))
        weighted = has * (len(emoji) / has.sum(0)).log()
        self.register_buffer("shares", F.normalize(weighted, p=1, dim=-1))
        self.words = nn.Parameter(0.3 * torch.randn(len(place), width))
        self.own = nn.Parameter(0.1 * torch.randn(len(emoji), width))

    def forward(self) -> Tensor:
        return F.normalize(self.shares @ self.words + self.own, dim=-1)


def spread(count: int, amount: float) -> Tensor:
    """(count,) numbers from -amount to amount."""
    return (2 * torch.rand(count) - 1) * amount


def moved(pictures: Tensor) -> Tensor:
    """Turned, scaled, sheared and moved a little, each in its way; what comes in is white. (pictures, 3, side, side)."""
    count = len(pictures)
    angle, scale = spread(count, 0.15), 1 + spread(count, 0.15)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(-1, 2, 2) * scale.view(-1, 1, 1)
    skew = torch.eye(2) + spread(4 * count, 0.08).view(-1, 2, 2)
    shift = spread(2 * count, 0.1).view(-1, 2, 1)
    grid = F.affine_grid(torch.cat((turn @ skew, shift), -1), list(pictures.shape), align_corners=False)
    return 1 + F.grid_sample(pictures - 1, grid, padding_mode="zeros", align_corners=False)


def recoloured(pictures: Tensor) -> Tensor:
    """Other colours and brightness; a few of them grey. White stays white. (pictures, 3, side, side), 0 to 1."""
    count = len(pictures)
    mix = torch.eye(3) + spread(9 * count, 0.2).view(-1, 3, 3)
    mix = mix / mix.sum(-1, keepdim=True)
    grey = torch.full((3, 3), 1 / 3).expand_as(mix)
    mix = torch.where(torch.rand(count, 1, 1) < 0.15, grey, mix)
    gamma = spread(count, 0.4).exp().view(-1, 1, 1, 1)
    return (mix @ pictures.flatten(2)).view_as(pictures).clamp(1e-3, 1) ** gamma


def draw(emoji: list[Emoji], pictures: Tensor, tokenizer, many: int, styles: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`many` emoji, each in `styles` styles: their numbers, augmented pictures (many * styles, 3, side, side) from 0 to 1,
    and texts, each the name with some of its tags."""
    chosen = torch.randperm(len(emoji))[:many]
    rows, others, texts = [], [], []
    for one in (emoji[i] for i in chosen.tolist()):
        order = [one.rows[i % len(one.rows)] for i in torch.randperm(styles * len(one.rows)).tolist()]
        rows += order[:styles]
        others += order[-styles:]
        tags = [one.tags[i] for i in torch.randperm(len(one.tags)).tolist()]
        texts.append(text_of(one.name, tags[: int(torch.randint(len(tags) + 1, ()))]))
    first, second = (moved(pictures[kind].float() / 255) for kind in (rows, others))
    share = (torch.rand(len(first), 1, 1, 1) - 0.6).clamp(min=0)  # of four in ten, up to two fifths are another style
    blended = recoloured(first * (1 - share) + second * share)
    return chosen, blended, dict(tokenizer(texts, padding=True, return_tensors="pt"))


def normalised(pictures: Tensor, image_processor) -> Tensor:
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (image_processor.image_mean, image_processor.image_std))
    return (pictures - mean) / std


def step_loss(model: CLIPModel, table: Table, batch: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
    """Images and texts of a batch find one another, and both their vector in the table of all emoji."""
    chosen, pixels, texts = batch
    out = model(pixel_values=pixels, **texts)
    images, texts = (F.normalize(found.float(), dim=-1) for found in (out.image_embeds, out.text_embeds))
    with torch.autocast("cpu", enabled=False):
        every, scale = table(), model.logit_scale.exp()
        own = torch.arange(len(chosen)).repeat_interleave(len(images) // len(chosen))
        pairs = scale * images @ texts.T
        right = own[:, None] == torch.arange(len(chosen))
        matched = comparison.loss([Ranking(pairs, right), Ranking(pairs.T, right.T)])
        known = F.cross_entropy(scale * images @ every.T, chosen[own])
        return matched + known + F.cross_entropy(scale * texts @ every.T, chosen)


def batches(folder: Path, split: str, processor) -> list[Batch]:
    """All pairs of a split as the benchmark reads them."""
    collate = Collator(processor, FAMILIES["clip"].topology, LONGEST, TASK.labels)
    paths = [(folder / row["file_name"], row["text"]) for row in read_rows(folder, split)]
    pairs = (Pair(Image.open(path), text, None, image_number(path.read_bytes())) for path, text in paths)
    return list(collate.batches(pairs, 64))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rows = read_rows(args.folder, "train")
    emoji, pictures = by_emoji(rows), read_pictures(args.folder, rows)
    processor = build_processor(vocabulary(emoji), LONGEST, IMAGE_SIZE)
    model = build_model(processor.tokenizer, IMAGE_SIZE)
    table = Table(emoji, model.config.projection_dim)
    validation = batches(args.folder, "validation", processor)

    def draw_batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        chosen, drawn, texts = draw(emoji, pictures, processor.tokenizer, args.emoji, args.styles)
        return chosen, normalised(drawn, processor.image_processor), texts

    def judge(step: int) -> dict[str, Any]:
        splits = {"validation": validation}
        if step == args.steps:
            splits["test"] = batches(args.folder, "test", processor)
        found = {split: comparison.evaluate(model, TASK, made).metrics for split, made in splits.items()}
        model.train()
        return {split: {name: round(value, 4) for name, value in metrics.items()} for split, metrics in found.items()}

    def loss_of(batch: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
        return step_loss(model, table, batch)

    fit(model, processor, table, args, draw=draw_batch, loss_of=loss_of, judge=judge, weight_decay=args.weight_decay)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what scripts/write_emoji.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--emoji", type=int, default=40, help="in a batch")
    parser.add_argument("--styles", type=int, default=3, help="of each emoji in a batch")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=200)
    train(parser.parse_args())
