"""Nothing is told to anybody: no file of a library's telemetry in the home folder, and the variables that switch it off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from comp_cli.privacy import SILENT

ROOT = Path(__file__).parent.parent


def run_at_home(home: Path, code: str, **variables: str) -> str:
    """What a script prints, in a fresh process with an empty home folder."""
    without = {name: value for name, value in os.environ.items() if name not in SILENT and not name.startswith("XDG_")}
    environment = without | {"HOME": str(home), "HF_HOME": str(home / "hub"), "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_telemetry_of_every_library_is_off_before_it_is_imported(tmp_path):
    code = f"import comp_cli, os, sys; print([os.environ[n] for n in {list(SILENT)}], 'onnxruntime' in sys.modules)"
    assert run_at_home(tmp_path, code).strip() == f"{list(SILENT.values())} False"


@pytest.mark.parametrize("name", SILENT)
def test_who_sets_a_variable_decides(tmp_path, name):
    code = f"import comp_cli, os; print(os.environ[{name!r}])"
    assert run_at_home(tmp_path, code, **{name: "mine"}).strip() == "mine"
