"""Folders that older versions wrote, one of each family, load, answer, upgrade and export with today's comp; journals that
they wrote are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.search.journal import Journal

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = {path.stem: path.with_suffix("") for path in sorted(FIXTURES.glob("written-by-*/*.json"))}
UNFINISHED = FIXTURES / "written-by-0.1.1" / "unfinished"  # journals of a run killed in its stages, and while fine-tuning


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


@pytest.mark.parametrize("name", ["search", "training"])
@pytest.mark.parametrize("version", ["0.1.1", "0.2.0"])
def test_an_old_journal_is_refused_in_a_sentence_and_stays_until_it_is_thrown_away(
    name, version, tiny_folder, tmp_path, monkeypatch
):
    """Searches of those versions calculate other numbers. What 0.2.0 wrote differs in the version only."""
    place = shutil.copytree(UNFINISHED / name, tmp_path / "place")
    monkeypatch.chdir(place)
    shutil.copytree(tiny_folder, "dense")
    if version != "0.1.1":
        written = json.loads(Path(".compact.journal").read_text())
        Journal(place / "compact", written["settings"] | {"comp": version}).save(written["state"])
    before = Path(".compact.journal").read_bytes()
    words = ["prune", "dense", "-o", "compact", "--ratio", "0.5", "--method", "joint"]
    refused = CliRunner().invoke(app, words)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and f"written by comp {version}; this is {comp_cli.__version__}" in said
    assert "--no-resume" in said and Path(".compact.journal").read_bytes() == before and not Path("compact").exists()
    sizes = ["--num-samples", "8", "--eval-samples", "8", "--text-tokens", "12", "--device", "cpu"]
    comp(*words, "--no-resume", *sizes)
    assert not list(place.glob(".compact.*"))
