"""`comp upgrade` puts today's runtime beside the weights of folders that version 0.1.0 wrote, and changes nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import comp_cli
from comp_cli.cli.exit_codes import FAILED, REFUSED, USAGE
from comp_cli.cli.output import Output
from comp_cli.commands import upgrade
from comp_cli.errors import CompError
from comp_cli.report.upgrade import print_upgraded
from comp_cli.runtime import modeling_comp

OLD = Path(__file__).parent / "fixtures" / "written-by-0.1.0"  # see also test_written_by_old_versions.py
TODAY = Path(modeling_comp.__file__).read_bytes()


@pytest.fixture(params=["clip", "blip-caption"])
def folder(request, tmp_path):
    return shutil.copytree(OLD / request.param, tmp_path / "old")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_an_upgrade_changes(folder):
    (folder / "NOTES").write_text("the user's own")
    before = contents(folder)
    report = upgrade.upgrade(folder, Output("quiet"))
    assert set(report.changed) == {"modeling_comp.py", "auto_map", "versions"}
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "modeling_comp.py",
        "config.json",
        "comp_report.json",
    }
    assert after.keys() == before.keys() and after["modeling_comp.py"] == TODAY
    was, config = (json.loads(files["config.json"]) for files in (before, after))
    runtime = config["comp"].pop("runtime")
    assert runtime == {"comp_version": comp_cli.__version__, "transformers": list(modeling_comp.TESTED)}
    assert len(config["auto_map"]) > len(was["auto_map"]) and set(config) == set(was)
    assert config | {"auto_map": was["auto_map"]} == was
    report = json.loads(after["comp_report.json"])
    for name, facts in report["files"].items():
        assert facts == {"bytes": len(after[name]), "sha256": hashlib.sha256(after[name]).hexdigest()}
    assert report | {"files": 0} == json.loads(before["comp_report.json"]) | {"files": 0}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_runtime_that_somebody_edited_is_replaced(folder):
    (folder / "modeling_comp.py").write_text("raise SystemExit")
    upgrade.upgrade(folder, Output("quiet"))
    assert (folder / "modeling_comp.py").read_bytes() == TODAY


def test_a_second_upgrade_changes_nothing(folder, capsys):
    upgrade.upgrade(folder, Output("quiet"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = upgrade.upgrade(folder, Output("quiet"))
    print_upgraded(report, Output("human"))
    assert report.changed == {} and "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_command_prints_one_document(tmp_path):
    folder = shutil.copytree(OLD / "clip", tmp_path / "old")
    command = [sys.executable, "-m", "comp_cli", "upgrade", str(folder), "--json"]
    place = {"PYTHONPATH": str(Path(comp_cli.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | place)
    assert done.returncode == 0, done.stderr
    assert "modeling_comp.py" in json.loads(done.stdout)["changed"]
    shutil.rmtree(folder)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | place)
    assert done.returncode == USAGE and "no such folder" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize("moment", ["copytree", "load_model", "rename"])
def test_an_upgrade_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch, moment):
    before = contents(folder)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    if moment == "rename":
        real = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, target: fail() if ".partial-" in path.name else real(path, target))
    else:
        monkeypatch.setattr(upgrade.shutil if moment == "copytree" else upgrade, moment, fail)
    with pytest.raises(CompError, match="It is as it was") as failed:
        upgrade.upgrade(folder, Output("quiet"))
    monkeypatch.undo()
    assert failed.value.exit_code == FAILED and contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["old"]


def changed(name: str, change):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def without(name: str):
    return lambda folder: (folder / name).unlink()


def edited_config(**keys):
    return changed("config.json", lambda text: json.dumps(json.loads(text) | keys).encode())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edited_config(comp=None), "not a compact model that comp wrote"),
        (edited_config(comp={"towers": 3}), "not a compact model that comp wrote"),
        (edited_config(auto_map=[]), "not a compact model that comp wrote"),
        (without("modeling_comp.py"), "not a compact model that comp wrote"),
        (without("comp_report.json"), "trained further"),
        (without("model.safetensors"), "'model.safetensors', which comp_report.json lists, is missing"),
        (changed("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])), "not the bytes that comp wrote"),
        (changed("comp_report.json", lambda data: b'{"files": 3}'), "expected the files of the folder"),
        (changed("comp_report.json", lambda data: b"[]"), "JSON object"),
    ],
)
def test_other_folders_are_refused_and_stay_as_they_are(folder, damage, said):
    damage(folder)
    before = contents(folder)
    with pytest.raises(CompError, match=said) as refused:
        upgrade.upgrade(folder, Output("quiet"))
    assert refused.value.exit_code == REFUSED and contents(folder) == before


def test_an_old_folder_with_the_shapes_of_the_dense_model_is_named(folder):
    """Its weights are not changed; but the user is told that stock classes take it."""
    config = json.loads((folder / "config.json").read_text())
    assert not upgrade.dense_shapes(config)
    for part in ("vision_config", "text_config"):
        config[part]["intermediate_size"] = 48
    for layer in config["comp"]["towers"][0]["layers"]:
        layer["ffn"] = 48
    assert upgrade.dense_shapes(config)


def test_a_folder_that_somebody_stands_in_is_not_swapped_away(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(CompError, match="the current folder lies in it") as refused:
        upgrade.upgrade(Path("."), Output("quiet"))
    assert refused.value.exit_code == USAGE and "comp upgrade " in refused.value.hint
    assert contents(folder) == before and Path.cwd() == folder.resolve()
