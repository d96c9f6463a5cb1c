"""Decoders that read images, opened with their processors: prompts, answers, written texts."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from vlm_made import made

from comp_cli import tasks
from comp_cli.checkpoint.loading import load_model, load_processor, save_processor, untied_state_dict
from comp_cli.cli.output import Output
from comp_cli.data.rows import Pair
from comp_cli.errors import RefusedError
from comp_cli.models.dense import collator, open_dense
from comp_cli.topology.prompts import with_answer, without_answers

QUIET = Output("quiet")
OPENED = [name for name in tiny.DECODERS if name != "smolvlm"]  # whose processor needs torchvision and num2words
RED, BLUE = Image.new("RGB", (40, 30), (200, 0, 0)), Image.new("RGB", (30, 60), (0, 0, 99))
PAIRS = [
    Pair(RED, "a red circle", answers=("circle",)),
    Pair(BLUE, "two small blue square and", answers=("square large",)),
]


@pytest.fixture(scope="session", params=OPENED)
def opened(request, tmp_path_factory):
    folder = tiny.write(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    return open_dense(str(folder), QUIET)


def test_a_folder_opens_and_its_default_reference_has_forty_tokens_of_text(opened):
    assert opened.task.name == "vqa" and opened.reference.tokens["language"] == 40 and opened.text_tokens == 35
    assert opened.longest > 35
    weights = untied_state_dict(load_model(opened.source.folder, family=opened.family, dtype=torch.float32))
    assert opened.params(opened.plan) == sum(tensor.numel() for tensor in weights.values())


def test_answers_alone_are_predicted(opened):
    batch = opened.collate(PAIRS)
    ids, labels, mask = (batch.inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    words = opened.processor.tokenizer.convert_tokens_to_ids
    expected = [words(["circle", "</s>"]), words(["square", "large", "</s>"])]
    assert [row[row != -100].tolist() for row in labels] == expected
    assert batch.labels.tolist() == sum(expected, [])
    for row, label, real, answer in zip(ids, labels, mask, expected, strict=True):
        assert row[real.bool()][-len(answer) :].tolist() == answer and (row[label != -100] == label[label != -100]).all()
        assert "</s>" not in opened.processor.tokenizer.decode(row[(label == -100) & real.bool()])
    asked = [opened.processor.tokenizer.decode(row[row != tiny.IMAGE]) for row in ids]
    assert "a red circle" in asked[0] and "two small blue square and" in asked[1]
    text = ((ids != tiny.IMAGE) & mask.bool()).sum()
    assert batch.text_tokens == {"language": int(text)} and batch.cut == 0
    with torch.no_grad():
        rows = opened.task.forward(opened.whole, batch.inputs)
    assert [len(part) for part in rows] == [5, 5]
    assert opened.task.metrics(opened.task.rankings(rows, batch.labels)).keys() == {"token accuracy"}


def test_batch_mates_and_padding_change_no_prediction(opened):
    both = opened.task.forward(opened.whole, opened.collate(PAIRS).inputs)[0]
    alone = [opened.task.forward(opened.whole, opened.collate([pair]).inputs)[0] for pair in PAIRS]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_captions_are_asked_for(opened, tmp_path):
    caption = open_dense(str(opened.source.folder), QUIET, task="caption")
    batch = caption.collate([Pair(RED, "a red circle", answers=("square",))])
    (labels,) = batch.inputs["labels"]
    words = ["a", "red", "circle", "</s>"]
    assert labels[labels != -100].tolist() == caption.processor.tokenizer.convert_tokens_to_ids(words)


def test_long_questions_and_answers_are_cut_and_counted(opened):
    short = replace(opened.collate, max_text=4)
    batch = short([PAIRS[0], Pair(RED, "a red a red a blue", answers=("a a a a circle circle",))])
    asked = opened.processor.tokenizer.decode(batch.inputs["input_ids"][1])
    assert batch.cut == 1 and "a red a red" in asked and "blue" not in asked
    (labels,) = batch.inputs["labels"][1:]
    assert (labels != -100).sum() == 5  # four and the end


def test_texts_are_written_as_one_by_one_and_as_by_hand(opened):
    """Left padding for prompts of different length, against a loop without a cache."""
    topology, model = opened.family.topology, opened.whole
    quiet = model.generation_config
    quiet.suppress_tokens, quiet.eos_token_id = [tiny.IMAGE, tiny.VIDEO], None
    found = topology.generate(opened.family, model, opened.collate(PAIRS).inputs, 4)
    for pair, expected in zip(PAIRS, found, strict=True):
        inputs = opened.collate([pair]).inputs
        rows = ("input_ids", "attention_mask", *topology.pictures.rows)
        given = {name: inputs[name] for name in topology.pictures.inputs} | without_answers(inputs, inputs["labels"], rows)
        for token in expected:
            with torch.no_grad():
                scores = model(**given).logits[0, -1].index_fill(0, torch.tensor([tiny.IMAGE, tiny.VIDEO]), -torch.inf)
            assert scores.argmax() == token
            given |= {name: nn.functional.pad(given[name], (0, 1), value=name == "attention_mask") for name in rows}
            given["input_ids"][0, -1] = token


def test_a_placeholder_in_the_data_is_not_a_second_image(opened):
    token = opened.processor.image_token
    expected, found = (opened.collate([replace(PAIRS[0], text=text)]).inputs for text in ("a red", f"{token}\na red"))
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("place", ["a file of its own", "the processor's file"])
def test_what_is_said_of_videos_is_handed_on(place, tmp_path):
    folder = tiny.write("qwen2-vl", tmp_path / "dense")
    said, path = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}, folder / "processor_config.json"
    if place == "a file of its own":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(said))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"video_processor": said}))
    save_processor(load_processor(folder), tmp_path / "compact", folder)
    name = "video_preprocessor_config.json" if place == "a file of its own" else "processor_config.json"
    found = json.loads((tmp_path / "compact" / name).read_text())
    assert found.get("video_processor", found) == said


class Still(transformers.SmolVLMProcessor):
    """SmolVLM's processor without what needs torchvision and num2words, for videos."""

    video_processor = SimpleNamespace(num_frames=1, fps=1)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def test_prompts_of_smolvlm(monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}  # two by two tiles, and the whole
    images, tokenizer = SmolVLMImageProcessorPil(**sizes), tiny.prompt_tokenizer()
    processor = Still(images, tokenizer, None, image_seq_len=9, chat_template=tiny.chat())
    model = made("smolvlm")
    task = tasks.TASKS["vqa"].of(model.family.topology)
    batch = collator(model.family, processor, 20, task, model.stock.config)(PAIRS)
    assert batch.inputs["pixel_values"].shape[1:] == (5, 3, 24, 24)
    assert (batch.inputs["input_ids"] == tiny.IMAGE).sum(1).tolist() == [5 * 9, 3 * 9]  # the other is narrow
    with torch.no_grad():
        read = task.forward(model.stock, batch.inputs)
    assert len(read[0]) == len(batch.labels) == 5


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_processor_that_cannot_do_without_videos_says_what_it_needs(tmp_path):
    made("smolvlm").stock.save_pretrained(tmp_path)
    for part in (tiny.prompt_tokenizer(), SmolVLMImageProcessorPil(size={"longest_edge": 24})):
        part.save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="needs a package that is missing: SmolVLMVideoProcessor requires the Torchvision"):
        open_dense(str(tmp_path), QUIET)


def test_an_answer_follows_its_prompt_as_the_tokenizer_writes_it():
    plain, ending = tiny.prompt_tokenizer(), tiny.word_tokenizer()
    circle, end = plain.convert_tokens_to_ids(["circle", "</s>"])
    assert with_answer(plain, "a red", "circle") == (0, [circle, end])
    assert with_answer(ending, "a red", "circle") == (1, [circle, end])  # which ends the prompt and the whole by itself


def test_prompts_without_answers_end_where_answers_began():
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, -100, -100, 7, 8]])
    made = without_answers({"input_ids": ids, "attention_mask": (ids > 0).long()}, labels, ("input_ids", "attention_mask"))
    assert made["input_ids"].tolist() == [[0, 1, 2], [1, 5, 6]]
    assert made["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
