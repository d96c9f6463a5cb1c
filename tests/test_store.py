"""Files in and out: broken input is named, output folders appear whole or not at all, nothing of the user's is lost."""

import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from comp_cli.errors import CompError
from comp_cli.files import store
from comp_cli.files.outputs import atomic_folder, check_output
from comp_cli.files.store import find_last, folder_size, read_config, read_tensors_header, sha256

ROOT = Path(__file__).parent.parent
DEAD = 2**22 + 1  # above the largest process id that Linux hands out


def code_of(call, *args, **options) -> int:
    with pytest.raises(CompError) as caught:
        call(*args, **options)
    return caught.value.exit_code


def our_folder(folder: Path, content: str = "old") -> Path:
    """As `comp prune` leaves it: a report that lists what else there is, with hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(content)
    files = {"weights": {"bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}}
    (folder / "comp_report.json").write_text(json.dumps({"schema_version": 1, "comp_version": "0.1.0", "files": files}))
    return folder


def fill(output: Path, content: str = "new", *, overwrite: bool = False) -> None:
    with atomic_folder(output, overwrite=overwrite) as partial:
        our_folder(partial, content)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


# Reading


def test_config(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip", "name": "é"}', encoding="utf-8")
    assert read_config(tmp_path) == {"model_type": "blip", "name": "é"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_broken_config(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CompError, match="config.json") as caught:
        read_config(tmp_path)
    assert caught.value.exit_code == 4


def test_missing_config(tmp_path):
    assert code_of(read_config, tmp_path) == 4


def test_tensors_header(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"half": np.zeros((2, 3), np.float16), "one": np.array(1, np.int64), "none": np.zeros((0, 4))}, path)
    assert read_tensors_header(path) == {"half": ("F16", (2, 3)), "one": ("I64", ()), "none": ("F64", (0, 4))}


def test_broken_tensors_name_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.ones(2, np.float32)}, path)
    whole = path.read_bytes()
    overlap = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}).encode()
    broken = {
        "truncated": whole[:-1],
        "header only": whole[:20],
        "zero length": b"",
        "no header": b"abcd",
        "header bomb": struct.pack("<Q", 2**62) + b"{}",
        "not JSON": struct.pack("<Q", 4) + b"{]]]",
        "overlapping": struct.pack("<Q", len(overlap)) + overlap + bytes(4),
        "a pickle": b"\x80\x04\x95" + bytes(40),
    }
    for kind, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(CompError, match="model.safetensors") as caught:
            read_tensors_header(path)
        assert caught.value.exit_code == 4, kind
    assert code_of(read_tensors_header, tmp_path / "gone.safetensors") == 4
    assert code_of(read_tensors_header, tmp_path) == 4


def test_sha256_and_size(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 3_000_000)
    assert sha256(tmp_path / "model.safetensors") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    (tmp_path / "config.json").write_bytes(b"x" * 10)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 10)
    (tmp_path / "part.safetensors").write_bytes(b"x" * 5)
    assert folder_size(tmp_path) == 3_000_005
    graphs = tmp_path / "graphs"
    graphs.mkdir()
    assert folder_size(graphs) == 0
    (graphs / "vision_model.onnx").write_bytes(b"x" * 7)
    (graphs / "vision_model.onnx.data").write_bytes(b"x" * 11)
    (graphs / "export.json").write_bytes(b"x" * 100)
    assert folder_size(graphs) == 18


def test_find_last(tmp_path):
    assert find_last("comp_report.json", tmp_path) is None
    places = ["old", "a/b/newest", "a/b/c/too_deep", ".hidden", "a/.hidden/x"]
    for age, place in enumerate(places):
        report = our_folder(tmp_path / place) / "comp_report.json"
        os.utime(report, (1_000_000 + age, 1_000_000 + age))
    os.utime(tmp_path / "old")  # a later bench result in the folder does not make it the last one written
    assert find_last("comp_report.json", tmp_path) == tmp_path / "a/b/newest"
    assert find_last("export.json", tmp_path) is None
    (tmp_path / "comp_report.json").touch()
    assert find_last("comp_report.json", tmp_path) == tmp_path


# Checking the output


def test_good_outputs_are_let_through_untouched(tmp_path):
    (tmp_path / "empty").mkdir()
    our_folder(tmp_path / "ours")
    for output in ("new", "deep/er/new", "empty"):
        check_output(tmp_path / output, overwrite=False, source=tmp_path / "ours")
    check_output(tmp_path / "ours", overwrite=True, source=tmp_path / "ours-dense")
    assert names(tmp_path) == ["empty", "ours"]


def test_outputs_that_overlap_the_source(tmp_path):
    source = our_folder(tmp_path / "models/source")
    (tmp_path / "link").symlink_to(source)
    for output in (
        source,
        source / "out",
        source / "a/b",
        tmp_path / "models",
        tmp_path / "link",
        tmp_path / "link/out",
    ):
        assert code_of(check_output, output, overwrite=True, source=source) == 2
    assert code_of(check_output, source, overwrite=True, source=tmp_path / "link") == 2
    check_output(tmp_path / "models/source2", overwrite=False, source=source)


def test_outputs_that_exist(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "below"):
        assert code_of(check_output, output, overwrite=True, source=None) == 2
    ours = our_folder(tmp_path / "ours")
    with pytest.raises(CompError) as caught:
        check_output(ours, overwrite=False, source=None)
    assert caught.value.exit_code == 2 and "--overwrite" in caught.value.hint
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    assert code_of(check_output, precious, overwrite=True, source=None) == 2
    assert code_of(fill, precious, overwrite=True) == 2
    assert names(precious) == ["thesis.tex"]


def test_output_that_cannot_be_written(tmp_path):
    assert code_of(check_output, tmp_path / ("x" * 250), overwrite=False, source=None) == 2
    assert code_of(check_output, Path("/proc/comp-out/x"), overwrite=False, source=None) == 2
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert code_of(check_output, tmp_path / "out", overwrite=False, source=None) == 2
        tmp_path.chmod(0o700)


# Writing the output


def test_a_folder_appears_whole(tmp_path):
    output = tmp_path / "deep/out"
    with atomic_folder(output, overwrite=False) as partial:
        assert partial.parent == output.parent and partial.name == f".out.partial-{os.getpid()}"
        (partial / "weights").write_text("new")
        assert not output.exists()
    assert names(output.parent) == ["out"] and names(output) == ["weights"]


def test_relative_and_linked_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    our_folder(tmp_path / "target")
    Path("link").symlink_to("target")
    fill(Path("link"), overwrite=True)
    fill(Path("out"))
    assert Path("link").is_symlink() and (tmp_path / "target/weights").read_text() == "new"
    assert names(tmp_path) == ["link", "out", "target"]


@pytest.mark.parametrize("mask, file, folder", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_modes_follow_the_umask(mask, file, folder, tmp_path, umask):
    umask(mask)
    with atomic_folder(tmp_path / "out", overwrite=False) as partial:
        save_file({"a": np.zeros(3)}, partial / "model.safetensors")
        (partial / "sub").mkdir()
        (partial / "sub/script.py").touch(mode=0o777)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes == {"out": folder, "sub": folder, "model.safetensors": file, "script.py": file}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error, tmp_path):
    old = our_folder(tmp_path / "old")
    for output, overwrite in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(error), atomic_folder(output, overwrite=overwrite) as partial:
            (partial / "weights").write_text("half")
            raise error
    assert names(tmp_path) == ["old"] and (old / "weights").read_text() == "old"


def test_overwrite_keeps_the_old_until_the_new_is_complete(tmp_path):
    output = our_folder(tmp_path / "out")
    with atomic_folder(output, overwrite=True) as partial:
        (partial / "weights").write_text("new")
        assert (output / "weights").read_text() == "old"
    assert names(tmp_path) == ["out"] and names(output) == ["weights"]
    assert (output / "weights").read_text() == "new"


def test_the_old_comes_back_when_the_new_cannot_be_renamed(tmp_path, monkeypatch):
    output = our_folder(tmp_path / "out")
    rename = Path.rename

    def refuse(self, target):
        if ".partial-" in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        fill(output, overwrite=True)
    assert names(tmp_path) == ["out"] and (output / "weights").read_text() == "old"


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(CompError, match="not empty"), atomic_folder(output, overwrite=False):
        our_folder(output)
    with pytest.raises(CompError, match="not written by comp"), atomic_folder(output, overwrite=True):
        (output / "comp_report.json").unlink()
    assert names(tmp_path) == ["out"] and names(output) == ["weights"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    for orphan in (f".out.partial-{DEAD}", f".out.old-{DEAD}", f".out.partial-{os.getpid()}"):
        our_folder(tmp_path / orphan)
    others = [f".other.partial-{DEAD}", ".out.partial-", ".out.partial-x1", f"out.partial-{DEAD}"]
    for other in others:
        our_folder(tmp_path / other)
    our_folder(tmp_path / "out")
    fill(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == sorted(["out", *others])
    assert (tmp_path / "out/weights").read_text() == "new"


def test_a_swap_cut_in_the_middle_gives_the_old_back(tmp_path):
    our_folder(tmp_path / f".out.old-{DEAD}")
    our_folder(tmp_path / f".out.partial-{DEAD}", "half")
    assert code_of(check_output, tmp_path / "out", overwrite=False, source=None) == 2
    assert names(tmp_path) == ["out"] and (tmp_path / "out/weights").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from comp_cli.files.outputs import atomic_folder
from comp_cli.files.store import sha256
moment, output = sys.argv[1], Path(sys.argv[2])
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
def rename(self, target, rename=Path.rename):
    last = ".partial-" in self.name
    if moment == "before renames" or (moment == "between renames" and last): kill()
    rename(self, target)
    if moment == "before cleaning" and last: kill()
Path.rename = rename
with atomic_folder(output, overwrite=True) as partial:
    report = (output / "comp_report.json").read_text()
    (partial / "weights").write_text("new")
    (partial / "comp_report.json").write_text(report.replace(sha256(output / "weights"), sha256(partial / "weights")))
    if moment == "writing": kill()
"""


