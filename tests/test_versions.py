"""The two sets of versions that CI tests with, and what the runtime says that it was tested with."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from comp_cli.runtime.modeling_comp import TESTED

ROOT = Path(__file__).parent.parent
SETS = ("constraints.txt", "constraints-newest.txt")


def versions(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)*", line) for line in lines)  # no paths, addresses or builds
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("name", SETS)
def test_every_direct_dependency_has_a_version(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    needed = {re.match(r"[\w-]+", line)[0] for line in lines} - {project["name"], "onnxruntime-gpu"}  # one or the other
    assert needed <= versions(name).keys()


@pytest.mark.parametrize("name", SETS)
def test_the_runtime_was_tested_with_what_ci_tests_with(name):
    first, last = (tuple(map(int, version.split("."))) for version in TESTED)
    release = tuple(map(int, versions(name)["transformers"].split(".")[:2]))
    assert first <= release <= last
    assert name != SETS[1] or release == last
    assert f"transformers>={TESTED[0]}," in (ROOT / "pyproject.toml").read_text()
    for page in ("README.md", "docs/export.md"):
        assert f"transformers {TESTED[0]} to {TESTED[1]}" in (ROOT / page).read_text()


def test_the_newest_versions_are_those_of_an_environment():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "newest.py"], capture_output=True, text=True, check=True)
    comment, *lines = done.stdout.splitlines()
    assert comment.startswith("# ") and all(re.fullmatch(r"[\w-]+==\d+(\.\d+)*", line) for line in lines)
    assert {"torch", "transformers", "pytest"} <= {line.split("==")[0] for line in lines}
