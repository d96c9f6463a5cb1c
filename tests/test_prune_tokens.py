"""Image tokens of a decoder leave on the way: `comp prune --method vitcop --tokens`, its folder, and what reads it."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_schema import strict
from typer.testing import CliRunner

import comp_cli
from comp_cli.checkpoint import loading
from comp_cli.checkpoint.runtimes import FILES
from comp_cli.cli.app import app
from comp_cli.engine.methods import DECODER, ENCODER, METHODS, methods_for
from comp_cli.engine.token_schedules import TOKEN_METHODS
from comp_cli.errors import GateError, RefusedError, UsageError
from comp_cli.files.store import sha256
from comp_cli.models import token_folder
from comp_cli.models.dense import open_dense
from comp_cli.models.described import describe_dense
from comp_cli.plan import PADDING, Plan, TokenStage
from comp_cli.progress import Silent
from comp_cli.search import calibration

TOKENS = 36  # of an image of the tiny LLaVA
ASKED = "user <image> a red circle a"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A LLaVA in several files, as large models are."""
    folder = tmp_path_factory.mktemp("llava") / "dense"
    torch.manual_seed(0)
    tiny.llava().eval().save_pretrained(folder, max_shard_size="200KB")
    tiny.llava_processor().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def pruned(dense) -> Path:
    """The same, with three stages of vitcop."""
    folder = dense.with_name("compact")
    comp_cli.prune(dense, method="vitcop", tokens=9, output=folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def prompt(folder: Path):
    picture = Image.effect_noise((24, 24), 60).convert("RGB")
    torch.manual_seed(0)
    given = transformers.AutoProcessor.from_pretrained(folder)(images=picture, text=ASKED, return_tensors="pt")
    return given | {"pixel_values": torch.randn(given["pixel_values"].shape)}


def answer(model, given) -> list[int]:
    with torch.inference_mode():
        return model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()


def run(*words: object):
    return CliRunner().invoke(app, ["prune", *map(str, words)])


# The folder --------------------------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_dense_model_byte_for_byte(dense, pruned):
    assert [path.name for path in shards(pruned)] == [path.name for path in shards(dense)]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(shards(dense), shards(pruned), strict=True))
    for name in ("model.safetensors.index.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (pruned / name).read_bytes() == (dense / name).read_bytes()


def test_the_compact_model_answers_otherwise_than_the_dense_one_and_as_its_plan_says(dense, pruned):
    given, plan = prompt(pruned), Plan.from_json(json.loads((pruned / "comp_report.json").read_text())["plan"])
    assert [stage.rule for stage in plan.stages] == ["cls-clusters", "cluster-merge", "key-norm"]
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(dense).eval()
    compact = comp_cli.load(pruned).eval()
    assert answer(compact, given) != answer(stock, given)
    cache = compact(**given, use_cache=True).past_key_values
    text = given["input_ids"].shape[1] - TOKENS
    left = [TOKENS] * 5
    for stage in plan.stages:
        left[stage.layer :] = [stage.keep] * (5 - stage.layer)
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + tokens for tokens in left]


def test_every_way_to_load_it_answers_the_same_without_comp(pruned, tmp_path):
    torch.save(dict(prompt(pruned)), tmp_path / "given.pt")
    code = f"""
import sys, json, torch, transformers
sys.modules["comp_cli"] = None
folder, given = {str(pruned)!r}, torch.load({str(tmp_path / "given.pt")!r})
found = {{}}
for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"):
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    written = model.generate(**given, max_new_tokens=8, do_sample=False)
    found[name] = [type(model).__name__, written[0, given["input_ids"].shape[1]:].tolist()]
pipe = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True)
written = pipe.model.generate(**given, max_new_tokens=8, do_sample=False)
found["pipeline"] = [type(pipe.model).__name__, written[0, given["input_ids"].shape[1]:].tolist()]
from PIL import Image
said = pipe(Image.new("RGB", (24, 24)), text={ASKED!r}, generate_kwargs={{"max_new_tokens": 3}})
assert said[0]["generated_text"]
print("FOUND" + json.dumps(found))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    expected = ["CompactLlavaForConditionalGeneration", answer(comp_cli.load(pruned).eval(), prompt(pruned))]
    assert len(found) == 4 and all(one == expected for one in found.values())


def test_the_stock_classes_refuse_it(pruned):
    for stock in (transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText):
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            stock.from_pretrained(pruned)
    config = json.loads((pruned / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 64 + PADDING
    assert config["comp"]["told_apart"] == {"section": "text_config", "name": "intermediate_size", "dense": 64}


def test_a_config_that_leaves_out_what_is_usual_is_told_apart_as_well(dense, tmp_path):
    """As that of LLaVA-1.5 on the hub, which names what is not Llama's default alone."""
    folder = shutil.copytree(dense, tmp_path / "dense")
    torch.manual_seed(0)
    usual = transformers.LlamaConfig().intermediate_size
    tiny.llava(text={"intermediate_size": usual}).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    comp_cli.prune(folder, method="stride", tokens=9, output=tmp_path / "compact")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "compact")
    given = prompt(dense)
    assert len(answer(comp_cli.load(tmp_path / "compact"), given)) == 8


