"""Decoders that read images as ONNX graphs: what they write is what torch writes, with image tokens leaving inside."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
import transformers
import vlm_models
from javascript import in_node, node_modules
from PIL import Image
from torch import nn

import comp_cli
from comp_cli import load_onnx
from comp_cli.checkpoint.loading import describe, quiet_libraries
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.errors import RefusedError, UsageError
from comp_cli.files.store import read_json
from comp_cli.onnx import parity, rewrite, transformers_js, wide_decoder
from comp_cli.onnx.sessions import OnnxModel, open_session
from comp_cli.onnx.translations import TRANSLATIONS, count_axes_from_the_front
from comp_cli.options import ExportOptions
from comp_cli.runtime.token_rules import STAGE_RULES, View
from comp_cli.runtime.token_selection import Stage
from comp_cli.topology.caches import Heads
from comp_cli.topology.decoder_graphs import DecoderGraphs
from comp_cli.topology.decoder_names import GRAPHS, MERGED
from comp_cli.topology.image_features import of_the_last_layer, through_projector

QUIET = Output("quiet")
STEPS = 4


def stage(layer, rule, keep, **settings):
    return {"layer": layer, "rule": rule, "keep": keep, "settings": settings}


STAGES = {  # each rule at least once, where it may stand
    "nothing leaves": [],
    "key-norm": vlm_models.STAGES["key-norm"],
    "last-attention": vlm_models.STAGES["last-attention"],
    "vitcop": [
        stage(0, "cls-clusters", 9, centre_share=0.4),
        stage(1, "cluster-merge", 6),
        stage(3, "key-norm", 2),
    ],
    "vitcop without [CLS]": [
        stage(0, "diverse-clusters", 9, centre_share=0.4),
        stage(2, "cluster-attention", 5),
        stage(3, "last-attention", 2),
    ],
    "visionzip": [stage(0, "visionzip", 8)],
    "divprune": [stage(0, "divprune", 6)],
    "divprune inside": [stage(2, "divprune", 6)],
    "cdpruner": [stage(0, "cdpruner", 6)],
    "tops": [stage(0, "tops", 6, relevance="class")],
    "tops by text": [stage(0, "tops", 6, relevance="text")],
    "tops inside": [stage(2, "tops", 6, relevance="last")],
    "rater-attention": [stage(2, "rater-attention", 6)],
    "dart": [stage(1, "dart", 10)],
    "cover": [stage(0, "cover", 6)],
    "random": [stage(0, "random", 6)],
    "stride": [stage(0, "stride", 6)],
    "pool": [stage(0, "pool", 4)],
    "pool inside": [stage(2, "pool", 4)],
}


def test_every_rule_is_here():
    assert {one["rule"] for stages in STAGES.values() for one in stages} == set(STAGE_RULES)


PREFIX = {"encode": of_the_last_layer, "prefix": True, "first_position": 1, "heads": (Heads(2, 12),) * vlm_models.LAYERS}


def graphs_of(stages, **changes):
    """Of the LLaVA of vlm_models, but for changes."""
    known = {
        "layout": vlm_models.FAMILIES["llava"].image_tokens | {"square": False},
        "encode": through_projector,
        "head": "lm_head",
        "stages": tuple(Stage(**one) for one in stages),
        "tokens": 16,
        "placeholder": vlm_models.IMAGE,
        "side": 16,
        "width": 48,
        "vocabulary": 100,
        "heads": (Heads(2, 12),) * vlm_models.LAYERS,
    }
    return DecoderGraphs(**known | changes)


def in_torch(model, graphs):
    """Runs what is traced, without tracing it."""
    specs = {spec.name: spec for spec in graphs.specs()}

    @torch.no_grad()
    def step(name, values):
        spec = specs[name]
        given = {name: torch.from_numpy(values[name]) for name in spec.inputs}
        return dict(zip(spec.outputs, (tensor.numpy() for tensor in spec.forward(model, given)), strict=True))

    return step


def written_by(model, inputs, steps=STEPS):
    """Inputs of the graphs with what torch writes, and torch's logits (batch, steps, vocabulary)."""
    length = {"max_new_tokens": steps, "min_new_tokens": steps}
    found = model.generate(**inputs, **length, do_sample=False, output_logits=True, return_dict_in_generate=True)
    values = {name: tensor.numpy() for name, tensor in inputs.items()}
    values["labels"] = found.sequences[:, inputs["input_ids"].shape[1] :].numpy()
    return values, torch.stack(found.logits, 1).numpy()


