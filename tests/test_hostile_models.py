"""Broken, hostile and unusual model folders: refused with exit 4 and a sentence, at once, and nothing of theirs is run."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import comp_cli
from comp_cli.checkpoint import hub, loading
from comp_cli.checkpoint.folder_check import leaves
from comp_cli.cli.app import app
from comp_cli.cli.output import Output
from comp_cli.errors import CompError
from comp_cli.models.dense import open_dense


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder to damage, without the report that would notice every change."""
    shutil.copytree(folder, to)
    (to / "comp_report.json").unlink(missing_ok=True)
    return to


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(do, *arguments, **options) -> CompError:
    with pytest.raises(CompError) as caught:
        do(*arguments, **options)
    assert caught.value.exit_code == 4, caught.value.message
    return caught.value


def opened(folder: Path):
    return open_dense(str(folder), Output("quiet"))


EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json"])
def test_code_of_a_folder_never_runs_and_no_question_is_asked(tiny_folder, tmp_path, name):
    """In a process of its own, with yes on stdin: each file asks for each of the classes that a folder could bring."""
    folder, marker = copied(tiny_folder, tmp_path / "evil"), tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    classes = ("Processor", "ImageProcessor", "ImageProcessorFast", "Tokenizer", "Config", "Model")
    asked = {f"Auto{kind}": ["evil.Evil", "evil.Evil"] if kind == "Tokenizer" else "evil.Evil" for kind in classes}
    kinds = {"processor_class": "Evil", "image_processor_type": "Evil", "tokenizer_class": "Evil", "auto_map": asked}
    found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    if name != "config.json":
        found |= kinds
    (folder / name).write_text(json.dumps(found | {"auto_map": asked}))
    command = [sys.executable, "-m", "comp_cli", "analyze", str(folder), "--json", "--num-samples", "8", "--text-tokens", "8"]
    done = subprocess.run(command, input="y\n" * 99, capture_output=True, text=True, timeout=120)
    assert not marker.exists() and "custom code" not in done.stdout
    document = json.loads(done.stdout)
    if name == "config.json":  # the stock class needs none of it
        assert done.returncode == 0
    else:
        assert done.returncode == 4 and "code of" in document["error"]["message"], document


def test_a_pickle_that_runs_code_is_refused_in_words_of_our_own(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    assert "--allow-pickle" in refusal(loading.load_model, folder).hint
    error = refusal(loading.load_model, folder, allow_pickle=True)
    assert "wants to run code" in error.message and "weights_only" not in error.message + error.hint
    assert not (tmp_path / "ran").exists()


def test_honest_pickles_load_where_they_are_allowed(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    state = loading.load_model(folder, allow_pickle=True).state_dict()
    expected = loading.load_model(tiny_folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_side_files_are_never_opened(tiny_folder, tmp_path):
    """training_args.bin and its like are pickles that lie beside weights; a pipe would hang whoever opens it."""
    folder = copied(tiny_folder, tmp_path / "side")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.pkl"):
        os.mkfifo(folder / name)
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    opened(folder)


KERNELS = [
    {"attn_implementation": "evil/kernel"},
    {"_attn_implementation": "evil/kernel:run"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": {"text_config": "evil/kernel"}},
    {"text_config": {"_attn_implementation": "paged|evil/kernel"}},
    {"experts_implementation": "evil/experts"},
]


@pytest.mark.parametrize("wish", [*KERNELS, {"transformers_weights": "adapter_model.bin"}, {"num_labels": 10**9}])
def test_wishes_for_kernels_and_files_from_elsewhere(tiny_folder, tmp_path, wish):
    folder = copied(tiny_folder, tmp_path / "wish")
    edit(folder / "config.json", lambda config: [config.setdefault(k, {}).update(v) if isinstance(config.get(k), dict)
                                                 else config.update({k: v}) for k, v in wish.items()])  # fmt: skip
    assert next(iter(wish)) in refusal(comp_cli.load, folder).message


def test_quantized_weights_are_refused(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "quantized")
    edit(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "nobody_knows_it"}))
    assert "quantized" in refusal(comp_cli.load, folder).message


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_weights_of_a_type_that_is_no_weight(tiny_folder, tmp_path, dtype):
    folder = copied(tiny_folder, tmp_path / "typed")
    tensors = load_file(folder / "model.safetensors")
    tensors["itm_head.weight"] = tensors["itm_head.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "itm_head.weight is of the type" in refusal(comp_cli.load, folder).message


# --- nothing outside the folder is read


@pytest.mark.parametrize(
    "shard", ["../out.safetensors", "{}/out.safetensors", "x" * 300 + ".safetensors", "pickle.bin", "a\0b"]
)
@pytest.mark.parametrize("do", [comp_cli.load, opened])
def test_shards_lie_beside_their_index(tiny_folder, tmp_path, shard, do):
    folder = copied(tiny_folder, tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    (folder / "pickle.bin").touch()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.format(tmp_path))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(do, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "x.jinja"])
def test_links_that_leave_the_folder_are_refused(tiny_folder, tmp_path, name):
    folder, outside = copied(tiny_folder, tmp_path / "linked"), tmp_path / "outside"
    (folder / name).touch()
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    error = refusal(opened, folder)
    assert str(outside) in error.message and name in error.message and "Copy the file" in error.hint


def test_links_inside_and_into_a_cache_of_the_hub_are_fine(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "linked")
    blobs, shared = tmp_path / "cache" / "models--org--name" / "blobs", tmp_path / "cache" / "blobs" / "ab"
    blobs.mkdir(parents=True)
    shared.mkdir(parents=True)
    shutil.move(folder / "model.safetensors", shared / ("ab" * 32))
    (blobs / ("cd" * 32)).symlink_to(shared / ("ab" * 32))
    (folder / "model.safetensors").symlink_to(blobs / ("cd" * 32))
    shutil.move(folder / "config.json", blobs / ("e" * 40))
    (folder / "config.json").symlink_to(blobs / ("e" * 40))
    shutil.move(folder / "tokenizer.json", folder / "words")
    (folder / "tokenizer.json").symlink_to("words")
    opened(folder)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)  # no byte of it is on the disk


@pytest.mark.parametrize("make", [pipe, loop, zeros, huge])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "generation_config.json"]
)
def test_files_that_are_none_are_refused_at_once(tiny_folder, tmp_path, make, name):
    folder = copied(tiny_folder, tmp_path / "odd")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    started = time.process_time()
    assert name in refusal(opened, folder).message
    refusal(comp_cli.load, folder)
    assert time.process_time() - started < 5


