"""The ONNX graph: what it says, on which inputs, and that it is refused where it differs from torch."""

import json

import numpy as np
import onnx
import pytest
import torch

from comp_cli import export, tasks
from comp_cli.errors import CompError
from comp_cli.loading import load_model
from comp_cli.output import Output


@pytest.fixture(scope="module", params=export.TARGETS)
def exported(compact_folder, request):
    folder = compact_folder.with_name(f"served-{request.param}")
    export.export(compact_folder, folder, Output("quiet"), overwrite=False, atol=1e-4, target=request.param)
    return folder


def test_attention_is_one_node_or_standard_operators(exported):
    nodes = onnx.load(exported / "model.onnx").graph.node
    fused = sum(node.op_type == "MultiHeadAttention" for node in nodes)
    if exported.name.endswith("onnxruntime"):
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
    model, session = load_model(compact_folder, dtype=torch.float32), export.open_session(exported / "model.onnx")
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
    assert {case["batch"] for case in report["parity"]} >= {1, 8}
    assert all(case["max_error"] <= 1e-4 and case["same_decision"] == 1 for case in report["parity"])
    assert report["versions"]["onnxruntime"] and report["files"]["model.onnx"]


def test_a_graph_that_differs_is_refused_and_leaves_nothing(compact_folder, tmp_path, monkeypatch):
    honest = tasks.Task.logits
    monkeypatch.setattr(tasks.Task, "logits", lambda self, model, inputs: honest(self, model, inputs) + 0.01)
    with pytest.raises(CompError, match="differs from torch by 1.00e-02") as caught:
        export.export(compact_folder, tmp_path / "served", Output("quiet"), overwrite=False, atol=1e-4)
    assert caught.value.code == 3 and list(tmp_path.iterdir()) == []


def test_a_session_on_another_provider_is_refused(exported):
    import onnxruntime

    if torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CompError) as caught:
        export.open_session(exported / "model.onnx", "cuda")
    assert caught.value.code == 5
