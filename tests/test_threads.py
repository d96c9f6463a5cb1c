"""How many threads a command works with, what it says of that, and that plans do not depend on it."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.commands import threads
from comp_cli.files import cores
from comp_cli.onnx import sessions

FEW = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
GIGA = 10**9


@pytest.fixture(autouse=True)
def _as_before():
    """Other tests have the number of threads that they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_wish(monkeypatch):
    for name in (*threads.WISHES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(no_wish, monkeypatch, tmp_path):
    """A machine of 8 cores, all of them this process's, without control groups."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUP", tmp_path / "own")
    return tmp_path


def group(machine, own, **files):
    """What /proc/self/cgroup says, and files of groups: `{"a/cpu.max": "150000 100000"}`."""
    (machine / "own").write_text(own)
    for name, text in files.items():
        path = machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


# What there is -----------------------------------------------------------------------------------------------------------


def test_without_limits_all_cores_count(machine):
    assert cores.available() == (8, "cores") and cores.quota() is None


def test_the_affinity_of_the_process_counts(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert cores.available() == (3, "affinity")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, (2, "quota")),  # a container with a namespace of its own
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, (3, "quota")),  # what is around it counts
        ("0::/host/path\n", {"cpu.max": "50000 100000"}, (1, "quota")),  # a path that is not seen from inside
        ("0::/\n", {"cpu.max": "max 100000"}, (8, "cores")),
        ("0::/\n", {"cpu.max": "3200000 100000"}, (8, "cores")),  # more than the machine has
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000",
                                             "cpu,cpuacct/x/cpu.cfs_period_us": "50000"}, (5, "quota")),
        ("1:cpu:/docker/1234\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, (1, "quota")),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, (8, "cores")),
        ("nonsense\n0::/\n", {"cpu.max": "x y"}, (8, "cores")),
    ],
)  # fmt: skip
def test_quotas_of_both_kinds_of_control_groups_count(machine, own, files, expected):
    group(machine, own, **files)
    assert cores.available() == expected


# What is chosen ----------------------------------------------------------------------------------------------------------


def test_an_option_wins_over_all(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    chosen = threads.choose(12, 5, 1.0)
    assert (chosen.number, chosen.because, str(chosen)) == (12, "--threads", "12 threads (--threads)")


@pytest.mark.parametrize("name", threads.WISHES)
def test_a_variable_of_the_environment_is_a_wish_whatever_the_size(machine, monkeypatch, name):
    monkeypatch.setenv(name, "5")
    assert threads.choose(0, 5, 1.0) == comp_cli.report.base.Threads(5, name)


@pytest.mark.parametrize("said", ["", "many", "0", "-2"])
def test_a_variable_that_says_nothing_is_none(machine, monkeypatch, said):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads.choose(0, 8, 1.0).because == "model size"


@pytest.mark.parametrize(
    ("before", "flops", "expected"),
    [(8, None, (8, "cores")), (8, 0.0, (1, "model size")), (8, 2.9 * GIGA, (2, "model size")), (8, 8 * GIGA, (8, "cores")),
     (8, 900 * GIGA, (8, "cores")), (4, 900 * GIGA, (4, "torch")), (4, 2 * GIGA, (2, "model size"))],
)  # fmt: skip
def test_a_thread_has_a_gigaflop_of_a_batch_at_least(machine, before, flops, expected):
    chosen = threads.choose(0, before, flops)
    assert (chosen.number, chosen.because) == expected


def test_processes_side_by_side_share_the_cores(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    chosen = threads.choose(0, 8, 900 * GIGA)
    assert (chosen.number, chosen.because) == (2, "processes")


# What is done ------------------------------------------------------------------------------------------------------------


def test_torch_and_graphs_have_the_number_and_torch_its_own_afterwards(machine, served):
    before = torch.get_num_threads()
    with threads.at_work(3):
        assert torch.get_num_threads() == 3
        threads.fit(1.0)  # no more than a wish
        options = sessions.open_session(served["whole"] / "model.onnx").get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
        with threads.at_work(0):
            threads.fit(1.0)
            assert torch.get_num_threads() == 1 and threads.in_use().because == "model size"
        assert torch.get_num_threads() == 3 and threads.in_use().number == 3
    assert torch.get_num_threads() == before
    threads.fit(1.0)  # nobody asked
    assert torch.get_num_threads() == before


def test_every_command_says_its_number_and_gives_torch_its_own_back(tiny_folder, compact_folder, tmp_path, no_wish):
    torch.set_num_threads(before := 2)
    some = {name: value for name, value in FEW.items() if name != "eval_samples"}
    few = FEW | {"method": "magnitude"}
    reports = {
        "analyze": comp_cli.analyze(tiny_folder, **some),
        "prune": comp_cli.prune(tiny_folder, ratio=0.3, output=tmp_path / "out", **few),
        "sweep": comp_cli.prune(tiny_folder, ratio=[0.2, 0.3], dry_run=True, **few),
        "export": comp_cli.export(compact_folder, output=tmp_path / "onnx"),
        "bench": comp_cli.bench(
            compact_folder, baseline=tiny_folder, backend="torch", iterations=1, duration=0, batch=1, device="cpu"
        ),
    }
    for name, report in reports.items():
        assert report.to_json()["threads"] == {"number": 1, "because": "model size"}, name
    assert reports["bench"].machine.threads == 1
    assert json.loads((tmp_path / "out" / "comp_report.json").read_text())["threads"]["number"] == 1
    asked = comp_cli.analyze(tiny_folder, threads=2, **some)
    assert asked.to_json()["threads"] == {"number": 2, "because": "--threads"}
    assert torch.get_num_threads() == before


def test_torch_has_its_own_number_after_a_failure_too(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(comp_cli.CompError):
        comp_cli.prune(tmp_path / "nothing", ratio=0.5, threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", ["-1", "1025", "two", "1.5"])
@pytest.mark.parametrize("command", ["analyze", "prune", "export", "bench"])
def test_a_number_that_is_none_is_refused(command, wrong):
    result = CliRunner().invoke(app, [command, "demo", "--threads", wrong, *["--onnx"] * (command == "export")])
    assert result.exit_code == 2 and "--threads" in result.output


def test_waiting_threads_of_the_command_sleep():
    """What decides on a busy machine; who says otherwise is heard."""
    code = (
        "import os, comp_cli.cli.app as app\n"
        "from comp_cli.cli import main\n"
        "app.run_command = lambda has_stdout: print(os.environ['OMP_WAIT_POLICY'])\n"
        "main.run()"
    )
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        done = subprocess.run([sys.executable, "-c", code], env=others | given, capture_output=True, text=True)
        assert done.stdout == f"{expected}\n", done.stderr


# What does not depend on it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["blip", "clip", "siglip"])
def test_plans_are_the_same_with_one_thread_and_with_two(family, tmp_path):
    dense = tiny.write(family, tmp_path / "dense")
    plans = []
    for number in (1, 2):
        comp_cli.prune(dense, ratio=0.5, output=tmp_path / str(number), threads=number, looks=3, **FEW)
        plans.append((tmp_path / str(number) / "config.json").read_bytes())
    assert plans[0] == plans[1]


def test_a_run_goes_on_with_another_number_of_threads(tiny_folder, tmp_path, monkeypatch):
    from comp_cli.search import journal

    class Killed(BaseException):
        pass

    def once(self, *state):
        save(self, *state)
        raise Killed

    save = journal.Journal.save
    monkeypatch.setattr(journal.Journal, "save", once)
    with pytest.raises(Killed):
        comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "out", threads=1, looks=2, **FEW)
    monkeypatch.setattr(journal.Journal, "save", save)
    comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "out", threads=2, looks=2, **FEW)
    comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "whole", threads=1, looks=2, **FEW)
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
