"""What scripts/ makes: the small CLIP (its texts, its labels, a step of its training), and pairs."""

import json
import random

import pytest
import torch
import train_clip
import write_pairs
from PIL import Image

from comp_cli.data import scenes
from comp_cli.data.scenes import Thing


@pytest.fixture(scope="module")
def processor():
    return train_clip.build_processor()


def test_every_description_is_of_known_words_and_fits(processor):
    texts = [scenes.describe(scene) for scene, _ in scenes.images("train", 400)]
    ids = processor.tokenizer(texts)["input_ids"]
    assert max(map(len, ids)) == train_clip.LONGEST
    assert all(train_clip.UNKNOWN not in row and row[-1] == train_clip.END for row in ids)


def test_clip_is_read_at_the_end_of_the_text_and_padding_says_nothing(processor):
    model = train_clip.build_model(processor.tokenizer).eval()
    texts = ["a small red ring", "a small red ring and a large blue star"]
    with torch.inference_mode():
        alone = model.get_text_features(**processor.tokenizer(texts[:1], return_tensors="pt")).pooler_output
        padded = model.get_text_features(**processor.tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(padded[0], padded[1], atol=1e-3)


def test_labels_of_a_scene_by_hand():
    right, left = Thing("small", "red", "circle", 76, 20), Thing("large", "blue", "star", 20, 76)
    assert scenes.describe((right, left)) == "a large blue star and a small red circle"
    ranks = train_clip.patch_ranks([(right, left)]).view(12, 12)
    assert ranks[9, 2] == 1 and ranks[2, 9] == 2 and ranks[0, 0] == 0
    assert train_clip.thing_labels([(right, left)], "colour").tolist() == [[3, 1, 0, 0, 0]]
    assert train_clip.thing_labels([(right, left)], "size").tolist() == [[2, 1, 0, 0, 0]]


def test_a_step_of_the_training_reaches_every_weight(processor):
    model = train_clip.build_model(processor.tokenizer)
    helpers = train_clip.Helpers(128, 128)
    batch = train_clip.draw_batch(random.Random(0), processor, 2)
    train_clip.step_loss(model, helpers, batch).backward()
    assert all(weight.grad is not None for weight in [*model.parameters(), *helpers.parameters()])


def test_pairs_that_are_written_have_a_picture_a_text_and_a_split_each(tmp_path):
    write_pairs.write(tmp_path / "pairs", {"train": 6, "validation": 4})
    lines = [json.loads(line) for line in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 6 + ["validation"] * 4
    drawn = [*scenes.images("train", 6), *scenes.images("validation", 4)]
    assert [line["text"] for line in lines] == [scenes.describe(scene) for scene, _ in drawn]
    for line, (scene, background) in zip(lines, drawn, strict=True):
        assert Image.open(tmp_path / "pairs" / line["file_name"]).tobytes() == scenes.render(scene, background).tobytes()
