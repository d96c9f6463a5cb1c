"""The model that ships inside the package, and the scenes that it knows."""

import random
from collections import Counter

import pytest
import torch

from comp_cli.checkpoint import hub
from comp_cli.cli.output import Output
from comp_cli.data import scenes
from comp_cli.data.scene_pairs import ScenePairs, scene_pairs
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.options import PruneOptions
from comp_cli.tasks import comparison

SCENES = ScenePairs(labelled=True)


@pytest.fixture(scope="module")
def demo():
    return open_dense("demo", Output("quiet"))


# Scenes --------------------------------------------------------------------------------------------------------------


def test_examples_are_balanced_whatever_one_looks_at():
    """Every caption is met once with a scene where it holds and once with one where it does not."""
    chosen = list(scenes.examples("test", 800))
    by_caption = Counter()
    for first, second in zip(chosen[::2], chosen[1::2], strict=True):
        assert first.caption == second.caption and first.background == second.background
        assert first.label + second.label == 1
        by_caption[first.caption.family] += 1
    assert set(by_caption.values()) == {100}
    by_scene = Counter((example.scene, example.background, example.label) for example in chosen)
    assert set(by_scene.values()) == {1}


def test_labels_are_what_the_captions_say():
    for example in scenes.examples("validation", 400):
        assert example.caption.holds(example.scene) is bool(example.label)


def test_negatives_differ_in_one_thing():
    for example, other in zip(*(list(scenes.examples("test", 800))[i::2] for i in (0, 1)), strict=True):
        changed = set(example.scene) ^ set(other.scene)
        assert len(changed) <= 4  # one thing edited or gone, or two that swap a colour or their places


def test_splits_are_disjoint_and_repeatable():
    splits = {name: list(scenes.examples(name, 200)) for name in scenes.SPLITS}
    seen = [set(splits[name]) for name in splits]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert splits["test"] == list(scenes.examples("test", 200))
    assert splits["train"] != list(scenes.examples("train", 200, seed=1))
    for seed in (100, 200, 10**9):
        assert not (set(scenes.examples("train", 200, seed=seed)) & (seen[1] | seen[2]))


def test_a_caption_that_a_person_would_hesitate_over_is_not_used():
    left = scenes.Thing("small", "red", "circle", 30, 40)
    caption = scenes.Caption("relation", "", ((None, "red", "circle"), (None, "blue", "square")), relation="left of")
    for x, expected in ((60, True), (10, False), (35, None)):
        assert caption.holds((left, scenes.Thing("large", "blue", "square", x, 40))) is expected


def test_most_of_a_picture_is_background():
    shares = []
    for example in scenes.examples("test", 100):
        covered = sum((2 * scenes.SIZES[thing.size]) ** 2 for thing in example.scene)
        shares.append(1 - covered / scenes.IMAGE_SIZE**2)
    assert sum(shares) / len(shares) > 0.75


def test_pictures_are_repeatable():
    scene = scenes.random_scene(random.Random(0))
    assert scenes.render(scene, 1).tobytes() == scenes.render(scene, 1).tobytes()
    assert scenes.render(scene, 1).tobytes() != scenes.render(scene, 2).tobytes()


# Model ---------------------------------------------------------------------------------------------------------------


def test_it_is_an_ordinary_small_checkpoint():
    files = {path.name: path.stat().st_size for path in hub.DEMOS["demo"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= files.keys()
    assert sum(files.values()) < 16 * 2**20


def test_it_matches_scenes_with_hard_captions(demo):
    """At least 90 % of 2000 unseen pairs, chance being 50 %; and something of every family."""
    pairs = list(scenes.examples("test", 2000))
    found = comparison.evaluate(demo.runtime(demo.plan), demo.task, batches_of(demo, SCENES, "evaluation", 2000, 50))
    right = found.outputs[0].argmax(-1) == torch.tensor([example.label for example in pairs])
    assert found.metrics["accuracy"] == pytest.approx(right.float().mean().item()) and found.metric(demo.task) >= 0.9
    for family in scenes.FAMILIES:
        of_family = torch.tensor([example.caption.family == family for example in pairs])
        assert right[of_family].float().mean() > 0.75, family


def test_it_knows_every_word_of_its_captions(demo):
    unknown = demo.processor.tokenizer.unk_token_id
    for example in scenes.examples("train", 400):
        ids = demo.processor.tokenizer(example.caption.text)["input_ids"]
        assert unknown not in ids and len(ids) <= demo.reference.tokens["language"]


def test_half_of_the_flops_keep_most_of_the_accuracy(demo):
    from comp_cli.search.run import search

    found = search(demo, SCENES, PruneOptions("demo", 0.5, method="wanda", num_samples=64), None, Output("quiet"))
    pairs = batches_of(demo, SCENES, "evaluation", 600, 50)
    dense, compact = (
        comparison.evaluate(m, demo.task, pairs).metric(demo.task) for m in (demo.runtime(demo.plan), found.model)
    )
    assert compact > dense - 0.1


def test_scene_pairs_carry_labels_only_where_asked():
    assert {pair.label for pair in scene_pairs("train", 8)} == {0, 1}
    assert {pair.label for pair in scene_pairs("train", 8, labelled=False)} == {None}
