"""Exported encoders where they are deployed: transformers.js, onnxruntime-node, onnxruntime-web, OpenVINO. What they say is
what torch says, of the same pixels.

Node's packages: npm install --ignore-scripts @huggingface/transformers, and NODE_PATH. OpenVINO: pip install openvino.
"""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
import sentencepiece
import tiny
import torch
import transformers
from javascript import in_node, node_modules
from PIL import Image
from test_recipes import write_compact

from comp_cli.checkpoint.loading import load_processor
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.errors import RefusedError, UsageError
from comp_cli.files.store import read_json
from comp_cli.onnx import transformers_js
from comp_cli.onnx.sessions import open_session
from comp_cli.options import ExportOptions

QUIET = Output("quiet")
CLIENT = "@huggingface/transformers"
ENDINGS = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
CALLED = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}
AWAY = {"fp32": 2e-4, "fp16": 0.02, "int8": 0.2}  # of the largest number
OPTIONS = {"fp32": {}, "fp16": {"dtype": "fp16"}, "int8": {"quantize": "int8"}}
WORDS = ["a small red circle", "two blue squares above a large circle", "a circle"]


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """Compact models by family, made when they are asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = write_compact(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture(scope="module")
def laid_out(compact, tmp_path_factory):
    """Folders as transformers.js reads them, by family and precision."""
    made = {}

    def of(family, kind):
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{kind}") / "client"
            options = ExportOptions(layout="transformers.js", **OPTIONS[kind])
            made[family, kind] = folder, export.export(compact(family).folder, folder, options, QUIET)
        return made[family, kind]

    return of


def asked(written, side=48):
    """A picture, inputs of it and of some texts, and what torch says."""
    processor, model = load_processor(written.folder), written.model
    noise = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    padding = "max_length" if written.dense.family.topology.padding == "max_length" else True
    inputs = dict(processor(images=picture, text=WORDS, padding=padding, return_tensors="pt"))
    inputs = {name: inputs[name] for name in written.dense.family.topology.inputs if name in inputs}
    texts = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        whole = model(**inputs)
        apart = {
            "image": model.get_image_features(inputs["pixel_values"]).pooler_output,
            "text": model.get_text_features(**texts).pooler_output,
        }
    return picture, inputs, whole, apart


KINDS = [
    ("clip", "fp32"),
    ("siglip", "int8"),
    # Not CLIP in int8: of random weights all embeddings are alike, what it decides is rounding, and the gate refuses that.
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (("clip", "fp16"), ("siglip", "fp32"))),
    pytest.param("siglip", "fp16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_files_are_named_as_the_client_asks_for_them(family, kind, laid_out):
    folder, report = laid_out(family, kind)
    names = [f"onnx/{name}{ENDINGS[kind]}.onnx" for name in ("model", "vision_model", "text_model")]
    assert list(report.graphs) == names and {f"onnx/{path.name}" for path in (folder / "onnx").iterdir()} == set(names)
    assert report.passed and set(names) < set(report.files)
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "preprocessor_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert read_json(folder / "config.json")["transformers.js_config"] == {"dtype": CALLED[kind]}
    settings = read_json(folder / "preprocessor_config.json")
    assert settings["image_processor_type"].removesuffix("Fast") in ("CLIPImageProcessor", "SiglipImageProcessor")
    assert "image_processor" not in settings and None not in [*settings.values(), *settings["size"].values()]
    for graph in report.graphs.values():  # whatever the weights are
        floats = {value.type for side in (graph.inputs, graph.outputs) for value in side.values()} - {"int64"}
        assert floats == {"float"}
    rows = {row.output for row in report.parity}
    assert {"logits_per_image", "text_embeds", "image_embeds"} <= rows


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_each_graph_says_what_torch_says(family, kind, laid_out, compact):
    folder, _ = laid_out(family, kind)
    _, inputs, whole, apart = asked(compact(family))
    given = {name: tensor.numpy() for name, tensor in inputs.items()}

    def said(name, output):
        session = open_session(folder / "onnx" / f"{name}{ENDINGS[kind]}.onnx")
        return session.run([output], {value.name: given[value.name] for value in session.get_inputs()})[0]

    for found, right in (
        (said("model", "logits_per_image"), whole.logits_per_image),
        (said("vision_model", "image_embeds"), apart["image"]),
        (said("text_model", "text_embeds"), apart["text"]),
    ):
        np.testing.assert_allclose(found, right.numpy(), atol=AWAY[kind] * right.abs().max().item())


SCORES = """
import {{ AutoModel, AutoTokenizer, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, SiglipModel,
  SiglipTextModel, SiglipVisionModel, Tensor, env, pipeline }} from "@huggingface/transformers";