def test_no_weight_is_loaded_where_nothing_is_measured(dense, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(loading, "load_model", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    comp_cli.prune(dense, method="fastv", tokens=9, output=tmp_path / "compact", link=True)


# Links -------------------------------------------------------------------------------------------------------------------


def test_links_are_second_names_that_outlive_the_dense_folder(dense, pruned, tmp_path):
    source = shutil.copytree(dense, tmp_path / "source")
    for path in shards(source):
        path.chmod(0o400)
    report = comp_cli.prune(source, method="vitcop", tokens=9, output=tmp_path / "linked", link=True)
    assert report.image_tokens.weights == "linked"
    for one, other in zip(shards(source), shards(tmp_path / "linked"), strict=True):
        assert one.samefile(other) and one.stat().st_mode & 0o777 == 0o400
    files = json.loads((tmp_path / "linked" / "comp_report.json").read_text())["files"]
    weights = {path.name for path in shards(source)}
    assert all(set(told) == {"bytes", "header_sha256"} for name, told in files.items() if name in weights)
    assert all(set(told) == {"bytes", "sha256"} for name, told in files.items() if name not in weights)
    shutil.rmtree(source)
    given = prompt(pruned)
    assert answer(comp_cli.load(tmp_path / "linked"), given) == answer(comp_cli.load(pruned), given)


def test_a_linked_folder_is_replaced_and_the_dense_weights_stay(dense, tmp_path):
    before = [path.read_bytes() for path in shards(dense)]
    for tokens in (9, 12):
        comp_cli.prune(dense, method="fastv", tokens=tokens, output=tmp_path / "linked", link=True, overwrite=tokens > 9)
    assert [path.read_bytes() for path in shards(dense)] == before
    assert json.loads((tmp_path / "linked" / "comp_report.json").read_text())["options"]["image_tokens"]["tokens"] == 12
    assert not list(tmp_path.glob(".linked.[op]*"))  # nothing old, nothing partial


def test_a_link_that_the_disk_does_not_allow_is_refused_and_nothing_is_left(dense, tmp_path, monkeypatch):
    def across(*args, **options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across)
    with pytest.raises(UsageError, match="different disks") as refused:
        comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "linked", link=True)
    assert "leave --link out" in refused.value.hint and not (tmp_path / "linked").exists()


def test_of_a_snapshot_in_a_cache_of_the_hub_the_blobs_are_linked(dense, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(sorted(dense.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    comp_cli.prune(snapshot, method="vitcop", tokens=9, output=tmp_path / "linked", link=True)
    for path in shards(tmp_path / "linked"):
        assert not path.is_symlink() and path.samefile(snapshot / path.name)


def test_of_blobs_whose_bytes_the_hub_announced_the_hash_is_known_without_reading_them(dense, tmp_path):
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(), blobs.mkdir(parents=True)
    for path in dense.iterdir():
        blob = blobs / sha256(path)
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    found = describe_dense(str(snapshot), Silent())
    known = {}
    for kind in ("folder", "hub"):
        described = replace(found, source=replace(found.source, kind=kind))
        (tmp_path / kind).mkdir()
        known[kind] = token_folder.hand_on_weights(tmp_path / kind, described, True, Silent())
    assert all("sha256" not in told for told in known["folder"].values())
    assert {name: told["sha256"] for name, told in known["hub"].items()} == {path.name: sha256(path) for path in shards(dense)}


# What is checked on loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def own(pruned, tmp_path) -> Path:
    return shutil.copytree(pruned, tmp_path / "own")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()  # not the other name of a link
    path.write_bytes(data)


def test_copies_are_compared_by_their_hash(own):
    flip(shards(own)[0], -1)
    with pytest.raises(RefusedError, match="not the bytes that comp wrote"):
        comp_cli.load(own)


def test_links_are_compared_by_size_and_header(dense, tmp_path):
    comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "linked", link=True)
    first, last = shards(tmp_path / "linked")[0], shards(tmp_path / "linked")[-1]
    flip(last, -1)
    comp_cli.load(tmp_path / "linked")  # one bit of a weight: nobody read it
    header = int.from_bytes(first.read_bytes()[:8], "little")
    text = first.read_bytes()[8 : 8 + header]
    padded = first.read_bytes().replace(text, text.replace(b'"pt"', b'"PT"'))
    first.unlink()
    first.write_bytes(padded)
    with pytest.raises(RefusedError, match="header"):
        comp_cli.load(tmp_path / "linked")


def edited(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["comp"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "comp_report.json").unlink()  # else its hash would tell


WRONG = {
    "layer beyond": (lambda comp: comp["token_stages"][2].update(layer=5), "token_stages\\[2\\].layer"),
    "layers that fall": (lambda comp: comp["token_stages"][1].update(layer=0), "token_stages\\[1\\].layer"),
    "more than before": (lambda comp: comp["token_stages"][1].update(keep=16), "token_stages\\[1\\].keep"),
    "none": (lambda comp: comp["token_stages"][2].update(keep=0), "token_stages\\[2\\].keep"),
    "unknown rule": (lambda comp: comp["token_stages"][0].update(rule="best"), "token_stages\\[0\\].rule"),
    "a rule that reads the layer before": (lambda comp: comp["token_stages"][0].update(rule="key-norm"), "settings|layer"),
    "unknown setting": (lambda comp: comp["token_stages"][1]["settings"].update(loud=True), "settings"),
    "a share that is none": (
        lambda comp: comp["token_stages"][0]["settings"].update(centre_share=-1.0),
        "centre_share is -1.0",
    ),
    "a word for a number": (lambda comp: comp["token_stages"][0]["settings"].update(centre_share="a"), "centre_share is 'a'"),
    "a cut-off below nothing": (lambda comp: comp["token_stages"][0]["settings"].update(cutoff=-1), "cutoff is -1"),
    "a word for yes": (lambda comp: comp["token_stages"][1]["settings"].update(compat="yes"), "compat is 'yes'"),
    "shares behind numbers": (
        lambda comp: comp["token_stages"].__setitem__(1, {"layer": 1, "rule": "key-norm", "share": 0.9, "settings": {}}),
        "share in all",
    ),
    "keep and share": (lambda comp: comp["token_stages"][0].update(share=0.5), "token_stages\\[0\\]"),
    "another place of [CLS]": (lambda comp: comp["image_tokens"].update(newline="model.image_newline"), "image_tokens"),
    "another dense size": (lambda comp: comp["told_apart"].update(dense=56), "told_apart"),
    "told apart by nothing": (lambda comp: comp.update(told_apart={}), "told_apart"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_block_that_lies_is_refused(name, own):
    change, said = WRONG[name]
    edited(own, change)
    with pytest.raises(RefusedError, match=said):
        comp_cli.load(own)


def test_every_setting_of_every_rule_is_checked():
    from comp_cli.checkpoint.stage_check import SETTINGS
    from comp_cli.runtime.token_rules import STAGE_RULES

    known = [inspect.signature(rule.choose).parameters.values() for rule in STAGE_RULES.values()]
    settings = {each.name: each.default for parameters in known for each in list(parameters)[2:]}
    assert set(settings) == set(SETTINGS)
    assert all(SETTINGS[name][0](default) for name, default in settings.items())
    assert not any(fits(wrong) for fits, _ in SETTINGS.values() for wrong in (-1, "a", [], {}))


def test_an_unchanged_block_loads_without_the_report(own):
    edited(own, lambda comp: None)
    comp_cli.load(own)


def test_chat_templates_with_names_are_handed_on(dense, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    comp_cli.prune(source, method="stride", tokens=9, output=tmp_path / "compact")
    assert (tmp_path / "compact" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert comp_cli.load(tmp_path / "compact") is not None


def test_upgrade_replaces_the_files_of_the_runtime(dense, tmp_path):
    comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "linked", link=True)
    today = {name: (tmp_path / "linked" / name).read_text() for name in FILES["modeling_comp_vlm"]}
    for name in today:
        (tmp_path / "linked" / name).write_text("# of an older comp\n")
    result = CliRunner().invoke(app, ["upgrade", str(tmp_path / "linked"), "--json"])
    assert result.exit_code == 0 and set(json.loads(result.stdout)["changed"]) == set(today)
    assert {name: (tmp_path / "linked" / name).read_text() for name in today} == today
    assert all(one.samefile(other) for one, other in zip(shards(dense), shards(tmp_path / "linked"), strict=True))
    comp_cli.load(tmp_path / "linked")


# The report --------------------------------------------------------------------------------------------------------------


def test_the_report_says_what_leaves_and_what_it_saves(dense, pruned, tmp_path):
    report = comp_cli.prune(dense, token_stages="0:15,1:12,3:2", method="vitcop", dry_run=True)
    found = report.image_tokens
    assert [(stage.layer, stage.kept, stage.of) for stage in found.stages] == [(0, 15, 36), (1, 12, 15), (3, 2, 12)]
    assert found.of == TOKENS and found.mean == (15 + 12 + 12 + 2 + 2) / 5 and found.weights is None
    given = prompt(pruned)
    text = report.reference.tokens["language"]
    for folder, said in ((dense, found.kv_cache_bytes.dense), (pruned, found.kv_cache_bytes.compact)):
        model = comp_cli.load(folder) if folder == pruned else transformers.LlavaForConditionalGeneration.from_pretrained(dense)
        cache = model(**given, use_cache=True).past_key_values
        more = text - (given["input_ids"].shape[1] - TOKENS)  # tokens of text at the reference input
        held = sum(2 * layer.keys[..., :1, :].nbytes * (layer.keys.shape[2] + more) for layer in cache.layers)
        assert held == said
    assert report.flops.compact < report.flops.dense and found.step_flops.compact < found.step_flops.dense
    assert report.params.dense == report.params.compact == sum(p.numel() for p in comp_cli.load(pruned).parameters())
    assert report.quality is None and any("nothing was measured" in said for said in report.warnings)


def test_the_published_presets(monkeypatch):
    """LLaVA-1.5 of 576 tokens and 32 layers, from the schedule alone."""
    from comp_cli.engine import token_schedules

    how = {"share": None, "image_tokens": 576, "layers": 32, "class_token": True, "fixed_size": True}
    for tokens, mean in ((192, 192.06), (128, 127.81), (64, 63.56)):
        stages = token_schedules.stages("vitcop", tokens=tokens, **how)
        assert token_schedules.mean_tokens(stages, 576, 32) == pytest.approx(mean, abs=0.005)


def test_the_document_keeps_to_its_schema(dense, tmp_path):
    for words in ((dense, "--dry-run"), (dense, "-o", tmp_path / "compact")):
        result = run(*words, "--method", "vitcop", "--tokens-share", "0.25", "--json")
        found = json.loads(result.stdout)
        assert result.exit_code == 0
        jsonschema.validate(found, strict("prune"))
    assert found["options"]["image_tokens"]["tokens_share"] == 0.25 and found["options"]["ratio"] is None
    assert found["command"].startswith("comp prune dense --method vitcop --tokens-share 0.25")


def test_people_read_stages_and_savings(dense):
    said = run(dense, "--method", "vitcop", "--tokens", "9", "--dry-run").stdout
    assert all(word in said for word in ("before layer 0", "cls-clusters", "15 / 36", "KV cache", "Nothing was written"))


def test_the_card_shows_how_it_is_used_and_what_it_cannot(pruned):
    card = (pruned / "README.md").read_text()
    for said in (
        "AutoModelForImageTextToText",
        "trust_remote_code=True",
        "comp_cli.load",
        'pipeline("image-text-to-text"',
        "Limits",
    ):
        assert said in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")


def test_quality_is_measured_on_pairs_of_the_user(dense, tmp_path):
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "blue" if n % 2 else "red")
    report = comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "compact", data=data, eval_samples=4)
    assert report.quality.samples > 0 and 0 <= report.quality.agreement <= 1 and report.quality.metrics
    assert not any("nothing was measured" in said for said in report.warnings)
    assert json.loads((tmp_path / "compact" / "comp_report.json").read_text())["quality"]["samples"] == report.quality.samples


def test_a_missed_max_drop_leaves_nothing(dense, tmp_path, monkeypatch):
    from comp_cli.commands import prune_tokens
    from comp_cli.report.base import Texts, Values
    from comp_cli.report.prune import Quality

    bad = Quality(100, "pairs", "accuracy", {"accuracy": Values(0.9, 0.5)}, 0.5, 1.0, Texts(0, 0, 0), 0)
    monkeypatch.setattr(prune_tokens, "compare", lambda *args: (bad, 0.0))
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "red")
    with pytest.raises(GateError, match="max-drop"):
        comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "compact", data=data, max_drop=1)
    assert not (tmp_path / "compact").exists()


# Refitting ---------------------------------------------------------------------------------------------------------------


PROJECTIONS = "self_attn.o_proj", "mlp.down_proj"


@pytest.fixture(scope="module")
def fitted(dense, tmp_path_factory):
    """With the first stage before layer 1, refitted on pairs of the user's; the report and the folder."""
    folder = tmp_path_factory.mktemp("fitted")
    data = tiny.table(folder, question=lambda n: "a red circle", answer=lambda n: "blue" if n % 2 else "red")
    how = {"token_stages": "1:12,3:4", "data": data, "num_samples": 8, "eval_samples": 4, "batch_size": 2}
    return comp_cli.prune(dense, method="pyramiddrop", refit=True, output=folder / "compact", **how), folder / "compact"


def test_only_output_projections_behind_the_first_stage_are_fitted_anew(dense, fitted):
    before = transformers.LlavaForConditionalGeneration.from_pretrained(dense).state_dict()
    after = comp_cli.load(fitted[1]).state_dict()
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    behind = [f"language_model.layers.{layer}.{part}.weight" for layer in (1, 2, 3, 4) for part in PROJECTIONS]
    assert changed == {f"model.{name}" for name in behind}
    assert fitted[0].image_tokens.weights == "refitted" and fitted[0].params.compact == fitted[0].params.dense


def test_the_size_of_a_refitted_folder_is_that_of_its_file(fitted):
    size = (fitted[1] / "model.safetensors").stat().st_size
    kept = json.loads((fitted[1] / "comp_report.json").read_text())
    assert size == fitted[0].size_bytes.compact == kept["size_bytes"]["compact"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_refitted_folder_has_the_precision_of_its_checkpoint(dtype, tmp_path):
    """In its file, and where transformers loads it; embeddings that are tied are written once."""
    model = tiny.llava(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    model.to(dtype).eval().save_pretrained(tmp_path / "dense")
    tiny.llava_processor().save_pretrained(tmp_path / "dense")
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "blue" if n % 2 else "red")
    how = {"tokens": 9, "data": data, "num_samples": 4, "eval_samples": 4}
    comp_cli.prune(tmp_path / "dense", refit=True, output=tmp_path / "compact", **how)
    written = load_file(tmp_path / "compact" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype} and "lm_head.weight" not in written
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "compact", trust_remote_code=True, dtype="auto"
    ).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_the_first_projection_is_that_of_least_squares_by_hand(dense, tmp_path, monkeypatch):
    """Out of the stock model's streams, at the positions of the tokens that stay; texts are of one length."""
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "blue" if n % 2 else "red")
    how = {"method": "stride", "token_stages": "0:12", "data": data, "eval_samples": 4, "batch_size": 2}
    given: list[dict[str, torch.Tensor]] = []
    streams = calibration.streams_of_dense

    def listen(*args):
        found = streams(*args)
        given.extend({name: tensor.clone() for name, tensor in batch.items()} for batch in found.batches)
        return found

    monkeypatch.setattr(calibration, "streams_of_dense", listen)
    comp_cli.prune(dense, refit=True, num_samples=6, output=tmp_path / "compact", **how)
    comp_cli.prune(dense, output=tmp_path / "plain", **how)
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(dense).eval()
    plain, fitted = (comp_cli.load(tmp_path / name).eval() for name in ("plain", "compact"))
    (own, before), (all_, after) = watched(plain, given), watched(stock, given)
    rows, wanted = [], []
    for few, many in zip(own, all_, strict=True):
        stay = [many["angles"].eq(angle).all(-1).nonzero().item() for angle in few["angles"]]
        assert len(stay) == len(many["angles"]) - 36 + 12
        rows.append(few["inner"].flatten(0, 1))
        wanted.append((many["behind"][:, stay] - few["entering"]).flatten(0, 1))
    x, y = torch.cat(rows).double(), torch.cat(wanted).double()
    ridge = 3e-2 * (x * x).sum(0).mean() * torch.eye(x.shape[1], dtype=x.dtype)
    right = torch.linalg.solve(x.T @ x + ridge, x.T @ y + ridge @ before.double().T).T
    found = projection(fitted).weight
    assert sum(len(batch["input_ids"]) for batch in given) == 6 and torch.equal(before, after)
    assert (found - before).norm() > 1 and torch.allclose(found.double(), right, atol=1e-4)


def projection(model):
    return model.model.language_model.layers[0].self_attn.o_proj


def watched(model, batches):
    """Of layer 0: what enters, what its o_proj reads, what lies behind it, and the positions; and the weights of o_proj."""
    layer, seen, found = model.model.language_model.layers[0], {}, []
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.update(entering=args[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(inner=args[0])),
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(behind=args[0])),
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, options: seen.update(angles=options["position_embeddings"][0][0]), with_kwargs=True
        ),
    ]
    with torch.inference_mode():
        for batch in batches:
            assert batch["attention_mask"].all()
            model(**batch)
            found.append(dict(seen))
    for hook in hooks:
        hook.remove()
    return found, layer.self_attn.o_proj.weight


