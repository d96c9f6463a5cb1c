"""The bench reports what was measured, for the models it was given."""

import pytest
import torch

from comp_cli import bench
from comp_cli.errors import CompError
from comp_cli.output import Output


@pytest.fixture(scope="module")
def report(compact_folder, tiny_folder):
    options = bench.Options(device="cpu", batches=(1, 3), iterations=4, duration=0, text_tokens=12)
    return bench.bench(compact_folder, str(tiny_folder), options, Output("quiet"))


def test_every_variant_is_timed_equally_often(report):
    seen = {(t["backend"], t["side"], t["batch"]): t["runs"] for t in report["timings"]}
    assert len(seen) == 8 and set(seen.values()) == {4}
    for timing in report["timings"]:
        assert 0 < timing["median"] <= timing["p90"] <= timing["p99"]
        assert timing["pairs_per_second"] == pytest.approx(1000 * timing["batch"] / timing["median"])


def test_speedups_are_ratios_of_medians(report):
    medians = {(t["backend"], t["side"], t["batch"]): t["median"] for t in report["timings"]}
    for row in report["speedups"]:
        expected = medians[row["backend"], "dense", row["batch"]] / medians[row["backend"], "compact", row["batch"]]
        assert row["speedup"] == pytest.approx(expected)


def test_flops_are_counted_and_agree_with_the_ratio(report):
    assert 1 - report["flops"]["compact"] / report["flops"]["dense"] == pytest.approx(0.7, abs=0.01)


def test_the_baseline_is_the_stock_model(report, stock):
    assert report["params"]["dense"] == sum(p.numel() for p in stock.parameters())
    assert report["params"]["compact"] < report["params"]["dense"]


def test_peak_memory_is_of_a_process_of_its_own(report):
    rows = {(row["backend"], row["side"]): row["bytes"] for row in report["peak_memory_bytes"]}
    assert len(rows) == 4
    # a process with ONNX Runtime alone is far smaller than one with torch: nothing is inherited from this process
    assert rows["onnx", "dense"] < rows["torch", "dense"]


def test_the_provider_and_the_machine_are_recorded(report):
    assert report["providers"] == {"dense": "CPUExecutionProvider", "compact": "CPUExecutionProvider"}
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["threads"] >= 1


def test_percentiles():
    timing = bench.summary("torch", "dense", 4, [float(i) for i in range(1, 102)])
    assert (timing.median, timing.p90, timing.p99) == (51, 91, 100)
    assert timing.pairs_per_second == pytest.approx(4000 / 51)


def test_a_baseline_that_does_not_fit(compact_folder, tmp_path, tiny_folder):
    with pytest.raises(CompError, match="is a compact model"):
        bench.bench(compact_folder, str(compact_folder), bench.Options(device="cpu"), Output("quiet"))
