"""Several processes that accelerate launch started do what one does: the same plan, the same report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import process_runs
import pytest
import torch
from safetensors.torch import load_file
from test_process import hear
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.search import processes

FREE = ("matching", "llava")
TUNED = ("retrieval, tuned",)
SLOPES = tuple(f"slopes of {case}" for case in ("matching, tuned", "retrieval, tuned", "caption, tuned", "llava, tuned"))
FEW = (*FREE, *TUNED, *SLOPES)
OF_THE_RUN = ("seconds", "cost", "output")
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHER += ["--dynamo_backend", "no", "--main_process_port", "0"]
# Either starts as many processes as are asked for, also where there is no GPU; --cpu starts one.
DATA_PARALLEL, SHARDED = ("--multi_gpu",), ("--use_fsdp", "--fsdp_version", "2")
LAUNCH = [*LAUNCHER, *DATA_PARALLEL, "--num_processes"]
ALONE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def launched(
    count: int, *words: object, how: tuple[str, ...] = DATA_PARALLEL, **more: object
) -> subprocess.CompletedProcess[str]:
    begin = [*LAUNCHER, *how, "--num_processes", str(count)] if count > 1 else [sys.executable]
    return subprocess.run([*begin, *map(str, words)], env=ALONE, capture_output=True, text=True, timeout=1500, **more)


def runs(place: Path, count: int, cases: tuple[str, ...], how: tuple[str, ...] = DATA_PARALLEL) -> Path:
    output = place / f"by {count}"
    output.mkdir()
    done = launched(count, process_runs.__file__, place / "dense", output, *cases, how=how)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[int, Path]:
    place = tmp_path_factory.mktemp("few")
    process_runs.prepare(place / "dense", *FEW)
    return {count: runs(place, count, FEW) for count in (1, 2)}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> dict[int, Path]:
    place = tmp_path_factory.mktemp("many")
    process_runs.prepare(place / "dense", *process_runs.CASES)
    return {count: runs(place, count, tuple(process_runs.CASES)) for count in (1, 2, 3)}


def check_equal(alone: Path, together: Path, case: str) -> None:
    """The plan and all that is measured; where nothing is trained to the last bit."""
    trained = "steps" in process_runs.CASES[case][1]
    told = [json.loads((place / f"{case}.json").read_text()) for place in (alone, together)]
    plans = [json.loads((place / case / "comp_report.json").read_text())["plan"] for place in (alone, together)]
    assert plans[0] == plans[1]
    if trained:
        for report in told:
            report["quality"].pop("divergence")
            report.pop("kept_samples")  # ranks that trained weights give: two of nearly one score may change places
            report["stages"] = [(stage["mode"], stage["flops"]) for stage in report["stages"]]
    told = [{name: value for name, value in report.items() if name not in OF_THE_RUN} for report in told]
    assert told[0] == told[1]
    weights = [load_file(place / case / "model.safetensors") for place in (alone, together)]
    # Adam makes a step of the rate of whatever is not zero: the rounding of slopes that should be, such as of biases of keys.
    bound = process_runs.TRAINED["steps"] * 2 * process_runs.TRAINED["lr"] if trained else 0.0
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() <= bound, name


@pytest.mark.parametrize("case", [*FREE, *TUNED])
def test_two_processes_do_what_one_does(few, case):
    check_equal(few[1], few[2], case)


def check_slopes(one: Path, several: Path, case: str) -> None:
    """To the rounding of fp32, in units of the largest."""
    alone, together = (load_file(place / f"{case}.safetensors") for place in (one, several))
    assert alone.keys() <= together.keys()  # DDP gives zeros where nothing flows
    largest = max(float(slope.abs().max()) for slope in alone.values())
    for name, slope in alone.items():
        torch.testing.assert_close(together[name], slope, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("case", SLOPES)
def test_slopes_of_a_step_are_those_of_the_whole_batch(few, case):
    """Five pairs in two processes: candidates of retrieval are all five, and every token of a text counts alike."""
    check_slopes(few[1], few[2], case)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", process_runs.CASES)
def test_any_task_and_method_in_several_processes(many, case, count):
    """Three processes have two batches: one of them has nothing to do, and a share of the tuning that is no whole number."""
    check_equal(many[1], many[count], case)


# The ends -------------------------------------------------------------------------------------------------------------

LONG = ["--ratio", "0.5", "--method", "comp-paper", "--stages", "200", "--num-samples", "8", "--batch-size", "4"]
LONG += ["--text-tokens", "12", "--device", "cpu", "--json"]


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout.split()
    return list(map(int, found))


def rank_of(process: int) -> str | None:
    """What the launcher told a process of its place."""
    try:
        said = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((each[5:].decode() for each in said if each.startswith(b"RANK=")), None)


def wait_for(found, seconds=120):
    for _ in range(seconds * 10):
        if made := found():
            return made
        time.sleep(0.1)
    raise AssertionError("it did not come so far")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize("end", ["Ctrl-C", "killed", "first killed"])
def test_processes_end_together(end, tiny_folder, tmp_path):
    """Whichever of them ends, none is left waiting, and the journal of the first one stays."""
    output = tmp_path / "out"
    words = [*LAUNCH, "2", "-m", "comp_cli", "prune", str(tiny_folder), "-o", str(output), *LONG]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(words, env=ALONE, stdout=said, stderr=said, preexec_fn=hear, start_new_session=True)
        try:
            wait_for(lambda: (tmp_path / ".out.journal").exists() or process.poll() is not None)
            workers = {rank_of(each): each for each in children(process.pid)}
            assert {"0", "1"} <= workers.keys(), (tmp_path / "said").read_text()[-2000:]
            if end == "Ctrl-C":
                os.killpg(process.pid, signal.SIGINT)
            else:
                os.kill(workers["0" if end == "first killed" else "1"], signal.SIGKILL)
            assert process.wait(timeout=60) != 0
            wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in workers.values()), 20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} - {"said"} <= {".out.journal", ".out.lock"}
    assert (tmp_path / ".out.journal").exists()
    documents = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("{")]
    if end != "first killed":  # which alone speaks
        told = json.loads(documents[0])["error"]
        assert len(documents) == 1 and "goes on where it was" in told["hint"]
        assert told["code"] in ((130,) if end == "Ctrl-C" else (1, 143))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [DATA_PARALLEL, SHARDED], ids=["data-parallel", "sharded"])
def test_processes_go_on_where_they_were_killed(how, tiny_folder, tmp_path):
    """In the midst of the tuning: the first one has the journal, the other one is told. The same bytes come out."""
    given = ["prune", tiny_folder, *LONG[:2], *LONG[6:], "--steps", "40", "--train-batch-size", "5", "--eval-samples", "4"]
    words = [*LAUNCHER, *how, "--num_processes", "2", "-m", "comp_cli", *map(str, given), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(words, env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: list(tmp_path.glob(".out.journal.*.safetensors")) or process.poll() is not None, 300)
        os.kill(next(each for each in children(process.pid) if rank_of(each) == "1"), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        done = launched(2, "-m", "comp_cli", *given, "-o", tmp_path / name, how=how)
        assert done.returncode == 0, done.stderr[-3000:]
        assert name == "whole" or "cost" not in json.loads(done.stdout)  # it did go on
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shares_out_weights_is_refused(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "true")
    result = CliRunner().invoke(app, ["prune", str(tiny_folder), "--ratio", "0.5", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "shares out no weights with it" in " ".join(result.stderr.split())


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_one_of(monkeypatch):
    def be(rank: int, count: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return be


def test_shares_and_rows_are_all_and_none_twice(as_one_of):
    for count in (1, 2, 3, 5):
        shares, rows = [], []
        for rank in range(count):
            as_one_of(rank, count)
            shares += processes.share(range(4))
            rows += range(7)[processes.own_rows(7)]
        assert sorted(shares) == [0, 1, 2, 3] and rows == list(range(7))


def test_what_processes_found_comes_back_in_the_order_of_the_batches(as_one_of, monkeypatch):
    as_one_of(0, 3)
    monkeypatch.setattr(processes, "_of_each", lambda own: [[0, 3, 6], [1, 4], [2, 5]])
    assert processes.gathered([0, 3, 6]) == list(range(7))