def test_files_that_a_tokenizer_names_by_itself_are_not_read(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "names")
    (tmp_path / "vocab.txt").write_text("secret\n")
    edit(folder / "tokenizer_config.json", lambda found: found.update(init_inputs=[str(tmp_path / "vocab.txt")]))
    assert "init_inputs" in refusal(opened, folder).message
    (tmp_path / "tokenizer.json").write_text("{}")
    named = {"vocab_file": "vocab.txt", "tokenizer_file": "tokenizer.json", "name_or_path": "vocab.txt"}
    edit(folder / "tokenizer_config.json", lambda found: (found.pop("init_inputs"), found.update(
        {key: str(tmp_path / value) for key, value in named.items()})))  # fmt: skip
    assert "secret" not in opened(folder).processor.tokenizer.get_vocab()


# --- absurd sizes


ABSURD = [
    *((("vision_config", "text_config"), name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")),
    (("vision_config",), "image_size"),
    (("text_config",), "vocab_size"),
    (("text_config",), "max_position_embeddings"),
    ((), "image_text_hidden_size"),
]


@pytest.mark.parametrize("kind", ["dense", "compact"])
@pytest.mark.parametrize("value", [10**6 + 2, 10**9 + 2])
def test_absurd_sizes_are_refused_from_headers(tiny_folder, compact_folder, tmp_path, kind, value):
    """At once, and in a few MiB: nothing of these sizes is built."""
    folder = copied({"dense": tiny_folder, "compact": compact_folder}[kind], tmp_path / kind)
    whole = (folder / "config.json").read_text()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for parts, name in ABSURD:
        for part in parts or (None,):
            edit(
                folder / "config.json",
                lambda found, part=part, name=name: (found[part] if part else found).update({name: value}),
            )
            if kind == "compact" and name == "intermediate_size":
                continue  # how many channels the dense model had is nowhere in a compact one; no memory either, see below
            refusal(comp_cli.load, folder)
            (folder / "config.json").write_text(whole)
    assert time.process_time() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    "value", [50_000, 10**9, 0, -1, "48", 47.5, {"height": 10**9, "width": 48}, {"shortest_edge": 50_000}, None, True]
)
@pytest.mark.parametrize("name", ["size", "crop_size"])
def test_sizes_of_pictures(tmp_path_factory, name, value):
    folder = copied(clip_folder(tmp_path_factory), tmp_path_factory.mktemp("sizes") / "clip")
    edit(folder / "processor_config.json", lambda found: found["image_processor"].update({name: value}))
    if name == "crop_size" and value is None:
        pytest.skip("not cropped where it is null")
    started = time.process_time()
    refusal(loading.load_processor, folder)
    assert time.process_time() - started < 5


def clip_folder(factory) -> Path:
    folder = factory.getbasetemp() / "clip-of-hostile"
    return folder if folder.exists() else tiny.write("clip", folder)


@pytest.mark.parametrize(
    "change",
    [
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0.2, 0.0, 0.2]},
        {"image_std": [-1, 1, 1]},
        {"image_std": ["0.2"] * 3},
        {"rescale_factor": float("inf")},
        {"rescale_factor": 1e38},
        {"rescale_factor": -0.1},
        {"resample": 99},
        {"do_resize": False},
        {"image_processor_type": "ViTHybridNothing"},
    ],
)
def test_numbers_of_pictures(tiny_folder, tmp_path, change):
    folder = copied(tiny_folder, tmp_path / "numbers")
    edit(folder / "processor_config.json", lambda found: found["image_processor"].update(change))
    refusal(loading.load_processor, folder)


