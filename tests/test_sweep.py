"""Several ratios in one run: a folder each, of one calibration, and what each ratio costs."""

import json
from collections import Counter

import jsonschema
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_schema import strict
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.commands import judging, sweep
from comp_cli.report.base import Values
from comp_cli.report.sweep import Point, knee
from comp_cli.search import journal, training_free
from comp_cli.signals import Interrupted

FEW = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
WORDS = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]
OF_THE_PLACE = ("base_address", "files")  # README.md says where the dense model is


def run(*given):
    return CliRunner().invoke(app, ["prune", *map(str, given), *WORDS])


def told(folder):
    """A folder's report, without what depends on where it lies."""
    found = json.loads((folder / "comp_report.json").read_text())
    return {name: value for name, value in found.items() if name not in OF_THE_PLACE}


@pytest.fixture
def passes(monkeypatch):
    """How often the dense model was looked at, calibrated and judged."""
    counted: Counter[str] = Counter()

    def counting(module, name):
        real = getattr(module, name)

        def call(*args, **options):
            counted[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    counting(training_free, "gather_statistics")
    counting(training_free, "prices")
    counting(judging, "judge_dense")
    counting(sweep, "open_all")
    return counted


ONCE = {"gather_statistics": 1, "prices": 1, "judge_dense": 1, "open_all": 1}


def test_every_folder_is_what_its_own_command_writes_and_the_calibration_is_one(tiny_folder, tmp_path, passes):
    report = comp_cli.prune(tiny_folder, ratio=[0.5, 0.3], output=tmp_path / "sweep", **FEW)
    assert passes == ONCE
    for ratio in (0.5, 0.3):
        comp_cli.prune(tiny_folder, ratio=ratio, output=tmp_path / "alone" / f"{ratio}", **FEW)
        one, other = tmp_path / "alone" / f"{ratio}", tmp_path / "sweep" / f"ratio-{ratio}"
        assert told(one) == told(other)
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
        weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        point = next(point for point in report.points if point.ratio == ratio)
        whole = told(other)
        assert (point.reached, point.agreement, point.folder) == (whole["ratio"], whole["quality"]["agreement"], other.name)
        assert point.flops.compact == whole["flops"]["compact"] and point.size_bytes.compact == whole["size_bytes"]["compact"]
    assert [point.ratio for point in report.points] == [0.5, 0.3] and report.output == tmp_path / "sweep"
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "ratio-0.5",
        "ratio-0.3",
        "comp_sweep.json",
        "tradeoff.md",
        "tradeoff.html",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("more", [{"method": "wanda"}, {"steps": 2, "train_batch_size": 4}], ids=["wanda", "tuned"])
def test_other_ways_share_their_calibration_too(tiny_folder, tmp_path, passes, more):
    comp_cli.prune(tiny_folder, ratio=(0.3, 0.2), output=tmp_path / "sweep", **FEW, **more)
    assert passes["gather_statistics"] == passes["judge_dense"] == passes["open_all"] == 1
    comp_cli.prune(tiny_folder, ratio=0.2, output=tmp_path / "alone", **FEW, **more)
    assert told(tmp_path / "alone") == told(tmp_path / "sweep" / "ratio-0.2")


def test_a_decoder_and_its_written_answers(tmp_path, passes):
    dense = tiny.write("llava", tmp_path / "llava")
    report = comp_cli.prune(dense, ratio="0.3,0.4", output=tmp_path / "sweep", **FEW | {"eval_samples": 2})
    comp_cli.prune(dense, ratio=0.4, output=tmp_path / "alone", **FEW | {"eval_samples": 2})
    assert passes["gather_statistics"] == 2 and told(tmp_path / "alone") == told(tmp_path / "sweep" / "ratio-0.4")
    assert report.points[1].reached == pytest.approx(0.4, abs=0.02)


def test_the_document_the_table_and_the_file(tiny_folder, tmp_path):
    given = (tiny_folder, "--ratio", "0.2,0.4", "--method", "joint", "-o", tmp_path / "sweep")
    result = run(*given, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    jsonschema.validate(document, strict("sweep"))
    assert [point["folder"] for point in document["points"]] == ["ratio-0.2", "ratio-0.4"]
    lines = (tmp_path / "sweep" / "tradeoff.md").read_text().splitlines()
    dense, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|") and "---" not in line][1:]
    assert dense[0] == "dense" and [row[0] for row in rows] == ["0.2", "0.4"]
    assert rows[0][1] == f"{document['points'][0]['flops']['compact'] / 1e9:.2f} G"
    again = run(*given)
    assert again.exit_code == 2 and "exists" in again.stderr
    shown = run(*given, "--overwrite")
    assert shown.exit_code == 0 and "ratio-0.2" in shown.stdout and "tradeoff.md" in shown.stdout, shown.output


def test_what_a_user_changed_beside_the_folders_stays(tiny_folder, tmp_path):
    given = (tiny_folder, "--ratio", "0.2,0.4", "--method", "joint", "-o", tmp_path / "sweep")
    assert run(*given, "-q").exit_code == 0
    (tmp_path / "sweep" / "tradeoff.md").write_text("mine")
    result = run(*given, "--overwrite")
    assert result.exit_code == 2 and "changed since" in result.stderr
    assert (tmp_path / "sweep" / "tradeoff.md").read_text() == "mine"


def test_a_dry_run_writes_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(tiny_folder, "--ratio", "0.2,0.4", "--method", "joint", "--dry-run")
    assert result.exit_code == 0 and "--dry-run" in result.stdout and not list(tmp_path.iterdir())


def test_a_ratio_that_loses_too_much_fails_alone(tiny_folder, tmp_path, monkeypatch):
    """The agreement at 0.6 is made bad: the folder of 0.2 is there, and the command ends as one of 0.6 does."""
    real = judging.comparison.agreements
    seen = []

    def bad(dense, compact):
        seen.append(real(dense, compact))
        return 0.5 if len(seen) == 2 else 1.0

    monkeypatch.setattr(judging.comparison, "agreements", bad)
    given = (tiny_folder, "--ratio", "0.2,0.6,0.3", "--max-drop", "2", "-o", tmp_path / "sweep")
    result = run(*given, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["error"]["code"] == 3
    assert document["error"]["message"].startswith("ratio 0.6: agreement falls from 100.0 % to 50.0 %")
    assert "ratio-0.2, ratio-0.3" in document["error"]["hint"]
    assert [point["folder"] for point in document["points"]] == ["ratio-0.2", None, "ratio-0.3"]
    assert document["points"][1]["agreement"] == 0.5
    assert not (tmp_path / "sweep" / "ratio-0.6").exists() and (tmp_path / "sweep" / "ratio-0.3").is_dir()
    assert "Ratio 0.6: agreement falls" in (tmp_path / "sweep" / "tradeoff.md").read_text()


def test_a_ratio_out_of_reach_fails_alone(tiny_folder, tmp_path):
    with pytest.raises(comp_cli.CompError, match=r"ratio 0.99: .*cannot be reached") as caught:
        comp_cli.prune(tiny_folder, ratio=[0.99, 0.3], output=tmp_path / "sweep", **FEW)
    assert caught.value.exit_code == 1 and [point.folder for point in caught.value.report.points] == [None, "ratio-0.3"]


def test_nothing_is_left_where_every_ratio_fails(tiny_folder, tmp_path):
    with pytest.raises(comp_cli.CompError, match="cannot be reached"):
        comp_cli.prune(tiny_folder, ratio=[0.99, 0.98], output=tmp_path / "sweep", **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["in the search of the second", "before the first is noted"])
def test_a_sweep_that_was_killed_goes_on(tiny_folder, tmp_path, monkeypatch, where):
    def killed(*given, **options):
        raise Interrupted(15)

    place = tmp_path / "sweep"
    with monkeypatch.context() as patched:
        if where == "before the first is noted":
            patched.setattr(sweep.Sweep, "_note", killed)
        else:
            real, saved = journal.Journal.save, []

            def save(self, state, tensors=None):
                saved.append(self.path.name)
                real(self, state, tensors)
                if saved.count(".ratio-0.5.journal") == 2:
                    killed()

            patched.setattr(journal.Journal, "save", save)
        with pytest.raises(Interrupted):
            comp_cli.prune(tiny_folder, ratio=[0.3, 0.5], output=place, **FEW)
    first = (place / "ratio-0.3" / "comp_report.json").stat().st_mtime_ns
    with pytest.raises(comp_cli.UsageError, match="other settings: seed was 0 and is 1"):
        comp_cli.prune(tiny_folder, ratio=[0.3, 0.5], output=place, seed=1, **FEW)
    report = comp_cli.prune(tiny_folder, ratio=[0.3, 0.5], output=place, **FEW)
    assert (place / "ratio-0.3" / "comp_report.json").stat().st_mtime_ns == first
    comp_cli.prune(tiny_folder, ratio=[0.3, 0.5], output=tmp_path / "whole", **FEW)
    documents = [json.loads((folder / "comp_sweep.json").read_text()) for folder in (place, tmp_path / "whole")]
    assert documents[0] == documents[1] and len(report.points) == 2
    assert told(place / "ratio-0.5") == told(tmp_path / "whole" / "ratio-0.5")
    assert not [path for path in (*tmp_path.iterdir(), *place.iterdir()) if path.name.startswith(".")]


@pytest.mark.parametrize(
    "given, said",
    [
        ("0.3,0.3", "0.3 is there twice"),
        ("0.3,0.30000000001", "0.3 is there twice"),
        ("0.3,", "expected a number"),
        ("0.3,half", "expected a number"),
        ("0.3,1.5", "between 0 and 1"),
        ("0.3,nan", "expected a number"),
        (",".join(f"{0.01 * n:g}" for n in range(1, 30)), "expected up to 20 numbers, found 29"),
        ("nan", "expected a number"),
        ("half", "expected a number"),
    ],
)
def test_lists_that_make_no_sense(tiny_folder, tmp_path, given, said):
    result = run(tiny_folder, "--ratio", given, "-o", tmp_path / "sweep")
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not (tmp_path / "sweep").exists()


def test_image_tokens_by_number_know_no_ratios(tmp_path):
    dense = tiny.write("llava", tmp_path / "llava")
    result = CliRunner().invoke(app, ["prune", str(dense), "--ratio", "0.3,0.5", "--method", "vitcop", "--tokens", "9"])
    assert result.exit_code == 2 and "--ratio is not for --method vitcop" in result.stderr


def test_a_limit_on_memory_is_for_one_ratio(tiny_folder, tmp_path):
    with pytest.raises(comp_cli.UsageError, match="--max-memory: several ratios"):
        comp_cli.prune(tiny_folder, ratio=[0.3, 0.5], max_memory="1GiB", output=tmp_path / "sweep")


def test_lists_of_the_library():
    for wrong in ([], [True], ["x"], [0.5, 0.5]):
        with pytest.raises(comp_cli.UsageError, match="--ratio"):
            comp_cli.prune("demo", ratio=wrong)


def points(*found, dense=1.0):
    """(FLOPs reduction, metric) of each, the reduction as ratio too."""
    return [Point(ratio=x, reached=x, metric=Values(dense, y)) for x, y in found]


def test_the_knee_is_farthest_above_the_line_from_dense_to_the_largest_ratio():
    assert knee(points((0.4, 0.95), (0.2, 0.98), (0.8, 0.6))) == 0.4  # the line is at 0.8 there, at 0.9 at 0.2
    assert knee(points((0.2, 0.9), (0.4, 0.8), (0.8, 0.6))) is None  # all of them lie on the line
    assert knee(points((0.2, 0.7), (0.4, 0.65), (0.8, 0.6))) is None  # below it
    assert knee(points((0.4, 0.95), (0.8, 0.6))) is None  # too few
    unlabelled = [Point(ratio=x, reached=x, agreement=y) for x, y in ((0.3, 0.99), (0.5, 0.9), (0.7, 0.5))]
    assert knee(unlabelled) == 0.5  # the line from 1 to 0.5 is at 0.64 there: 0.26 below; at 0.3 0.2 below
    assert knee([*unlabelled, Point(ratio=0.9, failed="out of reach")]) == 0.5
