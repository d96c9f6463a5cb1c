"""What pyproject.toml says: extras, and what lies in the sdist."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ALWAYS = {"README.md", "LICENSE", "pyproject.toml"}  # which a build takes along unasked


def packages(extra=None):
    """Names of what is installed, by an extra or without."""
    lines = PROJECT["project"]["dependencies"] if extra is None else PROJECT["project"]["optional-dependencies"][extra]
    found = set() if extra is None else packages()
    for line in lines:
        name, more = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line).groups()
        for other in (more or "").split(",") if name == "comp-cli" else ():
            found |= packages(other)
        found.add(name)
    return found - {"comp-cli"}


def test_without_an_extra_the_plain_runtime_comes_and_no_gpu_wheel():
    assert {"onnxruntime", "psutil"} <= packages() and "onnxruntime-gpu" not in packages()
    assert packages("gpu") - packages() == {"onnxruntime-gpu"}


def test_one_name_brings_everything():
    asked = "torch transformers typer safetensors huggingface-hub onnx onnxruntime-gpu pytest".split()
    assert set(asked) <= packages("all")
    every = set().union(*(packages(extra) for extra in PROJECT["project"]["optional-dependencies"] if extra != "docs"))
    assert packages("all") == every


def test_the_tested_versions_name_every_package():
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert packages("all") <= pinned


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_the_sdist_holds_what_is_named(page):
    """Links, and paths in commands."""
    included = {*PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"], *ALWAYS}
    text = (ROOT / page).read_text()
    named = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(
        r"(?<![\w/.])((?:docs|benchmarks|scripts|tests|\.ci)/[\w./-]+)", text
    )
    assert named
    for path in named:
        assert path.split("/")[0] in included, path
    assert all((ROOT / path).exists() for path in included)


def test_no_import_that_windows_lacks_stands_at_the_top():
    """`resource` and its like are imported where the system is known."""
    for path in (ROOT / "comp_cli").rglob("*.py"):
        assert not re.search(r"^(import|from) (resource|fcntl|pwd|grp)\b", path.read_text(), re.MULTILINE), path
