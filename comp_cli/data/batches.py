"""Image-text pairs, of the rows of a table or of generated scenes, and batches of model inputs made of them."""

import hashlib
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from ..families.base import ANSWER_INPUTS, ANSWER_TOKENS
from . import scenes
from .rows import Pair


@dataclass(frozen=True)
class Batch:
    """Model inputs, each (batch, ...), and the labels where they are known: integers, for each sample or token one or more.

    cut: how many of the samples have a text, or an answer to it, that is longer than the inputs hold.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    cut: int = 0

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels.to(device))


def scene_pairs(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes with captions. Unlabelled for models that were never trained on them."""
    for example in scenes.examples(split, count, seed):
        label = example.label if labelled else None
        yield Pair(scenes.render(example.scene, example.background), example.caption.text, label)


def caption_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes, each with a description of all that is in it."""
    for scene, background in scenes.images(split, count, seed):
        text = scenes.describe(scene)  # what is described alike counts as one image
        yield Pair(scenes.render(scene, background), text, image_id=zlib.crc32(text.encode()), known=labelled)


def vqa_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes, each with a question about it and the answer."""
    for number, (scene, background) in enumerate(scenes.images(split, count, seed)):
        question, answer = scenes.ask(random.Random(background), scene)
        yield Pair(scenes.render(scene, background), question, image_id=number, answers=(answer,), known=labelled)


@dataclass(frozen=True)
class Collator:
    """Makes batches of pairs: what the processor makes of them that the model takes, and the labels.

    inputs: names of the model's inputs. padding: "longest" or "max_length"; texts are cut at `max_text` tokens.
    written: the input that is a text as the model writes it, and the token it begins with in place of the tokenizer's.
    """

    processor: Any
    inputs: tuple[str, ...]
    padding: str
    max_text: int
    labels: Callable[[Sequence[Pair], Mapping[str, Tensor]], Tensor | None]
    prompt: str = "{}"  # what a text is put into
    written: tuple[str, int] | None = None

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        made, cut = {}, [False] * len(pairs)
        if "input_ids" in self.inputs:
            texts = [self.prompt.format(pair.text) for pair in pairs]
            made |= self.processor(text=texts, padding=self.padding, **self._limits())
            cut = self.are_cut(texts, made["input_ids"].shape[1])
        if "pixel_values" in self.inputs:
            made["pixel_values"] = torch.stack([self.seen(pair).image for pair in pairs])
        if ANSWER_INPUTS[0] in self.inputs:
            written = [pair.answer for pair in pairs]
            answers = self.processor.tokenizer(written, padding=True, **self._limits())
            made |= zip(ANSWER_INPUTS, (answers["input_ids"], answers["attention_mask"]), strict=True)
            cut = map(or_, cut, self.are_cut(written, answers["input_ids"].shape[1]))
        inputs = {name: made[name] for name in self.inputs}
        if self.written:
            name, begin = self.written
            inputs[name][:, 0] = begin
        labels = self.labels(pairs, inputs) if all(pair.known for pair in pairs) else None
        return Batch(inputs, labels, sum(cut))

    def _limits(self) -> dict[str, Any]:
        return {"truncation": True, "max_length": self.max_text, "return_tensors": "pt"}

    def seen(self, pair: Pair) -> Pair:
        """The pair with what the processor makes of its image in the image's place, (channels, height, width), so that the
        picture, of any size, need not stay in memory."""
        if "pixel_values" not in self.inputs:
            return replace(pair, image=None)
        if isinstance(pair.image, Tensor):
            return pair
        made = self.processor(images=[pair.image.convert("RGB")], return_tensors="pt")
        return replace(pair, image=made["pixel_values"][0])

    def are_cut(self, texts: Sequence[str], width: int | None = None) -> list[bool]:
        """Which texts have more tokens than are read; `width`: those of the longest one, as far as it is read."""
        if "input_ids" not in self.inputs or (width is not None and width < self.max_text):
            return [False] * len(texts)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return [len(ids) > self.max_text for ids in tokenizer(list(texts), verbose=False)["input_ids"]]

    def batches(self, pairs: Iterable[Pair], batch_size: int) -> Iterator[Batch]:
        """Batches in the order of the pairs. Of their pictures one at a time is in memory."""
        pairs = map(self.seen, pairs)
        while chunk := list(islice(pairs, batch_size)):
            yield self(chunk)


def fingerprint(batches: Iterable[Batch]) -> str:
    """What the batches hold, wherever it came from: 16 hexadecimal digits of a SHA-256 over inputs and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()) + [("labels", batch.labels)]:
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def random_inputs(config, family: Family, batch: int, text_tokens: int, *, padded: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Noise of the sizes that a model of this config takes; the last text ends with `padded` tokens of padding. Every text
    ends with the model's end-of-text token, where it is read there. The last answer is a token shorter, if anything is padded.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {tower.name: getattr(config, tower.config) if tower.config else config for tower in family.towers}
    made = {}
    if "language" in parts:
        text = parts["language"]
        if family.padding == "max_length":
            text_tokens, padded = text.max_position_embeddings, 0
        mask = torch.ones(batch, text_tokens, dtype=torch.long)
        mask[-1, text_tokens - padded :] = 0
        last = text.vocab_size - 1
        ids = torch.randint(min(5, last), last, (batch, text_tokens), generator=generator)
        if family.tower("language").text_end:
            end = last if text.eos_token_id == 2 else text.eos_token_id
            ids = torch.where(ids == end, end - 1, ids).scatter(1, mask.sum(1, keepdim=True) - 1, end)
        made = {"input_ids": ids * mask, "attention_mask": mask}
    if "answer" in parts:
        last = parts["answer"].vocab_size - 1
        mask = torch.ones(batch, ANSWER_TOKENS, dtype=torch.long)
        mask[-1, ANSWER_TOKENS - min(padded, 1) :] = 0
        ids = torch.randint(min(5, last), last, mask.shape, generator=generator)
        made |= zip(ANSWER_INPUTS, (ids * mask, mask), strict=True)
    if "vision" in parts:
        side = parts["vision"].image_size
        made["pixel_values"] = torch.randn(batch, 3, side, side, generator=generator)
    return {name: made[name] for name in family.inputs}
