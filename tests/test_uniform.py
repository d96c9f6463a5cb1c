"""Uniform plans: every layer keeps as many units, and the folder is one of a stock class."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from test_decoder_engine import QUIET, options, wide  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.commands.analyze import analyze
from comp_cli.commands.prune import prune
from comp_cli.engine import flops
from comp_cli.engine.schedule import TOLERANCE
from comp_cli.engine.uniform import Uniform, spread
from comp_cli.errors import DeadEnd, RefusedError, UsageError
from comp_cli.models.dense import open_dense
from comp_cli.models.stock import class_refuses, config_refuses, written_sizes
from comp_cli.options import AnalyzeOptions
from comp_cli.search.run import space_of, with_modes
from comp_cli.search.uniform_plans import check_uniform, uniform_plans

HEADS, CHANNELS, VISION = ("language", "attention"), ("language", "ffn"), ("vision", "ffn")
PARAMETERS = ("language_params",)
MANY = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6}


def opened(place, model, processor=tiny.llava_processor):
    torch.manual_seed(0)
    model().eval().save_pretrained(place)
    processor().save_pretrained(place)
    return open_dense(str(place), QUIET, text_tokens=8)


def random_prices(plan):
    random = torch.Generator().manual_seed(0)
    return {
        (tower.name, index, part): torch.rand(len(units.units), generator=random, dtype=torch.double)
        for tower in plan.towers
        for index, layer in enumerate(tower.layers)
        for part, units in layer.parts.items()
    }


def uniform_of(dense, modes=PARAMETERS):
    dense = with_modes(dense, modes)
    return Uniform(space_of(dense, options(modes=modes), random_prices(dense.plan)))


@pytest.fixture(scope="module")
def dense(wide):  # noqa: F811
    return open_dense(str(wide), QUIET, text_tokens=8)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("qwen") / "dense", *tiny.DECODERS["qwen2.5-vl"])


# Plans -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [PARAMETERS, ("vision_params", *PARAMETERS)])
def test_every_pair_has_the_ratio_and_the_most_channels_of_it(modes, dense):
    uniform = uniform_of(dense, modes)
    total, found = uniform.space.total, uniform.of_ratio(0.3)
    assert len(found) > 1 and len({sizes[HEADS] for sizes in found}) == len(found)
    for sizes in found:
        plan = uniform.plan(sizes)
        assert flops.count(plan, dense.reference).total == uniform.flops(sizes) <= 0.7 * total
        assert sizes[CHANNELS] % 8 == 0
        if sizes[CHANNELS] < 256:
            assert uniform.flops(uniform.sizes(sizes[HEADS], sizes[CHANNELS] // 8 + 1)) > 0.7 * total
        else:
            assert uniform.flops(sizes) >= (0.7 - TOLERANCE) * total
        assert (VISION in sizes) == ("vision_params" in modes)
        if VISION in sizes:  # the same share of 64 channels, in steps of 8
            assert 0 <= sizes[VISION] - sizes[CHANNELS] / 4 < 8


def test_each_layer_keeps_its_own_dearest_units(dense):
    uniform = uniform_of(dense)
    plan = uniform.plan({HEADS: 3, CHANNELS: 100})
    for index, layer in enumerate(plan.tower("language").layers):
        for part, count in (("attention", 3), ("ffn", 100)):
            price = uniform.space.prices["language", index, part]
            assert layer.kept(part) == tuple(sorted(price.topk(count).indices.tolist()))
    assert len({layer.kept("ffn") for layer in plan.tower("language").layers}) == 5
    assert plan.tower("vision") == dense.plan.tower("vision") and not plan.stages


def test_a_few_of_many_are_spread_evenly():
    assert spread(range(4)) == [0, 1, 2, 3]
    assert spread(range(32)) == [0, 6, 12, 19, 25, 31]


def test_a_ratio_out_of_reach_is_said(dense):
    uniform = uniform_of(dense)
    assert not uniform.of_ratio(uniform.most + 0.01) and uniform.of_ratio(uniform.most - 0.001)
    with pytest.raises(DeadEnd, match="cannot be reached"):
        uniform_plans(dense, uniform.space, 0.99)


# What stock classes take -------------------------------------------------------------------------------------------------


def test_llama_takes_heads_that_divide_its_width(tmp_path):
    dense = opened(tmp_path / "dense", lambda: tiny.llava(text=MANY))  # 48 wide
    uniform = uniform_of(dense)
    said = {groups: config_refuses(dense, uniform.plan({HEADS: groups, CHANNELS: 64})) for groups in range(1, 9)}
    assert [groups for groups, why in said.items() if why is None] == [1, 2, 3, 4, 6, 8]
    assert "not a multiple of the number of attention heads (7)" in said[7]
    assert class_refuses(dense, uniform.plan({HEADS: 6, CHANNELS: 40})) is None
    assert {sizes[HEADS] for sizes, _ in uniform_plans(dense, uniform.space, 0.2)} <= {1, 2, 3, 4, 6, 8}


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_others_take_any_number_of_heads(kind, tmp_path):
    text = {"model_type": kind, "num_attention_heads": 14, "num_key_value_heads": 7, "head_dim": 6, "sliding_window": None}
    dense = opened(tmp_path / "dense", lambda: tiny.llava(text=text))
    plan = uniform_of(dense).plan({HEADS: 5, CHANNELS: 40})
    assert written_sizes(dense, plan) == {
        "text_config": {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 6, "intermediate_size": 40}
    }
    assert class_refuses(dense, plan) is None


def test_qwen2_5_takes_fewer_channels_only(qwen):
    uniform = uniform_of(qwen)
    assert class_refuses(qwen, uniform.plan({HEADS: 2, CHANNELS: 40})) is None
    why = class_refuses(qwen, uniform.plan({HEADS: 1, CHANNELS: 64}))
    assert why is not None and ("divisible" in why or "it makes" in why)
    assert [sizes[HEADS] for sizes, _ in uniform_plans(qwen, uniform.space, 0.1)] == [2]
    ratio = 1 - (uniform.flops({HEADS: 1, CHANNELS: 8}) + 1) / uniform.space.total
    with pytest.raises(RefusedError, match="is one that Qwen2_5_VLForConditionalGeneration takes"):
        uniform_plans(qwen, uniform.space, ratio)


def test_a_tower_whose_config_has_no_number_of_channels_cannot_lose_any(tmp_path):
    dense = opened(tmp_path / "dense", *tiny.DECODERS["qwen2-vl"])
    plan = uniform_of(dense, ("vision_params", *PARAMETERS)).plan({HEADS: 2, CHANNELS: 40, VISION: 40})
    assert config_refuses(dense, plan) == "the config of its vision tower has no intermediate_size"


def test_layers_of_unequal_sizes_are_nothing_for_a_stock_class(dense):
    layer = dense.plan.tower("language").layers[2].keeping("ffn", range(40))
    why = config_refuses(dense, dense.plan.with_layer("language", 2, layer))
    assert why == "layers of the language tower keep different numbers of units"


# Folders -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [None, ("vision_params", *PARAMETERS)], ids=["decoder", "tower too"])
def test_the_folder_is_one_of_the_stock_class_and_says_what_the_compact_model_says(modes, wide, dense, tmp_path):  # noqa: F811
    folder = tmp_path / "compact"
    report = prune(options(wide, uniform=True, modes=modes), folder, QUIET)
    assert 0.4 <= report.ratio <= 0.4 + TOLERANCE
    names = {path.name for path in folder.iterdir()}
    assert "comp_report.json" in names and not any(name.endswith(".py") for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and not {"comp", "auto_map"} & set(config)
    kept = report.plan.tower("language").layers[0]
    groups, channels = len(kept.kept("attention")), len(kept.kept("ffn"))
    written = {"num_key_value_heads": groups, "num_attention_heads": 2 * groups, "intermediate_size": channels}
    assert written.items() <= config["text_config"].items() and config["text_config"]["head_dim"] == 6
    assert (config["vision_config"]["intermediate_size"] < 64) == (modes is not None)
    stock, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    compact = dense.build(report.plan, load_file(folder / "model.safetensors"))
    inputs = dense.random_inputs(2, 8, padded=3)
    with torch.inference_mode():
        found, expected = (model(**inputs).logits for model in (stock.eval(), compact))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    best = min(report.compared, key=lambda look: look.loss)
    assert best.units["language attention"] == groups and best.units["language ffn"] == channels
    card = (folder / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained(folder" in card and "trust_remote_code" not in card
    assert open_dense(str(folder), QUIET, text_tokens=8).params(report.plan.within(report.plan)) == report.params.compact
    beside = analyze(AnalyzeOptions(str(folder)), QUIET).compact
    assert (beside.flops, beside.params, beside.ratio) == (report.flops, report.params, report.ratio)
    assert [(row.heads, row.ffn) for row in beside.layers] == [(row.heads, row.ffn) for row in report.layers]
    (folder / "config.json").write_text(json.dumps(config))  # whose report says nothing of it
    with pytest.raises(RefusedError, match="not about the config.json beside it"):
        analyze(AnalyzeOptions(str(folder)), QUIET)


NEXT = {
    "uniform": (["--uniform"], 'LlavaForConditionalGeneration.from_pretrained("'),
    "another size in every layer": (["--method", "random", "--no-recover"], "comp bench "),
}


@pytest.mark.parametrize("case", NEXT)
def test_the_command_line_says_what_was_made_and_what_to_do_with_it(case, wide, tmp_path):  # noqa: F811
    given, following = NEXT[case]
    sizes = [f"--{name}-samples={count}" for name, count in (("num", 4), ("eval", 2), ("stage", 4))]
    asked = ["prune", str(wide), "--ratio=0.4", "--modes=language_params", "--text-tokens=8", "--device=cpu", *sizes, *given]
    done = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "compact")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert f"Next: {following}" in said and "image tokens, mean over layers" in said
    command = json.loads((tmp_path / "compact" / "comp_report.json").read_text())["command"]
    assert "--modes language_params" in command and ("--uniform" in command) == (case == "uniform")
    assert command in (tmp_path / "compact" / "README.md").read_text()


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_a_ratio_without_such_a_plan_is_refused_before_statistics_are_gathered(wide, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("comp_cli.search.training_free.gather_statistics", None)
    with pytest.raises(DeadEnd, match="0.99 cannot be reached"):
        prune(replace(options(wide, uniform=True), ratio=0.99), tmp_path / "compact", QUIET)


REFUSED = {
    "a method without prices": ({"method": "wanda"}, "--method wanda makes no such plans"),
    "image tokens by a method": ({"tokens_method": "vitcop"}, "image tokens leave by such code"),
    "image tokens by mode": ({"modes": ("language_params", "image_tokens")}, "image tokens leave by such code"),
    "nothing of the decoder": ({"modes": ("vision_params",)}, "--uniform prunes the language model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_uniform_does_not_go_with_is_refused(case, wide, tmp_path):  # noqa: F811
    others, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        prune(options(wide, uniform=True, **others), tmp_path / "compact", QUIET)


def test_encoders_have_no_uniform_plans(tmp_path):
    blip = open_dense(str(tiny.write("blip", tmp_path / "blip")), QUIET, text_tokens=8)
    with pytest.raises(UsageError, match="--uniform is for image-text decoders, and this model is a BlipFor"):
        check_uniform(blip, replace(options(), uniform=True), True)