@pytest.mark.parametrize("moment", ["writing", "before renames", "between renames", "before cleaning"])
def test_kill_9_loses_nothing(moment, tmp_path):
    output = our_folder(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(output)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert code_of(check_output, output, overwrite=False, source=None) == 2
    assert (output / "weights").read_text() == ("new" if moment == "before cleaning" else "old")
    fill(output, "again", overwrite=True)
    assert names(tmp_path) == ["out"] and (output / "weights").read_text() == "again"


FULL = """
import sys, torch
from pathlib import Path
from comp_cli.errors import CompError
from comp_cli.files.outputs import atomic_folder
from comp_cli.files.store import save_tensors
torch.set_num_threads(1)
def with_tensors(partial): save_tensors({"a": torch.zeros(1_000_000)}, partial / "model.safetensors")
def with_text(partial): (partial / "merges.txt").write_text("x" * 1_000_000)
for write in (with_tensors, with_text):
    try:
        with atomic_folder(Path(sys.argv[1]) / "out", overwrite=False) as partial:
            write(partial)
    except CompError as error:
        print(error.exit_code, error.message)
print(list(Path(sys.argv[1]).iterdir()))
"""


def test_full_disk(tmp_path):
    mount = 'mount -t tmpfs -o size=256k none "$2" && exec "$0" -c "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, FULL, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a private mount of a small disk")
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert len(said) == 3 and all(line.startswith("1 ") and "the disk is full" in line for line in said[:2])
    assert said[2] == "[]"


def test_save_tensors_makes_slices_contiguous(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "model.safetensors"
    store.save_tensors({"columns": weight[:, ::2], "turned": weight.T}, path)
    loaded = load_file(path)
    assert loaded["columns"].tolist() == [[0, 2], [4, 6], [8, 10]] and loaded["turned"].shape == (4, 3)
    header_size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert json.loads(path.read_bytes()[8 : 8 + header_size])["__metadata__"] == {"format": "pt"}
    assert code_of(store.save_tensors, {"a": weight}, tmp_path / "gone/model.safetensors") == 1


def test_store_is_imported_without_torch():
    check = "import sys, comp_cli.files.store, comp_cli.checkpoint.hub"
    check += "; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=60)