import {{ readFileSync }} from "node:fs";
env.allowRemoteModels = false;
env.localModelPath = "..";
const given = JSON.parse(readFileSync("inputs.json"));
const [Whole, Vision, Text] = {classes};
const more = {dtype};
const pixel_values = new Tensor("float32", Float32Array.from(given.pixel_values), [1, 3, 48, 48]);
const texts = (await AutoTokenizer.from_pretrained("client"))(given.words, {{ padding: {padding}, truncation: true }});
const whole = await (await Whole.from_pretrained("client", more))({{ ...texts, pixel_values }});
const vision = await (await Vision.from_pretrained("client", more))({{ pixel_values }});
const text = await (await Text.from_pretrained("client", more))(texts);
const classify = await pipeline("zero-shot-image-classification", "client", more);
const found = await classify("scene.png", given.words, {{ hypothesis_template: "{{}}" }});
console.log(JSON.stringify({{ logits: whole.logits_per_image.tolist(), image: vision.image_embeds.tolist(),
  text: text.text_embeds.tolist(), ids: texts.input_ids.tolist().map((row) => row.map(Number)),
  scores: Object.fromEntries(found.map(({{ label, score }}) => [label, score])) }}));
"""
CLASSES = {
    "clip": "[CLIPModel, CLIPVisionModelWithProjection, CLIPTextModelWithProjection]",
    "siglip": "[SiglipModel, SiglipVisionModel, SiglipTextModel]",
}


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("named", [False, True], ids=["as config.json says", "dtype"])
def test_transformers_js_says_what_torch_says(family, kind, named, laid_out, compact, tmp_path):
    """The whole model, its halves, and the pipeline, on a picture that needs no resizing."""
    modules = node_modules(CLIENT)
    folder = shutil.copytree(laid_out(family, kind)[0], tmp_path / "client")
    picture, inputs, whole, apart = asked(compact(family))
    picture.save(folder / "scene.png")
    given = {"words": WORDS, "pixel_values": inputs["pixel_values"].flatten().tolist()}
    (folder / "inputs.json").write_text(json.dumps(given))
    padding = '"max_length"' if family == "siglip" else "true"
    dtype = json.dumps({"dtype": CALLED[kind]} if named else {})
    said = json.loads(in_node(folder, SCORES.format(classes=CLASSES[family], padding=padding, dtype=dtype), modules))
    assert said["ids"] == inputs["input_ids"].tolist()
    for name, right in (("logits", whole.logits_per_image), ("image", apart["image"]), ("text", apart["text"])):
        np.testing.assert_allclose(said[name], right.numpy(), atol=AWAY[kind] * right.abs().max().item())
    logits = whole.logits_per_image[0]
    chances = logits.sigmoid() if family == "siglip" else logits.softmax(-1)
    found = [said["scores"][words] for words in WORDS]
    np.testing.assert_allclose(found, chances.numpy(), atol=max(2e-3, AWAY[kind] * logits.abs().max().item() / 4))


@pytest.mark.parametrize("family", ["clip-vision", "clip-text"])
def test_halves_by_themselves_are_called_what_they_are(family, compact, tmp_path):
    written, name = compact(family), f"{family.removeprefix('clip-')}_model"
    folder = tmp_path / "client"
    report = export.export(written.folder, folder, ExportOptions(layout="transformers.js"), QUIET)
    assert list(report.graphs) == [f"onnx/{name}.onnx"]
    Image.effect_noise((48, 48), 60).convert("RGB").save(folder / "scene.png")
    code = re.findall(r"```js\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    said = in_node(folder, code, node_modules(CLIENT))
    if family == "clip-text":
        texts = load_processor(written.folder)(WORDS[:2], padding=True, return_tensors="pt")
        with torch.no_grad():
            first, second = written.model(**texts).text_embeds
        assert float(said.split()[0]) == pytest.approx(torch.cosine_similarity(first, second, dim=0).item(), abs=1e-3)
    else:
        assert said.startswith("[ 1, 24 ]")


@pytest.mark.parametrize("family", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_the_card_runs_in_node_as_it_stands(family, laid_out, tmp_path):
    modules = node_modules(CLIENT)
    folder = shutil.copytree(laid_out(family, "fp32")[0], tmp_path / "any name")
    code = re.findall(r"```js\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    assert re.search(r"^ *[\d.]+% a ", in_node(folder, code, modules), re.MULTILINE)


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("blip", {}, "transformers.js has no BLIP"),
        ("blip-contrastive", {}, "transformers.js has no BLIP"),
        ("blip-caption", {}, "transformers.js has no BLIP"),
        ("blip-vqa", {}, "transformers.js has no BLIP"),
        ("clip", {"split": True}, "writes model, vision_model and text_model"),
        ("clip", {"quantize": "int4"}, "int4 is for the language model"),
    ],
)
def test_what_the_client_cannot_run_is_refused_by_name(family, options, said, tmp_path):
    folder = tiny.write(family, tmp_path / "dense")
    with pytest.raises(UsageError, match=said):
        export.export(folder, tmp_path / "x", ExportOptions(layout="transformers.js", **options), QUIET)


def test_a_tokenizer_without_tokenizer_json_is_refused(tmp_path):
    """SigLIP's own is of sentencepiece alone."""
    lines = [" ".join(tiny.WORDS)] * 20
    sizes = {"vocab_size": 50, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    trained = {"model_type": "unigram", "minloglevel": 2} | sizes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / "made"), **trained)
    tokenizer = transformers.SiglipTokenizer(str(tmp_path / "made.model"), model_max_length=24)
    with pytest.raises(RefusedError, match="transformers.js reads tokenizer.json, and transformers writes none for Siglip"):
        transformers_js.check_tokenizer(tokenizer, tmp_path)
    transformers_js.check_tokenizer(tiny.word_tokenizer(), tmp_path)
    transformers_js.check_tokenizer(None, tmp_path)


