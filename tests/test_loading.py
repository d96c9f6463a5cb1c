"""The three ways to load a compact checkpoint, and what loading refuses."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import comp_cli
from comp_cli.errors import CompError

# Loads with transformers alone; comp cannot be imported.
WITHOUT_COMP = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "comp_cli":
            raise ImportError("comp is not installed here")

sys.meta_path.insert(0, Blocker())
import torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[2])
with torch.inference_mode():
    torch.save(model(**inputs).itm_score, sys.argv[3])
assert not any(name.split(".")[0] == "comp_cli" for name in sys.modules)
"""


def scores(model, inputs):
    with torch.inference_mode():
        return model(**inputs).itm_score


def without_comp(folder, inputs, tmp_path):
    """The model's scores in a process that cannot import comp."""
    torch.save(inputs, tmp_path / "inputs.pt")
    script = tmp_path / "load.py"
    script.write_text(WITHOUT_COMP)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "out.pt")


def test_comp_and_transformers_without_comp_say_the_same(compact_folder, inputs, tmp_path):
    expected = scores(comp_cli.load(compact_folder), inputs)
    assert torch.equal(without_comp(compact_folder, inputs, tmp_path), expected)


def test_a_compact_model_that_was_trained_further_saves_and_loads(compact_folder, inputs, tmp_path):
    model = comp_cli.load(compact_folder)
    with torch.no_grad():
        model.itm_head.bias += 1
    model.save_pretrained(tmp_path / "tuned")
    expected = scores(model, inputs)
    assert torch.equal(scores(comp_cli.load(tmp_path / "tuned"), inputs), expected)
    assert torch.equal(without_comp(tmp_path / "tuned", inputs, tmp_path), expected)


def test_what_lies_in_the_folder(compact_folder):
    names = {path.name for path in compact_folder.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_comp.py", "tokenizer.json", "comp_report.json", "README.md"} <= names
    config = json.loads((compact_folder / "config.json").read_text())
    assert config["architectures"] == ["BlipForImageTextRetrieval"] and config["model_type"] == "blip"
    assert config["comp"]["base_model"] == "tiny-blip"
    assert not {"quantization_config", "compression_config", "sparsity_config"} & config.keys()
    umask = os.umask(0)
    os.umask(umask)
    for path in compact_folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_report_holds_plan_and_hashes(compact_folder):
    import hashlib

    report = json.loads((compact_folder / "comp_report.json").read_text())
    weights = (compact_folder / "model.safetensors").read_bytes()
    assert report["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    layer = report["plan"]["towers"][0]["layers"][0]
    tensors = load_file(compact_folder / "model.safetensors")
    assert tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0] == len(layer["ffn"])
    assert report["flops"]["compact"] / report["flops"]["dense"] == pytest.approx(0.3, abs=0.01)


def test_the_stock_class_fails_loudly(compact_folder):
    from transformers import BlipForImageTextRetrieval

    with pytest.raises(RuntimeError):
        BlipForImageTextRetrieval.from_pretrained(compact_folder)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_precisions(compact_folder, inputs, dtype):
    model = comp_cli.load(compact_folder, dtype=dtype)
    weight = next(model.parameters())
    half = {name: t.to(weight.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    expected = scores(comp_cli.load(compact_folder), inputs)
    torch.testing.assert_close(scores(model, half).float(), expected, atol=0.15, rtol=0.1)


def damage(folder, tmp_path, change):
    """A copy of the folder with its weights changed."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def missing(tensors):
    del tensors["itm_head.weight"]


def left_over(tensors):
    tensors["more.weight"] = torch.zeros(2)


def other_size(tensors):
    tensors["itm_head.weight"] = torch.zeros(3, 72)


def not_a_number(tensors):
    tensors["itm_head.weight"][1, 5] = torch.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (missing, "missing keys: itm_head.weight"),
        (left_over, "unexpected keys: more.weight"),
        (other_size, "does not load|mismatched"),
        (not_a_number, r"itm_head.weight is nan at index \[1, 5\]"),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_nothing_is_half_loaded(tiny_folder, compact_folder, tmp_path, kind, change, said):
    folder = damage(tiny_folder if kind == "dense" else compact_folder, tmp_path, change)
    with pytest.raises(CompError, match=said) as caught:
        comp_cli.load(folder)
    assert caught.value.exit_code == 4


def test_a_plan_that_does_not_fit_the_weights(compact_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(compact_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["comp"]["towers"][0]["layers"][1]["ffn"] += 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompError) as caught:
        comp_cli.load(copy)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 8 + b"{}"])
def test_broken_weights(tiny_folder, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(CompError) as caught:
        comp_cli.load(copy)
    assert caught.value.exit_code == 4


def test_devices(compact_folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CompError, match="cuda") as caught:
        comp_cli.load(compact_folder, device="cuda")
    assert caught.value.exit_code == 5
    with pytest.raises(CompError) as caught:
        comp_cli.load(compact_folder, device="tpu")
    assert caught.value.exit_code == 2


def test_the_tokenizer_is_written_as_it_was(tiny_folder, compact_folder):
    """Calibration cuts texts at its own length; the folder's tokenizer knows nothing of that."""
    import json

    found, was = (json.loads((folder / "tokenizer.json").read_text()) for folder in (compact_folder, tiny_folder))
    assert found["truncation"] == was["truncation"] and found["padding"] == was["padding"]


def test_siglips_own_tokenizer(tmp_path):
    """What google/siglip-* name: a sentencepiece model, without tokenizer.json."""
    import sentencepiece
    import tiny
    import transformers

    from comp_cli.cli.output import Output
    from comp_cli.data.rows import Pair
    from comp_cli.models.dense import open_dense

    folder = tiny.write("siglip", tmp_path / "siglip")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "words.txt").write_text("\n".join(f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS))
    settings = {"model_prefix": str(tmp_path / "spiece"), "vocab_size": 20, "hard_vocab_limit": False, "minloglevel": 5}
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "words.txt"), model_type="char", pad_id=3, **settings)
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=24, **special)
    tokenizer.save_pretrained(folder)
    assert (folder / "spiece.model").exists() and len(tokenizer) <= 21
    dense = open_dense(str(folder), Output("quiet"))
    assert type(dense.processor.tokenizer).__name__ == "SiglipTokenizer"
    batch = dense.collate([Pair(Image.new("RGB", (48, 48)), "a red circle")])
    assert batch.inputs["input_ids"].shape == (1, 24)
