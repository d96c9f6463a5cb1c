"""What a model is for: which of its outputs are read, its metrics, and how far a compact model strays from the dense one.

A task puts questions to a set of samples: rows of logits over candidates, and where it is known which are right. Whether
an image and a text match is one question for each pair; retrieval asks each image for its texts and each text for its image.
"""

import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Batch
from ..data.rows import Pair
from ..families.base import ANSWER_INPUTS

# What a task reads of a model's outputs, each (rows, ...): a row for each sample, or for each token that is predicted.
# Batches can be joined.
Read = tuple[Tensor, ...]


@dataclass(frozen=True)
class Question:
    """logits (rows, candidates); right (rows, candidates), booleans, at least one in a row, or (rows,), the one candidate that
    is right; None where nobody said."""

    logits: Tensor
    right: Tensor | None = None

    def loss(self) -> Tensor:
        """Mean surprise, in nats, that a right candidate is chosen."""
        if self.right.ndim == 1:
            return F.cross_entropy(self.logits, self.right)
        return -self.logits.log_softmax(-1).masked_fill(~self.right, -torch.inf).logsumexp(-1).mean()

    def hits(self, first: int = 1) -> float:
        """Share of the rows with a right candidate among the `first` best."""
        found = self.logits.topk(min(first, self.logits.shape[-1]), dim=-1).indices
        right = self.right.unsqueeze(-1) == found if self.right.ndim == 1 else self.right.gather(-1, found)
        return right.any(-1).float().mean().item()


