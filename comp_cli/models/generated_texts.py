"""Captions and answers that a model writes about pairs, greedily, and their score."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import nn

from ..data.rows import Pair
from ..tasks import text_metrics
from .dense import Dense

Chunks = Callable[[list[list[int]]], list[list[int]]]
Texts = Callable[[list[list[str]]], list[list[str]]]


def generate(
    model: nn.Module,
    dense: Dense,
    pairs: Sequence[Pair],
    batch_size: int,
    advance: Callable[[int], None],
    share: Chunks = list,
    gathered: Texts = list,
) -> list[str]:
    """A caption of each pair's image, or an answer to its question. `model` is of the dense model's class.

    Questions of a batch are of one length: transformers does not mask the padding of others (see families/blip.py). Where
    several processes write, `share` says which batches are this one's, and `gathered` makes the texts of all of what it wrote.
    """
    task, processor, family = dense.task, dense.processor, dense.family
    weight = next(model.parameters())
    lengths = [len(processor.tokenizer(pair.text)["input_ids"]) if task.has_answers else 0 for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    chunks: list[list[int]] = []
    for _, group in groupby(order, key=lengths.__getitem__):
        alike = list(group)
        chunks += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]

    def write(chunk: list[int]) -> list[str]:
        batch = dense.collate_whole([pairs[i] for i in chunk]).to(weight.device, weight.dtype)
        tokens = family.topology.generate(family, model, batch.inputs, task.new_tokens)
        advance(len(chunk))
        return list(processor.batch_decode(tokens, skip_special_tokens=True))

    model.eval()
    texts = gathered([write(chunk) for chunk in share(chunks)])
    found = {i: text for chunk, written in zip(chunks, texts, strict=True) for i, text in zip(chunk, written, strict=True)}
    return [found[i] for i in range(len(pairs))]


def judge(
    model: nn.Module,
    dense: Dense,
    about: Sequence[Pair],
    known: Sequence[tuple[str, ...]],
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
    share: Chunks = list,
    gathered: Texts = list,
) -> dict[str, float]:
    """Write about `text_metrics.references`, and score it. The last two as in `generate`."""
    with torch.inference_mode():
        written = generate(model, dense, about, batch_size, advance, share, gathered)
        return text_metrics.score(dense.task, written, known)
