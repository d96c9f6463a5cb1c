"""Retrieval and zero-shot classification: which texts and images belong together, among many."""

import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.rows import Pair
from .base import Outputs, Ranking, Task, unwrapped


@dataclass(frozen=True)
class Retrieval(Task):
    """Which text belongs to an image, which image to a text, among all samples. Labels: numbers of the images and of the texts,
    (rows, 2): a text that several images have is right for each of them."""

    name: str = "retrieval"
    outputs: tuple[str, ...] = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    judged: tuple[str, ...] = ("text_embeds", "image_embeds")
    metric: str = "recall@1"
    compares = "every pair counts as a match: what is compared is which texts and images of all pairs belong together"

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        """Embeddings of length 1, and the scale of the logits (a bias changes no choice)."""
        outputs = model(**inputs)
        images, texts = (F.normalize(getattr(outputs, name).float(), dim=-1) for name in ("image_embeds", "text_embeds"))
        scale: Any = unwrapped(model).logit_scale
        return images, texts, scale.float().exp().expand(len(images))

    def features(self, outputs: Outputs) -> Tensor:
        return torch.cat(outputs[:2], dim=-1)

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        images, texts, scale = outputs
        number = torch.arange(len(images), device=images.device)
        labels = number if labels is None else labels
        if labels.ndim == 1:  # of images alone: no text is that of another pair
            labels = torch.stack((labels, number), dim=-1)
        first = firsts(labels[:, 0])  # an image with several texts is one candidate
        logits = (images * scale.unsqueeze(-1)) @ texts.T
        right = belonging(labels)
        return [Ranking(logits[first], right[first]), Ranking(logits.T[:, first], right.T[:, first])]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([(pair.image_id, text_number(pair.text)) for pair in pairs])

    def shared(self, labels: Tensor | None) -> int:
        if labels is None:
            return 0
        images, texts = (column[:, None] == column for column in labels.T)
        return int((texts & ~images).any(-1).sum())

    def predictions(self, outputs: Outputs) -> Tensor:
        """No guess: every text belongs to its image."""
        return torch.arange(len(outputs[0]))

    def said(self, outputs: Outputs) -> str:
        images, texts, _ = outputs
        return f"cosine {(images * texts).sum().item():.2f}"

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        to_text, to_image = rankings
        found = {"recall@1": (to_text.top_k_accuracy() + to_image.top_k_accuracy()) / 2}
        for name, ranking in ("image to text", to_text), ("text to image", to_image):
            found |= {f"{name} recall@{first}": ranking.top_k_accuracy(first) for first in (1, 5, 10)}
        return found

    def decisions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        images, texts = (F.normalize(outputs[name], dim=-1) for name in ("image_embeds", "text_embeds"))
        return images @ texts.T


@dataclass(frozen=True)
class ZeroShot(Retrieval):
    """Which class an image is of: the texts are names of classes, the candidates all that occur. Labels: (rows,), of texts."""

    name: str = "zero-shot"
    metric: str = "accuracy"
    prompt = "a photo of a {}."
    compares = "texts are names of classes: what is compared is the class of an image among all that occur"

    def rankings(self, outputs: Outputs, labels: Tensor | None) -> list[Ranking]:
        images, texts, scale = outputs
        labels = torch.arange(len(images), device=images.device) if labels is None else labels
        first = firsts(labels)
        return [Ranking((images * scale.unsqueeze(-1)) @ texts[first].T, labels[:, None] == labels[first])]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([text_number(pair.text) for pair in pairs])

    def shared(self, labels: Tensor | None) -> int:
        return 0

    def metrics(self, rankings: list[Ranking]) -> dict[str, float]:
        return {"accuracy": rankings[0].top_k_accuracy(), "top-5 accuracy": rankings[0].top_k_accuracy(5)}


def firsts(labels: Tensor) -> Tensor:
    """Which rows are the first with their label, (batch,) booleans."""
    _, kind = labels.unique(return_inverse=True)
    row = torch.arange(len(labels), device=labels.device)
    return torch.full_like(row, len(row)).scatter_reduce(0, kind, row, "amin")[kind] == row


def text_number(text: str) -> int:
    """Texts that differ in capitals, space or the way letters are put together only are one, as for most tokenizers."""
    return zlib.crc32(" ".join(unicodedata.normalize("NFC", text).casefold().split()).encode())


def belonging(labels: Tensor) -> Tensor:
    """Which texts are right for which images, (rows, rows) booleans, of the numbers of both, (rows, 2): every text that a pair
    with the same image has, wherever it stands."""
    images, texts = (column[:, None] == column for column in labels.T)
    return (images.float() @ texts.float()) > 0