class Task:
    """Names of outputs are those of the transformers class; they are the names in ONNX graphs as well.

    outputs: what a graph hands out. judged: those that an export must get right. metric: the one that counts.
    """

    name: str
    outputs: tuple[str, ...]
    judged: tuple[str, ...]
    metric: str
    mismatches = False  # whether pairs that do not match are of use
    paired = False  # whether the model takes one text for each image
    relative = True  # whether an export's errors are judged in units of the largest number
    prompt = "{}"  # what a text is put into
    answered = False  # whether texts are questions, and pairs need their answers
    compares = "nothing is labelled: the compact model is compared with the dense one"  # what a user's pairs are good for

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Read:
        """Run a model over a batch, and take of it what the questions are made of."""
        raise NotImplementedError

    def remembered(self, parts: Read, samples: int) -> Read:
        """Of what was read of so many samples, and of their labels, the rows that are kept when batches are joined."""
        return parts

    def features(self, read: Read) -> Tensor:
        """What the decisions are made of, (rows, dim)."""
        raise NotImplementedError

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        raise NotImplementedError

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(rows,) integers, of pairs and the inputs made of them; None where nobody said."""
        raise NotImplementedError

    def shared(self, labels: Tensor | None) -> int:
        """How many samples have a text that is right for several images, where a text is an image's own."""
        return 0

    def guesses(self, read: Read) -> Tensor:
        """The model's own decisions as labels, for pairs that have none."""
        raise NotImplementedError

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        raise NotImplementedError

    def decisions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Logits (rows, candidates) of the outputs of exported graphs."""
        return outputs[self.outputs[0]].flatten(0, -2)

    def takes(self, pair: Pair) -> bool:
        return (self.mismatches or pair.label != 0) and (not self.answered or pair.answer is not None)


@dataclass(frozen=True)
class Matching(Task):
    """Do image and text belong together? Labels: 1 where they do, else 0."""

    name: str = "itm"
    outputs: tuple[str, ...] = ("itm_score",)
    judged: tuple[str, ...] = ("itm_score",)
    metric: str = "accuracy"
    feature: str = "question_embeds"  # (batch, tokens, dim), of which the first decides
    mismatches = paired = True
    relative = False
    compares = "where labels say whether image and text match, they count; else the dense model's decisions"

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Read:
        outputs = model(**inputs)
        return getattr(outputs, self.outputs[0]).float(), getattr(outputs, self.feature)[:, 0].float()

    def features(self, read: Read) -> Tensor:
        return read[1]

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        return [Question(read[0], labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor | None:
        known = all(pair.label is not None for pair in pairs)
        return torch.tensor([pair.label for pair in pairs]) if known else None

    def guesses(self, read: Read) -> Tensor:
        return read[0].argmax(-1)

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        return {"accuracy": questions[0].hits()}


@dataclass(frozen=True)
class Retrieval(Task):
    """Which text belongs to an image, which image to a text, among all samples. Labels: numbers of the images and of the texts,
    (rows, 2): a text that several images have is right for each of them."""

    name: str = "retrieval"
    outputs: tuple[str, ...] = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
    judged: tuple[str, ...] = ("text_embeds", "image_embeds")
    metric: str = "recall@1"
    compares = "every pair counts as a match: what is compared is which texts and images of all pairs belong together"

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Read:
        """Embeddings of length 1, and the scale of the logits (a bias changes no choice)."""
        outputs = model(**inputs)
        images, texts = (F.normalize(getattr(outputs, name).float(), dim=-1) for name in ("image_embeds", "text_embeds"))
        return images, texts, unwrapped(model).logit_scale.float().exp().expand(len(images))

    def features(self, read: Read) -> Tensor:
        return torch.cat(read[:2], dim=-1)

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        images, texts, scale = read
        number = torch.arange(len(images), device=images.device)
        labels = number if labels is None else labels
        if labels.ndim == 1:  # of images alone: no text is that of another pair
            labels = torch.stack((labels, number), dim=-1)
        first = firsts(labels[:, 0])  # an image with several texts is one candidate
        logits = (images * scale.unsqueeze(-1)) @ texts.T
        right = belonging(labels)
        return [Question(logits[first], right[first]), Question(logits.T[:, first], right.T[:, first])]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([(pair.image_id, text_number(pair.text)) for pair in pairs])

    def shared(self, labels: Tensor | None) -> int:
        if labels is None:
            return 0
        images, texts = (column[:, None] == column for column in labels.T)
        return int((texts & ~images).any(-1).sum())

    def guesses(self, read: Read) -> Tensor:
        """No guess: every text belongs to its image."""
        return torch.arange(len(read[0]))

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        to_text, to_image = questions
        found = {"recall@1": (to_text.hits() + to_image.hits()) / 2}
        for name, question in ("image to text", to_text), ("text to image", to_image):
            found |= {f"{name} recall@{first}": question.hits(first) for first in (1, 5, 10)}
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

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        images, texts, scale = read
        labels = torch.arange(len(images), device=images.device) if labels is None else labels
        first = firsts(labels)
        return [Question((images * scale.unsqueeze(-1)) @ texts[first].T, labels[:, None] == labels[first])]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([text_number(pair.text) for pair in pairs])

    def shared(self, labels: Tensor | None) -> int:
        return 0

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        return {"accuracy": questions[0].hits(), "top-5 accuracy": questions[0].hits(5)}


@dataclass(frozen=True)
class Embedding(Task):
    """One encoder of a dual pair, on its own: which of the other samples is the nearest? No labels: the dense model knows."""

    name: str
    output: str
    metric: str = "agreement"

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output,)

    @property
    def judged(self) -> tuple[str, ...]:
        return (self.output,)

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Read:
        return (F.normalize(getattr(model(**inputs), self.output).float(), dim=-1),)

    def features(self, read: Read) -> Tensor:
        return read[0]

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        logits = SHARPNESS * read[0] @ read[0].T
        logits = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -1e4)
        return [Question(logits, labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> None:
        return None

    def guesses(self, read: Read) -> Tensor:
        return self.questions(read, None)[0].logits.argmax(-1)

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        return {"agreement": questions[0].hits()}

    def decisions(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return self.questions((F.normalize(outputs[self.output], dim=-1),), None)[0].logits


@dataclass(frozen=True)
class Wording(Task):
    """Which token comes next in a text, after those before it as they should be (teacher forcing)? A row for each token that
    is predicted. Labels: the tokens of the text.

    text, mask: the inputs that hold it. head: path of the module that makes logits of its states.
    """

    name: str
    text: str
    mask: str
    outputs: tuple[str, ...] = ("logits",)
    head: str = "text_decoder.cls"
    metric: str = "token accuracy"
    answered: bool = False
    paired = True

    @property
    def compares(self) -> str:
        return f"the {'answers' if self.answered else 'texts'} are what should be written"

    @property
    def judged(self) -> tuple[str, ...]:
        return self.outputs

    def read(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Read:
        heard = []
        head = unwrapped(model).get_submodule(self.head)
        hook = head.register_forward_hook(lambda module, args, output: heard.extend((output, args[0])))
        try:
            model(**inputs)
        finally:
            hook.remove()
        wanted = inputs[self.mask][:, 1:].bool()
        return tuple(part[:, :-1][wanted].float() for part in heard)

    def remembered(self, parts: Read, samples: int) -> Read:
        rows, most = len(parts[0]), REMEMBERED * samples
        if rows <= most:
            return parts
        evenly = torch.arange(most) * rows // most  # in integers: the same on every device
        return tuple(part[evenly.to(part.device)] for part in parts)

    def features(self, read: Read) -> Tensor:
        return read[1]

    def questions(self, read: Read, labels: Tensor | None) -> list[Question]:
        return [Question(read[0], labels)]

    def labels(self, pairs: Sequence[Pair], inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs[self.text][:, 1:][inputs[self.mask][:, 1:].bool()]

    def guesses(self, read: Read) -> Tensor:
        return read[0].argmax(-1)

    def metrics(self, questions: list[Question]) -> dict[str, float]:
        return {self.metric: questions[0].hits()}


REMEMBERED = 4  # tokens of a text on average: each is as many numbers as the vocabulary has words, 120 kB for BERT's
CHUNK = 1024  # rows of logits that are compared at once
SHARPNESS = 20.0  # what a cosine counts where a model has no scale of its own

TASKS = {
    task.name: task
    for task in (
        Matching(),
        Retrieval(),
        ZeroShot(),
        Embedding("image-embedding", "image_embeds"),
        Embedding("text-embedding", "text_embeds"),
        Wording("caption", "input_ids", "attention_mask"),
        Wording("vqa", *ANSWER_INPUTS, answered=True),
    )
}


def unwrapped(model: nn.Module) -> nn.Module:
    """A model out of DistributedDataParallel."""
    return getattr(model, "module", model)


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


def joined(reads: Sequence[Read]) -> Read:
    """What was read of batches, as if of one."""
    return tuple(torch.cat(parts) for parts in zip(*reads, strict=True))


@dataclass(frozen=True)
class Evaluation:
    """Over `samples` samples: what was read, the labels, the task's metrics and mean surprise (None without labels)."""

    read: Read
    labels: Tensor | None
    samples: int
    metrics: dict[str, float] | None
    loss: float | None

    def metric(self, task: Task) -> float | None:
        """The metric that counts."""
        return self.metrics and self.metrics[task.metric]