def test_refitting_brings_the_residual_stream_back(dense, fitted, tmp_path):
    """On the pairs that it was fitted on, at the last token: nearer to the dense model than with the weights as they were."""
    comp_cli.prune(dense, method="pyramiddrop", token_stages="1:12,3:4", output=tmp_path / "plain")
    pictures = [Image.open(path).convert("RGB") for path in sorted(fitted[1].parent.glob("*.png"))[:8]]
    processor = transformers.AutoProcessor.from_pretrained(dense)
    given = processor(images=pictures, text=[ASKED] * len(pictures), return_tensors="pt")
    stock = transformers.LlavaForConditionalGeneration.from_pretrained(dense).eval()
    with torch.inference_mode():
        right, plain, better = (
            model(**given, output_hidden_states=False, logits_to_keep=1).logits
            for model in (stock, comp_cli.load(tmp_path / "plain"), comp_cli.load(fitted[1]))
        )
    assert len(pictures) == 8 and (better - right).square().mean() < 0.7 * (plain - right).square().mean()


def test_the_card_and_the_terminal_say_that_weights_were_fitted(fitted, capsys):
    from comp_cli.cli.output import Output
    from comp_cli.report.token_tables import print_tokens_pruned

    card = (fitted[1] / "README.md").read_text()
    assert "which were fitted anew" in card and "--refit" in card
    print_tokens_pruned(fitted[0], fitted[0].image_tokens, Output())
    assert "its weights are refitted" in " ".join(capsys.readouterr().out.split())
    jsonschema.validate(fitted[0].to_json(), strict("prune"))


