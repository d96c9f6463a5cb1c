"""Compact folders in transformers' own hands: with remote code they answer as compact, without it they fail loudly."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import comp_cli
from comp_cli.cli.output import Output
from comp_cli.commands import bench, export
from comp_cli.commands.prune import prune
from comp_cli.engine import flops
from comp_cli.models.dense import open_dense
from comp_cli.options import ExportOptions, PruneOptions
from comp_cli.plan import PADDING, Plan

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
RATIOS = {
    "blip": 0.31,
    "blip-caption": 0.15,
    "blip-vqa": 0.1,
    "clip": 0.4,
    "siglip": 0.4,
    "clip-vision": 0.31,
    "clip-text": 0.3,
}
STOCK = {
    "blip": ("BlipForImageTextRetrieval", "BlipModel", "AutoModel"),
    "blip-caption": ("BlipForConditionalGeneration", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "blip-vqa": ("BlipForQuestionAnswering", "AutoModelForVisualQuestionAnswering"),
    "clip": ("CLIPModel", "CLIPVisionModel", "CLIPTextModel", "AutoModel", "AutoModelForZeroShotImageClassification"),
    "siglip": ("SiglipModel", "SiglipVisionModel", "SiglipTextModel", "AutoModelForZeroShotImageClassification"),
    "clip-vision": ("CLIPVisionModelWithProjection", "CLIPVisionModel", "AutoModel"),
    "clip-text": ("CLIPTextModelWithProjection", "CLIPTextModel", "AutoModel"),
}


@pytest.fixture(scope="module", params=RATIOS)
def pruned(request, tmp_path_factory):
    """The name of a family, a dense folder, and the compact one that has lost tokens only, with the dense weights."""
    place = tmp_path_factory.mktemp(request.param)
    dense = tiny.write(request.param, place / "dense")
    options = PruneOptions(str(dense), RATIOS[request.param], method="token", sequential=False, **SIZES)
    prune(options, place / "compact", QUIET)
    return request.param, dense, place / "compact"


@pytest.fixture(scope="module")
def inputs(pruned):
    dense = open_dense(str(pruned[1]), QUIET, text_tokens=12)
    return dense, dense.random_inputs(3, 12)


def numbers(model, dense, given) -> torch.Tensor:
    with torch.inference_mode():
        if dense.task.new_tokens:
            given = {name: tensor.clone() for name, tensor in given.items() if name in ("pixel_values", "input_ids")}
            return model.generate(**given, max_new_tokens=6, num_beams=1, do_sample=False)
        return getattr(model(**given), dense.task.outputs[0])


@pytest.mark.parametrize("how", [{}, {"attn_implementation": "eager"}, {"dtype": torch.float16}])
def test_a_folder_that_lost_tokens_only_does_not_load_as_dense(pruned, how):
    name, dense, folder = pruned
    config = transformers.AutoConfig.from_pretrained(dense)
    for stock in STOCK[name]:
        kind = getattr(transformers, stock)
        with pytest.raises((RuntimeError, ValueError)):
            kind.from_pretrained(folder, **how)
        if "Auto" not in stock and kind.config_class is type(config):  # a config without a word of comp
            with pytest.raises(RuntimeError):
                kind.from_pretrained(folder, config=config, **how)


def test_pipelines_without_remote_code_fail_loudly(pruned):
    name, _, folder = pruned
    tasks = {"clip": "zero-shot-image-classification", "blip-caption": "image-text-to-text"}
    tasks["siglip"] = tasks["clip"]
    if name not in tasks:
        pytest.skip("no pipeline takes this model")
    with pytest.raises(ValueError, match="Could not load model"):
        transformers.pipeline(tasks[name], model=str(folder))


def test_every_auto_class_of_the_stock_class_answers_as_compact(pruned, inputs):
    """The same numbers as comp_cli.load, and others than the dense model."""
    name, _, folder = pruned
    expected = numbers(comp_cli.load(folder), *inputs)
    autos = {stock for stock in STOCK[name] if stock.startswith("AutoModel")} | {"AutoModel"}
    assert autos <= json.loads((folder / "config.json").read_text())["auto_map"].keys()
    for auto in autos:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__name__.startswith("Compact") and torch.equal(numbers(model, *inputs), expected)


def test_pipelines_with_remote_code_answer_as_compact(pruned):
    name, _, folder = pruned
    picture = Image.effect_noise((48, 48), 60).convert("RGB")
    if name == "clip":
        pipe = transformers.pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
        labels = ["red circle", "blue square"]
        found = {row["label"]: row["score"] for row in pipe(picture, candidate_labels=labels, hypothesis_template="{}")}
        given = pipe.tokenizer(labels, padding=True, return_tensors="pt") | pipe.image_processor(picture, return_tensors="pt")
        with torch.inference_mode():
            right = comp_cli.load(folder)(**given).logits_per_image.softmax(-1)[0]
        assert [found[label] for label in labels] == pytest.approx(right.tolist(), abs=1e-5)
    elif name == "blip-caption":
        pipe = transformers.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
        found = pipe(picture, text="a red", max_new_tokens=5)[0]["generated_text"]
        processor = transformers.AutoProcessor.from_pretrained(folder)
        given = processor(images=picture, text="a red", return_tensors="pt")
        tokens = comp_cli.load(folder).generate(**given, max_new_tokens=5)
        assert found == processor.decode(tokens[0], skip_special_tokens=True)
    else:
        pytest.skip("tested above: no pipeline takes this model as it is")


def test_channels_of_zeros_change_no_number(pruned, inputs):
    """The plan of the report without them, around the dense weights."""
    _, _, folder = pruned
    dense, given = inputs
    report = json.loads((folder / "comp_report.json").read_text())
    plan = Plan.from_json(report["plan"])
    padded = [layer for tower in plan.towers for layer in tower.layers if layer.padding]
    assert padded and all(layer.padding == PADDING for layer in padded)
    towers = tuple(replace(t, layers=tuple(replace(layer, padding=0) for layer in t.layers)) for t in plan.towers)
    without = dense.runtime(replace(plan, towers=towers))
    model = comp_cli.load(folder)
    found, expected = (numbers(either, dense, given) for either in (model, without))
    # Zeros add nothing; but sums of other lengths may be rounded in another order.
    torch.testing.assert_close(found, expected, atol=2e-6 * float(expected.abs().max()), rtol=0)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["compact"] > report["params"]["dense"]
    assert flops.count(plan, dense.reference).total == report["flops"]["compact"]
    assert bench.count_flops(model, dense.family, 12) == report["flops"]["compact"]  # by torch's own counter
    for tensor in load_file(folder / "model.safetensors").values():
        if tensor.shape[:1] == (200 + PADDING,):
            assert not tensor[200:].any()
        elif tensor.shape[-1:] == (200 + PADDING,):
            assert not tensor[:, 200:].any()


def test_it_trains_saves_loads_and_exports(pruned, inputs, tmp_path):
    name, _, folder = pruned
    dense, given = inputs
    model = comp_cli.load(folder)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).train().parameters(), lr=1e-3, weight_decay=0.1)
    outputs = model(**given)
    next(
        value for value in outputs.values() if torch.is_tensor(value) and value.requires_grad
    ).float().square().sum().backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "tuned")
    again = comp_cli.load(tmp_path / "tuned")
    assert torch.equal(numbers(again, dense, given), numbers(model, dense, given))
    with pytest.raises((RuntimeError, ValueError)):
        getattr(transformers, STOCK[name][0]).from_pretrained(tmp_path / "tuned")
    if name == "clip":
        assert export.export(folder, tmp_path / "onnx", ExportOptions(), QUIET).passed


def test_towers_that_lost_heads_or_channels_need_no_zeros(compact_folder):
    plan = Plan.from_json(json.loads((compact_folder / "comp_report.json").read_text())["plan"])
    assert not any(layer.padding for tower in plan.towers for layer in tower.layers)


def test_a_plan_that_drops_nothing_is_told_apart_by_nothing(dense):
    assert dense.plan.told_apart(dense.plan) == dense.plan
