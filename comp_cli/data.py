"""Image-text pairs, from the rows of a table or from generated scenes, and batches of model inputs made of them."""

import hashlib
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from . import scenes
from .errors import REFUSED, USAGE, CompError
from .families import Family
from .families.base import ANSWER_INPUTS, ANSWER_TOKENS

COLUMN_NAMES = {
    "image": "image img picture photo image_path img_path image_file file_name filename file_path filepath path".split(),
    "text": "text texts caption captions sentence sentences question description".split(),
    "label": "label labels match matches matched is_match is_matched".split(),
    "answer": "answers answer multiple_choice_answer".split(),
}
LABELS = dict.fromkeys("1 true yes match matched matching positive".split(), 1)
LABELS |= dict.fromkeys("0 false no mismatch mismatched unmatched negative".split(), 0)
# Words in a path that name a split: those of `datasets`, the one to be careful with first.
SPLIT_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev"},
    "train": {"train", "training"},
}
Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Pair:
    """An image, a text, and whether they match (1), do not (0), or nobody said (None). Pairs with one image (one file,
    or the same content in a table) share its id. A text that is a question has answers, of one person or of several.

    known: whether the model was made for such pairs; if not, nothing in them is a label.
    """

    image: Image.Image
    text: str
    label: int | None = None
    image_id: int = 0
    answers: tuple[str, ...] = ()
    known: bool = True

    @property
    def answer(self) -> str | None:
        """The answer that most people gave."""
        return max(self.answers, key=self.answers.count, default=None)


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None to find one by its common names, "" for no labels or answers."""

    image: str | None = None
    text: str | None = None
    label: str | None = None
    answer: str | None = None


Takes = Callable[[Pair], bool]  # whether a pair is of use


class BadRow(ValueError):
    """A row that makes no pair: what is wrong with it, to be counted, and what it holds, to find it by."""

    def __init__(self, problem: str, found: str):
        super().__init__(f"{problem}: {found}")
        self.problem, self.found = problem, found


@dataclass
class Tally:
    """How many rows were looked at, how many pairs they gave, and which rows are bad: problem -> what they hold."""

    looked: int = 0
    given: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        return sum(map(len, self.bad.values()))

    def __str__(self) -> str:
        problems = "; ".join(f"{problem} ({len(found)}): {few(found)}" for problem, found in self.bad.items())
        return f"{self.skipped} of {self.looked} rows are bad: {problems}"


@dataclass(frozen=True)
class Batch:
    """Model inputs, each (batch, ...), and the labels where they are known: integers, for each sample or token one."""

    inputs: dict[str, Tensor]
    labels: Tensor | None

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        inputs = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in self.inputs.items()
        }
        return Batch(inputs, None if self.labels is None else self.labels.to(device))


def find_columns(found: Mapping[str, Any], named: Columns, owner: str) -> Columns:
    """The columns to read of those a table has (name -> type, or None). Exit 2 where one is missing or not clear."""
    from datasets import Image as ImageType

    listed = f"Columns: {', '.join(found)}."
    taken = {}
    for role, common in COLUMN_NAMES.items():
        name, flag = getattr(named, role), f"--{role}-column"
        if name is None:
            candidates = [column for column in found if column.lower() in common and column not in taken.values()]
            if role == "image":  # stored images before file names
                candidates = [column for column, kind in found.items() if isinstance(kind, ImageType)] or candidates
            if role == "answer":  # those of all people before the one that was chosen
                candidates = sorted(candidates, key=lambda column: common.index(column.lower()))[:1]
            if len(candidates) > 1:
                several = " or ".join(candidates)
                raise CompError(f"{owner}: is the {role} in {several}?", code=USAGE, hint=f"{listed} Name one with {flag}.")
            name = candidates[0] if candidates else ""
        elif name and name not in found:
            raise CompError(f"{owner} has no column {name!r}.", code=USAGE, hint=f"{listed} Name one with {flag}.")
        if not name and role not in ("label", "answer"):
            hint = f"{listed} Name the one with the {role} with {flag}."
            raise CompError(f"{owner}: no {role} column found.", code=USAGE, hint=hint)
        taken[role] = name or None
    return Columns(**taken)


def every(pair: Pair) -> bool:
    """Takes every pair."""
    return True


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    columns: Columns,
    folder: Path | None,
    limit: int,
    tally: Tally,
    takes: Takes = every,
) -> Iterator[Pair]:
    """Up to `limit` pairs of those that are taken. Bad rows are skipped and tallied; more than `limit` of them end the
    reading."""
    for row in rows:
        tally.looked += 1
        try:
            pairs = [pair for pair in read_row(row, columns, folder) if takes(pair)][: limit - tally.given]
        except BadRow as bad:
            tally.bad.setdefault(bad.problem, []).append(bad.found)
            pairs = []
        tally.given += len(pairs)
        yield from pairs
        if tally.given >= limit or tally.skipped > limit:
            return


def read_row(row: Mapping[str, Any], columns: Columns, folder: Path | None) -> list[Pair]:
    """The pairs of a row: one for each of its texts. Relative image paths start in `folder`; raises BadRow."""
    _, path = stored_image(row[columns.image])
    texts = row[columns.text] if isinstance(row[columns.text], list) else [row[columns.text]]
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise BadRow("no text", path or "an embedded image")
    label = None
    if columns.label and (label := read_label(row[columns.label])) is None:
        raise BadRow("no match or mismatch as label", repr(row[columns.label]))
    image = read_image(row[columns.image], folder)
    number = int.from_bytes(image_digest(row[columns.image])[:7], "big")
    answers = read_answers(row[columns.answer]) if columns.answer else ()
    return [Pair(image, text, label, number, answers) for text in texts]


def read_answers(value: Any) -> tuple[str, ...]:
    """The answers of a row: a text, or a list of texts or of records that hold one each under "answer", as VQA v2 has them."""
    if isinstance(value, dict):  # a list of records may come as a record of lists
        value = value.get("answer")
    parts = value if isinstance(value, list) else [value]
    found = [part.get("answer") if isinstance(part, dict) else part for part in parts]
    texts = [f"{part:g}" if isinstance(part, int | float) and part == part else part for part in found]  # a NaN is no answer
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def read_image(value: Any, folder: Path | None) -> Image.Image:
    """The image of a row; raises BadRow where it is missing or broken. Addresses are not fetched, but for the hub's own."""
    from datasets import Image as ImageType

    content, path = stored_image(value)
    place = os.path.join(folder or "", path or "")
    if content is None and "hf://" not in place and not (os.path.isabs(place) and os.path.isfile(place)):
        raise BadRow("missing image", path or "no path")
    try:
        return ImageType().decode_example({"bytes": content, "path": place})
    except Exception as error:  # Pillow raises nearly anything for a broken file
        raise BadRow("image that cannot be read", path or "embedded") from error


