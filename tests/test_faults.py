"""A kill before each file operation, a full disk, SIGTERM: each time the target is absent, the old or the new one, and whole.
The same command then gives the same bytes, and nothing else stays.

By default some of the operations are tried, the last ones always; `-m slow` tries all.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tiny import blip_config, blip_processor

HERE = Path(__file__).parent
FEW = "--num-samples 4 --eval-samples 4 --batch-size 4 --text-tokens 12 --device cpu --method joint --ratio 0.4 -q".split()
TRAINED = "--steps 4 --train-batch-size 2 --mixed-precision no".split()

Tree = dict[str, str] | None


def tree(folder: Path) -> Tree:
    """Name -> SHA-256 of what a folder holds; None for no folder."""
    if not folder.exists():
        return None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@dataclass
class Server:
    """faults.py, and a place where its commands work."""

    process: subprocess.Popen
    root: Path
    model: Path
    known: dict[str, dict]

    def run(self, words: list[str], point: int | None = None, how: str = "kill") -> dict:
        request = {"words": words, "root": str(self.root), "point": point, "how": how}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def words(self, job: str) -> list[str]:
        prune = ["prune", str(self.model), "-o", "out", *FEW]
        export = ["export", str(self.model.with_name("compact")), "--onnx", "-o", "out", "-q"]
        return {
            "prune": prune,
            "overwrite": [*prune, "--overwrite"],
            "training": [*prune, *TRAINED],
            "export": export,
            "export over": [*export, "--overwrite"],
            "split": [*export, "--split"],
            "int8": [*export, "--quantize", "int8"],
            "upgrade": ["upgrade", "out", "-q"],
        }[job]

    def before(self, job: str) -> Path | None:
        """The folder that a job finds in its place."""
        return self.model.with_name("outdated" if job == "upgrade" else "old") if "over" in job or job == "upgrade" else None

    def clear(self, job: str) -> None:
        shutil.rmtree(self.root)
        self.root.mkdir()
        if there := self.before(job):
            shutil.copytree(there, self.root / "out")

    def undisturbed(self, job: str, how: str = "kill") -> tuple[Tree, int]:
        """What a job writes, and how many operations can fail."""
        if (job, how) not in self.known:
            self.clear(job)
            done = self.run(self.words(job), None, how)
            assert done["code"] == 0, done["err"]
            assert os.listdir(self.root) == ["out"]
            self.known[job, how] = tree(self.root / "out"), len(done["seen"])
        return self.known[job, how]


def outdate(folder: Path) -> None:
    """Put another runtime beside the weights, as if an older comp had written the folder."""
    (folder / "modeling_comp.py").write_text("# of yesterday\n")
    path = folder / "comp_report.json"
    report = json.loads(path.read_text())
    facts = {"bytes": 15, "sha256": hashlib.sha256(b"# of yesterday\n").hexdigest()}
    path.write_text(json.dumps(report | {"files": report["files"] | {"modeling_comp.py": facts}}) + "\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("faults").resolve()
    torch.manual_seed(0)
    short = {"num_hidden_layers": 2}
    transformers.BlipForImageTextRetrieval(blip_config(vision=short, text=short)).eval().save_pretrained(place / "model")
    blip_processor().save_pretrained(place / "model")
    warm = ["prune", str(place / "model"), "-o", str(place / "compact"), *FEW]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, HERE / "faults.py", *warm], env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        (place / "work").mkdir()
        server = Server(process, place / "work", place / "model", {})
        assert server.run(["prune", str(place / "model"), "-o", str(place / "old"), *FEW, "--ratio", "0.3"])["code"] == 0
        outdate(shutil.copytree(place / "compact", place / "outdated"))
        yield server
        process.stdin.close()


def points(count: int, step: int) -> list[int]:
    """Every `step`-th operation, and the last ones, where things take their place."""
    return sorted({*range(0, count, step), *range(max(count - 4, 0), count)})


def check_again(server: Server, job: str, state: Tree, new: Tree) -> None:
    """The same command gives the same bytes, or says that they are there, and leaves nothing else."""
    again = server.run(server.words(job))
    whole = state == new and server.before(job) is None
    assert again["code"] == (2 if whole else 0), again["err"]
    assert tree(server.root / "out") == new
    assert os.listdir(server.root) == ["out"]


def kill_and_run_again(server: Server, job: str, step: int) -> None:
    new, count = server.undisturbed(job)
    old = tree(there) if (there := server.before(job)) else None
    for point in points(count, step):
        server.clear(job)
        killed = server.run(server.words(job), point)
        assert killed["code"] == -9, (job, point, killed["err"])
        state = tree(server.root / "out")
        assert state in (None, old, new), (job, point, killed["seen"][-1])
        check_again(server, job, state, new)


JOBS = {"prune": 2, "overwrite": 2, "training": 5, "export": 4, "export over": 5, "split": 8, "int8": 5, "upgrade": 2}


@pytest.mark.parametrize("job", JOBS)
def test_killed_before_any_file_operation_the_target_is_whole_and_the_same_command_gives_the_same_bytes(server, job):
    kill_and_run_again(server, job, JOBS[job])


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_before_each_file_operation(server, job):
    kill_and_run_again(server, job, 1)


def kept(root: Path) -> set[str]:
    """What lies about, but the output, the journal and the weights that it names."""
    return {name for name in os.listdir(root) if name not in ("out", ".out.journal") and not name.endswith(".safetensors")}


@pytest.mark.parametrize("job, step", [("prune", 7), ("overwrite", 9), ("training", 15), ("int8", 9), ("upgrade", 5)])
def test_sigterm_at_any_time_ends_with_143_leaves_no_partial_and_the_same_command_goes_on(server, job, step):
    new, count = server.undisturbed(job)
    old = tree(there) if (there := server.before(job)) else None
    for point in points(count, step):
        server.clear(job)
        ended = server.run(server.words(job), point, "term")
        assert ended["code"] == 143, (job, point, ended)
        assert "ended by SIGTERM" in ended["err"] and "Traceback" not in ended["err"]
        state = tree(server.root / "out")
        assert state in (None, old, new) and not kept(server.root), (job, point, os.listdir(server.root))
        check_again(server, job, state, new)


@pytest.mark.parametrize(
    "job, step", [("prune", 1), ("overwrite", 5), ("training", 3), ("export", 2), ("split", 3), ("int8", 2), ("upgrade", 3)]
)
def test_a_disk_that_is_full_from_any_operation_on_ends_with_a_sentence_and_no_litter(server, job, step):
    new, count = server.undisturbed(job, "full")
    old = tree(there) if (there := server.before(job)) else None
    for point in points(count, step):
        server.clear(job)
        failed = server.run(server.words(job), point, "full")
        assert failed["code"] == 1, (job, point, failed["seen"][-1], failed["err"])
        assert "the disk is full" in failed["err"] and "defect" not in failed["err"], failed["err"]
        assert tree(server.root / "out") == old and not kept(server.root), (job, point, os.listdir(server.root))
    check_again(server, job, old, new)
