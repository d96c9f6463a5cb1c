"""kill -9 at any point, then the same command: the same bytes as without."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from comp_cli.cli import app

FEW = [
    "--num-samples",
    "8",
    "--batch-size",
    "4",
    "--text-tokens",
    "12",
    "--device",
    "cpu",
    "--stages",
    "8",
    "--eval-samples",
    "8",
]

# Kills itself when the journal is saved for the n-th time, or when the checkpoint is being written.
KILLED = """
import os, signal, sys
from comp_cli import journal, prune
from comp_cli.cli import app

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

where = sys.argv[1]
if where == "writing":
    prune.write_report = die
else:
    left = int(where)
    save = journal.Journal.save
    def saving(self, *state):
        global left
        left -= 1
        save(self, *state)
        if left == 0:
            die()
    journal.Journal.save = saving
app(sys.argv[2:])
"""


TRAINED = ["--steps", "12", "--stages", "4", "--train-batch-size", "4", "--mixed-precision", "no", "--lr", "1e-3"]


def arguments(model, output, *more):
    return ["prune", str(model), "--ratio", "0.5", "-o", str(output), *FEW, *map(str, more)]


def run(*given):
    return CliRunner().invoke(app, list(given))


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "compact"
    assert run(*arguments(tiny_folder, folder)).exit_code == 0
    return folder


@pytest.mark.parametrize("where", ["1", "5", "writing"])
def test_killed_and_resumed(tiny_folder, uninterrupted, tmp_path, where):
    output = tmp_path / "compact"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, script, where, *arguments(tiny_folder, output)], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    assert (tmp_path / ".compact.journal").exists()
    result = run(*arguments(tiny_folder, output))
    assert result.exit_code == 0 and "going on after stage" in result.stderr
    for name in ("model.safetensors", "config.json", "comp_report.json"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "killed.py"]


@pytest.mark.parametrize("share", ["0.5", "0"])
def test_killed_while_training_and_resumed(tiny_folder, tmp_path, share):
    """Inside a stage, and in the fine-tuning: weights, moments and the place in the data come back."""
    more = [*TRAINED, "--stage-share", share]
    assert run(*arguments(tiny_folder, tmp_path / "whole", *more)).exit_code == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output = tmp_path / "compact"
    stages = len(json.loads((tmp_path / "whole" / "comp_report.json").read_text())["stages"])
    for where in (2, stages, 2):  # one run, killed after two stages, and after two and four saves of the fine-tuning
        command = [sys.executable, script, str(where), *arguments(tiny_folder, output, *more)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL and not output.exists()
    assert len(list(tmp_path.glob(".compact.journal.*.safetensors"))) == 1
    result = run(*arguments(tiny_folder, output, *more))
    assert result.exit_code == 0, result.stderr
    for name in ("model.safetensors", "comp_report.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "killed.py", "whole"]


def test_weights_that_are_gone_are_missed(tiny_folder, tmp_path):
    script, output = tmp_path / "killed.py", tmp_path / "compact"
    script.write_text(KILLED)
    given = arguments(tiny_folder, output, *TRAINED, "--stage-share", "0.5")
    subprocess.run([sys.executable, script, "2", *given], capture_output=True)
    for path in tmp_path.glob(".compact.journal.*.safetensors"):
        path.unlink()
    result = run(*given)
    assert result.exit_code == 2 and "lost its weights" in result.stderr and "--no-resume" in result.stderr


def test_other_settings_are_refused(tiny_folder, tmp_path):
    output, script = tmp_path / "compact", tmp_path / "killed.py"
    script.write_text(KILLED)
    subprocess.run([sys.executable, script, "2", *arguments(tiny_folder, output)], capture_output=True)
    result = run(*arguments(tiny_folder, output, "--seed", 5))
    assert result.exit_code == 2 and "seed was 0 and is 5" in result.stderr and "--no-resume" in result.stderr
    assert run(*arguments(tiny_folder, output, "--seed", 5, "--no-resume")).exit_code == 0


def test_changed_pairs_are_refused(tiny_folder, tmp_path):
    """The same file name, the same number of pairs, another text."""
    rows = [{"image": f"{i}.png", "text": "a red circle"} for i in range(16)]
    for index, row in enumerate(rows):
        Image.new("RGB", (48, 48), (16 * index, 0, 0)).save(tmp_path / row["image"])
    data, script, output = tmp_path / "pairs.jsonl", tmp_path / "killed.py", tmp_path / "compact"
    data.write_text("\n".join(map(json.dumps, rows)))
    script.write_text(KILLED)
    command = arguments(tiny_folder, output, "--data", data)
    subprocess.run([sys.executable, script, "2", *command], capture_output=True)
    data.write_text(data.read_text().replace("circle", "square"))
    result = run(*command)
    assert result.exit_code == 2 and "content of the calibration pairs was" in result.stderr and "--no-resume" in result.stderr


def test_a_torn_journal_is_refused_and_can_be_thrown_away(tiny_folder, tmp_path):
    output = tmp_path / "compact"
    (tmp_path / ".compact.journal").write_text("{")
    result = run(*arguments(tiny_folder, output))
    assert result.exit_code == 2 and "--no-resume" in result.stderr
    assert run(*arguments(tiny_folder, output, "--no-resume")).exit_code == 0
    assert not (tmp_path / ".compact.journal").exists()


def test_ctrl_c_says_how_to_go_on(tiny_folder, tmp_path):
    """A real SIGINT in the middle of the stages."""
    output = tmp_path / "compact"
    long = ["--stages", 200, "--num-samples", 256, "--stage-samples", 256]  # a minute, of which seconds are waited for
    command = [sys.executable, "-m", "comp_cli", *arguments(tiny_folder, output, *long)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background ignores it
    process = subprocess.Popen(command, **pipes, **heard)
    journal = tmp_path / ".compact.journal"
    for _ in range(600):
        if journal.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command goes on" in said
    assert json.loads(journal.read_text())["state"]["stages"] and not output.exists()
