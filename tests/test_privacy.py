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


def left_at(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_an_export_leaves_nothing_at_home(compact_folder, tmp_path):
    """It runs the graph in ONNX Runtime, to check it."""
    (tmp_path / "home").mkdir()
    arguments = ["comp", "export", str(compact_folder), "--onnx", "-q", "-o", str(tmp_path / "out")]
    run_at_home(tmp_path / "home", f"import sys; sys.argv = {arguments}; from comp_cli.cli import run; run()")
    assert (tmp_path / "out/model.onnx").is_file() and left_at(tmp_path / "home") == []


def test_without_comp_onnxruntime_leaves_an_identity(served, tmp_path):
    """So the test above can fail. Only versions that report do."""
    graph = str(served["whole"] / "model.onnx")
    run_at_home(tmp_path, f"import onnxruntime; onnxruntime.InferenceSession({graph!r}, providers=['CPUExecutionProvider'])")
    if not left_at(tmp_path):
        pytest.skip("this ONNX Runtime does not report")
    assert any("deviceid" in name for name in left_at(tmp_path))


def test_an_onnxruntime_that_is_there_already_is_asked_to_stop(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("def disable_telemetry_events(): print('asked')")
    code = "import sys; sys.path.insert(0, '.'); import onnxruntime, comp_cli"
    assert run_at_home(tmp_path, code) == "asked\n"
    assert run_at_home(tmp_path, code, ORT_DISABLE_TELEMETRY="0") == ""