# Tuning ------------------------------------------------------------------------------------------------------------------


TUNED = {"steps": 6, "lr": 1e-3, "train_batch_size": 4}


@pytest.fixture(scope="module")
def tuned(dense, fitted):
    """The same, then trained; the report and the folder."""
    data = fitted[1].parent / "table.jsonl"
    how = {"token_stages": "1:12,3:4", "data": data, "num_samples": 8, "eval_samples": 4, "batch_size": 2, **TUNED}
    folder = fitted[1].parent / "tuned"
    return comp_cli.prune(dense, method="pyramiddrop", refit=True, output=folder, **how), folder


def test_what_was_refitted_is_trained_on(dense, fitted, tuned):
    """By the same trainer as a plan of a ratio: from the refitted weights, for so many steps."""
    from comp_cli.models.pairs import choose_pairs
    from comp_cli.options import DataOptions, ResolvedTraining
    from comp_cli.search.trainer import Trainer, training_batches

    opened, training = open_dense(str(dense), Silent()), ResolvedTraining(steps=6, lr=1e-3, batch_size=4)
    pairs = choose_pairs(opened, DataOptions(str(fitted[1].parent / "table.jsonl")), Silent())
    trainer = Trainer(opened, training, 0.5, lambda skip: training_batches(opened, pairs, training, 0, skip))
    trainer.take(tuned[0].plan, comp_cli.load(fitted[1]))
    right = trainer.tune(Silent(), lambda: None).state_dict()
    found, before = (comp_cli.load(folder).state_dict() for folder in (tuned[1], fitted[1]))
    near = torch.cat([(found[name] - tensor).abs().flatten() for name, tensor in right.items()])
    # Adam makes a step of the rate of the rounding of slopes that should be zero.
    assert near.max() <= 6 * 2 * 1e-3 and (near < 1e-5).float().mean() > 0.95
    assert sum(not torch.equal(found[name], before[name]) for name in before) > 20
    assert tuned[0].plan.stages == fitted[0].plan.stages and tuned[0].image_tokens.weights == "tuned"


