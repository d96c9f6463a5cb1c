"""Captions and answers that a model writes about pairs, greedily, and their score."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import nn

from ..data.rows import Pair
from ..tasks import text_metrics
from .dense import Dense


def generate(
    model: nn.Module, dense: Dense, pairs: Sequence[Pair], batch_size: int, advance: Callable[[int], None]
) -> list[str]:
    """A caption of each pair's image, or an answer to its question. `model` is of the dense model's class.

    Questions of a batch are of one length: transformers does not mask the padding of others (see families/blip.py).
    """
    task, processor, family = dense.task, dense.processor, dense.family
    weight = next(model.parameters())
    lengths = [len(processor.tokenizer(pair.text)["input_ids"]) if task.has_answers else 0 for pair in pairs]
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    found: dict[int, str] = {}
    model.eval()
    for _, group in groupby(order, key=lengths.__getitem__):
        alike = list(group)
        for chunk in (alike[i : i + batch_size] for i in range(0, len(alike), batch_size)):
            batch = dense.collate_whole([pairs[i] for i in chunk]).to(weight.device, weight.dtype)
            tokens = family.topology.generate(family, model, batch.inputs, task.new_tokens)
            found |= zip(chunk, processor.batch_decode(tokens, skip_special_tokens=True), strict=True)
            advance(len(chunk))
    return [found[i] for i in range(len(pairs))]


def judge(
    model: nn.Module,
    dense: Dense,
    about: Sequence[Pair],
    known: Sequence[tuple[str, ...]],
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Write about `text_metrics.references`, and score it."""
    with torch.inference_mode():
        return text_metrics.score(dense.task, generate(model, dense, about, batch_size, advance), known)
