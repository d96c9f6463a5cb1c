"""The bench reports what was measured, for the models it was given."""

import json
import random
import statistics
import sys

import numpy as np
import pytest
import torch

from comp_cli.checkpoint import hub
from comp_cli.cli.output import Output
from comp_cli.commands import bench
from comp_cli.errors import CompError
from comp_cli.measure import gates, timing, variants
from comp_cli.onnx import profiling
from comp_cli.options import BenchOptions, Gates, HubOptions
from comp_cli.report.bench import Factor, GateOutcome, Latency, PeakMemory, Speedup
from comp_cli.report.bench_plot import check_plot, plot
from comp_cli.report.bench_tables import gate_sentence, print_benchmark


@pytest.fixture(scope="module")
def report(compact_folder, tiny_folder):
    options = BenchOptions(device="cpu", batches=(1, 3), iterations=4, duration=0, text_tokens=12)
    return bench.bench(compact_folder, str(tiny_folder), options, Output("quiet"))


@pytest.fixture(scope="module")
def document(report):
    return report.to_json()


# What is measured ------------------------------------------------------------------------------------------------------


def test_every_variant_is_timed_equally_often(document):
    seen = {(t["backend"], t["side"], t["batch"]): t["runs"] for t in document["timings"]}
    assert len(seen) == 12 and set(seen.values()) == {4}
    for row in document["timings"]:
        assert 0 < row["median"] <= row["p90"] <= row["p99"]
        assert row["pairs_per_second"] == pytest.approx(1000 * row["batch"] / row["median"])


def test_speedups_are_ratios_of_medians(document):
    medians = {(t["backend"], t["side"], t["batch"]): t["median"] for t in document["timings"]}
    assert len(document["speedups"]) == 4
    for row in document["speedups"]:
        dense, own, compact = (medians[row["backend"], side, row["batch"]] for side in ("dense", "own_dense", "compact"))
        assert row["speedup"]["value"] == pytest.approx(dense / compact)
        assert row["by_kernels"]["value"] == pytest.approx(dense / own)
        assert row["by_pruning"]["value"] == pytest.approx(own / compact)
        assert row["flops_efficiency"] == pytest.approx(own / compact / document["flops_reduction"])
        assert row["against_stock_torch"]["value"] == pytest.approx(medians["torch", "dense", row["batch"]] / compact)
        assert row["speedup"]["low"] <= row["speedup"]["value"] <= row["speedup"]["high"]


def test_flops_are_counted_and_agree_with_the_ratio(document):
    assert 1 - 1 / document["flops_reduction"] == pytest.approx(0.7, abs=0.01)
    assert document["flops_reduction"] == document["flops"]["dense"] / document["flops"]["compact"]


def test_the_baseline_is_the_stock_model(document, stock):
    assert document["params"]["dense"] == sum(p.numel() for p in stock.parameters())
    assert document["params"]["compact"] < document["params"]["dense"]


def test_the_third_side_says_what_the_stock_model_says(stock, inputs):
    own = variants.on_own_kernels(stock)
    assert type(own.vision_model.encoder.layers[0].self_attn).__name__ == "CompactAttention"
    with torch.inference_mode():
        torch.testing.assert_close(own(**inputs).itm_score, stock(**inputs).itm_score, atol=1e-5, rtol=0)
    assert own.itm_head.weight.data_ptr() == stock.itm_head.weight.data_ptr()  # shared, not copied
    assert not hasattr(stock.config, "comp")


def test_peak_memory_is_of_a_process_of_its_own(document):
    rows = {(row["backend"], row["side"]): row["bytes"] for row in document["peak_memory_bytes"]}
    assert len(rows) == 5  # own dense is on disk as a graph only
    # a process with ONNX Runtime alone is far smaller than one with torch: nothing is inherited from this process
    assert rows["onnx", "dense"] < rows["torch", "dense"]


def test_the_machine_is_recorded(document):
    where = document["machine"]
    assert where["torch"] == torch.__version__ and where["threads"] >= 1 and where["tf32"] is False
    assert document["gates"] == []


def test_a_baseline_that_does_not_fit(compact_folder):
    with pytest.raises(CompError, match="is a compact model"):
        bench.bench(compact_folder, str(compact_folder), BenchOptions(device="cpu"), Output("quiet"))


