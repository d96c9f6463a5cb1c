"""Questions, metrics and losses of the tasks, on numbers that can be checked by hand."""

import math

import pytest
import torch

from comp_cli.data.rows import Pair
from comp_cli.tasks import TASKS, Ranking, comparison
from comp_cli.tasks.retrieval import text_number


def test_a_question_of_one_right_answer_is_cross_entropy():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    (question,) = TASKS["itm"].rankings((logits, logits), labels)
    assert question.loss().item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert TASKS["itm"].metrics([question])["accuracy"] == (logits.argmax(-1) == labels).float().mean().item()


def test_several_right_answers_share_the_probability():
    right = torch.tensor([[True, True, False, False]])
    assert Ranking(torch.zeros(1, 4), right).loss().item() == pytest.approx(math.log(2))


@pytest.fixture
def read():
    """Four images in the plane; the text of each lies on it, but those of the last two are swapped. Scale 10."""
    images = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    return images, images[[0, 1, 3, 2]], torch.full((4,), 10.0)


def test_retrieval_asks_both_ways(read):
    task = TASKS["retrieval"]
    metrics = task.metrics(task.rankings(read, torch.arange(4)))
    assert metrics["recall@1"] == metrics["image to text recall@1"] == metrics["text to image recall@1"] == 0.5
    assert metrics["image to text recall@5"] == 1.0


def test_an_image_with_several_texts_is_one_candidate():
    images = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    texts = torch.tensor([[1.0, 0], [0, 1], [0, 1]])  # the second text of the first image reads like the other image
    task = TASKS["retrieval"]
    to_text, to_image = task.rankings((images, texts, torch.ones(3)), torch.tensor([7, 7, 9]))
    assert to_text.logits.shape == (2, 3) and to_image.logits.shape == (3, 2)
    assert to_text.right.tolist() == [[True, True, False], [False, False, True]]
    assert to_image.top_k_accuracy() == pytest.approx(2 / 3)


def test_a_text_that_several_images_have_is_right_for_each():
    """Three images; the first two have a text in common, which is no miss in either direction. Counted by hand."""
    task = TASKS["retrieval"]
    pairs = [Pair(None, text, image_id=image) for image, text in ((5, "dog"), (5, "a brown dog"), (6, "dog"), (7, "cat"))]
    labels = task.labels(pairs, {})
    to_text, to_image = task.rankings((torch.eye(4), torch.eye(4), torch.ones(4)), labels)
    assert to_text.right.tolist() == [[True, True, True, False], [True, False, True, False], [False, False, False, True]]
    # "a brown dog" is a text of the first image only
    assert to_image.right.tolist() == [[True, True, False], [True, False, False], [True, True, False], [False, False, True]]
    assert task.shared(labels) == 2 and task.shared(None) == 0
    images = torch.tensor([[1.0, 0], [1, 0], [1, 0.01], [0, 1]])  # nearest to "dog" is the second image, in a miss of old
    assert task.metrics(task.rankings((images, images, torch.ones(4)), labels))["text to image recall@1"] == 1.0


@pytest.mark.parametrize("other", ["A dog", " a  dog ", "a\ndog", "caf\u00e9", "cafe\u0301"])
def test_texts_that_tokenizers_read_alike_are_one_text(other):
    first = "caf\u00e9" if "caf" in other else "a dog"
    assert text_number(other) == text_number(first) != text_number("a dog.")


def test_zero_shot_chooses_among_the_classes_that_occur(read):
    images, _, scale = read
    task = TASKS["zero-shot"]
    labels = task.labels([Pair(None, name) for name in ("cat", "dog", "cat", "dog")], {})
    texts = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    (question,) = task.rankings((images, texts, scale), labels)
    assert question.logits.shape == (4, 2) and question.logits.argmax(-1).tolist()[:2] == [0, 1]
    assert task.prompt.format("cat") == "a photo of a cat."


def test_one_tower_is_asked_for_its_neighbours(read):
    task = TASKS["image-embedding"]
    images = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=-1)
    assert task.predictions((images,)).tolist() == [1, 0, 3, 2]
    (question,) = task.rankings((images,), task.predictions((images,)))
    assert task.metrics([question]) == {"agreement": 1.0}


def test_divergence_and_agreement_of_a_model_from_itself(read):
    questions = TASKS["retrieval"].rankings(read, None)
    assert comparison.divergence(questions, questions).item() == pytest.approx(0, abs=1e-6)
    assert comparison.agreements(questions, questions) == 1.0
