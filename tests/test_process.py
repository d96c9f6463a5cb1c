"""comp as a process: signals, streams as they come, one document for every end, no code from the current folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from comp_cli import errors, signals
from comp_cli.checkpoint.loading import pick_device
from comp_cli.cli import app as cli
from comp_cli.cli import streams
from comp_cli.cli.app import app
from comp_cli.errors import RefusedError, UsageError, explain
from comp_cli.option_values import EMPTY_IS_NONE
from comp_cli.options import flag

FEW = ["--num-samples", "8", "--batch-size", "4", "--text-tokens", "12", "--device", "cpu"]
LONG = ["--method", "comp-paper", "--stages", "200"]  # for what is stopped
COMP = [sys.executable, "-m", "comp_cli"]


def comp(*words, **options):
    return subprocess.run([*COMP, *map(str, words)], capture_output=True, text=True, timeout=300, **options)


def shell(line: str, *words, **environment):
    """A line of sh in which "$@" is the comp command."""
    command = ["sh", "-c", line, "sh", *COMP, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


# One document for every end


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "demo", "--json"],
        ["prune", "demo", "--format", "json"],
        ["prune", "demo", "--format=json"],
        ["analyze", "demo", "--frobnicate", "--format", "json"],
        ["analyze", "demo", "--format", "xml"],
        ["analyze", "demo", "--format=yaml"],
        ["analyze", "demo", "--js"],
        ["analyze", "demo", "--form=json"],
        ["analyze", "demo", "--seed", "abc", "--json"],
        ["analyze", "--json"],
        ["frobnicate", "--json"],
        ["--json"],
        ["analyze", "demo", "--json", "--quiet"],
        ["analyze", "demo", "--json", "--format", "quiet"],
        ["analyze", "demo", "--json", "--format", "human"],
        ["analyze", "demo", "-q", "--format", "json"],
        ["export", "./nowhere", "--onnx", "--json"],
        ["bench", "./nowhere", "--json"],
    ],
)
def test_every_refusal_is_one_document_where_one_was_asked_for(words):
    result = CliRunner().invoke(app, words)
    told = json.loads(result.stdout)
    assert result.exit_code == told["error"]["code"] == 2 and told["schema_version"] == 1
    assert told["error"]["message"] and result.stderr.strip()


@pytest.mark.parametrize("words", [["prune", "--help", "--json"], ["env", "--format=json", "-h"], ["upgrade", "--json", "-h"]])
def test_help_is_a_document_where_one_was_asked_for(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and f"Usage: comp {words[0]}" in json.loads(result.stdout)["help"]


@pytest.mark.parametrize("words", [["prune", "demo"], ["analyze", "demo", "-q", "--format", "human"], ["frobnicate"]])
def test_no_document_where_none_was_asked_for(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and not result.stdout and result.stderr


def test_other_processes_of_a_run_are_mute(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(app, ["prune", "demo", "--json"]).stdout == ""


def test_the_document_says_what_the_parser_said():
    done = comp("prune", "--json")
    assert "Missing argument 'model'" in json.loads(done.stdout)["error"]["message"] and "model" in done.stderr
    done = comp("prune", "demo", "--json")
    assert json.loads(done.stdout)["error"]["message"] == "--ratio is missing." and "--ratio" in done.stderr


# Bad values


def options_of(command: str) -> dict[str, set[type]]:
    """Every option of a command that takes a value, with its types."""
    hints = get_type_hints(getattr(cli, command))
    types = {name: {hint, *get_args(hint)} for name, hint in hints.items() if name not in ("model", "folder", "return")}
    spelled = {"form": "--format"}
    return {spelled.get(name, "--" + name.replace("_", "-")): kinds for name, kinds in types.items() if bool not in kinds}


COMMANDS = {"analyze": ["demo"], "prune": ["demo", "--ratio", "0.5"], "export": [".", "--onnx"], "bench": ["."]}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_value_of_any_option_is_refused(command):
    """As a shell makes it of a variable that is not set."""
    names = [name for name in options_of(command) if name not in map(flag, EMPTY_IS_NONE)]
    assert len(names) > 8
    for name in names:
        for given in ([name, ""], [f"{name}="]):
            result = CliRunner().invoke(app, [command, *COMMANDS[command], *given])
            assert result.exit_code == 2 and result.stderr, (name, result.output)
    assert CliRunner().invoke(app, [command, ""]).exit_code == 2


@pytest.mark.parametrize("spelled", [["--label-column", ""], ["--label-column="]])
def test_the_empty_column_that_comp_advises_is_taken(spelled, tiny_folder, tmp_path):
    """The question that a column label raises is answered with the words of its hint."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "p.csv").write_text("image,text,label\n" + "".join(f"a.png,a red circle {i},{i % 2}\n" for i in range(8)))
    given = ["analyze", str(tiny_folder), "--data", str(tmp_path / "p.csv"), *FEW, "--json"]
    asked = CliRunner().invoke(app, given)
    assert asked.exit_code == 2 and "--label-column ''" in json.loads(asked.stdout)["error"]["hint"]
    taken = CliRunner().invoke(app, [*given, *spelled])
    assert taken.exit_code == 0, taken.output


