"""A target in the place of a ratio: what is found, that it is what its ratio writes, and what cannot be asked for."""

import json

import jsonschema
import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_schema import strict
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.commands import target_meters, targets
from comp_cli.data.sources import open_pairs
from comp_cli.errors import DeadEnd, GateError, UsageError
from comp_cli.files.tensors import file_size
from comp_cli.models.pairs import pairs_to_choose_on
from comp_cli.progress import Silent
from comp_cli.report.prune import Reading
from comp_cli.search import training_free
from comp_cli.signals import Interrupted

FEW = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu", "looks": 1}
WORDS = [word for name, value in FEW.items() for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write("clip", tmp_path_factory.mktemp("targets") / "clip")


def run(*given):
    return CliRunner().invoke(app, ["prune", *map(str, given), *WORDS])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Clock(target_meters.ClockMeter):
    """Times that follow from the parameters: as many times faster as there are fewer of them. Those of the models that are
    written may be others."""

    finals: tuple[float, ...] = ()  # factors, one for each model that is written

    def __init__(self, target, dense, *rest):
        super().__init__(target, dense, *rest)
        self.dense_params = dense.params(dense.plan)
        self.finals = list(type(self).finals)

    def _clocked(self, models, seconds):
        off = self.finals.pop(0) if seconds == target_meters.LONG and self.finals else 1
        faster = off * self.dense_params / sum(p.numel() for p in list(models.values())[-1].parameters())
        value = faster if self.target.kind == "target_speedup" else 10 / faster
        return Reading(value, value, value)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(targets, "ClockMeter", Clock)
    monkeypatch.setattr(Clock, "finals", ())
    return Clock


# What is found -----------------------------------------------------------------------------------------------------------


def test_a_size_is_met_and_the_folder_is_what_its_ratio_writes(folder, tmp_path):
    result = run(folder, "--target-size", "1.2MB", "-o", tmp_path / "small", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    jsonschema.validate(document, strict("prune"))
    found, size = document["target"], (tmp_path / "small" / "model.safetensors").stat().st_size
    assert found["kind"] == "target_size" and found["wanted"] == 1_200_000 and found["measured"]["value"] == size
    assert 1_150_000 < size <= 1_200_000
    assert f"--ratio {found['ratio']}" in document["command"] and "target" not in document["command"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    (tmp_path / "small").rename(tmp_path / "found")
    comp_cli.prune(folder, ratio=found["ratio"], output=tmp_path / "small", **FEW)
    assert contents(tmp_path / "found") == contents(tmp_path / "small")


@pytest.mark.parametrize("kind, wanted", [("target_speedup", 1.5), ("target_latency_ms", 6.5)])
def test_the_smallest_ratio_that_is_fast_enough(folder, tmp_path, clock, kind, wanted):
    report = comp_cli.prune(folder, output=tmp_path / "fast", **{kind: wanted}, **FEW)
    found = report.target
    reached = found.measured.value if kind == "target_speedup" else 10 / found.measured.value
    asked = wanted if kind == "target_speedup" else 10 / wanted
    assert asked <= reached <= 1.1 * asked and report.options.ratio == found.ratio
    assert found.missed == () and "batch 1" in found.on and report.output == tmp_path / "fast"
    missing = [each for each in found.tried if each.ratio < found.ratio - 0.03 and each.found]
    assert all(each.found.value < wanted if kind == "target_speedup" else each.found.value > wanted for each in missing)


def test_a_model_that_misses_when_it_is_measured_anew_is_made_again_with_a_larger_ratio(folder, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(clock, "finals", (0.9,))
    report = comp_cli.prune(folder, output=tmp_path / "fast", target_speedup=1.3, **FEW)
    (missed,) = report.target.missed
    assert report.target.ratio > missed and report.target.measured.value >= 1.3


def test_nothing_is_written_where_it_misses_again(folder, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(clock, "finals", (0.5, 0.5))
    with pytest.raises(GateError, match="--target-speedup 1.3 is missed when it is measured anew") as caught:
        comp_cli.prune(folder, output=tmp_path / "fast", target_speedup=1.3, **FEW)
    assert caught.value.exit_code == 3 and caught.value.report.target.missed and not list(tmp_path.iterdir())


def test_real_times_are_read_with_their_interval(folder):
    from comp_cli.commands.prune import open_all
    from comp_cli.options import HubOptions, PruneOptions, Target

    opened = open_all(PruneOptions(str(folder), device="cpu", text_tokens=12), Silent(), HubOptions())
    meter = target_meters.ClockMeter(Target("target_speedup", 2.0), opened.dense, opened.resolved, False, Silent())
    found = meter._clocked({"dense": meter.stock, "compact": opened.dense.whole}, (0.0, 0.2))
    assert 0 < found.low <= found.value <= found.high
    assert meter.excess(Reading(2.0, 2.0, 2.0), aimed=False) == 0 < meter.excess(Reading(2.0, 2.0, 2.0), aimed=True)


def test_a_method_in_stages_is_asked_itself(folder, tmp_path):
    given = {name: value for name, value in FEW.items() if name != "looks"}
    report = comp_cli.prune(folder, output=tmp_path / "small", target_size="1.5MB", method="magnitude", **given)
    assert 1_300_000 < (tmp_path / "small" / "model.safetensors").stat().st_size <= 1_500_000
    assert all(each.whole for each in report.target.tried)


def test_where_no_plan_is_compared_the_first_one_is_sized(folder, tmp_path):
    report = comp_cli.prune(folder, output=tmp_path / "small", target_size="1.5MB", **FEW | {"looks": 0})
    assert report.target.measured.value == (tmp_path / "small" / "model.safetensors").stat().st_size <= 1_500_000
    assert report.compared == ()


def test_a_decoder_by_size_and_in_half_precision(tmp_path):
    dense = tiny.write("llava", tmp_path / "llava")
    report = comp_cli.prune(dense, output=tmp_path / "small", target_size=160_000, dtype="bf16", **FEW | {"eval_samples": 2})
    assert report.target.measured.value == (tmp_path / "small" / "model.safetensors").stat().st_size <= 160_000


def test_a_dry_run_writes_nothing_and_says_the_ratio(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(folder, "--target-size", "1.5MB", "--dry-run")
    assert result.exit_code == 0 and "--target-size 1.5MB: ratio 0." in result.stdout, result.output
    assert not list(tmp_path.iterdir())


# As much as loses no more ------------------------------------------------------------------------------------------------


class Drop(target_meters.DropMeter):
    """Points that follow from the parameters: 100 times the share that is gone; of the models that are written more."""

    more = 0.0

    def read(self, model, plan):
        self.quality = None
        dense = self.source.params(self.source.plan)
        return target_meters.exact(100 * (1 - sum(p.numel() for p in model.parameters()) / dense))

    def final(self, model, report):
        return target_meters.exact(self.read(model, None).value + self.more)

    def in_words(self, found):
        return f"{found.value:.2f} points"


def test_as_much_goes_as_loses_no_more_on_either_pairs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "DropMeter", Drop)
    report = comp_cli.prune(folder, output=tmp_path / "less", max_drop=20, **FEW)
    found = report.target
    assert found.kind == "max_drop" and 14 <= found.measured.value <= 20 and found.missed == ()
    assert "behind the calibration pairs" in found.on
    assert any(each.found.value > 20 and each.ratio <= found.ratio + 0.05 for each in found.tried if each.found)
    monkeypatch.setattr(Drop, "more", 5.0)
    again = comp_cli.prune(folder, output=tmp_path / "again", max_drop=20, **FEW).target
    assert again.missed[0] == found.ratio > again.ratio and again.measured.value <= 20


def test_where_nothing_may_go_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "DropMeter", Drop)
    with pytest.raises(GateError, match="--max-drop 0: at ratio .*, the smallest that was tried") as caught:
        comp_cli.prune(folder, output=tmp_path / "less", max_drop=0, **FEW)
    assert caught.value.exit_code == 3 and not list(tmp_path.iterdir())


def test_the_real_metric_decides_on_pairs_of_its_own(folder, tmp_path):
    report = comp_cli.prune(folder, output=tmp_path / "less", max_drop=40, **FEW)
    assert report.target.on == "8 pairs of generated scenes, split train, behind the calibration pairs"
    fell = 100 * (1 - report.quality.agreement)
    assert report.target.measured.value == pytest.approx(fell) and fell <= 40


def test_pairs_to_choose_on_are_those_of_neither_the_calibration_nor_the_evaluation(dense, tmp_path):
    table = tiny.table(tmp_path, text=lambda number: f"a red circle {number}")
    pairs = open_pairs(table, progress=Silent())
    images = {purpose: {pair.image_id for pair in pairs.read(purpose, 4)} for purpose in ("calibration", "evaluation")}
    counted = pairs.counts()
    found, unseen = pairs_to_choose_on(dense, pairs, 4, 100)
    chosen = {pair.image_id for pair in found.listed}
    assert unseen and chosen and not chosen & images["calibration"] and not chosen & images["evaluation"]
    assert pairs.counts() == counted
    few, unseen = pairs_to_choose_on(dense, pairs, 100, 100)
    assert not unseen and "the calibration pairs themselves" in few.said


# What cannot be ----------------------------------------------------------------------------------------------------------


def test_a_target_out_of_reach_says_what_is_in_reach(folder, tmp_path):
    with pytest.raises(DeadEnd, match=r"--target-size 0.1MB cannot be reached: the nearest is 0\.\d+ MB, at ratio 0\.[89]"):
        comp_cli.prune(folder, output=tmp_path / "small", target_size="100KB", **FEW)
    assert not list(tmp_path.iterdir())


def test_what_the_dense_model_has_is_not_searched_for(folder, tmp_path):
    with pytest.raises(UsageError, match=r"--target-size 3MB: the dense model has that, 1\.9\d\d MB"):
        comp_cli.prune(folder, output=tmp_path / "small", target_size="3MB", **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, said",
    [
        ({"target_speedup": 2, "ratio": 0.5}, "--ratio and --target-speedup: one decides"),
        ({"target_speedup": 2, "ratio": [0.5, 0.3]}, "--ratio and --target-speedup: one decides"),
        ({"target_speedup": 2, "target_size": "1MB"}, "--target-speedup and --target-size: one decides"),
        ({"target_speedup": 1}, "--target-speedup 1: expected a number above 1"),
        ({"target_latency_ms": 0}, "--target-latency-ms 0: expected milliseconds above 0"),
        ({"target_latency_ms": -3}, "--target-latency-ms -3: expected a number from 0"),
        ({"target_size": "small"}, "--target-size 'small': expected bytes, such as 1GiB or 800MB"),
        ({"target_size": 0}, "--target-size 0: expected a whole number from 1"),
        ({"target_speedup": 2, "tokens": 64}, "image tokens of a decoder go by number"),
        ({"target_size": "1MB", "method": "vitcop"}, "image tokens of a decoder go by number"),
        ({"target_size": "1MB", "max_memory": "1GiB"}, "--max-memory: --target-size tries several ratios"),
        ({"max_drop": 1, "max_memory": "1GiB"}, "--max-memory: --max-drop tries several ratios"),
        ({"max_drop": 1, "steps": 10}, "--max-drop alone chooses the ratio on pairs that fine-tuning would have seen"),
        ({"max_drop": 101}, "--max-drop 101: expected points from 0 to 100"),
        ({"max_drop": 1, "dry_run": True}, "--max-drop needs a model to judge"),
        ({"target_size": "1MB", "max_drop": 1, "dry_run": True}, "--max-drop needs a model to judge"),
        (
            {"target_size": "1MB", "method": "comp-paper", "steps": 8, "stage_share": 0.5},
            "--stage-share: --target-size tries several ratios",
        ),
        ({}, "--ratio is missing"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(given, said):
    with pytest.raises(UsageError) as caught:
        comp_cli.prune("nowhere/at-all", **given)
    assert said in caught.value.message


def test_max_drop_beside_a_target_is_a_gate(folder, tmp_path):
    with pytest.raises(GateError, match="--max-drop allows 0 points"):
        comp_cli.prune(folder, output=tmp_path / "small", target_size="1MB", max_drop=0, **FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "target, name",
    [("--target-size=1.5MB", "clip-comp-1.5MB"), ("--max-drop=60", "clip-comp-drop-60")],
)
def test_folders_are_named_after_what_was_asked_for(folder, tmp_path, monkeypatch, target, name):
    monkeypatch.chdir(tmp_path)
    result = run(folder, target, "-q")
    assert result.exit_code == 0 and result.stdout.strip() == name and (tmp_path / name).is_dir(), result.output


# Going on ----------------------------------------------------------------------------------------------------------------


def test_a_search_that_was_killed_goes_on(folder, tmp_path, monkeypatch):
    given = {"target_size": "1.2MB", **FEW}
    whole = comp_cli.prune(folder, output=tmp_path / "whole", **given)
    real, asked = target_meters.SizeMeter.read, []

    def counting(self, model, plan):
        asked.append(plan)
        if len(asked) == 4:
            raise Interrupted(15)
        return real(self, model, plan)

    monkeypatch.setattr(target_meters.SizeMeter, "read", counting)
    with pytest.raises(Interrupted):
        comp_cli.prune(folder, output=tmp_path / "small", **given)
    with pytest.raises(UsageError, match="target was .* and is"):
        comp_cli.prune(folder, output=tmp_path / "small", **given | {"target_size": "1.3MB"})
    before = len(asked)
    report = comp_cli.prune(folder, output=tmp_path / "small", **given)
    assert [each.ratio for each in report.target.tried] == [each.ratio for each in whole.target.tried]
    assert len(asked) - before < before + len(whole.target.tried) - 3
    assert contents(tmp_path / "small").keys() == contents(tmp_path / "whole").keys()
    same = "model.safetensors"
    assert contents(tmp_path / "small")[same] == contents(tmp_path / "whole")[same]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]


def test_one_calibration_serves_all(folder, tmp_path, monkeypatch):
    real, passes = training_free.gather_statistics, []
    monkeypatch.setattr(training_free, "gather_statistics", lambda *a, **k: passes.append(1) or real(*a, **k))
    comp_cli.prune(folder, output=tmp_path / "small", target_size="1.4MB", **FEW)
    assert len(passes) == 1


@pytest.mark.parametrize("kinds", [("F32",), ("BF16", "F32", "I64"), ("F16", "BF16", "BOOL", "F64")])
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path, kinds):
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    dtypes |= {"I64": torch.int64, "BOOL": torch.bool}
    made = {f"layer.{n}.wéight": torch.zeros(n % 5, 3 * n + 1, dtype=dtypes[kinds[n % len(kinds)]]) for n in range(40)}
    save_file(made, tmp_path / "file", metadata={"format": "pt"})
    known = {name: (kinds[n % len(kinds)], tuple(tensor.shape)) for n, (name, tensor) in enumerate(made.items())}
    assert file_size(known) == (tmp_path / "file").stat().st_size
