"""Shapes of models: what each reads, which graphs it has, and that nobody outside asks which one it is."""

import ast
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from PIL import Image

import comp_cli
from comp_cli import tasks
from comp_cli.checkpoint.loading import load_model
from comp_cli.data.batches import random_inputs
from comp_cli.data.rows import Pair
from comp_cli.families import FAMILIES, Family
from comp_cli.families.blip import BLIP_CONTRASTIVE
from comp_cli.models.dense import collator
from comp_cli.onnx.write import Graph
from comp_cli.topology import CrossEncoder, DualEncoder, EncoderDecoder, ImageTextDecoder, SingleEncoder, Topology
from comp_cli.topology.graph_specs import DECODER, ENCODER, PAST

SHAPES = {
    "blip": CrossEncoder,
    "blip_contrastive": DualEncoder,
    "blip_caption": EncoderDecoder,
    "blip_vqa": EncoderDecoder,
    "clip": DualEncoder,
    "clip_vision": SingleEncoder,
    "clip_text": SingleEncoder,
    "siglip": DualEncoder,
    "llava": ImageTextDecoder,
    "llava_next": ImageTextDecoder,
    "llava_onevision": ImageTextDecoder,
    "qwen2_vl": ImageTextDecoder,
    "qwen2_5_vl": ImageTextDecoder,
    "qwen3_vl": ImageTextDecoder,
    "internvl": ImageTextDecoder,
    "smolvlm": ImageTextDecoder,
    "paligemma": ImageTextDecoder,
}
TEXTS = ["two red circle", "a square"]
OLD = {"decoder", "dual", "encoders", "vision", "text_embeds", "image_embeds", "inputs", "padding"}  # once fields of Family


def task_of(family: Family) -> tasks.Task:
    return tasks.TASKS[next(name for names in family.architectures.values() for name in names)]


@pytest.fixture(scope="module")
def config():
    """family -> the whole config of the tiny model, as a dictionary."""
    made = {name.replace("-", "_"): make().config.to_dict() for name, (make, _) in tiny.FAMILIES.items()}
    return made.__getitem__


def test_every_family_has_a_shape():
    assert {name: type(family.topology) for name, family in FAMILIES.items()} == SHAPES


def test_families_and_shapes_are_light():
    code = "import sys, comp_cli.families, comp_cli.topology; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# Nobody outside asks ---------------------------------------------------------------------------------------------------