@pytest.mark.parametrize("word", ["-o=", "-o=out"])
def test_an_equals_sign_behind_a_short_option_is_no_part_of_the_name(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["prune", "demo", "--ratio", "0.5", word])
    assert result.exit_code == 2 and "-o" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "9" * 20, "1e400"])
def test_numbers_that_are_none_are_refused_by_every_option_that_takes_one(command, value, monkeypatch):
    numbers = [name for name, kinds in options_of(command).items() if kinds & {int, float}]
    assert len(numbers) > 1

    def resolve(*given, **options):
        raise RefusedError("work was begun.")

    monkeypatch.setattr("comp_cli.checkpoint.hub.resolve", resolve)
    for name in numbers:
        more = ["--steps", "2"] if name in ("--lr", "--distill", "--stage-share") else []
        result = CliRunner().invoke(app, [command, *COMMANDS[command], *more, name, value])
        large = value == "9" * 20 and float in options_of(command)[name]  # which may be meant: then work is begun
        assert result.exit_code == 2 or large and result.exit_code == 4, (name, result.output)


@pytest.mark.parametrize("word", ["a\0b", "o\udcff"])
def test_words_that_are_no_text_are_refused(word):
    for words in (["analyze", word], ["prune", "demo", "--ratio", "0.5", "-o", word], ["bench", ".", "--plot", f"{word}.png"]):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and "defect" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "demo", "--ratio", "0.5"],
        ["export", "--onnx"],
        ["bench"],
        ["analyze", "./x"],
        ["bench", "x"],
        ["analyze", "demo"],
    ],
)
def test_a_current_folder_that_is_gone_is_said(words, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "defect" not in result.stderr, result.output


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "/x"), "the disk is full (/x)"),
        (OSError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (RuntimeError("PytorchStreamWriter failed: No space left on device"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU is out of memory (CUDA out"),
    ],
)
def test_what_the_machine_lacks_is_no_defect(error, said):
    found = explain(error)
    assert said in found.message and found.exit_code == 1 and "defect" not in found.hint
    assert "defect" in explain(KeyError("x")).hint


def test_what_is_larger_than_a_gpu_is_told_where_it_fits():
    """Layers are not spread over devices, as device_map="auto" does."""
    assert "--device cpu" in explain(torch.OutOfMemoryError("CUDA out of memory.")).hint
    for name in ("balanced", "cuda:0,cuda:1"):
        with pytest.raises(UsageError, match="not a device") as refused:
            pick_device(name)
        assert "--device cpu" in refused.value.hint


def test_a_full_disk_is_seen_through_what_libraries_wrap_around_it():
    try:
        try:
            raise OSError(122, "Disk quota exceeded")
        except OSError as error:
            raise ValueError("could not save") from error
    except ValueError as error:
        assert errors.is_full(error)


# Streams


def test_stdout_holds_nothing_but_the_document_whatever_libraries_and_children_print(tiny_folder, tmp_path):
    script = tmp_path / "noisy.py"
    script.write_text(
        "import ctypes, os, subprocess, sys\n"
        "from comp_cli.cli import main\nfrom comp_cli.commands import analyze\n"
        "def noisy(*given, work=analyze.analyze, **options):\n"
        "    print('python'); print('dunder', file=sys.__stdout__); os.write(1, b'fd\\n')\n"
        "    ctypes.CDLL(None).printf(b'from C\\n')\n"
        "    subprocess.run(['echo', 'child'])\n"
        "    return work(*given, **options)\n"
        "analyze.analyze = noisy\n"
        "main.run()\n"
    )
    done = subprocess.run([sys.executable, script, "analyze", tiny_folder, "--json", *FEW], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["layers"], done.stdout
    assert all(word in done.stderr for word in ("python", "dunder", "fd", "from C", "child"))


@pytest.mark.parametrize("line, words", [
    ('"$@" >&-', ["--help"]),
    ('"$@" >/dev/full', ["--help"]),
    ('"$@" >/dev/full', ["prune", "demo", "--json"]),
    ('"$@" >&- 2>&- <&-', ["--version"]),
])  # fmt: skip
def test_a_stdout_that_takes_nothing_ends_with_1_or_the_code_of_the_refusal(line, words):
    done = shell(line, *words)
    assert done.returncode == (2 if "prune" in words else 1)
    assert "Traceback" not in done.stderr and "defect" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("line", ['"$@" >/dev/full', '("$@"; echo "rc $?" >&2) | true'])
def test_a_result_that_cannot_be_printed_is_said_and_ends_with_1(line, tiny_folder):
    done = shell(line, "analyze", tiny_folder, *FEW)
    assert "the result cannot be written to stdout" in done.stderr and (done.returncode == 1 or "rc 1" in done.stderr)
    assert not any(word in done.stderr for word in ("Traceback", "defect", "Exception ignored", "rc 120"))


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" 2>/dev/full'])
def test_messages_that_nobody_can_read_do_not_cost_the_result(line, tiny_folder):
    done = shell(line, "analyze", tiny_folder, "--json", *FEW)
    assert done.returncode == 0 and json.loads(done.stdout)["architecture"]


def test_the_path_of_the_result_is_printed_as_it_is_and_words_as_the_encoding_allows(tmp_path):
    script = tmp_path / "speak.py"
    script.write_text(
        "import sys\nfrom comp_cli.cli import main, streams\nfrom comp_cli.cli.output import Output\nstreams.settle()\n"
        "Output('quiet').result({}, 'ö/x')\nOutput().line('ö')\nOutput().say('ö')\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "dumb"}
    done = subprocess.run([sys.executable, script], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout == "ö/x\n".encode() + b"\\xf6\n" and b"\\xf6" in done.stderr


def test_what_asks_for_a_document():
    yes = ["--json", "x --format json", "--format=json", "--js", "--form json", "--format xml", "--format"]
    no = ["", "demo", "-q", "--format human", "--format=quiet", "-- --json", "--jsonl", "--form"[:4]]
    assert all(streams.asked_mode(words.split()) == "json" for words in yes)
    assert not any(streams.asked_mode(words.split()) == "json" for words in no)


# Signals


def hear() -> None:
    """In a child: jobs in the background ignore Ctrl-C, and those under nohup SIGHUP; what is ignored stays so."""
    for name in signals.ENDING:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def start(*words, **more) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMP, *map(str, words)], preexec_fn=hear, **pipes, **more)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_with_its_code_one_document_and_a_command_line_to_go_on(name, code, tiny_folder, tmp_path):
    output = tmp_path / "out"
    process = start("prune", tiny_folder, "--ratio", "0.5", "-o", output, *LONG, "--json", "--no-resume", *FEW)
    for _ in range(1200):
        if (tmp_path / ".out.journal").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    time.sleep(0.05)
    process.send_signal(getattr(signal, name))  # an impatient user
    said, errors = process.communicate(timeout=120)
    told = json.loads(said)["error"]
    assert process.returncode == told["code"] == code and "Traceback" not in errors
    assert "goes on where it was: comp prune" in told["hint"] and "--no-resume" not in told["hint"]
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_python_still_imports_is_an_orderly_end_too(name, code, tmp_path):
    """rich, typer and the commands are made slow to import, so that the signal comes in the midst."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, time, sys\n"
        "seen = []\n"
        "def slow(name, *rest, real=builtins.__import__, **more):\n"
        "    if name == 'typer' and not seen:\n"
        "        seen.append(name); print('importing', file=sys.stderr, flush=True); time.sleep(30)\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = slow\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = start("analyze", "demo", "--format=json", env=os.environ | {"PYTHONPATH": path})
    assert process.stderr.readline() == "importing\n"
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    assert json.loads(said)["error"]["code"] == code


@pytest.fixture
def handlers():
    names = [getattr(signal, name) for name in signals.ENDING]
    before = [signal.getsignal(number) for number in names]
    signals._heard_at = -signals.GRACE
    signals.install()
    yield
    for number, handler in zip(names, before, strict=True):
        signal.signal(number, handler)
    signals._heard_at = -signals.GRACE


def test_a_second_signal_does_not_disturb_the_putting_away(handlers):
    with pytest.raises(signals.Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.code == 143 and caught.value.said == "ended by SIGTERM"


def test_a_signal_waits_for_steps_that_belong_together(handlers):
    reached = []
    with pytest.raises(signals.Interrupted), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("end")
    assert reached == ["end"]


def test_what_is_ignored_stays_ignored(handlers):
    """nohup, and jobs in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_process_that_measures_memory_ends_with_its_parent(tmp_path):
    """Also where the parent is killed: what it reads from ends."""
    script = tmp_path / "parent.py"
    fake = "import os, sys, time, threading; from comp_cli.measure import memory_process"
    fake += "; threading.Thread(target=memory_process.end_with_parent)"
    script.write_text(
        "import sys\nfrom comp_cli.measure import memory\n"
        f"memory.START = '''{fake}.start(); print(os.getpid(), file=open(sys.argv[2], 'w'), flush=True); time.sleep(60)'''\n"
        "memory.measure([sys.argv[1]])\n"
    )
    parent = subprocess.Popen([sys.executable, script, tmp_path / "pid"])
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Code


@pytest.mark.parametrize("name", ["numpy", "torch", "json", "threading", "comp_cli"])
def test_no_code_of_the_current_folder_is_run_by_bench_and_its_child(name, tmp_path, monkeypatch):
    """As in a repository that was downloaded. The process that measures memory is a Python of its own."""
    from comp_cli.measure import memory

    (tmp_path / f"{name}.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        memory, "START", memory.START.replace("memory_process.main()", 'print(\'{"bytes": 3, "baseline": 1}\')')
    )
    assert memory.measure(["x"]) == (3, 1)


def test_python_m_comp_cli_runs_no_code_of_the_current_folder(tmp_path):
    for name in ("typer", "rich", "torch", "numpy", "json", "pathlib", "signal", "threading"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(7)")
    done = comp("analyze", "nowhere/at/all", "--json", cwd=tmp_path)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["code"] == 2, done.stderr


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path):
    script = (
        "import resource, sys; from pathlib import Path; from comp_cli.files.outputs import atomic_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from comp_cli.errors import CompError\n"
        "try:\n"
        "    with atomic_folder(Path(sys.argv[1]), overwrite=False) as new: (new / 'x').write_bytes(bytes(10**6))\n"
        "except CompError as error: print(error.exit_code, error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert done.stdout.startswith("1 Cannot write") and not list(tmp_path.iterdir()), done.stderr


def test_debugging_shows_where_and_still_ends_with_the_document(tmp_path, monkeypatch):
    monkeypatch.setenv("COMP_DEBUG", "1")
    result = CliRunner().invoke(app, ["analyze", str(tmp_path), "--json"])
    assert json.loads(result.stdout)["error"]["code"] == result.exit_code == 4 and "Traceback" in result.stderr