@pytest.mark.parametrize("length", [-5, 0, 3, "x", 20.5, True, [24]])
def test_the_length_of_texts(tiny_folder, tmp_path, length):
    folder = copied(tiny_folder, tmp_path / "length")
    edit(folder / "tokenizer_config.json", lambda found: found.update(model_max_length=length))
    assert "model_max_length" in refusal(opened, folder).message
    edit(folder / "tokenizer_config.json", lambda found: found.pop("model_max_length"))
    assert opened(folder).reference.tokens["language"] <= 24  # without a limit of the tokenizer that of the model counts


@pytest.mark.parametrize("family", ["blip", "clip"])
def test_padding_in_front_of_texts_would_move_their_places(family, tmp_path):
    folder = tiny.write(family, tmp_path / "left")
    edit(folder / "tokenizer_config.json", lambda found: found.update(padding_side="left"))
    assert "pads texts on the left" in refusal(loading.load_processor, folder).message


def test_pictures_that_are_not_square_become_so(tmp_path):
    """Without the crop a processor with one edge fits square pictures only, and no two others make a batch."""
    folder = tiny.write("clip", tmp_path / "edge")
    edit(folder / "processor_config.json", lambda found: found["image_processor"].update(do_center_crop=False))
    assert "(3, 48, 72) of 48 x 32 pixels" in refusal(loading.load_processor, folder).message


@pytest.mark.parametrize("end", [23, 49407])
def test_texts_that_do_not_end_where_the_model_reads_them(tmp_path, end):
    """The stock model would read all of them at their first token, and say the same of each."""
    folder = tiny.write("clip", tmp_path / "end")
    edit(folder / "config.json", lambda found: found["text_config"].update(eos_token_id=end))
    assert f"eos_token_id {end}" in refusal(loading.load_processor, folder).message


@pytest.mark.parametrize("name", ["bos_token_id", "sep_token_id"])
def test_texts_begin_and_end_with_words_of_the_model(tmp_path, name):
    folder = tiny.write("blip-caption", tmp_path / "begin")
    edit(folder / "config.json", lambda found: found["text_config"].update({name: 30522}))
    assert f"text_config.{name} is 30522" in refusal(loading.load_processor, folder).message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "1e-5"])
@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_numbers_of_a_config_are_numbers(tiny_folder, tmp_path, part, value):
    folder = copied(tiny_folder, tmp_path / "nan")
    edit(folder / "config.json", lambda found: found[part].update(layer_norm_eps=value))
    assert "layer_norm_eps" in refusal(comp_cli.load, folder).message


# --- models that need a hand


def test_adapters_beside_or_alone(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "tuned")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc", "peft_type": "LORA"}')
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_model.safetensors").touch()
    for do in (opened, comp_cli.load):
        for where in (folder, alone):
            error = refusal(do, where)
            assert "LoRA adapter" in error.message and "merge_and_unload" in error.hint


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "model"),
        ("model.", "'model.'"),
        ("base_model.model.", "merge"),
        ("blip.", "'blip.'"),
    ],
)
def test_names_of_weights_that_a_wrapper_changed(tiny_folder, tmp_path, prefix, said):
    folder = copied(tiny_folder, tmp_path / "wrapped")
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(opened, folder)
    assert prefix.rstrip(".").split(".")[0] in error.message and said in error.message + error.hint


