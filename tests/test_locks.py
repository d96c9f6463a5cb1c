"""One command at a time writes an output, wherever the other one runs; what the dead held is free."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_store import code_of, fill, names, our_folder

from comp_cli.errors import CompError
from comp_cli.files import locks
from comp_cli.files.locks import locked
from comp_cli.files.outputs import atomic_folder, check_output

HOLDS = """
import sys
from pathlib import Path
from comp_cli.files.outputs import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite=False) as partial:
    (partial / "weights").write_text("theirs")
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(output: Path, *around: str) -> subprocess.Popen:
    """Another process inside `atomic_folder`, until its stdin ends."""
    command = [*around, sys.executable, "-c", HOLDS, str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    return process


def end(process: subprocess.Popen) -> int:
    process.stdin.close()
    process.stdout.close()
    return process.wait(60)


def test_a_second_command_ends_at_once_and_names_the_first(tmp_path):
    process = holder(tmp_path / "out")
    for call in (lambda: fill(tmp_path / "out"), lambda: check_output(tmp_path / "out", overwrite=True, source=None)):
        with pytest.raises(CompError, match=f"Process {process.pid} on .* is writing .*out") as caught:
            call()
        assert caught.value.exit_code == 1
    fill(tmp_path / "other")
    assert end(process) == 0
    assert (tmp_path / "out/weights").read_text() == "theirs" and names(tmp_path) == ["other", "out"]


def test_a_second_thread_ends_at_once_and_the_first_enters_again(tmp_path):
    with locked(tmp_path / "out"), ThreadPoolExecutor(1) as others:
        with locked(tmp_path / "out"):
            assert locks.holds(tmp_path / "out")
        with pytest.raises(CompError, match=f"Process {os.getpid()} on .* is writing .*out"):
            others.submit(fill, tmp_path / "out").result()
        assert names(tmp_path) == [".out.lock"]
        others.submit(fill, tmp_path / "other").result()
    assert names(tmp_path) == ["other"]


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")
without_containers = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0,
    reason="needs the right to make a PID namespace",
)


@without_containers
def test_a_live_output_of_another_container_is_left_alone(tmp_path):
    """Its process id means nothing here: there it is 1 or so, here nobody or somebody else has it."""
    process = holder(tmp_path / "out", *CONTAINER)
    assert code_of(fill, tmp_path / "out") == 1
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    assert end(process) == 0 and (tmp_path / "out/weights").read_text() == "theirs"


@without_containers
def test_a_container_sees_the_lock_of_the_machine(tmp_path):
    with atomic_folder(tmp_path / "out", overwrite=False) as partial:
        our_folder(partial, "ours")
        done = subprocess.run(
            [*CONTAINER, sys.executable, "-c", HOLDS, tmp_path / "out"], capture_output=True, text=True, input=""
        )
        assert done.returncode == 1 and f"Process {os.getpid()} on" in done.stderr
    assert (tmp_path / "out/weights").read_text() == "ours"


@without_containers
def test_what_a_killed_container_left_blocks_nobody(tmp_path):
    process = holder(tmp_path / "out", *CONTAINER, "--kill-child")
    process.kill()
    end(process)
    for _ in range(100):  # its child dies a moment later
        if not any(tmp_path.glob("out")) and _free(tmp_path / "out"):
            break
        time.sleep(0.1)
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def _free(output: Path) -> bool:
    try:
        with locked(output):
            return True
    except CompError:
        return False


def test_a_killed_command_leaves_a_lock_that_holds_nobody_up(tmp_path):
    process = holder(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    end(process)
    assert ".out.lock" in names(tmp_path)
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def foreign_lock(tmp_path: Path, age: float) -> Path:
    """What a process of another machine holds on a shared disk that shows us no kernel lock."""
    path = tmp_path / ".out.lock"
    record = {"comp": "lock", "pid": 12, "host": "far", "boot": "another", "command": "comp prune demo"}
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - age,) * 2)
    our_folder(tmp_path / ".out.partial-12", "theirs")
    return path


