"""`comp bench` and `comp analyze` of decoders that read images."""

import json
from dataclasses import replace

import jsonschema
import pytest
import tiny
import torch
from test_schema import strict
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig

import comp_cli
from comp_cli.checkpoint import loading
from comp_cli.cli.output import Output
from comp_cli.commands import bench
from comp_cli.commands.analyze_decoder import LEFT_OUT
from comp_cli.commands.bench_decoder import NO_GRAPHS
from comp_cli.data.batches import random_inputs
from comp_cli.engine import flops
from comp_cli.errors import CompError, GateError, UsageError
from comp_cli.families import find_family
from comp_cli.measure import decoding
from comp_cli.models.described import describe_dense
from comp_cli.options import BenchOptions, Gates
from comp_cli.plan import Plan, TokenStage
from comp_cli.report.analyze_tables import print_analysis
from comp_cli.report.bench_plot import plot
from comp_cli.report.bench_tables import print_benchmark

QUICK = {"device": "cpu", "batches": (1, 2), "iterations": 3, "duration": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.write("llava", tmp_path_factory.mktemp("llava") / "dense")


@pytest.fixture(scope="module")
def compact(dense):
    """Of 36 image tokens 12, 6 and 2 stay before layers 0, 1 and 3 of 5."""
    folder = dense.with_name("compact")
    comp_cli.prune(dense, method="vitcop", token_stages="0:12,1:6,3:2", output=folder)
    return folder


@pytest.fixture(scope="module")
def report(compact):
    return comp_cli.bench(compact, device="cpu", batch=(1, 2), iterations=3, duration=0)


def test_prompts_and_tokens_are_timed_equally_often(report):
    assert {(row.backend, row.side, row.batch) for row in report.timings} == {
        ("torch", side, batch) for side in ("dense", "compact") for batch in (1, 2)
    }
    assert {row.runs for row in report.timings} == {3}
    for row in report.generation:
        assert row.tokens_per_second == pytest.approx(1000 * row.batch / row.token_ms) and row.first_token_ms > 0
    medians = {(row.side, row.batch): row.median for row in report.timings}
    for row, faster in zip(report.speedups, report.generation_speedups, strict=True):
        assert row.speedup.value == pytest.approx(medians["dense", row.batch] / medians["compact", row.batch])
        assert row.flops_efficiency == pytest.approx(row.speedup.value / report.flops_reduction) and row.by_kernels is None
        times = {found.side: found.token_ms for found in report.generation if found.batch == row.batch}
        assert faster.decoding.value == pytest.approx(times["dense"] / times["compact"])
        assert faster.decoding_flops_efficiency == pytest.approx(faster.decoding.value / report.step_flops_reduction)


def test_the_cache_is_what_layers_hold(report):
    """5 layers, 40 tokens of text and template; keys and values of 2 heads, 12 wide, 4 bytes each."""
    whole, less = 5 * (36 + 40), 12 + 2 * 6 + 2 * 2 + 5 * 40
    held = {(row.side, row.batch): row.kv_cache_bytes for row in report.generation}
    assert held == {
        (side, batch): batch * tokens * 2 * 2 * 12 * 4
        for side, tokens in (("dense", whole), ("compact", less))
        for batch in (1, 2)
    }


def test_flops_are_those_of_the_plan(report, dense, compact):
    """Counted from what runs, and by formula; the clusters cost a little besides."""
    described = describe_dense(str(dense), Output("quiet"))
    plans = {"dense": described.plan, "compact": Plan.from_json(json.loads((compact / "comp_report.json").read_text())["plan"])}
    for side, plan in plans.items():
        assert getattr(report.flops, side) == pytest.approx(flops.count(plan, described.reference).total, rel=0.01)
        assert getattr(report.step_flops, side) == flops.decode_step(plan, described.reference).total
    assert (report.image_tokens, report.text_tokens) == (36, 35)


def test_peak_memory_is_of_a_process_of_its_own(report):
    assert [(row.backend, row.side, row.batch) for row in report.peak_memory_bytes] == [
        ("torch", s, 2) for s in ("dense", "compact")
    ]
    assert all(row.bytes > 2**26 for row in report.peak_memory_bytes)


def test_graphs_are_left_out_with_a_sentence(report, compact):
    left_out, *others = report.warnings
    assert left_out == NO_GRAPHS and report.providers == {}
    assert all(line.startswith("the spread is large") for line in others)  # which three rounds on a busy machine may be
    for backends, said in ((("onnx",), "runs no graphs"), (("torch", "compile"), "torch.compile is not for")):
        with pytest.raises(UsageError, match=said):
            bench.bench(compact, None, BenchOptions(**QUICK | {"backends": backends}), Output("quiet"))


def test_the_document_is_that_of_the_schema(report):
    document = report.to_json()
    jsonschema.validate(document, strict("bench"))
    assert document["image_tokens"] == 36 and document["speedups"][0]["by_kernels"] is None


def test_tables_and_picture(report, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    print_benchmark(report, Output())
    said = capsys.readouterr().out
    for words in ("stock transformers, batch 2", "tokens / s", "FLOPs of a token behind it", "36 image and 35 text tokens"):
        assert words in said
    assert "comp runtime" not in said
    plot(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_gate_looks_at_prompts(compact):
    options = BenchOptions(**QUICK | {"batches": (1,), "iterations": 1, "backends": ("torch",)}, gates=Gates(min_speedup=1000))
    with pytest.raises(GateError, match="the worst speed-up is .* \\(torch, batch 1\\)") as missed:
        bench.bench(compact, None, options, Output("quiet"))
    assert missed.value.report.generation[0].batch == 1 and missed.value.report.warnings == ()


def test_steps_leave_the_cache_as_it_was(compact):
    """Every run of the same steps costs the same, and says the same."""
    model = loading.load_model(compact, dtype=torch.float32)
    described = model.config
    prompt = decoding.prompt_of(random_inputs(described, find_family(described.to_dict())[0], 2, 12))
    steps = decoding.Steps(model, prompt)
    before = [layer.keys.clone() for layer in steps.cache.layers]
    steps({})
    for layer, keys in zip(steps.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and layer.get_seq_length() == prompt["input_ids"].shape[1]


def test_steps_on_a_static_cache_are_not_compiled(dense, compact):
    """On a GPU `generate` would compile them; here it is asked to on any device."""
    on_any = CompileConfig(backend="no such compiler")
    on_any._compile_all_devices = True
    for folder, compiles in ((compact, False), (dense, True)):
        model = loading.load_model(folder, dtype=torch.float32)
        described = loading.config_of(model)
        prompt = decoding.prompt_of(random_inputs(described, find_family(described.to_dict())[0], 1, 12))
        options = {"cache_implementation": "static", "max_new_tokens": 3, "min_new_tokens": 3, "compile_config": on_any}
        if compiles:
            with pytest.raises(Exception, match="no such compiler"):
                model.generate(**prompt, **options)
        else:
            assert model.generate(**prompt, **options).shape[1] == prompt["input_ids"].shape[1] + 3


@pytest.mark.gpu
def test_on_a_gpu(compact):
    found = bench.bench(compact, None, BenchOptions(**QUICK | {"device": "cuda"}), Output("quiet"))
    assert found.machine.device.startswith("cuda") and all(row.bytes > 0 for row in found.peak_memory_bytes)


def test_a_folder_of_another_model_is_no_baseline(compact):
    with pytest.raises(CompError, match="is a compact model"):
        bench.bench(compact, str(compact), BenchOptions(**QUICK), Output("quiet"))


# comp analyze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in tiny.DECODERS if name != "smolvlm"])  # whose processor needs torchvision
def test_parts_of_a_decoder_add_up(family, tmp_path):
    found = comp_cli.analyze(tiny.write(family, tmp_path), device="cpu")
    parts = {one.part: one for one in found.decoder.parts}
    stock = tiny.DECODERS[family][0]()
    modules = {"vision tower": "visual" if "qwen" in family else "vision_tower", "decoder layers": "language_model.layers"}
    for part, path in modules.items():
        assert parts[part].params == sum(p.numel() for p in stock.model.get_submodule(path).parameters())
    assert sum(one.params for one in parts.values()) == found.params.total == sum(p.numel() for p in stock.parameters())
    assert sum(one.flops for one in parts.values()) == found.flops.total
    assert parts["logits"].flops == parts["logits"].step_flops == 2 * stock.lm_head.weight.numel()
    assert parts["vision tower"].flops > 0 and parts["vision tower"].step_flops == 0 and parts["embeddings"].flops == 0
    pixels = prompt_of_tiny(stock)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stock.model.get_image_features(**pixels)
    encoded = parts["vision tower"].flops + parts["projector"].flops
    assert encoded == pytest.approx(counter.get_total_flops(), rel=0.02)


def prompt_of_tiny(stock):
    """Pixels of a reference image."""
    stock.config.architectures = [type(stock).__name__]
    made = random_inputs(stock.config, find_family(stock.config.to_dict())[0], 1, 12)
    return {name: made[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in made}


def test_what_leaving_tokens_would_save(dense, capsys):
    found = comp_cli.analyze(dense, device="cpu")
    described = describe_dense(str(dense), Output("quiet"))
    assert found.decoder.kv_cache_bytes == 5 * (36 + 40) * 2 * 2 * 12 * 4
    assert [round(saving.tokens) for saving in found.decoder.savings] == [12, 8, 4]
    for saving in found.decoder.savings:
        tokens = [tuple(map(int, stage.split(":"))) for stage in saving.stages.split(",")]
        plan = replace(described.plan, stages=tuple(TokenStage(layer, "stride", count) for layer, count in tokens))
        assert saving.flops == flops.count(plan, described.reference).total
        assert saving.flops_reduction == pytest.approx(found.flops.total / saving.flops)
        assert saving.kv_cache_bytes == sum(flops.kv_bytes(plan, described.reference, 4)) < found.decoder.kv_cache_bytes
    assert found.warnings == (LEFT_OUT,) and found.diagnostics is None and found.samples == 0
    jsonschema.validate(found.to_json(), strict("analyze"))
    print_analysis(found, Output(), "a model", ["--task", "vqa"])
    said = capsys.readouterr().out
    assert (
        "What it would save if image tokens left" in said
        and "comp prune 'a model' --method vitcop --tokens 4 --task vqa" in said
    )


def test_pairs_are_not_taken_and_ignored(dense, tmp_path):
    with pytest.raises(UsageError, match="nothing of a decoder that reads images is measured on pairs"):
        comp_cli.analyze(dense, data=tmp_path)
