"""`comp prune --dry-run`: what it expects, against what the run ends with, and against what a whole model takes."""

import time

import pytest
import tiny
import torch
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.commands import prune_estimate
from comp_cli.errors import DeadEnd, UsageError
from comp_cli.measure import layer_times
from comp_cli.models import described
from comp_cli.models.described import describe_dense
from comp_cli.progress import Silent

FAST = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
FAMILIES = ("blip", "clip", "siglip", "llava")


@pytest.fixture
def assumes(monkeypatch):
    """As of a model that takes long to be searched."""
    monkeypatch.setattr(prune_estimate, "FLOPS_OF_A_SEARCH", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_searching_takes_seconds_the_estimate_is_exact(family, tmp_path):
    folder = tiny.write(family, tmp_path / "dense")
    expected = comp_cli.prune(folder, ratio=0.4, dry_run=True, **FAST)
    found = comp_cli.prune(folder, ratio=0.4, output=tmp_path / "compact", **FAST)
    assert (expected.params, expected.flops, expected.plan) == (found.params, found.flops, found.plan)
    assert expected.estimate.assumed is None and set(expected.estimate.params) == {found.params.compact}
    assert expected.size_bytes.dense == found.size_bytes.dense
    assert expected.size_bytes.compact == pytest.approx(found.size_bytes.compact, rel=0.05)  # the header is guessed


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_assumed_is_about_what_the_run_ends_with(family, tmp_path, assumes):
    folder = tiny.write(family, tmp_path / "dense")
    expected = comp_cli.prune(folder, ratio=0.4, dry_run=True, **FAST)
    found = comp_cli.prune(folder, ratio=0.4, output=tmp_path / "compact", **FAST)
    assert expected.flops.dense == found.flops.dense and expected.params.dense == found.params.dense
    assert expected.flops.compact == pytest.approx(found.flops.compact, rel=0.03)
    assert expected.size_bytes.dense == found.size_bytes.dense
    (least, most), (smallest, largest) = expected.estimate.params, expected.estimate.size_bytes
    assert least <= expected.params.compact <= most < found.params.dense
    assert 0.9 * least <= found.params.compact <= 1.1 * most
    assert 0.9 * smallest <= found.size_bytes.compact <= 1.1 * largest


def test_a_search_that_takes_too_long_is_left(tiny_folder, monkeypatch):
    monkeypatch.setattr(prune_estimate, "SECONDS_OF_A_SEARCH", 0.0)
    report = comp_cli.prune(tiny_folder, ratio=0.4, dry_run=True, **FAST)
    assert "of the reduction" in report.estimate.assumed and report.estimate.params[0] < report.estimate.params[1]


WAYS = {"search": {"ratio": 0.4}, "several": {"ratio": (0.3, 0.4)}, "target": {"target_speedup": 1.5}, "tokens": {"tokens": 9}}


@pytest.mark.parametrize("way", WAYS)
def test_data_that_is_not_there_is_refused_as_by_the_run(way, tmp_path, assumes):
    dense = tiny.write("llava" if way == "tokens" else "clip", tmp_path / "dense")
    with pytest.raises(UsageError, match=r"nowhere\.jsonl: no such file"):
        comp_cli.prune(dense, dry_run=True, data=tmp_path / "nowhere.jsonl", **WAYS[way])


@pytest.mark.parametrize("method", ["wanda", "obs", "token", "joint", "comp-paper"])
def test_every_kind_of_method_has_an_estimate(method, tiny_folder, tmp_path, assumes):
    how = FAST | {"ratio": 0.33 if method == "token" else 0.3, "method": method}  # whole tokens of a tiny image
    expected = comp_cli.prune(tiny_folder, dry_run=True, **how)
    found = comp_cli.prune(tiny_folder, output=tmp_path / "compact", stages=4 if method == "comp-paper" else None, **how)
    assert expected.flops.compact == pytest.approx(found.flops.compact, rel=0.03)
    if method == "token":  # parameters stay, but for the zeros that tell the classes apart
        assert expected.params == found.params


def test_sizes_are_those_of_the_plan(tiny_folder, tmp_path):
    """An estimate whose plan is taken: the sizes of a model that is built of it."""
    expected = comp_cli.prune(tiny_folder, ratio=0.4, dry_run=True, **FAST)
    from comp_cli.cli.output import Output
    from comp_cli.models.dense import open_dense

    model = open_dense(str(tiny_folder), Output("quiet"), text_tokens=12).runtime(expected.plan)
    assert expected.params.compact == sum(parameter.numel() for parameter in model.parameters())
    assert expected.size_bytes.compact == pytest.approx(4 * expected.params.compact, rel=0.03)


def test_nothing_but_headers_is_read_of_a_large_model(tiny_folder, tmp_path, monkeypatch, assumes):
    from comp_cli.checkpoint import loading
    from comp_cli.models import pairs

    for module, name in ((loading, "load_model"), (pairs, "choose_pairs"), (pairs, "batches_of")):
        monkeypatch.setattr(module, name, lambda *given, **more: pytest.fail("weights or data were read"))
    (tmp_path / "pairs.jsonl").write_text("no pairs")
    assert comp_cli.prune(tiny_folder, ratio=0.5, data=tmp_path / "pairs.jsonl", dry_run=True).estimate.latency_ms


def test_a_short_model_takes_as_long_as_the_whole_one(monkeypatch, tmp_path):
    """Towers of 6 layers that are alike, in one of each: by the clock of the short model, against passes of the whole model."""
    import transformers

    torch.manual_seed(0)
    config = tiny.blip_config()
    for section in (config.vision_config, config.text_config):
        section.num_hidden_layers = 6
    whole = transformers.BlipForImageTextRetrieval(config).eval()
    whole.save_pretrained(tmp_path)
    tiny.blip_processor().save_pretrained(tmp_path)
    model = describe_dense(str(tmp_path), Silent(), text_tokens=12)
    short = layer_times.shorten(model.plan, model.reference, config.to_dict())
    assert [len(tower.layers) for tower in short.plan.towers] == [1, 1] and set(short.times.values()) == {(6,)}
    slow = 0.004  # of each layer, far above what its tensors take

    def pause(*given):
        time.sleep(slow)

    timed = layer_times.build(model, short, stock=True)
    clock = layer_times.Clock(torch.device("cpu"))
    clock.now = time.perf_counter
    for tower in model.family.towers:
        for layer in layer_times.tower_layers(timed, tower):
            layer.register_forward_hook(pause)
    inputs = layer_times.random_inputs(model.hf_config, model.family, 1, 12)
    with clock.watching(model, [(timed, short)]), torch.inference_mode():
        begin = clock()
        timed(**inputs)
        taken = clock() - begin
    assert taken > 12 * slow  # and twice what was slept


def test_latency_falls_with_the_ratio(tiny_folder):
    dense, model = 0.0, describe_dense(str(tiny_folder), Silent(), text_tokens=12)
    found = layer_times.latencies(model, model.plan, torch.device("cpu"))
    dense = found.dense
    assert 0 < found.compact < 3 * dense  # the same plan on the runtime's kernels


def test_a_model_that_does_not_fit_has_sizes_and_no_latency(tmp_path, monkeypatch):
    folder = tiny.write("llava", tmp_path / "dense")
    monkeypatch.setattr(layer_times.memory, "allowed", lambda: 1000)
    report = comp_cli.prune(folder, ratio=0.4, dry_run=True, **FAST)
    assert report.estimate.latency_ms is None and "GiB" in report.estimate.latency
    assert report.params.compact < report.params.dense
    assert report.estimate.peak_weights_bytes < 8 * report.params.dense  # layer by layer


def test_several_ratios_are_estimated_at_once(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(described, "read_headers", lambda *given, real=described.read_headers: calls.append(1) or real(*given))
    report = comp_cli.prune(tiny_folder, ratio=[0.2, 0.6], dry_run=True, **FAST)
    first, second = report.points
    assert first.params.compact > second.params.compact and first.folder is second.folder is None and len(calls) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("work", [0, prune_estimate.FLOPS_OF_A_SEARCH])
def test_what_cannot_be_is_refused_as_by_the_run(work, tiny_folder, monkeypatch):
    monkeypatch.setattr(prune_estimate, "FLOPS_OF_A_SEARCH", work)
    for how in ({"ratio": 0.999}, {"ratio": 0.99, "method": "wanda"}):
        with pytest.raises(DeadEnd, match="cannot be reached"):
            comp_cli.prune(tiny_folder, dry_run=True, **how)
    with pytest.raises(UsageError, match="--max-drop"):
        comp_cli.prune(tiny_folder, ratio=0.5, max_drop=1.0, dry_run=True)
    with pytest.raises(UsageError, match="--dry-run and --plan-only"):
        comp_cli.prune(tiny_folder, ratio=0.5, plan_only=True, dry_run=True)


def test_it_says_that_it_is_an_estimate(tiny_folder, monkeypatch, tmp_path, assumes):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["prune", str(tiny_folder), "--ratio", "0.5", "--dry-run"]).stdout
    assert "Assumed plan" in said and "Estimate" in said and "latency on cpu" in said and "--plan-only" in said


def test_it_says_that_the_plan_is_that_of_the_search(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["prune", str(tiny_folder), "--ratio", "0.5", "--num-samples", "8", "--text-tokens", "12", "--dry-run"]
    said = CliRunner().invoke(app, words).stdout
    assert "that of the search" in said and "Assumed" not in said and not list(tmp_path.iterdir())