def test_training_alone_begins_with_the_weights_of_the_model(dense, tuned, tmp_path):
    how = {"token_stages": "1:12,3:4", "data": tuned[1].parent / "table.jsonl", "eval_samples": 4, "batch_size": 2}
    report = comp_cli.prune(dense, method="pyramiddrop", output=tmp_path / "compact", **how, **TUNED | {"lr": 1e-5})
    before = transformers.LlavaForConditionalGeneration.from_pretrained(dense).state_dict()
    found = comp_cli.load(tmp_path / "compact").state_dict()
    assert report.image_tokens.weights == "tuned" and report.options.training.steps == 6
    assert 0 < max(float((found[name] - before[name]).abs().max()) for name in before) < 6 * 2 * 1e-5


def test_the_card_and_the_terminal_say_that_weights_were_trained(tuned, capsys):
    from comp_cli.cli.output import Output
    from comp_cli.report.token_tables import print_tokens_pruned

    card = (tuned[1] / "README.md").read_text()
    assert "with weights that were fine-tuned" in card and "--refit" in card and "--steps 6" in card
    print_tokens_pruned(tuned[0], tuned[0].image_tokens, Output())
    assert "its weights are fine-tuned" in " ".join(capsys.readouterr().out.split())
    jsonschema.validate(tuned[0].to_json(), strict("prune"))


