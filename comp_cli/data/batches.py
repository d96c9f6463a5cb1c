"""Batches of model inputs, made of image-text pairs or of noise."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..families import Family
from ..topology import Topology
from .rows import Pair


@dataclass(frozen=True)
class Batch:
    """Model inputs, each (batch, ...), and the labels where they are known: integers, for each sample or token one or more.

    rows: of inputs that have not one row for each sample, how many each has; see `Topology.rows`.

    cut: how many of the samples have a text, or an answer to it, that is longer than the inputs hold. text_tokens: tokens of
    all texts together, by stream; see `Topology.count_tokens`.
    """

    inputs: dict[str, Tensor]
    labels: Tensor | None
    cut: int = 0
    text_tokens: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)

    def piece(self, begin: int, end: int) -> "Batch":
        """Some of the samples, without their labels."""

        def part(name: str, tensor: Tensor) -> Tensor:
            counts = self.rows.get(name)
            return tensor[begin:end] if counts is None else tensor[sum(counts[:begin]) : sum(counts[:end])]

        inputs = {name: part(name, tensor) for name, tensor in self.inputs.items()}
        rows = {name: counts[begin:end] for name, counts in self.rows.items()}
        return replace(self, inputs=inputs, labels=None, rows=rows)

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class Collator:
    """Makes batches of pairs: what the processor makes of them that the model takes, and the labels.

    Texts are cut at `max_text` tokens. first_token: what texts that the model writes begin with, see `Topology.first_token`.
    """

    processor: Any
    topology: Topology
    max_text: int
    labels: Callable[[Sequence[Pair], Mapping[str, Tensor]], Tensor | None]
    prompt: str = "{}"  # what a text is put into
    first_token: int | None = None
    answers: bool = False  # whether texts are questions, and their answers are what is written

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        made, cut = self.topology.collate(self, pairs)
        inputs = {name: made[name] for name in self.topology.inputs}
        labels = self.labels(pairs, inputs) if all(pair.known for pair in pairs) else None
        tokens = self.topology.count_tokens(inputs, self.processor)
        return Batch(inputs, labels, sum(cut), tokens, self.topology.rows(inputs))

    @property
    def limits(self) -> dict[str, Any]:
        """Arguments of a tokenizer."""
        return {"truncation": True, "max_length": self.max_text, "return_tensors": "pt"}

    def pixels(self, pairs: Sequence[Pair]) -> Tensor:
        """(pairs, channels, height, width)."""
        return torch.stack([self.seen(pair).image for pair in pairs])

    def seen(self, pair: Pair) -> Pair:
        """The pair with what the processor makes of its image in the image's place, (channels, height, width), so that the
        picture, of any size, need not stay in memory. Where pixels and text are made together, the pair as it is."""
        if not self.topology.reads_images:
            return replace(pair, image=None)
        if isinstance(pair.image, Tensor) or not self.topology.pictures_apart:
            return pair
        made = self.processor(images=[pair.image.convert("RGB")], return_tensors="pt")
        return replace(pair, image=made["pixel_values"][0])

    def are_cut(self, texts: Sequence[str], width: int | None = None) -> list[bool]:
        """Which texts have more tokens than are read; `width`: those of the longest one, as far as it is read."""
        _, tokenizer = self.topology.parts_of(self.processor)
        if tokenizer is None or (width is not None and width < self.max_text):
            return [False] * len(texts)
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
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def random_inputs(
    config: PretrainedConfig, family: Family, batch: int, text_tokens: int, *, padded: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Noise of the sizes that a model of this config takes; see `Topology.random_inputs`."""
    return family.topology.random_inputs(family, config.to_dict(), batch, text_tokens, padded=padded, seed=seed)
