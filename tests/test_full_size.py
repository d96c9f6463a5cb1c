"""Full size: 224 M parameters, 384 px. Minutes, so marked slow: pytest -m slow tests/test_full_size.py"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

# Runs a command and prints the peak memory of its process: VmHWM does not remember the parent's size.
MEASURED = """
import sys
from comp_cli.cli.app import app
from comp_cli.measure.memory_process import resident_peak
try:
    app(sys.argv[1:])
finally:
    print(resident_peak(), file=sys.stderr)
"""


def comp(*arguments):
    begin = time.monotonic()
    command = [sys.executable, "-c", MEASURED, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout), time.monotonic() - begin, peak


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "blip"
    subprocess.run([sys.executable, SCRIPTS / "full_size.py", folder], check=True)
    return folder


@pytest.mark.slow
def test_prune_and_export_stay_within_time_and_memory(full_size, tmp_path):
    report, seconds, peak = comp("prune", full_size, "--ratio", 0.5, "-o", tmp_path / "compact", "--device", "cpu")
    assert report["ratio"] == pytest.approx(0.5, abs=0.01)
    assert report["flops"]["dense"] == pytest.approx(135.03e9, rel=1e-3)
    assert report["cost"]["dense_passes"] < 25 and peak < 8 * 2**30
    report, seconds, peak = comp("export", tmp_path / "compact", "--onnx", "-o", tmp_path / "onnx")
    assert max(case["max_error"] for case in report["parity"]) < 1e-4
    assert peak < 8 * 2**30