def outside() -> dict[Path, ast.Module]:
    """Every module of comp but descriptions and shapes."""
    root = Path(comp_cli.__file__).parent
    files = (path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] not in ("families", "topology"))
    return {path: ast.parse(path.read_text()) for path in files}


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def questions(tree: ast.Module) -> list[str]:
    """What asks for the shape of a model: a field of a topology, an optional field of old, a class, an input by its name."""
    own = {field.name for shape in set(SHAPES.values()) for field in fields(shape)} - {field.name for field in fields(Topology)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = last_name(node.value)
            if (holder == "topology" and node.attr in own) or (holder == "family" and node.attr in OLD):
                found.append(f"{node.lineno}: {holder}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            named = {shape.__name__ for shape in SHAPES.values()} & {alias.name for alias in node.names}
            found += [f"{node.lineno}: {name}" for name in named]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            if (
                isinstance(node.left, ast.Constant)
                and last_name(node.comparators[0]) == "inputs"
                and "family" in ast.dump(node)
            ):
                found.append(f"{node.lineno}: {node.left.value} in inputs")
    return found


def test_nobody_outside_asks_for_the_shape():
    found = {str(path): asked for path, tree in outside().items() if (asked := questions(tree))}
    assert len(outside()) > 50 and not found


@pytest.mark.parametrize(
    "code",
    [
        "if dense.family.decoder: pass",
        "x = family.topology.question",
        "topology.halves",
        "from ..topology import EncoderDecoder",
        "'pixel_values' in family.inputs",
        "'pixel_values' not in family.topology.inputs",
    ],
)
def test_such_a_question_would_be_seen(code):
    assert questions(ast.parse(code))


# Graphs ----------------------------------------------------------------------------------------------------------------

CACHE = [f"{i}.{part}.{kind}" for i in range(4) for part in ("decoder", "encoder") for kind in ("key", "value")]
OWN = [name for name in CACHE if "decoder" in name]
IMAGES, TOKENS, MASKS = "pixel_values images", "input_ids texts,tokens", "attention_mask texts,tokens"
BOTH = ["pixel_values batch", "input_ids batch,tokens", "attention_mask batch,tokens"]
ANSWERS = ["labels batch,answer_tokens", "decoder_attention_mask batch,answer_tokens"]
DUAL = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]


def writers(asked: list[str], attended: str) -> dict[str, tuple[list[str], list[str]]]:
    """Graphs of a model that writes texts. asked: inputs of the encoder; attended: axes of what the decoder attends to."""
    grown = "batch,past_tokens"
    past = [f"past_key_values.{name} {grown if 'decoder' in name else attended}" for name in CACHE]
    return {
        ENCODER: (asked, ["last_hidden_state"]),
        DECODER: (
            ["input_ids batch,tokens", f"encoder_hidden_states {attended}"],
            ["logits", *(f"present.{name}" for name in CACHE)],
        ),
        PAST: (["input_ids batch,tokens", *past], ["logits", *(f"present.{name}" for name in OWN)]),
    }


WHOLE = {  # family -> graph -> inputs with their free axes, outputs
    "blip": {"model.onnx": (BOTH, ["itm_score"])},
    "blip_contrastive": {"model.onnx": ([IMAGES, TOKENS, MASKS], DUAL)},
    "blip_caption": writers(["pixel_values batch"], "batch"),
    "blip_vqa": writers(BOTH, "batch,encoder_tokens"),
    "clip": {"model.onnx": ([IMAGES, TOKENS, MASKS], DUAL)},
    "clip_vision": {"model.onnx": ([IMAGES], ["image_embeds"])},
    "clip_text": {"model.onnx": ([TOKENS, MASKS], ["text_embeds"])},
    "siglip": {"model.onnx": ([IMAGES, TOKENS], DUAL)},
}
DUAL_SPLIT = {"vision_model.onnx": ([IMAGES], ["image_embeds"]), "text_model.onnx": ([TOKENS, MASKS], ["text_embeds"])}
SPLIT = {
    "blip": {
        "vision_model.onnx": ([IMAGES], ["image_embeds"]),
        "text_model.onnx": (["image_embeds images", *BOTH[1:]], ["itm_score"]),
    },
    "blip_contrastive": DUAL_SPLIT,
    "clip": DUAL_SPLIT,
    "siglip": DUAL_SPLIT | {"text_model.onnx": ([TOKENS], ["text_embeds"])},
}
FULL = {"blip_caption": (BOTH, ["logits"]), "blip_vqa": (BOTH + ANSWERS, ["logits"])}


def listed(spec) -> tuple[list[str], list[str]]:
    return [f"{name} {','.join(axes.values())}" for name, axes in spec.dynamic.items()], list(spec.outputs)


@pytest.mark.parametrize("name", WHOLE)
def test_graphs_have_these_names(name, config):
    family = FAMILIES[name]
    described = partial(family.topology.graphs, family, config(name), task_of(family))
    assert {spec.name: listed(spec) for spec in described(split=False)} == WHOLE[name]
    assert (family.topology.why_whole is None) == (name in SPLIT)
    if name in SPLIT:
        assert {spec.name: listed(spec) for spec in described(split=True)} == SPLIT[name]
    full = family.topology.full_graph(family, config(name), task_of(family))
    assert listed(full) == (FULL[name] if name in FULL else WHOLE[name]["model.onnx"])


def test_what_has_no_graphs_says_so():
    assert {name for name, family in FAMILIES.items() if not family.topology.exports} == FAMILIES.keys() - {
        *WHOLE,
        "llava",
        "paligemma",
    }


@pytest.mark.parametrize("name", ["blip-caption", "blip-vqa"])
def test_the_graphs_of_a_writer_run_together_say_what_the_whole_says(name):
    """In torch, without ONNX between: encoder, the beginning, and the rest token by token with the cache."""
    torch.manual_seed(0)
    model, family = tiny.FAMILIES[name][0]().eval(), FAMILIES[name.replace("-", "_")]
    described, task = model.config.to_dict(), task_of(family)
    inputs = random_inputs(model.config, family, 2, 6)
    specs = {spec.name: spec for spec in family.topology.graphs(family, described, task, False)}

    def step(graph, values):
        spec = specs[graph]
        made = Graph(model, spec)(*(torch.from_numpy(values[name]) for name in spec.inputs))
        return {name: tensor.numpy() for name, tensor in zip(spec.outputs, made, strict=True)}

    with torch.no_grad():
        found = family.topology.run(step, specs, {name: tensor.numpy() for name, tensor in inputs.items()})
        full = family.topology.full_graph(family, described, task)
        (expected,) = Graph(model, full)(*(inputs[name] for name in full.inputs))
    torch.testing.assert_close(torch.from_numpy(found["logits"]), expected, atol=1e-5, rtol=1e-5)


# What goes in ----------------------------------------------------------------------------------------------------------

LAST, PADDED = [1] * 6, [1] * 4 + [0] * 2
RANDOM = {  # two samples, six tokens, two of padding, seed 0; of the pixels the first two
    "blip": {
        "pixel_values": [-0.0885, 0.5239],
        "input_ids": [[9, 8, 12, 7, 6, 14], [18, 8, 16, 10, 0, 0]],
        "attention_mask": [LAST, PADDED],
    },
    "blip_vqa": {
        "pixel_values": [0.5988, -1.5551],
        "input_ids": [[9, 8, 12, 7, 6, 14], [18, 8, 16, 10, 0, 0]],
        "attention_mask": [LAST, PADDED],
        "labels": [[13, 10, 7, 9], [9, 7, 9, 0]],
        "decoder_attention_mask": [[1] * 4, [1] * 3 + [0]],
    },
    "clip": {
        "pixel_values": [-0.0885, 0.5239],
        "input_ids": [[9, 8, 12, 7, 6, 3], [18, 8, 16, 3, 0, 0]],
        "attention_mask": [LAST, PADDED],
    },
    "siglip": {
        "pixel_values": [-0.6731, 0.8728],
        "input_ids": [
            [9, 8, 12, 7, 6, 14, 18, 8, 16, 10, 14, 5, 13, 10, 7, 9, 9, 7, 9, 14, 11, 14, 16, 7],
            [9, 16, 6, 8, 6, 9, 6, 5, 16, 17, 8, 16, 15, 14, 6, 9, 9, 12, 5, 10, 18, 16, 10, 16],
        ],
    },
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_inputs_are_these(name, config):
    family = FAMILIES[name]
    made = family.topology.random_inputs(family, config(name), 2, 6, padded=2)
    assert tuple(made) == family.topology.inputs == tuple(RANDOM[name])
    for kind, expected in RANDOM[name].items():
        if kind == "pixel_values":
            assert made[kind].shape == (2, 3, 48, 48)
            assert made[kind].flatten()[:2].tolist() == pytest.approx(expected, abs=1e-4)
        else:
            assert made[kind].tolist() == expected


LENGTHS = {
    "blip": {"vision": 37, "language": 12},
    "blip_caption": {"vision": 37, "language": 12},
    "blip_vqa": {"vision": 37, "language": 12, "answer": 4},
    "clip": {"vision": 37, "language": 12},
    "clip_vision": {"vision": 37},
    "clip_text": {"language": 12},
    "siglip": {"vision": 36, "language": 24},
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_reference_input_has_so_many_tokens(name, config):
    family = FAMILIES[name]
    found = family.topology.lengths(family, config(name), 12)
    assert found == LENGTHS[name] and family.topology.text_tokens(found) == LENGTHS[name].get("language", 0)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_batch_is_what_the_processor_makes(name, config):
    """But texts that the model writes begin as it writes them."""
    family, processor = FAMILIES[name.replace("-", "_")], tiny.FAMILIES[name][1]()
    task = task_of(family).of(family.topology)
    pictures = [Image.new("RGB", (20 + 9 * number, 31), (200, 10 * number, 0)) for number in range(2)]
    pairs = [
        Pair(*row, answers=(answer,)) for row, answer in zip(zip(pictures, TEXTS, strict=True), ("red", "two red"), strict=True)
    ]
    model_config = transformers.AutoConfig.for_model(**config(family.name))
    batch = collator(family, processor, 24, task, model_config)(pairs)
    assert tuple(batch.inputs) == family.topology.inputs and batch.cut == 0
    images, tokenizer = family.topology.parts_of(processor)
    if images is not None:
        expected = torch.cat([images(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures])
        assert torch.equal(batch.inputs["pixel_values"], expected)
    if tokenizer is None:
        return
    padding = "max_length" if family.name == "siglip" else True
    texts = [task.prompt.format(text) for text in TEXTS]
    expected = tokenizer(texts, padding=padding, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
    if family.name == "blip_caption":
        expected[:, 0] = tiny.START
    assert torch.equal(batch.inputs["input_ids"], expected)
    if family.name == "blip_vqa":
        answers = tokenizer(["red", "two red"], padding=True, return_tensors="pt")
        answers["input_ids"][:, 0] = tiny.START
        assert torch.equal(batch.inputs["labels"], answers["input_ids"])
        assert torch.equal(batch.inputs["decoder_attention_mask"], answers["attention_mask"])
    assert collator(family, processor, 3, task, model_config)(pairs).cut == (1 if family.name == "siglip" else 2)


# The interface of dual encoders ----------------------------------------------------------------------------------------


def test_a_model_is_born_with_its_interface(tiny_folder):
    """Its class is never changed, keeps its name, and what is saved of it is of its own class."""
    stock, dual = load_model(tiny_folder), load_model(tiny_folder, family=BLIP_CONTRASTIVE)
    assert type(dual).__name__ == type(stock).__name__ and isinstance(dual, type(stock))
    assert not hasattr(stock, "get_image_features") and hasattr(dual, "get_image_features")
    assert dual.state_dict().keys() == stock.state_dict().keys()
    assert type(load_model(tiny_folder)) is type(stock)


def test_only_a_dual_encoder_tells_its_scale(tiny_folder):
    dual = load_model(tiny_folder, family=BLIP_CONTRASTIVE)
    assert BLIP_CONTRASTIVE.topology.facts(dual) == {"logit_scale": pytest.approx(1 / 0.07)}
    assert FAMILIES["blip"].topology.facts(load_model(tiny_folder)) == {}
    siglip = FAMILIES["siglip"].topology.facts(tiny.siglip_model())
    assert siglip.keys() == {"logit_scale", "logit_bias"}


def test_a_task_of_no_model_does_not_guess_where_texts_are():
    task = tasks.TASKS["caption"]
    with pytest.raises(ValueError, match="of no model yet"):
        task.forward(torch.nn.Identity(), {})
    assert task.of(FAMILIES["blip_vqa"].topology).place == ("labels", "decoder_attention_mask", "text_decoder.cls")