def test_weights_beside_a_graph_keep_its_name(tmp_path):
    """As the client asks for those of a graph above 2 GB, and as the graph names them."""
    weights = onnx.numpy_helper.from_array(np.arange(2048, dtype=np.float32), "w")
    values = [onnx.helper.make_tensor_value_info(name, 1, [2048]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "one", values[:1], values[1:], [weights])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    (tmp_path / "config.json").write_text("{}")
    places = transformers_js.lay_out(tmp_path, {"model.onnx": "model.onnx"}, {"model.onnx": "int8"})
    assert places == {"model.onnx": "onnx/model_quantized.onnx"}
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model_quantized.onnx", "model_quantized.onnx_data"]
    client = {"dtype": "q8", "use_external_data_format": {"model_quantized.onnx": 1}}
    assert read_json(tmp_path / "config.json") == {"transformers.js_config": client}
    (found,) = open_session(tmp_path / places["model.onnx"]).run(None, {"x": np.zeros(2048, np.float32)})
    np.testing.assert_array_equal(found, np.arange(2048))


def test_precisions_of_several_graphs_are_named_one_by_one(tmp_path):
    names = {"vision_encoder.onnx": "fp32", "decoder_model_merged.onnx": "int4"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text("{}")
    places = transformers_js.lay_out(tmp_path, {name: name for name in names}, names)
    assert list(places.values()) == ["onnx/vision_encoder.onnx", "onnx/decoder_model_merged_q4.onnx"]
    dtypes = {"vision_encoder": "fp32", "decoder_model_merged": "q4"}
    assert read_json(tmp_path / "config.json") == {"transformers.js_config": {"dtype": dtypes}}


# The graphs by themselves --------------------------------------------------------------------------------------------------

RUN = """
import * as ort from "{package}";
import {{ readFileSync }} from "node:fs";
{before}
const given = JSON.parse(readFileSync("inputs.json"));
const session = await ort.InferenceSession.create({model});
const made = {{ float32: (data) => Float32Array.from(data), int64: (data) => BigInt64Array.from(data, BigInt),
  uint8: (data) => Uint8Array.from(data) }};
const feeds = {{}};
for (const [name, {{ type, dims, data }}] of Object.entries(given)) feeds[name] = new ort.Tensor(type, made[type](data), dims);
const found = await session.run(feeds);
console.log(JSON.stringify(Object.fromEntries(Object.entries(found).map(([name, value]) => [name, [...value.data]]))));
"""
PACKAGES = {
    "onnxruntime-node": ("", '"./model.onnx"'),
    "onnxruntime-web": ("ort.env.wasm.numThreads = 1;", 'new Uint8Array(readFileSync("model.onnx"))'),
}


@pytest.fixture(scope="module")
def pictures(compact, tmp_path_factory):
    """A CLIP with fused attention that takes pictures as they are; inputs, and what ONNX Runtime in Python says."""
    written, folder = compact("clip"), tmp_path_factory.mktemp("pictures") / "onnx"
    export.export(written.folder, folder, ExportOptions(with_preprocessing=True), QUIET)
    _, inputs, _, _ = asked(written)
    noise = np.random.default_rng(4).integers(0, 256, (1, 150, 60, 3), dtype=np.uint8)
    given = {"image": noise} | {name: inputs[name].numpy() for name in ("input_ids", "attention_mask")}
    session = open_session(folder / "model.onnx")
    names = [value.name for value in session.get_outputs()]
    return folder, given, dict(zip(names, session.run(None, given), strict=True))


@pytest.mark.parametrize("package", PACKAGES)
def test_javascript_runs_the_same_graph(package, pictures, tmp_path):
    modules = node_modules(package)
    folder, given, expected = pictures
    shutil.copyfile(folder / "model.onnx", tmp_path / "model.onnx")
    told = {
        name: {"type": str(value.dtype), "dims": value.shape, "data": value.ravel().tolist()} for name, value in given.items()
    }
    (tmp_path / "inputs.json").write_text(json.dumps(told))
    before, model = PACKAGES[package]
    said = json.loads(in_node(tmp_path, RUN.format(package=package, before=before, model=model), modules))
    assert said.keys() == expected.keys()
    for name, right in expected.items():
        np.testing.assert_allclose(said[name], right.ravel(), atol=1e-4, err_msg=name)


def test_openvino_runs_the_same_graph(pictures):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    folder, given, expected = pictures
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(given)
    for name, right in expected.items():
        np.testing.assert_allclose(found[name], right, atol=1e-3 * np.abs(right).max(), err_msg=name)
