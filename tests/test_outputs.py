"""What --overwrite may replace, where an output may lie, and what room it needs. Nothing of the user's is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_store import code_of, fill, names, our_folder

from comp_cli.errors import CompError
from comp_cli.files import outputs
from comp_cli.files.outputs import atomic_folder, check_output, check_room


def refused(output: Path) -> str:
    """Why --overwrite leaves a folder alone; nothing of it changes."""
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(CompError) as caught:
        check_output(output, overwrite=True, source=None)
    assert caught.value.exit_code == 2 and code_of(fill, output, overwrite=True) == 2
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    return caught.value.message


# Whose folder it is


@pytest.mark.parametrize(
    "marker",
    [
        {},
        {"opset": 20, "files": {"thesis.txt": "0" * 64}},
        {"comp_version": "0.1.0", "schema_version": 1},
        {"comp_version": "0.1.0", "schema_version": 1, "files": {}},
        {"comp_version": 1, "schema_version": 1, "files": {"a": "b"}},
        {"schema_version": 1, "files": {"a": "b"}},
        [],
    ],
)
@pytest.mark.parametrize("name", ["export.json", "comp_report.json"])
def test_a_marker_is_judged_by_its_content_and_not_by_its_name(name, marker, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    (tmp_path / "out" / name).write_text(json.dumps(marker))
    assert "was not written by comp" in refused(tmp_path / "out")


def test_overwrite_refuses_what_the_user_added_and_names_it(tmp_path):
    out = our_folder(tmp_path / "out")
    for number in range(5):
        (out / f"notes{number}.txt").write_text("mine")
    assert "notes0.txt, notes1.txt, notes2.txt and 2 more" in refused(out)


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "link", "broken link", "link instead of a file", "hidden"])
def test_overwrite_refuses_anything_that_the_marker_does_not_list(kind, tmp_path):
    out = our_folder(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("old")
    match kind:
        case "file":
            (out / "thesis.txt").touch()
        case "folder":
            (out / "sub").mkdir()
            (out / "sub/weights").write_text("old")
        case "empty folder":
            (out / "sub").mkdir()
        case "link":
            (out / "link").symlink_to(elsewhere)
        case "broken link":
            (out / "link").symlink_to("nowhere")
        case "link instead of a file":
            (out / "weights").unlink()
            (out / "weights").symlink_to(elsewhere)
        case "hidden":
            (out / ".gitignore").touch()
    assert "holds what comp did not write" in refused(out)


def test_overwrite_refuses_a_file_that_the_user_edited(tmp_path):
    out = our_folder(tmp_path / "out")
    (out / "weights").write_text("OLD")
    assert "weights (changed)" in refused(out)


def test_a_file_that_is_gone_is_no_reason_to_refuse(tmp_path):
    out = our_folder(tmp_path / "out")
    (out / "weights").unlink()
    fill(out, overwrite=True)
    assert (out / "weights").read_text() == "new"


def test_folders_of_version_0_1_0_are_known(tmp_path):
    """comp_report.json: name -> bytes and hash; export.json: name -> hash; neither lists itself."""
    out = our_folder(tmp_path / "out")
    told = json.loads((out / "comp_report.json").read_text())
    told["files"] = {name: file["sha256"] for name, file in told["files"].items()}
    (out / "comp_report.json").unlink()
    (out / "export.json").write_text(json.dumps(told))
    fill(out, overwrite=True)
    assert names(out) == ["comp_report.json", "weights"]


def test_what_appears_while_the_new_folder_is_made_is_not_deleted(tmp_path):
    out = our_folder(tmp_path / "out")
    with pytest.raises(CompError, match="thesis.txt"), atomic_folder(out, overwrite=True) as partial:
        our_folder(partial, "new")
        (out / "thesis.txt").write_text("mine")
    assert names(tmp_path) == ["out"] and names(out) == ["comp_report.json", "thesis.txt", "weights"]
    assert (out / "weights").read_text() == "old"


def test_what_appears_between_the_last_look_and_the_swap_comes_back(tmp_path, monkeypatch):
    out = our_folder(tmp_path / "out")
    rename = Path.rename

    def late(self, target):
        if self == out:
            (out / "thesis.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert code_of(fill, out, overwrite=True) == 2
    assert names(tmp_path) == ["out"] and names(out) == ["comp_report.json", "thesis.txt", "weights"]


def test_what_appears_in_the_old_folder_after_the_swap_stays(tmp_path, monkeypatch):
    out = our_folder(tmp_path / "out")
    discard = outputs.discard

    def late(old, new):
        (old / "thesis.txt").write_text("mine")
        discard(old, new)

    monkeypatch.setattr(outputs, "discard", late)
    fill(out, overwrite=True)
    (rest,) = tmp_path.glob(".out.old-*")
    assert names(rest) == ["thesis.txt"] and (out / "weights").read_text() == "new"
    fill(out, overwrite=True)
    assert names(rest) == ["thesis.txt"]


def test_a_failed_export_is_not_put_over_what_the_user_added(compact_folder, tmp_path):
    from comp_cli.cli.output import Output
    from comp_cli.commands import export
    from comp_cli.options import ExportOptions

    failed = our_folder(tmp_path / "x.failed")
    (failed / "thesis.txt").touch()
    given = ExportOptions(keep_failed=True)
    with pytest.raises(CompError, match="thesis.txt") as caught:
        export.export(compact_folder, tmp_path / "x", given, Output("quiet"))
    assert caught.value.exit_code == 2 and names(tmp_path) == ["x.failed"]


def test_a_write_test_that_was_killed_leaves_nothing_for_ever(tmp_path):
    for leftover in {".out.partial-qfwzy90f", ".out.partial-1", f".out.partial-{os.getppid()}"}:  # the parent may be 1
        (tmp_path / leftover).mkdir()
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# Where it lies


@pytest.mark.parametrize("typed", [".", "sub/..", "../here", "./", "../here/"])
def test_the_current_folder_can_be_filled_and_stays_the_same_folder(typed, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = here.stat().st_ino
    if typed == "sub/..":
        monkeypatch.setattr(outputs, "resolve", lambda path: here.resolve())  # a sub folder would make it not empty
    fill(Path(typed))
    assert names(here) == ["comp_report.json", "weights"] == sorted(os.listdir("."))
    assert here.stat().st_ino == before and names(tmp_path) == ["here"]


def test_a_current_folder_that_was_being_filled_is_emptied_again(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    partial = our_folder(tmp_path / ".here.partial-123", "new")
    (partial / "weights").rename(here / "weights")  # as if killed between the two files
    fill(Path("."), "again")
    assert names(tmp_path) == ["here"] and (here / "weights").read_text() == "again"


def test_the_current_folder_is_overwritten_only_by_name_of_comp(tmp_path, monkeypatch):
    monkeypatch.chdir(our_folder(tmp_path / "here"))
    fill(Path("."), overwrite=True)
    assert (tmp_path / "here/weights").read_text() == "new" and names(tmp_path) == ["here"]


def test_places_that_are_no_places_are_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for output in (
        tmp_path / "a",
        tmp_path / "a/x",
        tmp_path / "o\udcff",
        tmp_path / "nul\0",
        tmp_path / ("x" * 300),
        Path("/"),
    ):
        assert code_of(check_output, output, overwrite=False, source=None) == 2, output
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert code_of(check_output, Path("out"), overwrite=False, source=None) == 2
    check_output(tmp_path / "out", overwrite=False, source=None)
    assert names(tmp_path) == ["a", "b"]


def test_a_mount_point_is_refused_with_a_name_that_works(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(CompError, match="mount point") as caught:
        check_output(tmp_path / "out", overwrite=False, source=None)
    assert caught.value.exit_code == 2 and str(tmp_path / "out/compact") in caught.value.hint


# What room it needs


def test_too_little_room_is_said_before_any_work_with_both_numbers(tiny_folder, tmp_path, monkeypatch):
    from comp_cli.cli.output import Output
    from comp_cli.commands import prune
    from comp_cli.options import PruneOptions, Training

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**19))
    monkeypatch.setattr(prune, "search", lambda *given: pytest.fail("work was done"))
    options = PruneOptions(str(tiny_folder), 0.5, num_samples=4, eval_samples=4)
    with pytest.raises(CompError, match="has 0.5 MiB free; the compact model needs at least 1.1 MiB") as caught:
        prune.prune(options, tmp_path / "out", Output("quiet"))
    assert caught.value.exit_code == 1 and names(tmp_path) == []
    training = prune.replace(options, training=Training(steps=2))
    with pytest.raises(CompError, match="journal of its training, needs at least 7.5 MiB"):
        prune.prune(training, tmp_path / "out", Output("quiet"))


def test_room_is_looked_up_at_the_nearest_folder_that_exists(tmp_path):
    check_room(tmp_path / "not/yet/there", 1, "it")
    with pytest.raises(CompError, match="MiB free"):
        check_room(tmp_path / "not/yet/there", 2**70, "it")


SMALL = """
import os, sys
from pathlib import Path
from comp_cli.errors import CompError
from comp_cli.search.journal import Journal
from comp_cli.options import ExportOptions, PruneOptions, Training
import torch
root = Path(sys.argv[1])
journal = Journal(root / "out", {})
journal.save({"a": 1})
for state, tensors in (({"a": "x" * 10**6}, None), ({"a": 2}, {"w": torch.zeros(10**6)})):
    try:
        journal.save(state, tensors)
    except CompError as error:
        print(error.exit_code, error.message)
print(os.listdir(root), journal.load())
"""


def test_a_journal_on_a_full_disk_says_so_and_stays_as_it_was(tmp_path):
    mount = 'mount -t tmpfs -o size=256k none "$2" && exec "$0" -c "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, SMALL, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a private mount of a small disk")
    said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.splitlines()
    assert all(line.startswith("1 ") and line.endswith("the disk is full.") for line in said[:2])
    assert said[2:] == ["['.out.journal'] {'a': 1}"]
