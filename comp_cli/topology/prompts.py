"""Prompts of decoders that read images: what a pair is asked with, and where in the tokens the answer stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # label of a token that nobody has to predict, as in transformers


def as_asked(processor: Any, question: str, plain: str) -> str:
    """The prompt with a placeholder for one image, up to where the answer begins: by the chat template of the processor, or by
    `plain`, into which the question is put."""
    if getattr(processor, "chat_template", None) is None:
        return plain.format(question)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    asked: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return asked


def shortened(tokenizer: Any, text: str, most: int) -> tuple[str, bool]:
    """The beginning of a text, of so many tokens at most, and whether anything was cut."""
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return (text, False) if len(places) <= most else (text[: places[most - 1][1]], True)


def with_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[int, list[int]]:
    """How many of the last tokens of a prompt change when an answer follows, and the tokens from there on: the answer's, as
    the tokenizer writes it behind the prompt, and the end of a text."""
    between = "" if prompt[-1:].isspace() or prompt.endswith(">") else " "
    alone = tokenizer(prompt)["input_ids"]
    whole = tokenizer(f"{prompt}{between}{answer}{tokenizer.eos_token or ''}")["input_ids"]
    same = next((place for place, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
    twice = whole[-2:] == [tokenizer.eos_token_id] * 2  # by a tokenizer that ends texts itself
    return len(alone) - same, whole[same : len(whole) - twice]


def side_by_side(rows: Sequence[Mapping[str, Sequence[int]]], fill: Mapping[str, int], left: bool = False) -> dict[str, Tensor]:
    """Rows of tokens as tensors (rows, tokens), filled up at the right, or at the left."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, values: Sequence[int]) -> list[int]:
        rest = [fill[name]] * (longest - len(values))
        return [*rest, *values] if left else [*values, *rest]

    return {name: torch.tensor([filled(name, row[name]) for row in rows]) for name in fill}


def without_answers(inputs: Mapping[str, Tensor], labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The named inputs (batch, tokens) up to the first token that is predicted, moved to the right end: zeros before it."""
    import torch

    asked = (labels != IGNORED).int().argmax(1)  # (batch,) tokens of each prompt
    longest = int(asked.max())
    place = torch.arange(longest, device=labels.device) - (longest - asked)[:, None]
    return {name: inputs[name].gather(1, place.clamp(min=0)) * (place >= 0) for name in names}