def test_a_compact_folder_knows_the_way_to_a_dense_one_nearby(tmp_path):
    """And names no path of the machine; it may be moved with it."""
    near, far = (hub.Source(tmp_path / place, "dense", None, "folder") for place in ("models/dense", "a/b/c/dense"))
    output = tmp_path / "out/compact"
    for place in (near.folder, output):
        place.mkdir(parents=True)
    way = near.address_from(output)
    assert way == "../../models/dense"
    assert far.address_from(tmp_path / "x/y/z/compact") is None
    assert bench.made_of(output, {"base_model": "dense", "base_address": way}) == str(near.folder)
    tmp_path.rename(tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved")
    assert bench.made_of(moved / "out/compact", {"base_address": way}) == str(moved / "models/dense")
    assert hub.Source(tmp_path, "org/x", "abc", "hub").address_from(output) == "hf://org/x@abc"


@pytest.mark.parametrize(
    "comp", [{"base_model": "dense", "base_address": None}, {"base_model": "dense", "base_address": "../gone"}, {}]
)
def test_without_one_the_baseline_is_asked_for(tmp_path, comp):
    with pytest.raises(CompError, match="dense|records no base model") as refused:
        bench.made_of(tmp_path, comp)
    assert refused.value.exit_code == 2 and "--baseline" in refused.value.hint


def test_a_pickled_baseline_is_taken_only_when_asked_for(compact_folder, tiny_folder, stock, tmp_path):
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    options = BenchOptions(device="cpu", backends=("torch",), batches=(1,), iterations=1, duration=0, text_tokens=12)
    with pytest.raises(CompError) as refused:
        bench.bench(compact_folder, str(tmp_path), options, Output("quiet"))
    assert refused.value.exit_code == 4
    found = bench.bench(compact_folder, str(tmp_path), options, Output("quiet"), hub_options=HubOptions(allow_pickle=True))
    assert [row.side for row in found.peak_memory_bytes] == ["dense", "compact"]


# Statistics ------------------------------------------------------------------------------------------------------------


def test_percentiles():
    row = timing.summary("torch", "dense", 4, [float(i) for i in range(1, 102)])
    assert (row.median, row.p90, row.p99) == (51, 91, 100)
    assert row.pairs_per_second == pytest.approx(4000 / 51)


def test_rounds_are_interleaved_and_turn_around():
    ran = []
    runners = {name: lambda inputs, name=name: ran.append(name) for name in "abc"}
    clock = iter(range(100))
    found = timing.rounds(runners, {}, clock=lambda: next(clock))
    assert [sorted(next(found)) for _ in range(3)] == [list("abc")] * 3
    assert "".join(ran) == "aabbcc" + "abc" + "cba" + "abc"  # two runs each to warm up


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Against a bootstrap written another way: one resample at a time, from the standard library."""
    noise = random.Random(1)
    before = [100 * noise.uniform(0.8, 1.2) for _ in range(21)]
    after = [50 * noise.uniform(0.8, 1.2) for _ in range(21)]
    found = timing.speedup(before, after)
    ratios = []
    for _ in range(4000):
        drawn = noise.choices(range(21), k=21)
        ratios.append(statistics.median(before[i] for i in drawn) / statistics.median(after[i] for i in drawn))
    ratios.sort()
    assert found.value == statistics.median(before) / statistics.median(after)
    assert (found.low, found.high) == pytest.approx((ratios[100], ratios[-100]), rel=0.03)
    assert found == timing.speedup(before, after) and found != timing.speedup(before, after, seed=1)


def test_noise_that_hits_a_whole_round_does_not_widen_the_interval():
    slow = np.random.default_rng(0).uniform(1, 10, 15)
    found = timing.speedup(60 * slow, 20 * slow)
    assert (found.low, found.value, found.high) == pytest.approx((3, 3, 3))


# Providers -------------------------------------------------------------------------------------------------------------


def test_the_provider_of_every_node_is_reported(document):
    for side in ("dense", "own_dense", "compact"):
        found = document["providers"][side]
        assert found["first"] == "CPUExecutionProvider" and found["tf32"] is False
        share = found["shares"]["CPUExecutionProvider"]
        assert share["nodes"] > 50 and share["node_share"] == share["time_share"] == 1


def test_shares_of_two_providers():
    def node(provider, ms):
        return profiling.Node("n", "MatMul", provider, (), (), ms)

    seen = profiling.Profile("CUDA", True, (node("CUDA", 3.0), node("CPU", 1.0), node("CUDA", 4.0), node("CUDA", 2.0)))
    assert seen.shares() == {
        "CUDA": {"nodes": 3, "node_share": 0.75, "time_share": 0.9},
        "CPU": {"nodes": 1, "node_share": 0.25, "time_share": 0.1},
    }


def test_the_missing_library_of_the_cuda_provider_is_named(tmp_path, monkeypatch):
    (tmp_path / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    assert "libonnxruntime_providers_cuda.so" in profiling.missing_library(tmp_path)
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(profiling, "missing_library", lambda folder: "libcublas.so.13: cannot open shared object file")
    with pytest.raises(CompError, match="libcublas.so.13") as refused:
        bench.check(BenchOptions(device="cuda", backends=("onnx",)))
    assert refused.value.exit_code == 5
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(CompError, match="built without it"):
        bench.check(BenchOptions(device="cuda", backends=("onnx",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers here")
def test_cuda_without_cuda_is_refused_before_anything_is_loaded():
    for backends in (("onnx",), ("torch",), ("torch", "onnx")):
        with pytest.raises(CompError) as refused:
            bench.check(BenchOptions(device="cuda", backends=backends))
        assert refused.value.exit_code == 5


# Gates and the picture -------------------------------------------------------------------------------------------------


def test_gates_take_the_worst_row_of_the_compact_model():
    speedups = [Speedup(*row, *[Factor(value, value, value)] * 3, 1.0) for *row, value in (("torch", 1, 2.5), ("onnx", 8, 1.5))]
    sides = (("torch", "compact", 40.0), ("onnx", "compact", 30.0), ("torch", "dense", 400.0))
    timings = [Latency(backend, side, 8, 3, median, median, median, 1.0, median, median) for backend, side, median in sides]
    measured = speedups, timings, [PeakMemory("torch", "compact", 8, 100 * 2**20)]
    found = gates.outcomes(Gates(2.0, 50.0, 90.0), *measured)
    assert found == (
        GateOutcome("min_speedup", limit=2.0, passed=False, found=1.5, backend="onnx", batch=8),
        GateOutcome("max_latency_ms", limit=50.0, passed=True, found=40.0, backend="torch", batch=8),
        GateOutcome("max_memory_mb", limit=90.0, passed=False, found=100.0, backend="torch", batch=8),
    )
    said = "--min-speedup 2 not met: the worst speed-up is 1.50x (onnx, batch 8)."
    assert gate_sentence(found[0]) == said
    assert gates.outcomes(Gates(min_speedup=1.5), *measured)[0].passed  # the limit itself passes
    assert gates.outcomes(Gates(), *measured) == ()


def test_a_missed_gate_carries_the_whole_report(compact_folder, tiny_folder, capsys):
    options = BenchOptions(
        device="cpu", backends=("torch",), batches=(1,), iterations=1, duration=0, text_tokens=12, gates=Gates(1000.0)
    )
    with pytest.raises(CompError, match="--min-speedup 1000 not met") as missed:
        bench.bench(compact_folder, str(tiny_folder), options, Output())
    assert missed.value.exit_code == 3 and capsys.readouterr().out == ""
    print_benchmark(missed.value.report, Output())
    assert "Speed-up of the compact model" in capsys.readouterr().out
    Output("json").error(missed.value)
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == 3 and len(document["timings"]) == 3
    assert [row["passed"] for row in document["gates"]] == [False]


def test_a_memory_gate_needs_a_backend_whose_memory_is_known():
    options = BenchOptions(device="cpu", backends=("compile",), gates=Gates(max_memory_mb=1))
    with pytest.raises(CompError, match="no backend whose memory is measured"):
        bench.check(options)


def test_the_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    check_plot(tmp_path / "a.png")
    plot(report, tmp_path / "a.png")
    from PIL import Image

    assert Image.open(tmp_path / "a.png").size == (1500, 630)


def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    for path in (tmp_path / "a.txt", tmp_path / "nowhere" / "a.png"):
        with pytest.raises(CompError, match="--plot") as refused:
            bench.check(BenchOptions(device="cpu", plot=path))
        assert refused.value.exit_code == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CompError, match="needs matplotlib"):
        bench.check(BenchOptions(device="cpu", plot=tmp_path / "a.png"))


# torch.compile ---------------------------------------------------------------------------------------------------------


def test_compile_is_refused_with_a_sentence_where_no_compiler_exists(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(CompError, match="torch.compile does not work here") as refused:
        bench.check(BenchOptions(device="cpu", backends=("compile",)))
    assert refused.value.exit_code == 5


@pytest.mark.slow
def test_compiled_models_are_a_backend(compact_folder, tiny_folder):
    options = BenchOptions(device="cpu", backends=("compile",), batches=(2,), iterations=2, duration=0, text_tokens=12)
    found = bench.bench(compact_folder, str(tiny_folder), options, Output("quiet"))
    assert {(t.backend, t.side) for t in found.timings} == {("compile", side) for side in variants.SIDES}
    assert found.peak_memory_bytes == () and found.speedups[0].against_stock_torch is None


@pytest.mark.gpu
def test_on_a_gpu_the_nodes_run_there(compact_folder, tiny_folder):
    options = BenchOptions(device="cuda", batches=(2,), iterations=2, duration=0, text_tokens=12)
    found = bench.bench(compact_folder, str(tiny_folder), options, Output("quiet"))
    assert {place.first for place in found.providers.values()} == {"CUDAExecutionProvider"}
    assert all(place.shares["CUDAExecutionProvider"].time_share > 0.5 for place in found.providers.values())
    assert {row.backend for row in found.peak_memory_bytes} == {"torch"}
