"""The ONNX graph: what it says, on which inputs, and that it is refused where it differs from torch."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from comp_cli import tasks
from comp_cli.checkpoint.loading import load_model, load_processor
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.errors import CompError
from comp_cli.families import FAMILIES
from comp_cli.onnx import parity, rewrite, sessions, write
from comp_cli.options import DataOptions, ExportOptions
from comp_cli.report.export import ParityRow
from comp_cli.runtime import modeling_comp
from comp_cli.runtime.modeling_comp import TokenPruning, TokenScores
from comp_cli.topology import CrossEncoder
from comp_cli.topology.graph_specs import TEXT, VISION, GraphSpec


def run_export(source, folder, out=None, **options):
    return export.export(source, folder, ExportOptions(**options), out or Output("quiet")).to_json()


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module", params=export.TARGETS)
def exported(compact_folder, served, request):
    if request.param == "onnxruntime":
        return served["whole"]
    folder = compact_folder.with_name("served-onnx")
    run_export(compact_folder, folder, target=request.param)
    return folder


@pytest.fixture
def pair(served):
    """vision_model.onnx and text_model.onnx."""
    return served["split"]


@pytest.fixture(scope="module")
def cases(compact_folder):
    model, processor = load_model(compact_folder, dtype=torch.float32), load_processor(compact_folder)
    pairs = parity.real_pairs(None, tasks.TASKS["itm"], rounded=True)
    return parity.make_cases(model, tasks.TASKS["itm"], FAMILIES["blip"], processor, 20, pairs, split=True)


@pytest.fixture
def judge(cases):
    return export.Check(cases, tasks.TASKS["itm"], "cpu", parity.TOLERANCES["int8"])


@pytest.fixture
def graph_pair(pair, tmp_path):
    """The pair of graphs alone, in a folder to work in."""
    for name in (VISION, TEXT):
        shutil.copy(pair / name, tmp_path)
    return tmp_path


def test_attention_is_one_node_or_standard_operators(exported):
    nodes = onnx.load(exported / "model.onnx").graph.node
    fused = sum(node.op_type == "MultiHeadAttention" for node in nodes)
    if exported.name == "served-whole":
        assert fused == 5 + 2 * 4
    else:
        assert {node.domain for node in nodes} <= {"", "ai.onnx"}


def test_the_graph_has_the_names_of_the_ecosystem(exported):
    graph = onnx.load(exported / "model.onnx").graph
    assert [i.name for i in graph.input] == ["pixel_values", "input_ids", "attention_mask"]
    assert [o.name for o in graph.output] == ["itm_score"]
    assert {"config.json", "tokenizer.json", "export.json", "README.md"} <= {p.name for p in exported.iterdir()}


def test_token_pruning_is_inside_with_sorted_topk(exported):
    nodes = [node for node in onnx.load(exported / "model.onnx").graph.node if node.op_type == "TopK"]
    assert nodes
    for node in nodes:  # the CUDA provider rejects TopK without it
        assert not any(a.name == "sorted" and a.i != 1 for a in node.attribute)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (1, 24), (2, 9), (5, 12), (8, 17)])
def test_any_batch_and_text_length(compact_folder, exported, batch, tokens):
    model, session = load_model(compact_folder, dtype=torch.float32), sessions.open_session(exported / "model.onnx")
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, tokens // 2 + 1 :] = 0
    inputs = {
        "pixel_values": torch.randn(batch, 3, 48, 48, generator=generator),
        "input_ids": torch.randint(5, 15, (batch, tokens), generator=generator) * mask,
        "attention_mask": mask,
    }
    with torch.inference_mode():
        expected = model(**inputs).itm_score.numpy()
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_report(exported):
    report = json.loads((exported / "export.json").read_text())
    assert report["passed"] and report["agreement"] == 1
    assert {case["batch"] for case in report["parity"]} >= {1, 2, 3, 8}
    assert all(case["max_error"] <= 1e-4 and case["same_decision"] == 1 for case in report["parity"])
    assert len({case["text_tokens"] for case in report["parity"]}) > 3
    assert report["versions"]["onnxruntime"] and report["files"]["model.onnx"]
    assert report["graphs"]["model.onnx"]["inputs"]["input_ids"] == {"type": "int64", "shape": ["batch", "tokens"]}


def test_the_tokenizer_cuts_at_what_the_model_takes_and_pads(exported):
    tokenizer = json.loads((exported / "tokenizer.json").read_text())
    assert tokenizer["truncation"]["max_length"] == 24 and tokenizer["padding"]["strategy"] == "BatchLongest"


def test_no_path_of_this_machine_is_in_the_graph_and_nodes_are_named_after_modules(exported):
    content = (exported / "model.onnx").read_bytes()
    assert b".py" not in content and str(export.__file__).encode().rpartition(b"/")[0] not in content
    names = [node.name for node in onnx.load(exported / "model.onnx").graph.node]
    assert len(names) == len(set(names))
    assert any(name.startswith("vision_model.encoder.layers.0.mlp.fc1/") for name in names)


# The pair ------------------------------------------------------------------------------------------------------------


def test_split_writes_two_graphs_and_not_the_whole_one(pair):
    assert sorted(path.name for path in pair.glob("*.onnx")) == ["text_model.onnx", "vision_model.onnx"]
    report = json.loads((pair / "export.json").read_text())
    embeds = report["graphs"]["vision_model.onnx"]["outputs"]["image_embeds"]
    assert report["graphs"]["text_model.onnx"]["inputs"]["image_embeds"] == embeds
    rows = [row for row in report["parity"] if row["output"] == "image_embeds"]
    assert rows and all(row["max_error"] < 1e-4 and row["same_decision"] is None for row in rows)
    assert any(row["images"] == 1 and row["batch"] == 8 for row in report["parity"])


@pytest.mark.parametrize(("images", "texts"), [(1, 1), (1, 5), (3, 3)])
def test_an_image_is_encoded_once_for_many_texts(compact_folder, pair, images, texts):
    generator = torch.Generator().manual_seed(texts)
    pixels = torch.randn(images, 3, 48, 48, generator=generator)
    text = {"input_ids": torch.randint(5, 15, (texts, 11), generator=generator), "attention_mask": torch.ones(texts, 11).long()}
    with torch.inference_mode():
        model = load_model(compact_folder, dtype=torch.float32)
        expected = model(pixel_values=pixels.expand(texts, -1, -1, -1), **text).itm_score.numpy()
    (embeds,) = sessions.open_session(pair / "vision_model.onnx").run(None, {"pixel_values": pixels.numpy()})
    feeds = {"image_embeds": embeds, **sessions.feeds(text)}
    (found,) = sessions.open_session(pair / "text_model.onnx").run(None, feeds)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Smaller and faster --------------------------------------------------------------------------------------------------


def test_fp16_halves_the_file_and_keeps_its_inputs(compact_folder, served, tmp_path):
    document = run_export(compact_folder, tmp_path / "half", dtype="fp16")
    whole = (served["whole"] / "model.onnx").stat().st_size
    assert (tmp_path / "half/model.onnx").stat().st_size < 0.65 * whole
    kinds = [part["type"] for side in document["graphs"]["model.onnx"].values() for part in side.values()]
    assert kinds == ["float", "int64", "int64", "float"]
    assert document["dtype"] == "fp16" and sum(row["batch"] for row in document["parity"] if row["inputs"] == "real") > 64


def test_bf16_is_refused_where_it_cannot_be_checked(compact_folder, tmp_path):
    with pytest.raises(CompError, match="no bf16 graph on the CPU") as caught:
        run_export(compact_folder, tmp_path / "b", dtype="bf16")
    assert caught.value.exit_code == 5 and not list(tmp_path.iterdir())


def test_int8_matrices_are_a_quarter_and_attention_stays_one_node(graph_pair, judge, capsys):
    before = {path.name: path.stat().st_size for path in graph_pair.iterdir()}
    assert export.quantize(graph_pair, list(before), list(before), "int8", judge, Output("quiet")) == []
    assert {path.name for path in graph_pair.iterdir()} == set(before)
    assert sum(path.stat().st_size for path in graph_pair.iterdir()) < 0.5 * sum(before.values())
    found = operators(graph_pair / VISION)
    assert found["MatMulInteger"] == 4 * 5 and found["MultiHeadAttention"] == 5
    assert capsys.readouterr() == ("", "")


def test_matrices_that_cost_decisions_stay_float(graph_pair, judge, monkeypatch, cases):
    verdicts = iter(["decisions suffer", None])
    monkeypatch.setattr(parity, "problem", lambda rows, tolerance: next(verdicts))
    names = [VISION, TEXT]
    floats = sessions.OnnxModel(graph_pair, names)
    noise = Counter()
    for case in (cases[0], cases[-1]):  # real and random
        floats.run(case.inputs)
        for name in names:
            noise |= Counter(rewrite.noise(graph_pair / name, floats.given[name], "int8"))  # the larger of both
    for probe in graph_pair.glob("*.probe.onnx"):
        probe.unlink()
    left_out = export.quantize(graph_pair, names, names, "int8", judge, Output("quiet"))
    assert (
        len(left_out) == round(0.1 * len(noise))
        and min(noise[name] for name in left_out) == sorted(noise.values())[-len(left_out)]
    )
    stayed = {node.name for name in names for node in onnx.load(graph_pair / name).graph.node}
    assert set(left_out) <= stayed


@pytest.mark.parametrize("outlier", [1, 100])
def test_the_noise_is_that_of_onnxruntime(tmp_path, outlier):
    generator = np.random.default_rng(0)
    weight, states = generator.normal(size=(64, 32)), generator.normal(size=(4, 64))
    states[0, 0] *= outlier
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["states", "weight"], ["out"], "product")],
        "one",
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, 32])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "one.onnx")
    rewrite.quantize(tmp_path / "one.onnx", tmp_path / "int8.onnx")
    inputs = {"states": states.astype(np.float32)}
    (found,) = sessions.open_session(tmp_path / "int8.onnx").run(None, inputs)
    real = np.linalg.norm(found - states @ weight) / np.linalg.norm(states @ weight)
    assert rewrite.noise(tmp_path / "one.onnx", inputs, "int8")["product"] == pytest.approx(real, rel=0.3)


def of_floats(judge):
    return replace(judge, tolerance=parity.TOLERANCES["fp32"])


def test_optimize_fuses_what_is_around_attention(graph_pair, judge):
    names = [VISION, TEXT]
    fused = export.optimize(graph_pair, names, of_floats(judge), Output("quiet"))
    assert fused["SkipLayerNormalization"] > 10 and fused["BiasGelu"] == 5 + 4
    assert operators(graph_pair / VISION)["BiasGelu"] == 5
    assert sorted(path.name for path in graph_pair.iterdir()) == sorted(names)


def test_optimize_that_changes_the_result_is_skipped_with_a_line(graph_pair, judge, monkeypatch):
    def wrong(source, target):
        shutil.copy(graph_pair / source.name, target)
        model = onnx.load(target)
        for weight in model.graph.initializer:
            if weight.name.endswith("itm_head.weight"):
                weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
        onnx.save(model, target)
        return {"Wrong": 1}

    monkeypatch.setattr(rewrite, "optimize", wrong)
    before = {path.name: path.read_bytes() for path in graph_pair.iterdir()}
    out = Output("quiet")
    assert export.optimize(graph_pair, [VISION, TEXT], of_floats(judge), out) == {}
    assert "--optimize is skipped: the graph differs from PyTorch by" in out.warnings[0]
    assert {path.name: path.read_bytes() for path in graph_pair.iterdir()} == before


def test_weights_lie_beside_the_graph_when_they_are_large(compact_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "EXTERNAL_DATA_FROM", 1000)
    monkeypatch.setattr(rewrite, "EXTERNAL_DATA_FROM", 1000)
    document = run_export(compact_folder, tmp_path / "large", optimize=True, quantize="int8")
    files = {path.name for path in (tmp_path / "large").iterdir()}
    assert {"model.onnx", "model.onnx.data"} <= files and {"model.onnx", "model.onnx.data"} <= set(document["files"])
    assert not [name for name in files if "plain" in name or "probe" in name]
    sessions.open_session(tmp_path / "large/model.onnx")


# The gate ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch_says_more(pair, monkeypatch):
    def write_graphs(model, task, family, folder, **how):
        names = [VISION, TEXT]
        for name in names:
            shutil.copy(pair / name, folder)
        return names

    monkeypatch.setattr(export, "write_graphs", write_graphs)
    honest = CrossEncoder.expected
    monkeypatch.setattr(CrossEncoder, "expected", lambda *given: {name: t + 0.01 for name, t in honest(*given).items()})


def test_a_graph_that_differs_is_refused_and_leaves_nothing(compact_folder, tmp_path, torch_says_more):
    with pytest.raises(CompError, match="differs from PyTorch by 1.00e-02") as caught:
        run_export(compact_folder, tmp_path / "served", split=True)
    assert caught.value.exit_code == 3 and list(tmp_path.iterdir()) == []


def test_keep_failed_leaves_it_for_a_look(compact_folder, tmp_path, torch_says_more):
    for _ in range(2):  # the second takes the place of the first
        with pytest.raises(CompError, match="differs from PyTorch") as caught:
            run_export(compact_folder, tmp_path / "served", keep_failed=True, split=True)
        assert caught.value.exit_code == 3 and "served.failed" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["served.failed"]
    report = json.loads((tmp_path / "served.failed/export.json").read_text())
    assert not report["passed"] and (tmp_path / "served.failed/text_model.onnx").stat().st_size > 10000


def test_keep_failed_does_not_take_the_place_of_something_else(compact_folder, tmp_path):
    (tmp_path / "served.failed").mkdir()
    (tmp_path / "served.failed/thesis.txt").touch()
    with pytest.raises(CompError, match="not written by comp") as caught:
        run_export(compact_folder, tmp_path / "served", keep_failed=True)
    assert caught.value.exit_code == 2


def row(error, same, inputs="real", samples=None):
    return ParityRow("itm_score", inputs, 8, 8, 9, error, error / 2, error, samples or (error,) * 8, same)


def test_the_gate_counts_errors_and_decisions():
    allowed = parity.Tolerance(0.1, 0.95)
    assert parity.problem([row(0.1, 1.0), row(0.1, 0.5, "random")], allowed) is None
    assert "differs from PyTorch by 2.00e-01" in parity.problem([row(0.2, 1.0)], allowed)
    assert "differs from PyTorch by inf" in parity.problem([row(float("inf"), 1.0)], allowed)
    assert "93.8 % on the real pairs" in parity.problem([row(0.1, 1.0), row(0.1, 0.875)], allowed)


def test_a_few_samples_may_jump_where_rounding_changes_which_tokens_stay():
    allowed = parity.Tolerance(0.1, 0.95, jumps=0.1)
    jumping = (0.7,) + (0.1,) * 7
    assert parity.problem([row(0.7, 1.0, samples=jumping), row(0.1, 1.0)], allowed) is None  # 1 of 16
    assert parity.problem([row(0.7, 1.0, samples=jumping)], replace(allowed, jumps=0.0))
    said = parity.problem([row(0.7, 1.0, samples=jumping), row(0.7, 1.0, "random", samples=jumping)], allowed)
    assert "differs from PyTorch by 7.00e-01" in said and "2 of 16 samples differ by more, 1 may, never all of a case." in said
    padded = row(0.7, 1.0, "random", samples=(0.7, 0.6))
    assert "never all of a case" in parity.problem([row(0.1, 1.0)] * 8 + [padded], allowed)
    assert parity.problem([row(0.1, 1.0)] * 8 + [replace(padded, samples=(0.7, 0.1))], allowed) is None
    assert "93.8 %" in parity.problem([row(0.7, 0.9375, samples=jumping), row(0.1, 0.9375)], allowed)
    none = (float("inf"),) + (0.1,) * 7
    assert "by inf" in parity.problem([row(float("inf"), 1.0, samples=none), row(0.1, 1.0)], allowed)


@pytest.mark.parametrize("rounding, jumps", [("fp32", 0), ("fp16", parity.JUMPS), ("int8", parity.JUMPS)])
def test_no_sample_may_jump_where_no_token_is_chosen_or_nothing_is_rounded(rounding, jumps):
    task = tasks.TASKS["retrieval"]
    assert parity.tolerance(task, rounding, None).jumps == 0
    assert parity.tolerance(task, rounding, 0.3, drops_tokens=True) == replace(
        parity.tolerance(task, rounding, None), atol=0.3, jumps=jumps
    )


def test_one_nan_is_an_infinite_difference(cases):
    found = cases[0].expected["itm_score"].clone()
    found[0, 0] = float("nan")
    assert parity.compare(cases[0], "itm_score", cases[0].expected["itm_score"], found, 1.0, None).max_error == float("inf")


def test_a_session_on_another_provider_is_refused(exported):
    import onnxruntime

    if torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CompError) as caught:
        sessions.open_session(exported / "model.onnx", "cuda")
    assert caught.value.exit_code == 5


def test_nodes_tell_where_tokens_are_pruned(exported):
    """For profiles: top-k and what scores for it stand in layers that drop tokens, named so; nothing else is."""
    graph = onnx.load(exported / "model.onnx").graph
    named = [node for node in graph.node if f"/{write.TOKEN_PRUNING}/" in node.name]
    assert "TopK" in {node.op_type for node in named}
    assert not {"MultiHeadAttention", "Gelu", "LayerNormalization"} & {node.op_type for node in named}
    assert all(node.op_type != "TopK" or node in named for node in graph.node)


class Pruned(torch.nn.Module):
    """Tokens that rank themselves: scoring and dropping, and one more operation before and behind."""

    def __init__(self, merge):
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.scorer = TokenScores("cls", 0, skip_first=True)
        self.layer.dropper = TokenPruning(5, ("first",), merge)
        self.weight = torch.nn.Parameter(torch.zeros(2))  # in whose precision a graph computes

    def forward(self, states):
        states = states.tanh()
        return self.layer.dropper(states, self.layer.scorer(states, states, 4, 0.5), None)[0].sin()


def drops(model, inputs):
    return (model(**inputs),)


PRUNED = GraphSpec("model.onnx", drops, ("left",), {"states": {}}, lambda model: {"states": torch.zeros(2, 9, 8)})


@pytest.mark.parametrize("merge", [False, True])
def test_nodes_of_token_pruning_are_known_by_their_module(tmp_path, monkeypatch, merge):
    """Whatever functions and attributes are called. By hand: all nodes are token pruning, but the first and the last."""
    select, cls = modeling_comp.select_tokens, modeling_comp.TOKEN_RULES["cls"]
    monkeypatch.setattr(modeling_comp, "select_tokens", lambda *tensors: select(*tensors))
    monkeypatch.setitem(modeling_comp.TOKEN_RULES, "cls", replace(cls, score=lambda *given, **more: cls.score(*given, **more)))
    write.write(Pruned(merge), PRUNED, tmp_path / "model.onnx", opset=20, target="onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    named = [node for node in nodes if node.name.startswith(f"layer/{write.TOKEN_PRUNING}/")]
    assert [node.op_type for node in nodes if node not in named] == ["Tanh", "Sin"]
    assert {"Softmax", "TopK"} <= {node.op_type for node in named}


def test_graphs_are_checked_on_the_users_pairs(compact_folder, tmp_path):
    """Five pairs are enough; the report says whose they were."""
    from PIL import Image

    rows = []
    for number in range(5):
        Image.new("RGB", (60, 50), (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": "a red circle", "label": "whatever"}))
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    options = ExportOptions(data=DataOptions(str(tmp_path / "val.jsonl")))
    document = export.export(compact_folder, tmp_path / "onnx", options, Output("quiet")).to_json()
    assert document["passed"] and document["data"].startswith("val.jsonl, split validation")
    assert document["pairs"]["evaluation"]["rows"] == 5 and document["texts"]["cut"] == 0
    options = ExportOptions(data=DataOptions(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(CompError, match="no such file"):
        export.export(compact_folder, tmp_path / "other", options, Output("quiet"))


def test_embeddings_are_judged_by_their_size():
    """Unit vectors of 512 numbers: unrelated ones differ by 0.2, which would pass for a score of size 10."""
    from comp_cli.onnx.parity import Case, check

    generator = torch.Generator().manual_seed(0)
    real = torch.nn.functional.normalize(torch.randn(8, 512, generator=generator), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(8, 512, generator=generator), dim=-1)

    class Graphs:
        def run(self, inputs, names):
            return {"image_embeds": other.numpy()}

    case = Case("real", {"pixel_values": torch.zeros(8, 3, 4, 4)}, {"image_embeds": real})
    task = tasks.TASKS["image-embedding"]
    rows = check(Graphs(), [case], task)
    assert rows[0].max_error < 0.3 and "differs from PyTorch" in parity.problem(rows, parity.tolerance(task, "int8", None))
