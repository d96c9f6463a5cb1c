"""Compact folders whose plan lies, or whose bytes are not those that comp wrote, are refused at load."""

import copy
import json
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import comp_cli
from comp_cli.checkpoint.plan_check import check_block
from comp_cli.errors import CompError
from comp_cli.families import FAMILIES
from comp_cli.runtime.modeling_comp import check_sizes

FIRST = ("towers", 0, "layers", 0)
ATTENTION = (*FIRST, "attention")
CROSS = ("towers", 1, "layers", 0, "cross")
NAN, INF = float("nan"), float("inf")
LIES = [
    *((("schema_version",), value) for value in (99, 0, -1, None, "1", 1.0, True)),
    *((("family",), value) for value in ("clip", "blip_caption", None, 3, ["blip"], "")),
    *((("task",), value) for value in ("caption", "zero-shot", "evil", 3, ["itm"])),
    *((("method",), value) for value in ("stride", 3, ["comp"])),
    *((("base_address",), value) for value in (3, {}, ["x"])),
    *((("towers",), value) for value in (None, {}, "x", [], 3)),
    (("towers", 0), None),
    *((("towers", 0, "layout", "order"), value) for value in ("post_norm", None, "evil")),
    *((("towers", 0, "layout", "encoder"), value) for value in ("text_encoder.encoder", "vision_model", "__class__", 3)),
    (("towers", 0, "layout", "layers"), "__dict__"),
    (("towers", 0, "layout", "protected"), []),
    (("towers", 0, "layout", "protected"), ["first", "last"]),
    (("towers", 1, "layout", "protected"), "first"),
    (("towers", 1, "layout", "causal"), True),
    (("towers", 1, "layout", "cross"), None),
    (("towers", 0, "layout", "text_end"), "text_encoder"),
    (("towers", 0, "layout", "more"), 1),
    (("towers", 0, "layout", "attention", "qkv"), ["projection"]),
    (("towers", 0, "layout", "ffn"), ["mlp.fc2", "mlp.fc1"]),
    (("towers", 0, "layout"), None),
    *((("towers", 0, "score_rows"), value) for value in (-1, "x", None, 2.5, True, NAN)),
    *((("towers", 0, "score_rule"), value) for value in ("evil", "last", "even", "cls", "stride", "random", None, 3, ["cls"])),
    *((("towers", 1, "score_rule"), value) for value in ("cls", "stride", "random")),
    *((("towers", 0, "fuse"), value) for value in (True, 1, "x", None)),
    *((("towers", 0, "layers"), value) for value in (None, [], "x", {})),
    *(((*FIRST, "keep"), value) for value in (0, -1, "3", 2.5, True, 38, 10**9, [], NAN)),
    (("towers", 1, "layers", 0, "keep"), 1),  # fewer than the tokens that are protected
    (("towers", 1, "layers", 0, "keep"), 25),  # more than the text can have
    *(((*FIRST, "ffn"), value) for value in (0, -1, "8", None, 209, 10**9, True)),
    *((ATTENTION, value) for value in (None, [], 3, {})),
    *(((*ATTENTION, "num_heads"), value) for value in (0, -1, 7, "6", 2.0, None, True)),
    *(((*ATTENTION, "head_dim"), value) for value in (0, 6, 24, "12", 12.0, None)),
    *(((*ATTENTION, "scale"), value) for value in (0, -0.2886751, "0.25", None, 1e30, NAN, INF, 0.2887, 1, [0.28])),
    *(((*CROSS, "scale"), value) for value in (0.25, NAN)),
    (CROSS, None),
    ((*FIRST, "cross"), {"num_heads": 1, "head_dim": 12, "scale": 12**-0.5}),
]


def changed(block, place, value):
    found = copy.deepcopy(block)
    *path, last = place
    reduce(lambda part, key: part[key], path, found)[last] = value
    return found


def refusal(do, *arguments) -> CompError:
    with pytest.raises(CompError) as caught:
        do(*arguments)
    assert caught.value.exit_code == 4
    return caught.value


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def rewrite(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(content)))


@pytest.fixture(scope="module")
def whole(compact_folder):
    from comp_cli.checkpoint.loading import describe

    return describe(compact_folder)[0].to_dict()


def check(config, block):
    check_block(block, config, FAMILIES["blip"], "BlipForImageTextRetrieval")


@pytest.mark.parametrize(("place", "value"), LIES)
def test_a_plan_that_lies_is_refused_with_its_place_and_value(whole, place, value):
    block = whole["comp"]
    check(whole, block)  # or the test could not fail
    if place == ("task",):  # is asked before, see the next test
        return
    said = refusal(check, whole, changed(block, place, value)).message
    named = [str(part) for part in place if isinstance(part, str)]
    assert named[0] in said or named[0] == "method" and "score_rule" in said
    assert place in (("method",), ("towers", 0, "layout"), ATTENTION) or repr(value)[:40] in said or value in ([], {}, None)


@pytest.mark.parametrize(
    ("place", "value"), [*((p, v) for p, v in LIES if p == ("task",)), ((*ATTENTION, "scale"), NAN), ((*FIRST, "keep"), "3")]
)
def test_they_are_refused_where_models_are_loaded(compact_folder, tmp_path, place, value):
    folder = copied(compact_folder, tmp_path / "copy")
    (folder / "comp_report.json").unlink()
    comp_cli.load(folder)
    rewrite(folder, lambda found: found | {"comp": changed(found["comp"], place, value)})
    assert "comp." in refusal(comp_cli.load, folder).message


