"""`comp env`: what a bug report needs, also where a library is missing or broken."""

import json
import platform
from importlib import metadata

import pytest
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.commands import environment


@pytest.fixture
def document():
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_versions_are_those_that_are_installed(document):
    assert document["python"] == platform.python_version()
    for name in ("torch", "transformers", "safetensors", "onnx", "datasets"):
        assert document["packages"][name] == metadata.version(name)
    assert "pytest" not in document["packages"]  # what developers need is no part of it


def test_people_read_lines_with_what_would_fail():
    import torch

    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0 and f"transformers: {metadata.version('transformers')}" in result.stdout
    if torch.version.cuda is None:
        assert f"- --device cuda: torch {torch.__version__} is built without CUDA" in result.stdout


def test_a_token_is_never_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = CliRunner().invoke(app, ["env"])
    assert "hf_secret" not in result.output and "HF_TOKEN: (set)" in result.stdout


def test_a_password_in_an_address_is_never_printed(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.example/x")
    result = CliRunner().invoke(app, ["env"])
    assert "hunter2" not in result.output and "https://(set)@hub.example/x" in result.stdout


def test_a_package_that_is_missing_or_too_old_is_said(monkeypatch):
    installed = {"pillow": None, "transformers": "4.57.0"}
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: installed[name] if name in installed else real(name))
    versions, problems = environment.read_packages()
    said = [f"{problem['what']}: {problem['why']}" for problem in problems]
    assert versions["pillow"] is None and "everything: pillow is not installed" in said
    assert any(line.startswith("everything: transformers 4.57.0 is installed, needed is") for line in said)


def test_two_wheels_of_one_module_are_said(monkeypatch):
    """They share a folder, so that one of them is torn: which one, the providers say."""
    installed = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(environment, "_version", installed.get)
    assert environment.both_runtimes(["CUDAExecutionProvider", "CPUExecutionProvider"]) == []
    (problem,) = environment.both_runtimes(["CPUExecutionProvider"])
    assert problem["why"].startswith("onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 share one folder, and the one without CUDA")
    assert problem["why"].endswith("pip install --force-reinstall --no-deps onnxruntime-gpu")
    del installed["onnxruntime"]
    assert environment.both_runtimes([]) == []


@pytest.mark.parametrize("there", [{"onnxruntime": "1.31.1"}, {"onnxruntime-gpu": "1.31.1"}, {}])
def test_either_wheel_of_onnx_runtime_will_do(monkeypatch, there):
    """The GPU's alone is what remains where the other one was removed."""
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: there.get(name) if name in environment.RUNTIMES else real(name))
    asked = [*(metadata.requires("comp-cli") or []), "onnxruntime>=1.23"]
    monkeypatch.setattr(metadata, "requires", lambda name: [line for line in asked if not line.startswith("onnxruntime-gpu")])
    versions, problems = environment.read_packages()
    assert {name: versions[name] for name in environment.RUNTIMES if versions.get(name)} == there
    assert any(problem["why"] == "onnxruntime is not installed" for problem in problems) == (not there)


def test_cores_and_memory_are_what_this_process_may_use(document):
    cpu = document["devices"][0]
    assert 1 <= cpu["usable_cores"] <= cpu["cores"] and cpu["threads"] >= 1
    assert 0 < cpu["usable_memory_bytes"] <= cpu["memory_bytes"]
    result = CliRunner().invoke(app, ["env"])
    assert f"{cpu['cores']} cores, {cpu['usable_cores']} usable ({cpu['because']})" in result.stdout


def test_a_library_that_cannot_be_imported_is_a_finding_not_a_failure(monkeypatch, document):
    real = environment.import_module

    def broken(name):
        if name in ("torch", "onnxruntime"):
            raise OSError(f"lib{name}.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(environment, "import_module", broken)
    devices, problems = environment.read_devices()
    assert [device["device"] for device in devices] == ["cpu"]
    assert problems[0]["why"] == "torch cannot be imported: OSError: libtorch.so: cannot open shared object file"
    assert environment.read_providers() == (
        [],
        [{"what": "everything", "why": problems[0]["why"].replace("torch", "onnxruntime")}],
    )


def test_little_room_for_downloads_is_said(monkeypatch):
    monkeypatch.setattr(environment, "LITTLE_SPACE", 2**70)
    cache, problems = environment.read_cache()
    assert cache["free_bytes"] > 0 and "are free at" in problems[0]["why"]


def test_a_transformers_that_nobody_tested_with_is_said(monkeypatch):
    from comp_cli.runtime import modeling_comp

    assert environment.read_tested() == (None, [])
    monkeypatch.setattr(modeling_comp.transformers, "__version__", "5.99.0")
    _, (problem,) = environment.read_tested()
    assert "transformers 5.99.0 is not one that this runtime of compact models was tested with" in problem["why"]


@pytest.mark.parametrize("name", ["read_packages", "read_tested", "read_devices", "read_providers", "read_cache"])
def test_whatever_else_stumbles_is_a_finding_too(name, monkeypatch):
    """Half an installation: a folder without the module's parts, a version that is none, a cache in a forbidden place."""

    def stumble():
        raise AttributeError("module 'torch' has no attribute '__version__'")

    stumble.__name__ = name
    monkeypatch.setattr(environment, name, stumble)
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0, result.output
    assert any("has no attribute '__version__'" in problem["why"] for problem in json.loads(result.stdout)["problems"])


def test_a_version_that_is_none_is_said(monkeypatch):
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "broken" if name == "onnx" else real(name))
    _, problems = environment.read_packages()
    assert any(problem["why"].startswith("onnx broken is installed, needed is") for problem in problems)


def test_a_cache_below_a_file_is_said(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    _, problems = environment.read_cache()
    assert "file is no folder" in problems[0]["why"]