def test_a_drop_that_is_too_large_leaves_neither_folder_nor_journal(dense, fitted, tmp_path, monkeypatch):
    def judged(report, quality, max_drop, progress):
        assert list(tmp_path.glob(".compact.journal*"))
        raise GateError("it falls too far.", report=report)

    monkeypatch.setattr("comp_cli.commands.prune_tokens.check_drop", judged)
    how = {"tokens": 9, "data": fitted[1].parent / "table.jsonl", "eval_samples": 4, **TUNED}
    with pytest.raises(GateError, match="falls too far"):
        comp_cli.prune(dense, output=tmp_path / "compact", **how)
    assert [path for path in tmp_path.iterdir() if "lock" not in path.name] == []


def test_a_dry_run_sends_nobody_who_named_pairs_for_pairs(dense, tmp_path):
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "red")
    said = " ".join(run(dense, "--tokens", 9, "--refit", "--data", data, "--dry-run").stdout.split())
    assert "the run without --dry-run does that" in said and "--data with pairs" not in said
    said = " ".join(run("demo-vlm", "--tokens", 22, "--dry-run").stdout.split())
    assert "the run without --dry-run does that" in said and "--data with pairs" not in said


# Families ----------------------------------------------------------------------------------------------------------------


def written(family: str, folder: Path) -> Path:
    try:
        return tiny.write(family, folder)
    except ImportError as missing:  # the processor of SmolVLM wants torchvision
        pytest.skip(str(missing).strip().splitlines()[0])


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_family_is_pruned_and_loads_with_comp_and_without(family, tmp_path):
    dense = written(family, tmp_path / "dense")
    report = comp_cli.prune(dense, method="vitcop", tokens_share=0.25, output=tmp_path / "compact", link=True)
    has_class_token = report.image_tokens.stages[0].rule == "cls-clusters"
    assert has_class_token != any("no [CLS]" in said for said in report.warnings)
    described = open_dense(str(dense), Silent())
    given = described.random_inputs(2, 12)
    with torch.inference_mode():
        expected = comp_cli.load(tmp_path / "compact")(**given).logits
        remote = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "compact", trust_remote_code=True)
        assert torch.equal(remote.eval()(**given).logits, expected)
        assert not torch.allclose(described.whole(**given).logits, expected, atol=1e-2)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        getattr(transformers, report.architecture).from_pretrained(tmp_path / "compact")


def test_where_images_are_of_any_size_a_share_stays_one_and_a_number_is_the_same_for_all(tmp_path):
    dense = written("llava-next", tmp_path / "dense")
    for amount, kinds in (({"tokens_share": 0.25}, (float, type(None))), ({"tokens": 45}, (type(None), int))):
        plan = comp_cli.prune(dense, method="vitcop", dry_run=True, **amount).plan
        assert all((type(stage.share), type(stage.keep)) == kinds for stage in plan.stages)


