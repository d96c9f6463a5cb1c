"""What is looked at before graphs run: the age of ONNX Runtime, and whether graphs, hashes and config.json belong together."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch

from comp_cli import load_onnx, tasks
from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.exit_codes import DEVICE, REFUSED
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.commands.prune import prune
from comp_cli.data.batches import random_inputs
from comp_cli.errors import CompError
from comp_cli.families import find_family
from comp_cli.files.store import read_config
from comp_cli.onnx import sessions
from comp_cli.onnx.checks import BIAS, least_runtime
from comp_cli.options import ExportOptions, PruneOptions
from comp_cli.topology.graph_specs import DECODER, ENCODER, PAST, WHOLE

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}


def compact(family: str, place: Path) -> Path:
    dense = tiny.write(family, place / "dense")
    prune(PruneOptions(str(dense), 0.5, method="joint", task=tiny.TASKS.get(family), **SIZES), place / "compact", QUIET)
    return place / "compact"


def export_of(folder: Path, **options) -> Path:
    output = folder.with_name(folder.name + "-onnx")
    export.export(folder, output, ExportOptions(**options), QUIET)
    return output


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """Graphs that write texts."""
    return export_of(compact("blip-caption", tmp_path_factory.mktemp("captions")))


@pytest.fixture
def copied(captions, tmp_path):
    return Path(shutil.copytree(captions, tmp_path / "copied"))


def unlisted(folder: Path) -> Path:
    """The same folder as if somebody else had made it: without hashes."""
    (folder / "export.json").unlink()
    return folder


# The oldest ONNX Runtime ----------------------------------------------------------------------------------------------

RUN = """
import sys
import numpy as np, onnxruntime
given = dict(np.load("inputs.npz"))
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
made = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
np.savez("made.npz", **dict(zip([value.name for value in session.get_outputs()], made)))
print(onnxruntime.__version__)
"""


def run_on(version: str, graph: Path, inputs: dict[str, torch.Tensor], place: Path) -> dict[str, np.ndarray]:
    """What another ONNX Runtime makes of a graph. It lies in a folder of its own, before the installed one."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", "--target", place / "ort"]
    done = subprocess.run([*install, f"onnxruntime=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch onnxruntime {version}: {done.stderr.strip().splitlines()[-1]}")
    np.savez(place / "inputs.npz", **sessions.feeds(inputs))
    script = f"import sys; sys.path.insert(0, {str(place / 'ort')!r})\n{RUN}"
    ran = subprocess.run([sys.executable, "-c", script, graph], cwd=place, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == version
    return dict(np.load(place / "made.npz"))


def test_batches_are_right_on_the_oldest_onnxruntime_that_is_promised(clip, tmp_path):
    """1.20 read past the end of an attention mask that heads share, and said nothing."""
    folder, served = clip
    assert json.loads((served / "export.json").read_text())["min_onnxruntime"] == "1.20"
    config = read_config(folder)
    family, _, name = find_family(config)
    model = load_model(folder, dtype=torch.float32)
    inputs = random_inputs(model.config, family, 5, 12, padded=6)
    with torch.inference_mode():
        expected = family.topology.expected(model, tasks.TASKS[name], inputs, split=False)
    found = run_on("1.20.0", served / WHOLE, inputs, tmp_path)
    for output, values in expected.items():
        np.testing.assert_allclose(found[output], values.numpy(), atol=1e-4, err_msg=output)


def test_no_attention_mask_is_shared_by_heads_but_has_a_batch(clip, served, captions):
    """Each has all of (batch, heads, tokens, tokens), or is one for everything: then older runtimes say that they cannot."""
    for path in (*clip[1].glob("*.onnx"), *served["split"].glob("*.onnx"), *captions.glob("*.onnx")):
        model = onnx.load(path)
        shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
        for node in model.graph.node:
            if node.op_type == "MultiHeadAttention" and len(node.input) > BIAS:
                batch, heads, *_ = shapes[node.input[BIAS]]
                own = next(a.i for a in node.attribute if a.name == "num_heads")
                assert heads.dim_value == own or (batch.dim_value, heads.dim_value) == (1, 1), (path, node.name)


def test_the_least_version_follows_from_what_a_graph_holds(clip, served, captions):
    for folder, least in ((clip[1], "1.20"), (served["whole"], "1.18"), (captions, "1.18")):
        document = json.loads((folder / "export.json").read_text())
        models = [onnx.load(folder / name) for name in document["graphs"]]
        assert document["min_onnxruntime"] == least == least_runtime(models)


@pytest.mark.parametrize(("opset", "least"), [(18, "1.18"), (21, "1.18"), (22, "1.21"), (23, "1.23")])
def test_newer_opsets_need_newer_versions(captions, opset, least):
    model = onnx.load(captions / PAST)
    next(entry for entry in model.opset_import if entry.domain == "").version = opset
    assert least_runtime([onnx.load(captions / ENCODER), model]) == least


def test_an_onnxruntime_that_is_too_old_is_refused(captions, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.17.3")
    with pytest.raises(CompError, match=r"need ONNX Runtime 1\.18 or newer; 1\.17\.3 is installed") as refused:
        load_onnx(captions)
    assert refused.value.exit_code == DEVICE and "pip install" in refused.value.hint


@pytest.mark.parametrize("version", ["1.18.0", "1.20.1+cu12", "2.0", "1.33.0.dev20260101"])
def test_newer_ones_are_not(captions, monkeypatch, version):
    monkeypatch.setattr("onnxruntime.__version__", version)
    load_onnx(captions)


# Broken and foreign graphs --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def junk(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def outside(path: Path) -> None:
    """Weights that lie anywhere else."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())


def future(path: Path) -> None:
    model = onnx.load(path)
    model.ir_version = 99
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("damage", [cut, junk, empty, outside, future])
@pytest.mark.parametrize("name", [ENCODER, PAST])
def test_a_broken_graph_is_refused(copied, damage, name):
    damage(copied / name)
    with pytest.raises(CompError, match=name) as refused:
        load_onnx(unlisted(copied))
    assert refused.value.exit_code == REFUSED and "defect" not in str(refused.value)


@pytest.mark.parametrize("damage", [cut, junk, empty, one_byte])
@pytest.mark.parametrize("name", [ENCODER, DECODER, PAST, "config.json"])
def test_files_that_are_not_those_of_export_json_are_refused_by_name(copied, damage, name):
    damage(copied / name)
    with pytest.raises(CompError, match=name) as refused:
        load_onnx(copied)
    assert refused.value.exit_code == REFUSED


def test_an_export_json_that_lists_nothing_vouches_for_nothing(copied):
    document = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps(document | {"files": {}}))
    with pytest.raises(CompError, match="does not list") as refused:
        load_onnx(copied)
    assert refused.value.exit_code == REFUSED


def identity(path: Path, output: str, name: str = "pixel_values") -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node("Identity", [name], [output])
    values = ([helper.make_tensor_value_info(n, kind, ["batch", 3, 48, 48])] for n in (name, output))
    model = helper.make_model(helper.make_graph([node], "one", *values), ir_version=10)
    model.opset_import[0].version = 20
    onnx.save(model, path)


@pytest.mark.parametrize(("output", "said"), [("features", "hands out"), ("last_hidden_state", r"\(\*, 3, 48, 48\)")])
def test_a_foreign_graph_is_refused(copied, output, said):
    identity(copied / ENCODER, output)
    with pytest.raises(CompError, match=said) as refused:
        load_onnx(unlisted(copied))
    assert refused.value.exit_code == REFUSED and "config.json" in refused.value.hint


def change(path: Path, **parts) -> None:
    config = json.loads(path.read_text())
    for name, change in parts.items():
        config[name] = config[name] | change if change else {}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": {"vocab_size": 99}},
        {"vision_config": {"image_size": 64}},
        {"vision_config": {"hidden_size": 48}},
        {"comp": None},
        {"comp": {"towers": []}},
        {"comp": {"towers": 3}},
    ],
)
def test_graphs_and_a_config_of_another_model_are_refused(copied, changes):
    change(unlisted(copied) / "config.json", **changes)
    with pytest.raises(CompError) as refused:
        load_onnx(copied)
    assert refused.value.exit_code == REFUSED


def test_one_head_more_than_the_graph_has_is_refused(copied):
    config = read_config(unlisted(copied))
    config["comp"]["towers"][1]["layers"][2]["cross"]["num_heads"] += 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompError, match=r"present\.2\.encoder\.key") as refused:
        load_onnx(copied)
    assert refused.value.exit_code == REFUSED


def test_graphs_that_caption_are_refused_beside_the_config_of_a_model_that_answers(copied):
    config = read_config(unlisted(copied))
    config |= {"architectures": ["BlipForQuestionAnswering"], "comp": config["comp"] | {"task": "vqa"}}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompError, match="takes not attention_mask, input_ids") as refused:
        load_onnx(copied)
    assert refused.value.exit_code == REFUSED


def test_untouched_folders_load_with_hashes_and_without(copied):
    load_onnx(copied)
    load_onnx(unlisted(copied))


def test_two_exports_are_the_same_bytes(clip, tmp_path):
    again = shutil.copytree(clip[0], tmp_path / "compact")
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (clip[1], export_of(Path(again))))
    assert first == second