def test_heads_that_are_divided_otherwise(whole):
    """Every product num_heads * head_dim as before, so all shapes fit; the accuracy of a trained model falls to chance."""
    for change in (lambda n, d: (1, n * d), lambda n, d: (n * 2, d // 2)):
        block = copy.deepcopy(whole["comp"])
        for tower in block["towers"]:
            for layer in tower["layers"]:
                for part in ("attention", "cross"):
                    if part in layer:
                        heads, wide = change(layer[part]["num_heads"], layer[part]["head_dim"])
                        layer[part] |= {"num_heads": heads, "head_dim": wide, "scale": wide**-0.5}
        refusal(check, whole, block)
        with pytest.raises(ValueError):  # the runtime, for people without comp, sees it too
            check_sizes(block["towers"][0], 72, 6)


def test_more_tokens_than_the_layer_before_hands_on(whole):
    block = copy.deepcopy(whole["comp"])
    for layer, keep in zip(block["towers"][0]["layers"], (20, None, 21, None, None), strict=True):
        layer["keep"] = keep
    assert "1 to 20 tokens" in refusal(check, whole, block).message
    block["towers"][0]["layers"][2]["keep"] = 20
    check(whole, block)


@pytest.mark.parametrize(("place", "value"), [(p, v) for p, v in LIES if p[-1] in ("scale", "num_heads", "head_dim", "keep")])
def test_the_runtime_refuses_nonsense_without_comp(whole, place, value):
    tower = changed(whole["comp"], place, value)["towers"][place[1]]
    if place[-1] == "keep" and type(value) is int and value > 1 or (place[-1] == "head_dim" and value == 12):
        return  # what only the sizes of the inputs say
    with pytest.raises((ValueError, TypeError)):
        check_sizes(tower, 72, 6)
    check_sizes(whole["comp"]["towers"][place[1]], 72, 6)


# --- the hashes of the report


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def negate(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["itm_head.weight"] *= -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def activate_otherwise(folder):
    rewrite(folder, lambda found: found | {"vision_config": found["vision_config"] | {"hidden_act": "relu"}})


def other_epsilon(folder):
    rewrite(folder, lambda found: found | {"text_config": found["text_config"] | {"layer_norm_eps": 0.1}})


def other_pictures(folder):
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace("0.48145466", "0.58145466"))


def fewer_words(folder):
    (folder / "tokenizer.json").unlink()


def no_hash(folder):
    report = json.loads((folder / "comp_report.json").read_text())
    del report["files"]["model.safetensors"]["sha256"]
    (folder / "comp_report.json").write_text(json.dumps(report))


def other_report(folder):
    (folder / "comp_report.json").write_text('{"files": ["model.safetensors"]}')


def names_outside(folder):
    report = json.loads((folder / "comp_report.json").read_text())
    report["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "comp_report.json").write_text(json.dumps(report))


CHANGES = [
    flip_a_bit,
    negate,
    activate_otherwise,
    other_epsilon,
    other_pictures,
    fewer_words,
    no_hash,
    other_report,
    names_outside,
]


@pytest.mark.parametrize("change", CHANGES)
def test_bytes_that_comp_did_not_write_are_refused_where_its_report_lies(compact_folder, tmp_path, change):
    folder = copied(compact_folder, tmp_path / "copy")
    change(folder)
    error = refusal(comp_cli.load, folder)
    assert "comp_report.json" in error.message and "remove" in error.hint


def test_the_card_and_the_runtime_beside_it_may_be_edited(compact_folder, inputs, tmp_path):
    folder = copied(compact_folder, tmp_path / "copy")
    (folder / "README.md").write_text("mine")
    (folder / "modeling_comp.py").write_text("raise SystemExit('never run by comp')")
    (folder / "notes.txt").write_text("mine too")
    expected = comp_cli.load(compact_folder)(**inputs).itm_score
    assert torch.equal(comp_cli.load(folder)(**inputs).itm_score, expected)


def test_a_model_that_was_trained_further_in_place_says_what_to_do(compact_folder, tmp_path):
    folder = copied(compact_folder, tmp_path / "copy")
    model = comp_cli.load(folder)
    with torch.no_grad():
        model.itm_head.bias += 1
    model.save_pretrained(folder)
    assert "trained further" in refusal(comp_cli.load, folder).hint
    (folder / "comp_report.json").unlink()
    assert torch.equal(comp_cli.load(folder).itm_head.bias, model.itm_head.bias)


def test_a_folder_without_the_facts_that_came_later_still_loads(compact_folder, inputs, tmp_path):
    """What the first version wrote, and less: the family, the sizes, and nothing about the origin."""
    folder = copied(compact_folder, tmp_path / "copy")
    (folder / "comp_report.json").unlink()

    def older(found):
        towers = [{key: value for key, value in tower.items() if key != "fuse"} for tower in found["comp"]["towers"]]
        return found | {"comp": {"schema_version": 1, "family": "blip", "towers": towers}}

    rewrite(folder, older)
    assert torch.equal(comp_cli.load(folder)(**inputs).itm_score, comp_cli.load(compact_folder)(**inputs).itm_score)
