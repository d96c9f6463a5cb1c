"""Folders and journals that older versions wrote, one of each family: they load, answer, upgrade, export and go on with today's
comp."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.search.journal import of_today

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = {path.stem: path.with_suffix("") for path in sorted(FIXTURES.glob("written-by-*/*.json"))}
UNFINISHED = FIXTURES / "written-by-0.1.1" / "unfinished"  # killed after the fourth of ten stages, and while fine-tuning


@pytest.fixture(params=FOLDERS)
def old(request, tmp_path) -> tuple[Path, dict]:
    """A copy of a folder, and what was recorded when it was written."""
    folder = FOLDERS[request.param]
    return shutil.copytree(folder, tmp_path / "old"), json.loads(folder.with_suffix(".json").read_text())


def says(model: torch.nn.Module, recorded: dict) -> torch.Tensor:
    """An output of the model for two samples, or the tokens that it writes about them."""
    inputs = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in recorded["inputs"].items()}
    if recorded["pictures"]:
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        if recorded["output"] is None:
            return model.generate(**inputs, num_beams=1, max_new_tokens=10)
        return getattr(model(**inputs), recorded["output"])


def same(model: torch.nn.Module, recorded: dict) -> None:
    torch.testing.assert_close(says(model, recorded), torch.tensor(recorded["says"]), atol=1e-4, rtol=1e-4)


def comp(*words: object) -> dict:
    """The document that a command ends with."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_there_is_one_of_each_family():
    import tiny

    assert set(FOLDERS) == set(tiny.FAMILIES)


def test_an_old_folder_says_with_todays_comp_what_it_said(old):
    folder, recorded = old
    same(comp_cli.load(folder), recorded)


def test_an_upgraded_folder_answers_without_comp_and_says_the_same(old):
    folder, recorded = old
    comp("upgrade", folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert "comp_cli" not in type(model).__module__
    same(model, recorded)


def test_an_old_folder_is_exported_and_agrees_with_torch(old, tmp_path):
    folder, _ = old
    document = comp("export", folder, "--onnx", "-o", tmp_path / "onnx")
    assert document["passed"] and document["agreement"] == 1.0


# Journals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """As the runs had that were killed: a journal is of so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["search", "training"])
def test_an_old_journal_goes_on_and_ends_with_the_plan_of_a_run_that_was_not_killed(name, tmp_path, monkeypatch, one_thread):
    place = shutil.copytree(UNFINISHED / name, tmp_path / "place")
    monkeypatch.chdir(place)  # the journal says where model and data are, seen from here
    words = json.loads(Path("words.json").read_text())
    journal = json.loads(Path(".compact.journal").read_text())
    if journal["settings"]["torch"] != torch.__version__:  # another torch calculates other numbers
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2 and f"is {torch.__version__}" in " ".join(refused.stderr.split())
        return
    resumed = comp(*words)
    assert resumed["stages"][: len(journal["state"]["stages"])] == journal["state"]["stages"]
    assert not list(place.glob(".compact.*"))
    whole = comp(*words[:3], "whole", *words[4:])
    plans = [json.loads(Path(output, "comp_report.json").read_text())["plan"] for output in ("compact", "whole")]
    assert plans[0] == plans[1] and resumed["ratio"] == whole["ratio"]
    if name == "search":
        assert len(resumed["stages"]) > len(journal["state"]["stages"])


@pytest.mark.parametrize("version", ["0.1.0", "0.1.1", "0.0.9"])
def test_the_settings_of_an_old_journal_are_read_as_those_of_today(version):
    data = {"data": "pairs.jsonl", "split": None} | ({} if version == "0.1.0" else {"split_column": None})
    found = of_today({"comp": version, "data": data, "seed": 0})
    if version == "0.0.9":  # which calculated other numbers
        assert found["comp"] == version
    else:
        today = {"data": "pairs.jsonl", "split": None, "split_column": None}
        assert found == {"comp": comp_cli.__version__, "data": today, "seed": 0}