def prompts(*parts, family="llava"):
    return vlm_models.batch(family, [vlm_models.sample(family, part) for part in parts])


ONE_EACH = ((5, 6, "a", 7, 8, 9), (5, "b", 7, 8, 9, 11, 12), (1, 2, 3, 4, "c", 9))
TWO_EACH = ((5, "a", 7, "b", 8, 9), (5, "b", "c", 6, 7, 8, 9, 11))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("parts", [ONE_EACH, TWO_EACH], ids=["one image", "two images"])
def test_what_is_traced_writes_what_torch_writes(name, parts):
    """Prompts of unequal length, filled up at the left."""
    stages = STAGES[name]
    model = vlm_models.compact("llava", stages) if stages else vlm_models.stock("llava")
    values, expected = written_by(model, prompts(*parts))
    graphs = graphs_of(stages)
    found = graphs.logits(in_torch(model, graphs), values)["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["nothing leaves", "key-norm", "last-attention", "divprune", "cover", "vitcop without [CLS]"])
def test_prompts_that_are_read_in_both_directions(name):
    """PaliGemma's."""
    stages = STAGES[name]
    model = vlm_models.compact("paligemma", stages) if stages else vlm_models.stock("paligemma")
    values, expected = written_by(model, prompts(*ONE_EACH, family="paligemma"))
    layout = vlm_models.FAMILIES["paligemma"].image_tokens | {"square": False}
    graphs = graphs_of(stages, layout=layout, **PREFIX)
    found = graphs.logits(in_torch(model, graphs), values)["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_mask_of_another_kind_gives_no_logits():
    graphs = graphs_of(STAGES["key-norm"])
    model = vlm_models.compact("llava", STAGES["key-norm"])
    inputs = prompts(*ONE_EACH)
    values = {name: tensor.numpy() for name, tensor in inputs.items()} | {"labels": np.zeros((3, 1), np.int64)}
    assert np.isfinite(graphs.logits(in_torch(model, graphs), dict(values))["logits"]).all()
    values["attention_mask"] = values["attention_mask"][:, ::-1].copy()  # as if filled up at the right
    found = graphs.logits(in_torch(model, graphs), values)["logits"]
    padded = values["attention_mask"].all(1) ^ True
    assert np.isnan(found[padded]).all() and np.isfinite(found[~padded]).all()


def test_images_and_placeholders_must_agree():
    graphs = graphs_of(STAGES["key-norm"])
    step = in_torch(vlm_models.compact("llava", STAGES["key-norm"]), graphs)
    values = {name: tensor.numpy() for name, tensor in prompts(*ONE_EACH).items()}
    seen = graphs.see(step, values["pixel_values"], 3)
    ids, mask = values["input_ids"], values["attention_mask"]
    lost = ids.copy()
    lost[0, ids[0].tolist().index(vlm_models.IMAGE)] = 5
    with pytest.raises(ValueError, match="prompts with 15, 16, 16 placeholders"):
        graphs.read(step, lost, mask, seen)
    with pytest.raises(ValueError, match="2 images for 3 prompts"):
        graphs.see(step, values["pixel_values"][:2], 3)


# Rules in ONNX Runtime ---------------------------------------------------------------------------------------------------

RULES = [
    ("cluster-merge", 5, {}),
    ("rater-attention", 5, {}),
    ("visionzip", 8, {}),
    ("cdpruner", 3, {}),
    ("tops", 3, {}),
    ("dart", 10, {}),
    ("cover", 5, {}),
    ("pool", 4, {}),
    ("stride", 5, {}),
    ("random", 5, {}),
    ("diverse-clusters", 4, {"centre_share": 0.5}),
]
FIELDS = ("states", "positions", "keys", "class_attention", "tower_keys", "labels")
FIELDS += ("text_states", "text_valid", "text_attention")


class AllRules(nn.Module):
    """What all rules choose of one view, (images, tokens) each, and states where they merge."""

    def forward(self, *fields):
        made = []
        for rule, keep, settings in RULES:
            given = dict(zip(FIELDS, fields, strict=True))
            view = View(torch.ones_like(given["positions"], dtype=torch.bool), **given)
            choice = STAGE_RULES[rule].choose(view, [keep], **settings)
            made += [choice.kept, *(part for part in (choice.states, choice.labels, choice.weights) if part is not None)]
        return tuple(made)


def fields_of(images):
    torch.manual_seed(images)
    return (
        torch.randn(images, 16, 8),
        torch.arange(16).expand(images, -1).contiguous(),
        torch.randn(images, 16, 2, 6),
        torch.rand(images, 16),
        torch.randn(images, 16, 12),
        torch.arange(16).remainder(4).expand(images, -1).contiguous(),
        torch.randn(images, 5, 8),
        torch.tensor([False, True, True, True, True]).expand(images, -1).contiguous(),
        torch.rand(images, 5, 16),
    )


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rules.onnx"
    with quiet_libraries(), torch.no_grad():
        program = torch.onnx.export(
            AllRules().eval(),
            args=fields_of(3),
            dynamo=True,
            input_names=list(FIELDS),
            dynamic_shapes={"fields": tuple({0: "images"} for _ in FIELDS)},
            opset_version=23,
            verbose=False,
            custom_translation_table=TRANSLATIONS,
        )
    count_axes_from_the_front(program.model)
    program.save(path)
    return open_session(path)


@pytest.mark.parametrize("images", [1, 4, 0])
def test_rules_choose_in_onnx_what_they_choose_in_torch(rules, images):
    """Also of no images, which is what they see in every step."""
    fields = fields_of(images)
    given = {value.name: dict(zip(FIELDS, fields, strict=True))[value.name].numpy() for value in rules.get_inputs()}
    found = rules.run(None, given)
    expected = AllRules()(*fields) if images else [torch.zeros(0, *value.shape[1:]) for value in rules.get_outputs()]
    assert len(found) == len(expected) > len(RULES)
    for one, wanted in zip(found, expected, strict=True):
        assert one.shape == tuple(wanted.shape)
        np.testing.assert_allclose(one, wanted.numpy(), atol=1e-5)


# A folder ----------------------------------------------------------------------------------------------------------------


def small_llava():
    """Three layers in the tower and in the decoder."""
    config = tiny.llava_config()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 3
    torch.manual_seed(0)
    return tiny.decoder(transformers.LlavaForConditionalGeneration, config).eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "dense"
    small_llava().save_pretrained(folder)
    tiny.llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compact(dense):
    """A folder whose image tokens leave at ViTCoP's three stages, the first before layer 0."""
    comp_cli.prune(str(dense), method="vitcop", tokens=8, output=dense.with_name("compact"))
    return dense.with_name("compact")


@pytest.fixture(scope="module")
def served(compact):
    """Its graphs."""
    folder = compact.with_name("served")
    export.export(compact, folder, ExportOptions(), QUIET)
    return folder


@pytest.fixture(scope="module")
def in_stages(compact, served):
    return compact, served


@pytest.fixture(scope="module")
def weighted(dense):
    """A folder whose image tokens stand for several, and its graphs."""
    compact, served = (dense.with_name(name) for name in ("weighted", "weighted-onnx"))
    comp_cli.prune(str(dense), method="cover", tokens=8, output=compact)
    export.export(compact, served, ExportOptions(), QUIET)
    return compact, served


@cache
def asked(folder, images=1):
    """A batch of three prompts of unequal length, filled up at the left, with as many pictures each."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    words = ("red", "what color is the", "a blue")
    texts = [f"USER: {'<image>' * images} {question} ASSISTANT:" for question in words]
    pictures = [[Image.effect_noise((30, 24), 60 + 9 * i + j).convert("RGB") for j in range(images)] for i in range(3)]
    return processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")


def test_the_folder_has_the_names_that_others_know(served):
    document = read_json(served / "export.json")
    assert list(document["graphs"]) == ["vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"]
    inputs = document["graphs"][MERGED]["inputs"]
    assert list(inputs)[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert inputs["image_positions"]["shape"] == ["batch_size", "image_tokens"]
    assert {"past_key_values.0.key", "past_key_values.2.value"} < set(inputs)
    assert document["graphs"][MERGED]["outputs"]["logits"]["shape"] == ["batch_size", 1, 40]
    assert document["agreement"] == 1 and document["opset"] == 23 and document["passed"]
    assert (served / "generation_config.json").is_file()


def test_weights_go_from_pass_to_pass_behind_the_keys(weighted):
    graphs = read_json(weighted[1] / "export.json")["graphs"]
    assert list(graphs["vision_encoder.onnx"]["outputs"]) == ["image_features", "image_kept", "image_weights"]
    inputs, outputs = graphs[MERGED]["inputs"], graphs[MERGED]["outputs"]
    assert list(inputs)[-1] == "past_key_values.bias" and list(outputs)[-1] == "present.bias"
    assert inputs["past_key_values.bias"]["shape"] == ["batch_size", 1, "past_tokens_0", 1]
    assert inputs["image_weights"]["shape"] == ["batch_size", "kept_tokens"]


def test_key_value_heads_are_not_repeated(served):
    graph = onnx.load(served / MERGED).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == 3


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("way", [{"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("folders", ["in_stages", "weighted"])
def test_graphs_write_what_torch_writes(folders, images, way, request):
    found, (compact, served) = [], request.getfixturevalue(folders)
    for model in (comp_cli.load(compact), load_onnx(served)):
        torch.manual_seed(5)
        found.append(model.generate(**asked(compact, images), **{"do_sample": False} | way, max_new_tokens=12))
    assert torch.equal(*found)


def test_texts_end_where_torch_ends_them(compact, served):
    """At a token that the greedy text has in its middle."""
    models = [comp_cli.load(compact), load_onnx(served)]
    plain = models[0].generate(**asked(compact), max_new_tokens=8, do_sample=False)
    end = int(plain[0, -5])
    found = [model.generate(**asked(compact), max_new_tokens=8, do_sample=False, eos_token_id=end) for model in models]
    assert torch.equal(*found) and end in found[0][0, -8:]


def test_prompts_without_images_and_second_turns(compact, served):
    torch_model, graphs = comp_cli.load(compact), load_onnx(served)
    words = torch.tensor([[5, 6, 7, 8]])
    more = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    first = [model.generate(input_ids=words, **more) for model in (torch_model, graphs)]
    assert torch.equal(first[0].sequences, first[1].sequences)
    longer = torch.cat([first[0].sequences, torch.tensor([[9, 10, 11]])], 1)
    again = [
        model.generate(input_ids=longer, past_key_values=before.past_key_values, **more).sequences
        for model, before in zip((torch_model, graphs), first, strict=True)
    ]
    assert torch.equal(*again)


def test_what_graphs_cannot_is_refused(compact, served):
    graphs, inputs = load_onnx(served), asked(compact)
    for wrong, said in (
        ({"attention_mask": inputs["attention_mask"].flip(1)}, "filled up at the left"),
        ({"use_cache": False}, "leave use_cache out"),
        ({"pixel_values": inputs["pixel_values"][:2]}, "2 images for 3 prompts"),
    ):
        with pytest.raises(UsageError, match=said):
            graphs.generate(**dict(inputs) | wrong, max_new_tokens=3, do_sample=False)
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    with pytest.raises(UsageError, match="guess ahead"):
        graphs.generate(**alone, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=2)


# Without torch, and in other languages -------------------------------------------------------------------------------------

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "comp_cli"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocked())
"""


def code_of(folder, language):
    return re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def example_of(folder, tmp_path):
    """The picture of the card, and the prompt in its code as the model's processor reads them."""
    Image.effect_noise((30, 24), 60).convert("RGB").save(tmp_path / "scene.png")
    code = code_of(folder, "python")
    prompt = eval(re.search(r"^text = (.*)$", code, re.MULTILINE)[1])  # of comp's own card
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert prompt.count(processor.image_token) == 36
    pixels = processor.image_processor(Image.open(tmp_path / "scene.png"), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([processor.tokenizer(prompt)["input_ids"]])
    return processor, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("folders", ["in_stages", "weighted"])
def test_the_card_writes_without_torch(folders, tmp_path, request):
    compact, served = request.getfixturevalue(folders)
    processor, inputs = example_of(served, tmp_path)
    code = BLOCKED + code_of(served, "python").replace("scene.png", str(tmp_path / "scene.png"))
    said = subprocess.run([sys.executable, "-c", code], cwd=served, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    written = comp_cli.load(compact).generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.stdout.strip() == processor.decode(written, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_the_card_of_a_processor_that_reads_prompts_in_its_own_way(tmp_path):
    """PaliGemma's puts a token between image and words: the card holds the prompt as numbers."""
    model, processor = (make() for make in tiny.DECODERS["paligemma"])
    model.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    export.export(tmp_path / "dense", tmp_path / "served", ExportOptions(), QUIET)
    code = code_of(tmp_path / "served", "python")
    said = subprocess.run(
        [sys.executable, "-c", BLOCKED + code], cwd=tmp_path / "served", capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    prompt = re.search(r"# what the processor makes of (.*)$", code, re.MULTILINE)[1]
    picture = Image.open(tmp_path / "served" / "scene.png").convert("RGB")
    inputs = processor(images=picture, text=eval(prompt), return_tensors="pt")  # of comp's own card
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.stdout.strip() == processor.decode(written, skip_special_tokens=True).strip()


def test_the_card_says_what_cannot_run_the_graphs(served):
    assert "onnxruntime-genai cannot: its cache has one length for all layers" in (served / "README.md").read_text()


@pytest.mark.parametrize("folders", ["in_stages", "weighted"])
def test_the_card_writes_in_node(folders, tmp_path, request):
    modules = node_modules("onnxruntime-node")
    compact, served = request.getfixturevalue(folders)
    folder = shutil.copytree(served, tmp_path / "served")
    _, inputs = example_of(served, tmp_path)
    given = {"input_ids": inputs["input_ids"][0].tolist(), "pixel_values": inputs["pixel_values"].flatten().tolist()}
    (folder / "inputs.json").write_text(json.dumps(given))
    said = json.loads(in_node(folder, code_of(folder, "js"), modules))
    written = comp_cli.load(compact).generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == written.tolist()


# transformers.js -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laid_out(compact, served):
    """The folder as that client reads it."""
    folder = shutil.copytree(served, served.with_name("client"))
    config, family = describe(compact)
    wide_decoder.widen(folder, family.topology.decoder_graphs(family, config.to_dict()))
    transformers_js.lay_out(folder, {name: name for name in GRAPHS}, dict.fromkeys(GRAPHS, "fp32"), more_layers=1)
    return folder


def test_its_graphs_say_what_the_others_say(compact, served, laid_out):
    """By the steps of that client, which hands over masks of ones: padding is known from the cache."""
    config, family = describe(compact)
    known = family.topology.decoder_graphs(family, config.to_dict())
    values, expected = written_by(comp_cli.load(compact), asked(compact))
    names = [f"onnx/{name}" for name in GRAPHS]
    found = wide_decoder.logits(known, OnnxModel(laid_out, names).step, names, values)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_its_first_cache_counts_every_token(laid_out):
    session = open_session(laid_out / "onnx" / MERGED)
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    assert caches[0].name == "past_key_values.3.key" and caches[0].shape == ["batch_size", 1, "seen", 1]
    assert read_json(laid_out / "config.json")["text_config"]["num_hidden_layers"] == 4
    assert read_json(laid_out / "preprocessor_config.json")["processor_class"] == "LlavaProcessor"


def test_samples_with_unequal_images_stop_its_decoder(laid_out):
    session = open_session(laid_out / "onnx" / MERGED)
    width = session.get_inputs()[0].shape[2]
    embeds = np.zeros((2, 80, width), np.float32)
    embeds[0, :72, -3:-1], embeds[1, 3:4, -3:-1] = 1, 0  # two images in one sample, none in the other
    given = {"inputs_embeds": embeds, "attention_mask": np.ones((2, 80), np.int64)}
    for value in session.get_inputs()[2:]:
        given[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="GatherElements"):
        session.run(None, given)


CLIENT = """
import {{ LlavaForConditionalGeneration, Tensor, env }} from "@huggingface/transformers";
import {{ readFileSync }} from "node:fs";
env.allowRemoteModels = false;
env.localModelPath = "..";
const given = JSON.parse(readFileSync("inputs.json"));
const whole = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const model = await LlavaForConditionalGeneration.from_pretrained("client");
const pixel_values = new Tensor("float32", Float32Array.from(given.pixel_values), [given.input_ids.length, 3, 24, 24]);
const [input_ids, attention_mask] = [whole(given.input_ids), whole(given.attention_mask)];
const written = await model.generate({{ input_ids, attention_mask, pixel_values, max_new_tokens: 8, do_sample: false }});
console.log(JSON.stringify(written.tolist().map((row) => row.map(Number))));
"""


def test_the_client_writes_what_torch_writes(compact, laid_out, tmp_path):
    modules = node_modules("@huggingface/transformers")
    folder = shutil.copytree(laid_out, tmp_path / "client")
    inputs = asked(compact)
    given = {name: inputs[name].tolist() for name in ("input_ids", "attention_mask")}
    (folder / "inputs.json").write_text(json.dumps(given | {"pixel_values": inputs["pixel_values"].flatten().tolist()}))
    said = json.loads(in_node(folder, CLIENT.format(), modules))
    written = comp_cli.load(compact).generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert said == written.tolist()


# What is refused, and int4 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in tiny.DECODERS if name not in ("llava", "paligemma")])
def test_families_without_graphs_are_refused_by_name(name, tmp_path):
    folder = tmp_path / "dense"
    tiny.DECODERS[name][0]().save_pretrained(folder)
    with pytest.raises(RefusedError, match=r"comp exports no graphs of a \w+ForConditionalGeneration: \w+"):
        export.export(folder, tmp_path / "onnx", ExportOptions(), QUIET)


@pytest.mark.parametrize(
    ("stages", "layout", "said"),
    [
        (
            "2:8",
            "optimum",
            "rule cover before layer 2 gives image tokens weights, which graphs carry from a stage before layer 0",
        ),
        ("0:9,2:4", "optimum", "rule cover before layer 0 .* where no other follows. .* tops or divprune"),
        ("0:8", "transformers.js", "the client of --layout transformers.js does not hand on. .* tops or divprune"),
    ],
)
def test_weights_are_refused_where_no_graph_carries_them(dense, tmp_path, stages, layout, said):
    comp_cli.prune(str(dense), method="cover", token_stages=stages, output=tmp_path / "compact")
    with pytest.raises(RefusedError, match=said):
        export.export(tmp_path / "compact", tmp_path / "onnx", ExportOptions(layout=layout), QUIET)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 21}, "--opset 21: graphs of a LlavaForConditionalGeneration need opset 23"),
        ({"split": True}, "--split: LlavaForConditionalGeneration reads images inside of a text"),
        ({"layout": "genai"}, "--layout genai: unknown"),
    ],
)
def test_options_that_cannot_be(compact, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        export.export(compact, tmp_path / "onnx", ExportOptions(**options), QUIET)


def test_encoders_have_no_int4(tmp_path):
    folder = tiny.write("clip", tmp_path / "dense")
    with pytest.raises(UsageError, match="--quantize int4 is for the language model of a decoder"):
        export.export(folder, tmp_path / "onnx", ExportOptions(quantize="int4"), QUIET)


def test_int4_weights_are_in_16_steps(tmp_path):
    """One matrix, by hand: a scale for every 32 weights of a column, what goes in stays float."""
    weights = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    values = [onnx.helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 64), ("y", 8))]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = onnx.helper.make_graph([node], "one", values[:1], values[1:], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "one.onnx")
    rewrite.quantize_weights(tmp_path / "one.onnx", tmp_path / "int4.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "int4.onnx").graph.node] == ["MatMulNBits"]
    (found,) = open_session(tmp_path / "int4.onnx").run(None, {"x": np.eye(64, dtype=np.float32)})
    blocks = weights.reshape(2, 32, 8)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    steps = largest / -8
    expected = (np.clip(np.round(blocks / steps), -8, 7) * steps).reshape(64, 8)
    assert np.abs(found - expected).max() <= np.abs(steps).max() * 1.01  # halves may be rounded either way
    assert (np.abs(found - expected) < 1e-5).mean() > 0.95
    states = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    real = np.linalg.norm(states @ found - states @ weights) / np.linalg.norm(states @ weights)
    assert rewrite.noise(tmp_path / "one.onnx", {"x": states}, "int4")["product"] == pytest.approx(real, rel=0.3)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A model with matrices of 16 steps, so that int4 changes nothing, whose image tokens leave by their place."""
    place = tmp_path_factory.mktemp("calm")
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(small_llava().config).eval()
    for module in (*model.model.language_model.modules(), model.lm_head):
        if isinstance(module, nn.Linear):
            module.weight.data = torch.randint(-7, 8, module.weight.shape) * 0.02
            module.weight.data[:, ::32] = -8 * 0.02  # the largest of each block
    model.save_pretrained(place / "dense")
    tiny.llava_processor().save_pretrained(place / "dense")
    comp_cli.prune(str(place / "dense"), method="stride", tokens=8, output=place / "compact")
    return place / "compact"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"quantize": "int4"}, "decoder_model_merged.onnx"),
        ({"dtype": "fp16"}, "decoder_model_merged.onnx"),
        ({"layout": "transformers.js"}, "onnx/decoder_model_merged.onnx"),
        ({"layout": "transformers.js", "quantize": "int4"}, "onnx/decoder_model_merged_q4.onnx"),
        ({"with_preprocessing": True}, "decoder_model_merged.onnx"),
    ],
    ids=["int4", "fp16", "transformers.js", "transformers.js, int4", "pictures"],
)
def test_other_kinds_of_graphs_pass_the_gate(calm, tmp_path, options, written):
    report = export.export(calm, tmp_path / "onnx", ExportOptions(**options), QUIET)
    assert report.passed and report.agreement >= 0.9 and (tmp_path / "onnx" / written).is_file()
    assert written in report.files and written in report.graphs
    kinds = {node.op_type for node in onnx.load(tmp_path / "onnx" / written).graph.node}
    assert ("MatMulNBits" in kinds) == ("quantize" in options)
    assert report.quantization is None or (report.quantization.block_size, report.quantization.left_out) == (32, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"dtype": "fp16"}, {"quantize": "int8"}, {"quantize": "int4"}], ids=["fp16", "int8", "int4"]
)
def test_rounded_graphs_of_the_default_method_are_judged_by_more_than_their_worst_sample(tmp_path, options):
    """Now and then rounding lets one token stay in the place of another, and the output of that sample jumps."""
    comp_cli.prune("demo-vlm", tokens=36, output=tmp_path / "compact", eval_samples=8)
    report = export.export(tmp_path / "compact", tmp_path / "onnx", ExportOptions(**options), QUIET)
    errors = [error for row in report.parity for error in row.samples]
    beyond = sum(error > report.allowed.atol for error in errors)
    assert report.passed and report.agreement >= report.allowed.agreement
    assert len(errors) > 70 and report.allowed.jumps == parity.JUMPS and beyond <= parity.JUMPS * len(errors)
