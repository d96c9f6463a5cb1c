"""Each tensor keeps the precision that it had, on disk and when it is loaded; what comp cannot compute in is refused."""

import json

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

import comp_cli
from comp_cli.checkpoint import precision
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.commands.prune import prune
from comp_cli.errors import CompError
from comp_cli.models.dense import open_dense
from comp_cli.options import ExportOptions, HubOptions, PruneOptions

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
SCALE = 4.6052  # a scale of 100; in bf16 it is 98.86


def rewritten(folder, change):
    """The checkpoint with each tensor changed by name."""
    path = folder / "model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def half_but_scale(name, tensor):
    return torch.full_like(tensor, SCALE) if name == "logit_scale" else tensor if tensor.numel() == 1 else tensor.bfloat16()


def half_but_norms(name, tensor):
    wide = "norm" in name.lower() or tensor.numel() == 1
    return tensor + 0.001 if wide else tensor.bfloat16()


def compact(folder, place, **options):
    prune(PruneOptions(str(folder), 0.3, method="magnitude", recover=False, **SIZES, **options), place, QUIET)
    return place


def dtypes(folder) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_scale_of_all_logits_is_what_it_was_however_it_is_loaded(family, tmp_path):
    dense = rewritten(tiny.write(family, tmp_path / "dense"), half_but_scale)
    folder = compact(dense, tmp_path / "compact")
    assert dtypes(folder) == dtypes(dense)
    right = torch.tensor(SCALE).exp().item()
    auto = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    half = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float16)
    for model in (comp_cli.load(folder), auto, comp_cli.load(folder, dtype="bf16"), comp_cli.load(folder, dtype="fp32"), half):
        assert model.logit_scale.exp().item() == pytest.approx(right, rel=1e-6)
    assert auto.dtype == comp_cli.load(folder).dtype == torch.bfloat16
    auto.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert comp_cli.load(tmp_path / "again").logit_scale.exp().item() == pytest.approx(right, rel=1e-6)
    given = open_dense(str(dense), QUIET, text_tokens=12).random_inputs(2, 12)
    with torch.inference_mode():
        exact, found = (model(**given).logits_per_image.float() for model in (comp_cli.load(folder, dtype="fp32"), auto))
    torch.testing.assert_close(found, exact, atol=2.0, rtol=0.05)


def test_the_scale_in_exported_graphs(tmp_path):
    dense = rewritten(tiny.write("clip", tmp_path / "dense"), half_but_scale)
    folder = compact(dense, tmp_path / "compact")
    report = export.export(folder, tmp_path / "onnx", ExportOptions(dtype="fp16"), QUIET)
    assert report.passed
    assert report.logit_scale == pytest.approx(torch.tensor(SCALE).exp().item(), rel=1e-6)


@pytest.mark.parametrize("where", ["safetensors", "shards", "pickle"])
def test_mixed_precision_is_kept_whatever_the_files(where, tmp_path):
    dense = rewritten(tiny.write("clip", tmp_path / "dense"), half_but_norms)
    expected, state = dtypes(dense), load_file(dense / "model.safetensors")
    if where == "pickle":
        torch.save(state, dense / "pytorch_model.bin")
        (dense / "model.safetensors").unlink()
    elif where == "shards":
        parts = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
        names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for part, name in zip(parts, names, strict=True):
            save_file(part, dense / name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {key: name for part, name in zip(parts, names, strict=True) for key in part}}
        (dense / "model.safetensors.index.json").write_text(json.dumps(index))
        (dense / "model.safetensors").unlink()
    options = PruneOptions(str(dense), 0.3, method="magnitude", recover=False, **SIZES)
    prune(options, tmp_path / "compact", QUIET, hub_options=HubOptions(allow_pickle=where == "pickle"))
    written = load_file(tmp_path / "compact" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    # What is loaded holds all of it exactly: matrices of two precisions do not multiply, so all are in the wider one.
    for model in (
        comp_cli.load(tmp_path / "compact"),
        transformers.AutoModel.from_pretrained(tmp_path / "compact", trust_remote_code=True),
    ):
        assert all(torch.equal(tensor, written[name].float()) for name, tensor in model.state_dict().items() if name in written)
    norms = [name for name, dtype in expected.items() if dtype == torch.float32 and name in state]
    assert all(torch.equal(written[name], state[name]) for name in norms)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_precision_that_is_asked_for_leaves_scalars_alone(dtype, kind, tmp_path):
    dense = rewritten(tiny.write("siglip", tmp_path / "dense"), lambda name, t: half_but_scale(name, t).float())
    folder = compact(dense, tmp_path / "compact", dtype=dtype)
    found = dtypes(folder)
    assert {name for name, dtype in found.items() if dtype == torch.float32} == {"logit_scale", "logit_bias"}
    assert set(found.values()) == {torch.float32, kind} and comp_cli.load(folder).dtype == kind
    assert comp_cli.load(folder).logit_scale.item() == pytest.approx(SCALE, rel=1e-7)


@pytest.mark.parametrize("kind", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_precisions_that_comp_does_not_compute_in_are_refused(kind, tmp_path):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    dense = rewritten(tiny.write("clip", tmp_path / "dense"), lambda n, t: t.to(kind) if n == name else t)
    with pytest.raises(CompError) as refused:
        compact(dense, tmp_path / "compact")
    assert refused.value.exit_code == 4 and not (tmp_path / "compact").exists()
    if kind == torch.float64:
        assert f"weight {name} is F64" in refused.value.message and "float32" in refused.value.hint


def test_the_precision_of_tensors_with_other_names_is_that_of_their_numbers(tmp_path):
    """As transformers renames what old checkpoints hold."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    exact = {"old.weight": torch.tensor([1.0, 0.5]).bfloat16(), "old.bias": torch.tensor([0.1001])}
    save_file(exact | {"more": torch.ones(2).bfloat16()}, folder / "model.safetensors")
    state = {"new.weight": exact["old.weight"].float(), "new.bias": exact["old.bias"], "ids": torch.arange(3)}
    found = precision.checkpoint_dtypes(folder, state)
    assert found == {"new.weight": torch.bfloat16, "new.bias": torch.float32}


def test_what_is_judged_is_what_is_written():
    """Rounded in memory, without a change to weights that are shared."""
    shared = torch.nn.Linear(4, 4)
    other = torch.nn.Linear(4, 4)
    other.load_state_dict(shared.state_dict(), assign=True)
    before = shared.weight.detach().clone()
    precision.round_as_written(other, {"weight": torch.bfloat16, "bias": torch.float32})
    assert torch.equal(other.weight, before.bfloat16().float()) and other.weight.dtype == torch.float32
    assert torch.equal(shared.weight, before) and torch.equal(other.bias, shared.bias)


def test_a_cast_model_keeps_its_scalars():
    model = tiny.clip_model()
    model.logit_scale.data.fill_(SCALE)
    precision.cast(model, torch.bfloat16)
    assert model.logit_scale.item() == pytest.approx(SCALE, rel=1e-7)
    assert {p.dtype for name, p in model.named_parameters() if name != "logit_scale"} == {torch.bfloat16}
