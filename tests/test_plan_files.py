"""`--plan-only` and `--plan`: a search and its model in two runs, and plan files that cannot be."""

import json

import pytest
import tiny

import comp_cli
from comp_cli.commands import prune_streamed
from comp_cli.errors import CompError, RefusedError, UsageError
from comp_cli.report.base import Streamed

FAST = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
CASES = {
    "comp": ("blip", {"ratio": 0.4, "looks": 2}),
    "comp-paper": ("blip", {"ratio": 0.3, "method": "comp-paper", "stages": 4}),
    "wanda": ("clip", {"ratio": 0.4, "method": "wanda"}),
    "tuned": ("blip", {"ratio": 0.4, "method": "joint", "steps": 2, "train_batch_size": 4}),
    "decoder": ("llava", {"ratio": 0.4, "looks": 2}),
    "uniform": ("llava", {"ratio": 0.3, "uniform": True}),
    "larger than memory": ("llava", {"ratio": 0.4}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_folder_is_that_of_the_run_that_searched(name, tmp_path, monkeypatch):
    family, how = CASES[name]
    folder = tiny.write(family, tmp_path / "dense")
    if name == "larger than memory":
        monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40))  # as if no model fitted
    how = how | FAST
    report = comp_cli.prune(folder, output=tmp_path / "whole", **how)
    assert (report.streamed is not None) == (name == "larger than memory")
    planned = comp_cli.prune(folder, output=tmp_path / "plan.json", plan_only=True, **how)
    assert planned.quality is None and planned.output == tmp_path / "plan.json" and not (tmp_path / "again").exists()
    comp_cli.prune(folder, plan=tmp_path / "plan.json", output=tmp_path / "again", device="cpu")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def planned(tiny_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    comp_cli.prune(tiny_folder, ratio=0.4, method="joint", output=file, plan_only=True, **FAST)
    return file


def test_nothing_is_replaced_silently(tiny_folder, planned, tmp_path):
    before = planned.read_bytes()
    how = FAST | {"ratio": 0.3, "method": "joint", "plan_only": True}
    with pytest.raises(UsageError, match="exists"):
        comp_cli.prune(tiny_folder, output=planned, **how)
    assert planned.read_bytes() == before
    (tmp_path / "mine.json").write_text('{"a": 1}')
    with pytest.raises(UsageError, match="no plan that comp wrote"):
        comp_cli.prune(tiny_folder, output=tmp_path / "mine.json", overwrite=True, **how)
    with pytest.raises(UsageError, match=r"\.json"):
        comp_cli.prune(tiny_folder, output=tmp_path / "folder", **how)
    own = tmp_path / "own.json"
    own.write_bytes(before)
    comp_cli.prune(tiny_folder, output=own, overwrite=True, **how)
    assert json.loads(own.read_text())["options"]["ratio"] == 0.3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 0.6}, "--ratio 0.6: the plan .* was made with 0.4"),
        ({"method": "wanda"}, "--method"),
        ({"seed": 3}, "--seed"),
        ({"ratio": [0.3, 0.4]}, "--ratio"),
        ({"dry_run": True}, "--dry-run and --plan"),
        ({"plan_only": True}, "--plan-only and --plan"),
        ({"link": True}, "--plan"),
    ],
)
def test_what_contradicts_a_plan_is_refused(given, said, tiny_folder, planned, tmp_path):
    with pytest.raises(UsageError, match=said):
        comp_cli.prune(tiny_folder, plan=planned, output=tmp_path / "c", **given)
    assert not (tmp_path / "c").exists()


def changed(document, **others):
    return json.loads(json.dumps(document)) | others


def layer(document, tower=0, index=0):
    return document["state"]["plan"]["towers"][tower]["layers"][index]


def with_layer(document, **others):
    found = changed(document)
    layer(found).update(others)
    return found


HOSTILE = {
    "another kind": (lambda d: changed(d, kind="recipe"), "no plan"),
    "newer": (lambda d: changed(d, schema_version=2), "schema_version"),
    "no state": (lambda d: changed(d, state=None), "no plan"),
    "no hashes": (lambda d: changed(d, weights="abc"), "no plan"),
    "another model's": (lambda d: changed(d, weights=["0" * 64]), "other weights"),
    "unknown option": (lambda d: changed(d, options=d["options"] | {"shell": "rm"}), "unknown option"),
    "option of another type": (lambda d: changed(d, options=d["options"] | {"seed": "1"}), "seed"),
    "unknown method": (lambda d: changed(d, options=d["options"] | {"method": "magic"}), "method"),
    "another ratio": (lambda d: changed(d, options=d["options"] | {"ratio": 0.7}), "ratio"),
    "channels that are not there": (lambda d: with_layer(d, ffn=[0, 1, 10**6]), "does not have"),
    "the same channel twice": (lambda d: with_layer(d, ffn=[1, 1]), "does not have"),
    "no channels": (lambda d: with_layer(d, ffn=[]), "does not have"),
    "channels as text": (lambda d: with_layer(d, ffn=["0"]), "does not have"),
    "heads of another width": (lambda d: with_layer(d, attention=layer(d)["attention"] | {"head_dim": 3}), "another size"),
    "a part too few": (lambda d: with_layer(d, ffn=None), "expected"),
    "more tokens than there are": (lambda d: with_layer(d, keep=10**6), "plan says"),
    "padding": (lambda d: with_layer(d, padding=8), "expected"),
    "towers missing": (lambda d: changed(d, state=d["state"] | {"plan": d["state"]["plan"] | {"towers": []}}), "state"),
    "state of another kind": (lambda d: changed(d, state={"plan": 1}), "state"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(name, tiny_folder, planned, tmp_path):
    change, said = HOSTILE[name]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(change(json.loads(planned.read_text()))))
    with pytest.raises(RefusedError, match=said) as refused:
        comp_cli.prune(tiny_folder, plan=file, output=tmp_path / "c", device="cpu")
    assert str(file) in refused.value.message and not (tmp_path / "c").exists()


def test_what_is_no_file_is_refused(tiny_folder, tmp_path):
    (tmp_path / "torn.json").write_text('{"kind": "comp plan"')
    for path in (tmp_path / "torn.json", tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(CompError):
            comp_cli.prune(tiny_folder, plan=path, output=tmp_path / "c")


def test_own_pairs_have_to_be_named_again(tiny_folder, tmp_path):
    data = tiny.table(tmp_path, caption=lambda number: "a red circle")
    file = tmp_path / "plan.json"
    comp_cli.prune(tiny_folder, ratio=0.4, method="joint", data=data, output=file, plan_only=True, **FAST)
    assert str(tmp_path) not in file.read_text()
    with pytest.raises(UsageError, match="pairs of your own"):
        comp_cli.prune(tiny_folder, plan=file, output=tmp_path / "c")
    report = comp_cli.prune(tiny_folder, plan=file, data=data, output=tmp_path / "c", device="cpu")
    assert report.options.num_samples == 8 and not any("other calibration pairs" in line for line in report.warnings)
