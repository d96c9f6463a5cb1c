"""kill -9 at any point, then the same command: the same bytes as without."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.commands import prune

FEW = [
    "--num-samples",
    "8",
    "--batch-size",
    "4",
    "--text-tokens",
    "12",
    "--device",
    "cpu",
    "--eval-samples",
    "8",
]

# Kills itself when the journal is saved for the n-th time, or when the checkpoint is being written.
KILLED = """
import os, signal, sys
from comp_cli.commands import prune
from comp_cli.search import journal
from comp_cli.cli.app import app

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


METHODS = {"comp": [], "comp-paper": ["--method", "comp-paper", "--stages", "8"]}  # whole plans, and stages
TRAINED = ["--steps", "12", "--train-batch-size", "4", "--mixed-precision", "no", "--lr", "1e-3"]
IN_STAGES = ["--stages", "4", "--stage-share", "0.5"]  # where stages train


def arguments(model, output, *more):
    return ["prune", str(model), "--ratio", "0.5", "-o", str(output), *FEW, *map(str, more)]


def run(*given):
    return CliRunner().invoke(app, list(given))


@pytest.fixture(scope="module", params=METHODS)
def uninterrupted(request, tiny_folder, tmp_path_factory):
    """A method, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("whole") / "compact"
    assert run(*arguments(tiny_folder, folder, *METHODS[request.param])).exit_code == 0
    return request.param, folder


@pytest.mark.parametrize("where", ["1", "5", "writing"])
def test_killed_and_resumed(tiny_folder, uninterrupted, tmp_path, where):
    """In the middle of comparing plans, and between stages."""
    method, whole = uninterrupted
    output = tmp_path / "compact"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    given = arguments(tiny_folder, output, *METHODS[method])
    done = subprocess.run([sys.executable, script, where, *given], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    state, report = json.loads((tmp_path / ".compact.journal").read_text())["state"], report_of(whole)
    passed = len(state["looks"] if method == "comp" else state["stages"])
    assert where == "writing" or passed == int(where) < len(report["compared"] or report["stages"])
    result = run(*given)
    said = {"comp": f"going on after {passed} plans", "comp-paper": f"going on after stage {passed}"}
    assert result.exit_code == 0 and said[method] in result.stderr
    for name in ("model.safetensors", "config.json", "comp_report.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "killed.py"]


@pytest.mark.parametrize("refit", [["--refit", *FEW[:2]], []], ids=["refitted", "as they are"])
def test_killed_while_image_tokens_are_trained_for_and_resumed(tmp_path, refit):
    """Image tokens of a decoder that leave by their number; with --no-resume it starts anew."""
    dense, script = tiny.write("llava", tmp_path / "dense"), tmp_path / "killed.py"
    data = tiny.table(tmp_path, text=lambda n: "a red circle", answer=lambda n: ["red", "two blue"][n % 2])
    script.write_text(KILLED)

    def given(output, *more):
        asked = ["--tokens", "9", "--data", str(data), "--eval-samples", "4", "--device", "cpu", *refit, *TRAINED]
        return ["prune", str(dense), "-o", str(tmp_path / output), *asked, *more]

    assert run(*given("whole")).exit_code == 0
    for where in (1, 3):
        killed = subprocess.run([sys.executable, script, str(where), *given("compact")], capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not (tmp_path / "compact").exists()
    assert len(list(tmp_path.glob(".compact.journal.*.safetensors"))) == 1
    other = run(*given("compact", "--seed", "1"))
    assert other.exit_code == 2 and "seed was 0 and is 1" in other.stderr
    for more in ([], ["--no-resume", "--overwrite"]):
        result = run(*given("compact", *more))
        assert result.exit_code == 0, result.stderr
        for name in ("model.safetensors", "comp_report.json"):
            assert (tmp_path / "compact" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".compact*"))


def report_of(folder):
    return json.loads((folder / "comp_report.json").read_text())


TRAININGS = {
    "comp": TRAINED,
    "comp-paper in stages": ["--method", "comp-paper", *IN_STAGES, *TRAINED],
    "comp-paper": ["--method", "comp-paper", "--stages", "4", *TRAINED],
    "sjp-obs in stages": ["--method", "sjp-obs", *IN_STAGES, *TRAINED],
}


QUICKLY = ("comp", "comp-paper in stages")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow) for name in TRAININGS])
def test_killed_while_training_and_resumed(tiny_folder, tmp_path, name):
    """While plans are compared, inside a stage, and in the fine-tuning: weights, moments and the place in the data come
    back."""
    more = TRAININGS[name]
    assert run(*arguments(tiny_folder, tmp_path / "whole", *more)).exit_code == 0
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    output = tmp_path / "compact"
    report = report_of(tmp_path / "whole")
    before = len(report["compared"] or report["stages"])
    assert before > 2
    for where in (2, before, 2):  # one run, killed after two plans or stages, and after two and four saves of the fine-tuning
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
    given = arguments(tiny_folder, output, *TRAININGS["comp-paper in stages"])
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
    """A real SIGINT while plans are compared."""
    output = tmp_path / "compact"
    long = ["--num-samples", 256, "--stage-samples", 256]  # many seconds, of which few are waited for
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
    assert json.loads(journal.read_text())["state"]["looks"] and not output.exists()


# What a journal may say ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal_text(tiny_folder, tmp_path_factory):
    """The journal of a run that was killed after its first look at a plan."""
    place = tmp_path_factory.mktemp("journal")
    (place / "killed.py").write_text(KILLED)
    subprocess.run([sys.executable, place / "killed.py", "1", *arguments(tiny_folder, place / "compact")], capture_output=True)
    return (place / ".compact.journal").read_text()


CHANGES = {
    "no state": lambda found: found.pop("state"),
    "empty state": lambda found: found.update(state={}),
    "another state": lambda found: found.update(state={"looks": [], "plan": {}}),
    "a number": lambda found: found.update(state=3),
    "a list": lambda found: found.update(state=[]),
    "settings": lambda found: found["settings"].update(seed=7),
    "a loss": lambda found: found["state"]["looks"][0].update(loss=0.0),
    "the plan": lambda found: found["state"]["plan"]["towers"][0]["layers"][0].update(ffn=[0]),
    "no hash": lambda found: found.pop("sha256"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_journal_that_somebody_changed_is_refused_before_any_work(change, journal_text, tiny_folder, tmp_path, monkeypatch):
    found = json.loads(journal_text)
    CHANGES[change](found)
    (tmp_path / ".compact.journal").write_text(json.dumps(found))
    monkeypatch.setattr(prune, "open_dense", lambda *given, **options: pytest.fail("the model was loaded"))
    result = run(*arguments(tiny_folder, tmp_path / "compact"))
    assert result.exit_code == 2 and "--no-resume" in result.stderr and "defect" not in result.stderr, result.output


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "3", '"x"', "{}", "[" * 10**5, '{"settings": {}, "state": {}}', "\ud800"]
)
def test_a_journal_that_is_none_is_refused(content, tiny_folder, tmp_path):
    (tmp_path / ".compact.journal").write_bytes(content.encode("utf-8", "surrogatepass"))
    result = run(*arguments(tiny_folder, tmp_path / "compact"))
    assert result.exit_code == 2 and "--no-resume" in result.stderr and "defect" not in result.stderr, result.output


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_what_stands_in_the_place_of_a_journal_and_is_no_file_stays(kind, tiny_folder, tmp_path):
    place = tmp_path / ".compact.journal"
    match kind:
        case "folder":
            place.mkdir()
        case "link":
            place.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(place)
    result = run(*arguments(tiny_folder, tmp_path / "compact"))
    assert result.exit_code == 2 and "is no file" in result.stderr and os.path.lexists(place)


def test_other_settings_are_refused_before_the_model_is_loaded(journal_text, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / ".compact.journal").write_text(journal_text)
    monkeypatch.setattr(prune, "open_dense", lambda *given, **options: pytest.fail("the model was loaded"))
    for option, value, said in (
        ("--ratio", "0.4", "ratio was 0.5 and is 0.4"),
        ("--seed", "5", "seed was 0 and is 5"),
        ("--data", "pairs.jsonl", "data.data was None and is pairs.jsonl"),
        ("--steps", "3", "training.steps was 0 and is 3"),
        ("--num-samples", "9", "num_samples was 8 and is 9"),
    ):
        result = run(*arguments(tiny_folder, tmp_path / "compact", option, value))
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output


def test_weights_of_a_journal_that_were_changed_are_refused(tiny_folder, tmp_path):
    script, output = tmp_path / "killed.py", tmp_path / "compact"
    script.write_text(KILLED)
    given = arguments(tiny_folder, output, *TRAININGS["comp-paper in stages"])
    subprocess.run([sys.executable, script, "2", *given], capture_output=True)
    (weights,) = tmp_path.glob(".compact.journal.*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # still a whole safetensors file
    weights.write_bytes(content)
    result = run(*given)
    assert result.exit_code == 2 and "the file was changed" in result.stderr and "--no-resume" in result.stderr


def test_a_run_that_was_killed_when_all_was_done_says_so_and_leaves_nothing(
    compact_folder, journal_text, tiny_folder, tmp_path
):
    from comp_cli.search.journal import Journal

    output = tmp_path / "compact"
    shutil.copytree(compact_folder, output)
    found = json.loads(journal_text)
    journal = Journal(output, found["settings"])
    journal.save(found["state"])
    journal.finish(output / "comp_report.json")
    result = run(*arguments(tiny_folder, output))
    assert result.exit_code == 2 and "is complete" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["compact"]