def stored_image(value: Any) -> tuple[bytes | None, str | None]:
    """Content and path of an image that a row holds as bytes, path, or both in a dict."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return (value, None) if isinstance(value, bytes) else (None, value if isinstance(value, str) else None)


def read_label(value: Any) -> int | None:
    """1 or 0 for a number, truth value or word that says so; else None."""
    return LABELS.get(str(value).strip().lower().removesuffix(".0"))


def choose_split(owner: str, splits: Sequence[str], purpose: Purpose, wanted: str | None) -> str:
    """Calibration: the wanted split, else train, else validation, else the only one; never a test split.

    Evaluation: validation, else test, else the split of the calibration, which then share it.
    Exit 2 for a wanted split that is unknown or a test split, or none where one is needed; 4 for nothing but test data.
    """
    tests = [split for split in splits if is_test(split)]
    usable = [split for split in splits if not is_test(split)]
    if purpose == "evaluation":
        calibration = choose_split(owner, splits, "calibration", wanted) if usable or wanted else None
        validation = [split for split in usable if split.lower() in SPLIT_WORDS["validation"] and split != calibration]
        return [*validation, *tests, calibration][0]
    listed = f"Splits: {', '.join(splits)}."
    if wanted and wanted not in splits:
        raise CompError(f"{owner} has no split {wanted!r}.", code=USAGE, hint=listed)
    if wanted in tests:
        raise CompError(f"{wanted} is a test split: comp never calibrates on one.", code=USAGE, hint=listed)
    if not usable:
        hint = "Give training or validation pairs; if these are, rename the file, folder or split."
        raise CompError(f"{owner} is test data: comp never calibrates on it.", code=REFUSED, hint=hint)
    known = [split for kind in ("train", "validation") for split in usable if split.lower() in SPLIT_WORDS[kind]]
    if not wanted and not known and len(usable) > 1:
        raise CompError(f"{owner} has no split called train.", code=USAGE, hint=f"{listed} Name one with --split.")
    return wanted or [*known, *usable][0]


def is_test(split: str) -> bool:
    return "test" in split.lower() or split.lower() in SPLIT_WORDS["test"]


def purpose_of(value: Any) -> Purpose | None:
    """Of images that share a split, a fifth is for evaluation: content or path decide. None where there is no image."""
    if not any(stored_image(value)):
        return None
    return "evaluation" if image_digest(value)[0] % 5 == 0 else "calibration"


def image_digest(value: Any) -> bytes:
    """What tells the images of rows apart: SHA-256 of the content, or of the path."""
    content, path = stored_image(value)
    return hashlib.sha256(content or os.path.normpath(path).encode()).digest()


def few(found: Sequence[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def scene_pairs(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes with captions. Unlabelled for models that were never trained on them."""
    for example in scenes.examples(split, count, seed):
        label = example.label if labelled else None
        yield Pair(scenes.render(example.scene, example.background), example.caption.text, label)


def described_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
    """Generated scenes, each with a description of all that is in it."""
    for scene, background in scenes.images(split, count, seed):
        text = scenes.describe(scene)  # what is described alike counts as one image
        yield Pair(scenes.render(scene, background), text, image_id=zlib.crc32(text.encode()), known=labelled)


def asked_scenes(split: str, count: int, seed: int = 0, labelled: bool = True) -> Iterator[Pair]:
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
        parts = {}
        if "pixel_values" in self.inputs:
            parts["images"] = [pair.image.convert("RGB") for pair in pairs]
        if "input_ids" in self.inputs:
            parts["text"] = [self.prompt.format(pair.text) for pair in pairs]
            parts |= {"padding": self.padding, "truncation": True, "max_length": self.max_text}
        made = self.processor(**parts, return_tensors="pt")
        if ANSWER_INPUTS[0] in self.inputs:
            options = {"padding": True, "truncation": True, "max_length": self.max_text, "return_tensors": "pt"}
            answers = self.processor.tokenizer([pair.answer for pair in pairs], **options)
            made |= zip(ANSWER_INPUTS, (answers["input_ids"], answers["attention_mask"]), strict=True)
        inputs = {name: made[name] for name in self.inputs}
        if self.written:
            name, begin = self.written
            inputs[name][:, 0] = begin
        return Batch(inputs, self.labels(pairs, inputs) if all(pair.known for pair in pairs) else None)

    def batches(self, pairs: Iterable[Pair], batch_size: int) -> Iterator[Batch]:
        """Batches in the order of the pairs."""
        pairs = iter(pairs)
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