def test_a_compiled_part_of_a_model(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "part")
    state = load_file(folder / "model.safetensors")
    tensors = {name.replace("vision_model.", "vision_model._orig_mod."): tensor for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "torch.compile" in refusal(opened, folder).message


@pytest.mark.parametrize(
    ("model_type", "named", "nearest"),
    [
        ("clip", ["CLIPForImageClassification"], "CLIPModel"),
        ("clip_text_model", ["CLIPTextModel"], "CLIPTextModelWithProjection"),
        ("clip_vision_model", ["CLIPVisionModel"], "CLIPVisionModelWithProjection"),
        ("siglip", ["SiglipForImageClassification"], "SiglipModel"),
        ("siglip_vision_model", ["SiglipVisionModel"], "SiglipModel"),
        ("blip", ["BlipModel"], "BlipForImageTextRetrieval"),
        ("blip_text_model", ["BlipTextModel"], "BlipForImageTextRetrieval"),
        ("clip", None, "CLIPModel"),
        ("siglip", [], "SiglipModel"),
        ("blip", "BlipForImageTextRetrieval", "BlipForImageTextRetrieval"),
    ],
)
def test_the_nearest_architecture_is_of_the_same_kind(tiny_folder, tmp_path, model_type, named, nearest):
    folder = copied(tiny_folder, tmp_path / "kind")
    edit(folder / "config.json", lambda found: found.update(model_type=model_type, architectures=named))
    error = refusal(opened, folder)
    if isinstance(named, list) and named:
        assert error.hint.endswith(f"The nearest is {nearest}.")
    else:
        assert f'Add "architectures": ["{nearest}"]' in error.hint


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model_index.json", "unet"], "diffusers"),
        (["modules.json", "0_CLIPModel"], "sentence-transformers"),
        (["open_clip_config.json", "open_clip_pytorch_model.bin"], "OpenCLIP"),
        (["clip.gguf"], "GGUF"),
        (["config.json", "model.onnx"], "ONNX"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        (["__0_0.distcp", ".metadata"], "FSDP"),
        (["consolidated.safetensors", "params.json"], "own layout"),
        (["config.json", "tf_model.h5"], "TensorFlow"),
        (["config.json", "model.fp16.safetensors"], "another precision"),
        (["checkpoint-500"], "training checkpoints"),
        (["config.json", "epoch_3.pt"], "torch.save"),
        (["config.json", "model-00001-of-00002.safetensors"], "without their index"),
    ],
)
def test_other_kinds_of_folders_are_named(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text("{}")
    error = refusal(hub.resolve, str(tmp_path), progress=Output("quiet"))
    assert said in error.message and error.hint


def test_what_does_not_fit_is_named_with_expected_and_found(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "shape")
    tensors = load_file(folder / "model.safetensors")
    tensors["text_encoder.encoder.layer.2.output.dense.weight"] = torch.zeros(72, 199)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal(comp_cli.load, folder).message
    assert "text_encoder.encoder.layer.2.output.dense.weight" in said and "(72, 199)" in said and "(72, 200)" in said


def test_timm_models_are_named(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "timm")
    (folder / "config.json").write_text('{"architecture": "vit_base_patch16_224", "pretrained_cfg": {"tag": "x"}}')
    assert "a timm model (vit_base_patch16_224)" in refusal(opened, folder).message


@pytest.mark.parametrize("block", [[], "x", 3, None, True, {}, {"towers": []}, {"towers": None, "schema_version": 1}])
@pytest.mark.parametrize("command", ["analyze", "prune", "export", "bench"])
def test_a_comp_block_that_is_none(tiny_folder, tmp_path, block, command):
    folder = copied(tiny_folder, tmp_path / "block")
    edit(folder / "config.json", lambda found: found.update(comp=block))
    more = {"prune": ["--ratio", "0.5", "-o", str(tmp_path / "o")], "export": ["--onnx", "-o", str(tmp_path / "o")]}
    result = CliRunner().invoke(app, [command, str(folder), *more.get(command, []), "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 4 and "defect" not in result.output, document
    assert list(tmp_path.iterdir()) == [folder]


def test_weights_that_are_numbers_and_overflow(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "huge")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.post_layernorm.weight"] *= 1e38
    tensors["vision_model.post_layernorm.bias"] += 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in refusal(opened, folder).message


@pytest.mark.parametrize(
    "content", ['{"a": [' + "0," * 2**23 + "0]}", '{"a":' * 500 + "1" + "}" * 500, '{"a": [' + "[]," * 10**5 + "NaN]}"]
)
def test_long_and_deep_configs(tiny_folder, tmp_path, content):
    folder = copied(tiny_folder, tmp_path / "long")
    (folder / "tokenizer_config.json").write_text(content)
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loading.check_folder(folder)
    except CompError as error:
        assert error.exit_code == 4
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_places_of_values():
    content = {"a": {"b": [1, {"c": [2, 3]}], "d": {}}, "e": None, "": 4}
    expected = {("a.b[0]", 1), ("a.b[1].c[0]", 2), ("a.b[1].c[1]", 3), ("e", None), ("", 4)}
    assert set(leaves(content)) == expected