def evaluate(model: nn.Module, task: Task, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None) -> Evaluation:
    """Run a model over batches. Deterministic for a given order of the batches."""
    weight = next(model.parameters())
    reads, labels, samples = [], [], 0
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            batch = batch.to(weight.device, weight.dtype)
            samples += batch.samples
            reads.append(tuple(part.cpu() for part in task.remembered(task.read(model, batch.inputs), batch.samples)))
            labels.append(remembered_labels(task, batch))
            advance()
    read = joined(reads)
    if any(label is None for label in labels):
        return Evaluation(read, None, samples, None, None)
    target = torch.cat(labels)
    questions = task.questions(read, target)
    return Evaluation(read, target, samples, task.metrics(questions), loss(questions).item())


def remembered_labels(task: Task, batch: Batch) -> Tensor | None:
    """The labels of the rows that a task remembers."""
    return None if batch.labels is None else task.remembered((batch.labels.cpu(),), batch.samples)[0]


def loss(questions: list[Question]) -> Tensor:
    """Mean over the questions."""
    return torch.stack([question.loss() for question in questions]).mean()


def divergence(dense: list[Question], compact: list[Question]) -> Tensor:
    """Mean KL(dense || compact) of the decisions, in nats."""

    def summed(dense: Tensor, compact: Tensor) -> Tensor:
        return F.kl_div(compact.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True)

    found = []
    for d, c in zip(dense, compact, strict=True):
        parts = zip(d.logits.split(CHUNK), c.logits.split(CHUNK), strict=True)
        found.append(torch.stack([summed(*part) for part in parts]).sum() / len(d.logits))
    return torch.stack(found).mean()


def distance(dense: Tensor, compact: Tensor) -> Tensor:
    """Mean squared difference of features in units of the variance of all numbers in the dense ones. (batch, dim) each."""
    return F.mse_loss(compact, dense) / dense.var().clamp(min=1e-6)


def agreement(dense: Tensor, compact: Tensor) -> float:
    """Share of rows in which the best candidate is the same. (rows, candidates) each."""
    return (dense.argmax(-1) == compact.argmax(-1)).float().mean().item()


def agreements(dense: list[Question], compact: list[Question]) -> float:
    """Mean of `agreement` over the questions."""
    found = [agreement(d.logits, c.logits) for d, c in zip(dense, compact, strict=True)]
    return sum(found) / len(found)