def test_a_flat_config_of_older_releases_is_told_apart_too(tmp_path):
    """Qwen2-VL has the sizes of the language model among those of the whole on the hub."""
    dense = written("qwen2-vl", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    text = {name: value for name, value in config.pop("text_config").items() if name not in ("model_type", "architectures")}
    (dense / "config.json").write_text(json.dumps(text | config))
    report = comp_cli.prune(dense, method="vitcop", tokens_share=0.25, output=tmp_path / "compact")
    assert "text_config" not in json.loads((tmp_path / "compact" / "config.json").read_text())
    given = open_dense(str(dense), Silent()).random_inputs(2, 12)
    with torch.inference_mode():
        assert comp_cli.load(tmp_path / "compact")(**given).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        getattr(transformers, report.architecture).from_pretrained(tmp_path / "compact")


def test_an_image_that_is_smaller_than_what_a_stage_keeps_is_no_defect(tmp_path):
    dense = written("qwen2-vl", tmp_path / "dense")
    rows = [{"image": f"{grey}.png", "question": "what", "answer": "red"} for grey in range(0, 200, 10)]
    for grey, row in zip(range(0, 200, 10), rows, strict=True):
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(tmp_path / row["image"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--method", "vitcop", "--tokens", "8", "--data", str(tmp_path / "pairs.jsonl"), "-o", str(tmp_path / "compact")]
    found = CliRunner().invoke(app, ["prune", str(dense), *given])
    said = " ".join(found.output.split())
    assert found.exit_code == 2 and "the stage before layer 0 keeps" in said and "defect" not in said, said


# Methods and mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods_for(DECODER, only_tokens=True))
def test_every_method_prunes_and_runs(method, dense, tmp_path):
    report = comp_cli.prune(dense, method=method, tokens=18, output=tmp_path / "compact", link=True)
    assert report.image_tokens.mean < TOKENS
    assert answer(comp_cli.load(tmp_path / "compact"), prompt(dense))


def test_methods_of_decoders_are_those_that_have_schedules():
    assert set(methods_for(DECODER, only_tokens=True)) == set(TOKEN_METHODS)
    assert all(
        METHODS[name].description == TOKEN_METHODS[name] for name in TOKEN_METHODS if ENCODER not in METHODS[name].drops_in
    )


def test_random_tokens_follow_the_seed(dense):
    plans = [comp_cli.prune(dense, method="random-token", tokens=9, seed=seed, dry_run=True).plan for seed in (0, 5)]
    assert [plan.stages for plan in plans] == [(TokenStage(0, "random", 9, None, {"seed": seed}),) for seed in (0, 5)]


MISTAKES = {
    "no amount": (["--method", "vitcop"], "expected one of --tokens, --tokens-share or --token-stages; found none"),
    "two amounts": (["--method", "vitcop", "--tokens", "9", "--tokens-share", "0.1"], "found --tokens and --tokens-share"),
    "as many as there are": (["--method", "vitcop", "--tokens", "36"], "an image of this model has 36 tokens"),
    "none": (["--method", "vitcop", "--tokens", "0"], "--tokens 0"),
    "a share of all": (["--method", "vitcop", "--tokens-share", "1"], "between 0 and 1"),
    "a share of none": (["--method", "vitcop", "--tokens-share", "0"], "between 0 and 1"),
    "stages that fall": (["--method", "vitcop", "--token-stages", "2:20,0:12,3:2"], "layers must rise"),
    "stages that grow": (["--method", "vitcop", "--token-stages", "0:12,1:20,3:2"], "fewer tokens"),
    "stages beyond": (["--method", "vitcop", "--token-stages", "0:12,1:8,9:2"], "layers must rise, up to 4"),
    "no stages": (["--method", "fastv", "--token-stages", "nine"], "LAYER:TOKENS"),
    "ratio alone": (["--method", "vitcop", "--ratio", "0.5"], "removes image tokens of a decoder, by number"),
    "ratio of both kinds": (["--method", "stride", "--ratio", "0.5"], "asked for a number of image tokens"),
    "ratio and tokens": (["--method", "vitcop", "--ratio", "0.5", "--tokens", "9"], "--ratio is not for"),
    "a method of encoders": (["--method", "joint", "--ratio", "0.5"], "--method joint is for models that encode"),
    "tokens for wanda": (
        ["--tokens", "9", "--method", "wanda"],
        "--tokens is for methods of image tokens in a decoder; --method wanda is none",
    ),
    "link for comp": (["--ratio", "0.5", "--link"], "--link is for methods of image tokens"),
    "training": (["--method", "vitcop", "--tokens", "9", "--steps", "5"], "--steps needs pairs to train on"),
    "epochs of scenes": (["--tokens", "9", "--refit", "--epochs", "1", "--dry-run"], "--epochs needs --data"),
    "a rate of no steps": (["--tokens", "9", "--lr", "1e-3", "--data", "pairs.jsonl"], "--lr, --distill and"),
    "a batch of no steps": (["--tokens", "9", "--train-batch-size", "4", "--data", "p.jsonl"], "--train-batch-size: nothing"),
    "stages": (["--tokens", "9", "--steps", "5", "--stage-share", "0.5", "--data", "pairs.jsonl"], "in no stages of a search"),
    "trained links": (["--tokens", "9", "--steps", "5", "--link", "--data", "pairs.jsonl"], "--steps changes weights, and"),
    "samples of no refit": (
        ["--tokens", "9", "--steps", "5", "--num-samples", "4", "--data", "p.jsonl"],
        "--num-samples: nothing",
    ),
    "precision": (["--method", "vitcop", "--tokens", "9", "--dtype", "bf16"], "--dtype: nothing changes"),
    "calibration": (["--method", "vitcop", "--tokens", "9", "--num-samples", "5"], "--num-samples: nothing changes"),
    "judged on nothing": (["--method", "vitcop", "--tokens", "9", "--max-drop", "1"], "needs pairs"),
    "a choice of vitcop": (["--method", "fastv", "--tokens", "9", "--compat"], "--compat is for --method vitcop"),
    "unknown saliency": (["--method", "vitcop", "--tokens", "9", "--saliency", "loud"], "'key-norm', 'attention'"),
    "unknown method": (["--method", "best", "--tokens", "9"], "'best' is not one of"),
    "another task": (["--method", "vitcop", "--tokens", "9", "--task", "retrieval"], "--task retrieval"),
    "refitted on nothing": (["--tokens", "9", "--refit"], "--refit needs pairs"),
    "refitted links": (["--tokens", "9", "--refit", "--link", "--data", "pairs.jsonl"], "--link leaves them"),
    "refit of a ratio": (["--ratio", "0.5", "--refit"], "--refit is for methods of image tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_sentences_and_nothing_is_left(name, dense, tmp_path):
    words, said = MISTAKES[name]
    result = run(dense, *words, "-o", tmp_path / "compact", "--json")
    found = json.loads(result.stdout)["error"]
    assert result.exit_code == 2 and said in found["message"], found
    assert list(tmp_path.glob("compact*")) == []


def test_an_encoder_is_refused_with_the_methods_for_it(tiny_folder, tmp_path):
    for words, said in (
        (["--method", "vitcop", "--tokens", "9"], "this model is a BlipForImageTextRetrieval"),
        (["--method", "stride", "--tokens", "9"], "asked for --ratio"),
    ):
        result = run(tiny_folder, *words, "-o", tmp_path / "compact", "--json")
        error = json.loads(result.stdout)["error"]
        assert result.exit_code == 2 and said in error["message"], error
    assert list(tmp_path.glob("compact*")) == []


def test_outputs_that_would_destroy_something_are_refused(dense, pruned, tmp_path):
    for output, said in (
        (dense / "inside", "lies inside the input"),
        (dense, "is the input"),
        (pruned, "exists and is not empty"),
    ):
        with pytest.raises(UsageError, match=said):
            comp_cli.prune(dense, method="vitcop", tokens=9, output=output)
    with pytest.raises(RefusedError, match="compact model already"):
        comp_cli.prune(pruned, method="vitcop", tokens=9, output=tmp_path / "again")


def test_an_interrupted_copy_leaves_nothing(dense, tmp_path, monkeypatch):
    whole = token_folder.copy

    def cut(source, target, advance):
        whole(source, target, advance)
        raise KeyboardInterrupt

    monkeypatch.setattr(token_folder, "copy", cut)
    with pytest.raises(KeyboardInterrupt):
        comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "compact")
    assert not (tmp_path / "compact").exists() and not list(tmp_path.glob(".compact.partial*"))
    monkeypatch.undo()
    comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "compact")
    comp_cli.load(tmp_path / "compact")


def test_a_killed_process_leaves_nothing_that_the_next_one_does_not_remove(dense, tmp_path):
    code = f"""
import os, comp_cli
from comp_cli.files.store import sha256
from comp_cli.models import token_folder
token_folder.check_folder_loads = lambda *given: os.kill(os.getpid(), 9)
comp_cli.prune({str(dense)!r}, method="vitcop", tokens=9, output={str(tmp_path / "compact")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert not (tmp_path / "compact").exists() and list(tmp_path.glob(".compact.partial*"))
    comp_cli.prune(dense, method="vitcop", tokens=9, output=tmp_path / "compact")
    assert not list(tmp_path.glob(".compact.partial*"))
    comp_cli.load(tmp_path / "compact")


def test_missing_and_pickled_weights_are_refused(dense, tmp_path):
    lacking = shutil.copytree(dense, tmp_path / "lacking")
    index = json.loads((lacking / "model.safetensors.index.json").read_text())
    lost = shards(lacking)[-1].name
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RefusedError, match="missing keys|layers"):
        comp_cli.prune(lacking, method="vitcop", tokens=9, output=tmp_path / "compact")
    pickled = shutil.copytree(dense, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(transformers.LlavaForConditionalGeneration.from_pretrained(dense).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="pickled"):
        comp_cli.prune(pickled, method="vitcop", tokens=9, output=tmp_path / "compact", allow_pickle=True)
