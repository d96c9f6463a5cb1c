"""What captions and answers that a model writes are worth."""

import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec

from ..data.rows import Pair
from .base import Task

ARTICLES = {"a", "an", "the"}
DIGITS = {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())}
DIGITS |= {"none": "0"}


def references(task: Task, pairs: Sequence[Pair]) -> tuple[list[Pair], list[tuple[str, ...]]]:
    """What is written about, and the texts that people wrote about it: every question, or every image once."""
    if task.has_answers:
        return list(pairs), [pair.answers for pair in pairs]
    captions = defaultdict(list)
    for pair in pairs:
        captions[pair.image_id].append(pair.text)
    first = {pair.image_id: pair for pair in reversed(pairs)}
    return [first[image] for image in captions], [tuple(texts) for texts in captions.values()]


def score(task: Task, written: Sequence[str], known: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Metrics of written texts, the one that counts first."""
    if not task.has_answers:
        return {"CIDEr": cider(written, known)}
    written = [normalize_answer(text) for text in written]
    known = [tuple(normalize_answer(answer) for answer in answers) for answers in known]
    pairs = list(zip(written, known, strict=True))
    exact = {"accuracy": sum(text == max(answers, key=answers.count) for text, answers in pairs) / len(pairs)}
    if max(map(len, known)) == 1:
        return exact
    return {"soft accuracy": sum(vqa_accuracy(text, answers) for text, answers in pairs) / len(pairs)} | exact


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Accuracy of the VQA challenge: an answer is right in full if three of the other people gave it, averaged over people.

    Of fewer than four people one is enough.
    """
    if len(answers) < 4:
        return float(text in answers)
    others = (answers.count(text) - (answer == text) for answer in answers)
    return sum(min(1.0, agreeing / 3) for agreeing in others) / len(answers)


def normalize_answer(text: str) -> str:
    """An answer as the VQA challenge compares it: lower case, no punctuation, no articles, numbers in digits."""
    text = re.sub(r"(?<=\d),(?=\d)", "", re.sub("['’]", "", text.lower()))
    words = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", " ", text).split()
    kept = [word for word in words if word not in ARTICLES] or words  # "A" may be the answer
    return " ".join(DIGITS.get(word, word) for word in kept)


def missing(task: Task, references: Sequence[Pair]) -> str | None:
    """Why what a model writes about these cannot be scored; None where it can."""
    if task.has_answers:
        return None
    if find_spec("pycocoevalcap") is None:
        return "CIDEr needs pycocoevalcap: pip install 'comp-cli[caption]'"
    return None if len(references) > 1 else "CIDEr needs two images: --eval-samples gives it more"


def cider(written: Sequence[str], known: Sequence[tuple[str, ...]]) -> float:
    """CIDEr-D, 1.0 is what papers call 100. Texts are split into words by a rule, not by the Java tokenizer of COCO."""
    from pycocoevalcap.cider.cider import Cider

    def words(text: str) -> str:
        return " ".join(re.findall(r"[\w']+", text.lower()))

    references = {number: [words(text) for text in texts] for number, texts in enumerate(known)}
    value, _ = Cider().compute_score(references, {number: [words(text)] for number, text in enumerate(written)})
    return float(value)
