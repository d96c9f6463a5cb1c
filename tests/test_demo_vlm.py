"""The decoder that ships inside the package, and the questions that it answers."""

import json
import random
import re

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import comp_cli
from comp_cli.checkpoint import hub
from comp_cli.data import scenes

FOLDER = hub.DEMOS["demo-vlm"]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def stock():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()


def answers(model, processor, asked, new_tokens=4):
    """What a model of transformers writes about (scene, background, question), by the chat template."""
    written = []
    for start in range(0, len(asked), 50):
        part = asked[start : start + 50]
        chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, _, text in part]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [[scenes.render(scene, background)] for scene, background, _ in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        written += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


def questions(count):
    """(scene, background, question, answer) of the test split."""
    return [(*one, *scenes.ask(random.Random(one[1]), one[0])) for one in scenes.images("test", count)]


# Questions -----------------------------------------------------------------------------------------------------------


def test_answers_to_questions_are_what_is_in_the_scene():
    for scene, background in scenes.images("validation", 200):
        rng = random.Random(background)
        for question, answer in [*scenes.ask_everything(rng, scene), *(scenes.ask(rng, scene) for _ in range(4))]:
            words = question.rstrip("?").split()
            if words[0] == "what":
                assert [thing.colour for thing in scene if thing.shape == words[-1]] == [answer]
            elif words[0] == "how":
                colour = words[2] if words[2] in scenes.COLOURS else None
                found = [t for t in scene if t.colour == colour or (colour is None and scenes.plural(t.shape) == words[2])]
                assert scenes.NUMBERS[len(found)] == answer and found
            else:
                first, relation, last = re.fullmatch(r"is the (\w+ \w+) (.*) the (\w+ \w+)\?", question).groups()
                left, right = ([t for t in scene if f"{t.colour} {t.shape}" == name] for name in (first, last))
                dx, dy = scenes.RELATIONS[relation]
                distance = (left[0].x - right[0].x) * dx + (left[0].y - right[0].y) * dy
                assert len(left) == len(right) == 1 and abs(distance) >= scenes.RELATION_MARGIN
                assert answer == ("yes" if distance > 0 else "no")


def test_what_ask_asks_is_among_everything():
    for scene, background in scenes.images("test", 200):
        every = scenes.ask_everything(random.Random(0), scene)
        assert scenes.ask(random.Random(background), scene) in every and len(dict(every)) == len(every)


# Model ---------------------------------------------------------------------------------------------------------------


def test_it_is_an_ordinary_small_checkpoint(stock, processor):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 24 * 2**20
    assert stock.config.image_seq_length == 196 and 4 <= stock.config.text_config.num_hidden_layers <= 6
    assert processor.chat_template and processor.tokenizer.padding_side == "left"


def test_it_answers_nine_of_ten_unseen_questions_in_its_own_words(stock, processor):
    """Of the kinds that `scenes.ask` asks; always the most frequent answer of each kind is right for less than half."""
    asked = questions(500)
    written = answers(stock, processor, [one[:3] for one in asked])
    right = [text.strip() == answer for text, (*_, answer) in zip(written, asked, strict=True)]
    colours = [ok for ok, (_, _, question, _) in zip(right, asked, strict=True) if question.startswith("what")]
    assert sum(right) / len(right) >= 0.9 and sum(colours) / len(colours) >= 0.95


def test_it_describes_a_scene(stock, processor):
    chosen = list(scenes.images("test", 20))
    written = answers(stock, processor, [(*one, "Describe the image.") for one in chosen], new_tokens=40)
    named = [f"{t.colour} {t.shape}" in text for text, (scene, _) in zip(written, chosen, strict=True) for t in scene]
    assert sum(named) / len(named) > 0.8


def test_it_knows_every_word_of_its_questions_however_they_are_spelt(processor):
    tokenizer = processor.tokenizer
    for scene, background in scenes.images("train", 200):
        for question, answer in scenes.ask_everything(random.Random(background), scene):
            assert tokenizer.unk_token_id not in tokenizer(f"{question} {answer} {scenes.describe(scene)}")["input_ids"]
    assert tokenizer("What color is the Circle?")["input_ids"] == tokenizer("what colour is the circle?")["input_ids"]


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm") / "out"
    return comp_cli.prune("demo-vlm", output=folder, method="vitcop", tokens=36, eval_samples=100), folder


def test_pruning_its_tokens_says_what_that_cost_on_scenes(pruned, stock, processor):
    report, folder = pruned
    assert report.quality.samples == 100 and report.quality.metric == "accuracy" and "scenes" in report.quality.data
    asked = questions(100)
    right = [text.strip() == one[3] for text, one in zip(answers(stock, processor, [o[:3] for o in asked]), asked, strict=True)]
    found = report.quality.metrics["accuracy"]
    assert found.dense == pytest.approx(sum(right) / 100) and found.compact < 1
    model = comp_cli.load(folder)
    right = [text.strip() == one[3] for text, one in zip(answers(model, processor, [o[:3] for o in asked]), asked, strict=True)]
    assert found.compact == pytest.approx(sum(right) / 100)


def test_what_is_lost_can_be_limited(tmp_path):
    with pytest.raises(comp_cli.GateError, match="accuracy falls from"):
        comp_cli.prune("demo-vlm", output=tmp_path / "out", method="stride", tokens=2, eval_samples=50, max_drop=1.0)
    assert not (tmp_path / "out").exists()


def test_its_card_is_asked_what_it_knows(pruned):
    card, config = (pruned[1] / "README.md").read_text(), json.loads((pruned[1] / "config.json").read_text())
    assert "color" in card and config["comp"]["base_model"] == "demo-vlm"


@pytest.mark.slow
def test_tokens_and_parameters_go_together(tmp_path, stock):
    report = comp_cli.prune("demo-vlm", ratio=0.3, output=tmp_path / "out", num_samples=16, eval_samples=20)
    assert report.params.compact < report.params.dense and report.ratio == pytest.approx(0.3, abs=0.02)
    assert report.quality.metrics["accuracy"].compact > 0.3
    model = comp_cli.load(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report.params.compact < sum(p.numel() for p in stock.parameters())
    assert torch.isfinite(next(model.parameters())).all()
