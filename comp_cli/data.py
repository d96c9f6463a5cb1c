"""Image-text pairs, and batches of model inputs made of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from . import scenes


@dataclass(frozen=True)
class Pair:
    """An image, a text, and whether they match (1), do not (0), or nobody said (None)."""

    image: Image.Image
    text: str
    label: int | None = None


@dataclass(frozen=True)
class Batch:
    """Model inputs, each (batch, ...), and the labels (batch,) where they are known."""

    inputs: dict[str, Tensor]
    labels: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in self.inputs.items()
        }
        return Batch(inputs, None if self.labels is None else self.labels.to(device))


def scene_pairs(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes with captions. Unlabelled for models that were never trained on them."""
    for example in scenes.examples(split, count, seed):
        label = example.label if labelled else None
        yield Pair(scenes.render(example.scene, example.background), example.caption.text, label)


def make_batches(pairs: Iterable[Pair], processor, batch_size: int, max_text: int) -> Iterator[Batch]:
    """Batches in the order of the pairs; texts longer than `max_text` tokens are cut."""
    pairs = iter(pairs)
    while chunk := list(islice(pairs, batch_size)):
        yield make_batch(chunk, processor, max_text)


def make_batch(pairs: Sequence[Pair], processor, max_text: int) -> Batch:
    images = [pair.image.convert("RGB") for pair in pairs]
    texts = [pair.text for pair in pairs]
    inputs = processor(images=images, text=texts, padding=True, truncation=True, max_length=max_text, return_tensors="pt")
    labels = None
    if all(pair.label is not None for pair in pairs):
        labels = torch.tensor([pair.label for pair in pairs])
    names = ("pixel_values", "input_ids", "attention_mask")
    return Batch({name: inputs[name] for name in names}, labels)