def test_the_lock_of_another_machine_is_respected_while_it_gives_signs(tmp_path):
    path = foreign_lock(tmp_path, age=locks.STALE - 20)
    for _ in range(2):  # looking is no sign of life
        with pytest.raises(CompError, match=r"Process 12 on far is writing .*out \(comp prune demo\)") as caught:
            fill(tmp_path / "out")
        assert caught.value.exit_code == 1 and f"after {locks.STALE} s it counts as dead" in caught.value.hint
        assert str(path) in caught.value.hint
    assert names(tmp_path) == [".out.lock", ".out.partial-12"]


def test_a_machine_that_gave_no_sign_for_long_is_dead(tmp_path):
    foreign_lock(tmp_path, age=locks.STALE + 20)
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("age, code", [(10, 1), (500, None)])
def test_on_a_disk_without_locks_the_signs_decide_alone(age, code, tmp_path, monkeypatch):
    path = foreign_lock(tmp_path, age)
    path.write_text(path.read_text().replace("another", locks.boot_id()))
    os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(locks, "_try_lock", lambda handle: None)
    if code:
        assert code_of(fill, tmp_path / "out") == code
    else:
        fill(tmp_path / "out")


def test_the_holder_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with locked(tmp_path / "out"):
        path = tmp_path / ".out.lock"
        os.utime(path, (1, 1))
        for _ in range(200):
            if path.stat().st_mtime > 1:
                break
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 60


def test_who_lost_the_lock_replaces_nothing(tmp_path):
    with (
        pytest.raises(CompError, match="lock of .* is gone") as caught,
        atomic_folder(tmp_path / "out", overwrite=False) as new,
    ):
        our_folder(new)
        (tmp_path / ".out.lock").unlink()
        foreign_lock(tmp_path, age=0)
        shutil.rmtree(tmp_path / ".out.partial-12")
    assert caught.value.exit_code == 1 and names(tmp_path) == [".out.lock"]  # which is another's now


def test_a_file_of_the_user_is_not_taken_for_a_lock(tmp_path):
    for content in ("mine", "{}", '{"comp": "lock"}'):
        (tmp_path / ".out.lock").write_text(content)
        assert code_of(fill, tmp_path / "out") == 2
        assert (tmp_path / ".out.lock").read_text() == content
    (tmp_path / ".out.lock").unlink()
    (tmp_path / ".out.lock").symlink_to("elsewhere")
    assert code_of(fill, tmp_path / "out") == 2 and names(tmp_path) == [".out.lock"]


RACE = """
import sys, time
from pathlib import Path
from comp_cli.errors import CompError
from comp_cli.files.locks import locked
from comp_cli.options import PruneOptions
inside, end, taken = Path(sys.argv[1]).with_name("inside"), time.time() + 3, 0
while time.time() < end:
    try:
        with locked(Path(sys.argv[1])):
            inside.mkdir()  # fails where two are inside
            inside.rmdir()
            taken += 1
    except CompError:
        pass
print(taken)
"""


def test_removing_a_lock_lets_no_two_in(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    several = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in several:
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and int(said) > 0, errors
    assert names(tmp_path) == []


def test_prune_holds_the_lock_from_the_start(tiny_folder, tmp_path, monkeypatch):
    """While it reads the model already, not only when it writes: and a second run does no work."""
    from comp_cli.cli.output import Output
    from comp_cli.commands import prune
    from comp_cli.options import PruneOptions

    class Reached(Exception):
        pass

    def look(*given, **options):
        assert names(tmp_path) == [".out.lock"]
        raise Reached

    monkeypatch.setattr(prune, "open_dense", look)
    options = PruneOptions(str(tiny_folder), 0.5)
    with pytest.raises(Reached):
        prune.prune(options, tmp_path / "out", Output("quiet"))
    process = holder(tmp_path / "out")
    with pytest.raises(CompError, match=f"Process {process.pid}"):
        prune.prune(options, tmp_path / "out", Output("quiet"))
    end(process)
