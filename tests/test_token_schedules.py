"""From a number of tokens to stages: golden values of the published schedules, and properties at any size."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comp_cli.engine.token_schedules import (
    BEFORE,
    INSIDE,
    STAGED,
    TOKEN_METHODS,
    mean_tokens,
    parse_stages,
    saliency_note,
    stages,
)
from comp_cli.errors import UsageError
from comp_cli.plan import TokenStage
from comp_cli.runtime.token_rules import OF_THE_LAYER_BEFORE, STAGE_RULES, may_be_first

LLAVA = {"image_tokens": 576, "layers": 32, "class_token": True}


def made(method="vitcop", tokens=64, share=None, fixed_size=True, **other):
    return stages(method, tokens=tokens, share=share, fixed_size=fixed_size, **{**LLAVA, **other})


def kept(found):
    return [(stage.layer, stage.keep) for stage in found]


@pytest.mark.parametrize(
    "tokens, image_tokens, layers, expected, centres, mean",
    [
        (192, 576, 32, [(0, 288), (2, 253), (22, 51)], 51, 192.06),  # the three presets of the authors' script
        (128, 576, 32, [(0, 230), (2, 165), (22, 33)], 34, 127.81),
        (64, 576, 32, [(0, 172), (2, 77), (22, 15)], 20, 63.56),
        (320, 2880, 32, [(0, 864), (2, 387), (22, 77)], 103, 319.94),
        (144, 1296, 28, [(0, 388), (2, 173), (19, 35)], 46, 144.0),
        (16, 144, 6, [(0, 43), (1, 16), (4, 3)], 5, 16.17),
        (48, 144, 4, [(0, 72), (1, 55), (3, 11)], 12, 48.25),
    ],
)
def test_vitcop_has_the_stages_of_the_formula(tokens, image_tokens, layers, expected, centres, mean):
    """V = int(r_v V0), S = round((L rho V0 - s V) / ((d - s) + 0.2 (L - d))), D = round(S / 5), worked out apart from comp."""
    found = made(tokens=tokens, image_tokens=image_tokens, layers=layers)
    assert kept(found) == expected
    assert [stage.rule for stage in found] == ["cls-clusters", "cluster-merge", "key-norm"]
    assert int(found[0].settings["centre_share"] * found[0].keep) == centres
    assert mean_tokens(found, image_tokens, layers) == pytest.approx(mean, abs=0.005)


def test_pyramiddrop_halves_twice_and_reproduces_the_published_shares():
    found = made("pyramiddrop")
    assert kept(found) == [(2, 64), (8, 32), (16, 16)]  # .111, .056, .028 of 576
    assert [round(stage.keep / 576, 3) for stage in found] == [0.111, 0.056, 0.028]
    assert mean_tokens(found, 576, 32) == 64  # (2 * 576 + 6 * 64 + 8 * 32 + 16 * 16) / 32


@pytest.mark.parametrize(
    "tokens, published", [(192, [300, 200, 110]), (128, [303, 110, 36]), (96, [238, 48, 26]), (64, [66, 30, 17])]
)
def test_sparsevlm_has_its_published_lists_and_their_shape_elsewhere(tokens, published):
    found = made("sparsevlm", tokens)
    assert kept(found) == list(zip([2, 6, 15], published, strict=True))
    larger = made("sparsevlm", 5 * tokens, image_tokens=2880)
    assert mean_tokens(larger, 2880, 32) == pytest.approx(5 * tokens, abs=0.5)
    ratios = [round(stage.keep / larger[0].keep, 2) for stage in larger]
    assert ratios == pytest.approx([count / published[0] for count in published], abs=0.011)


def test_one_shot_methods_keep_the_number_that_was_asked_for():
    for method in TOKEN_METHODS.keys() - set(STAGED):
        (stage,) = made(method)
        assert (stage.keep, stage.layer) == (64, 2 if method in ("fastv", "dart") else 0)


def test_a_share_is_a_number_where_images_are_of_one_size_and_stays_one_elsewhere():
    assert made(tokens=None, share=1 / 9) == made(tokens=64)
    found = made(tokens=None, share=1 / 9, fixed_size=False)
    assert all(stage.keep is None for stage in found)
    # V = 0.3; S = (32 / 9 - 2 * 0.3) / (20 + 2) = 0.134343; D = S / 5
    assert [stage.share for stage in found] == pytest.approx([0.3, 0.134343, 0.026869], abs=1e-6)
    assert [stage.left(576) for stage in found] == [173, 78, 16]
    assert kept(made("divprune", None, 0.25, fixed_size=False)) == [(0, None)]


def test_towers_without_cls_are_ranked_in_another_way_and_the_user_is_told():
    rules = {saliency: [stage.rule for stage in made(class_token=False, saliency=saliency)] for saliency in (None, "key-norm")}
    assert rules[None] == ["diverse-clusters", "cluster-attention", "last-attention"]
    assert rules["key-norm"] == ["diverse-clusters", "cluster-merge", "key-norm"]
    assert "63 to 74 %" in saliency_note("vitcop", False, "key-norm")
    assert "not the paper's" in saliency_note("vitcop", False, None)
    assert saliency_note("vitcop", True, None) is None and saliency_note("tops", False, None) is None
    assert made("tops", class_token=False)[0].settings == {"relevance": "text"}
    assert made("tops")[0].settings == {"relevance": "class"}


def test_compat_reaches_the_stage_that_merges():
    assert [dict(stage.settings).get("compat") for stage in made(compat=True)] == [None, True, None]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(tokens=5), "--tokens from 9 to 430"),
        (dict(tokens=500), "--tokens from 9 to 430"),
        (dict(tokens=0), "--tokens from 9"),
        (dict(tokens=None, share=0.9, fixed_size=False), "--tokens-share from 0.014 to 0.749"),
        (dict(tokens=None), "--tokens or --tokens-share"),
        (dict(tokens=64, share=0.1), "--tokens or --tokens-share"),
        (dict(tokens=64, share=0.1, fixed_size=False), "--tokens or --tokens-share"),
        (dict(method="divprune", tokens=576), "--tokens from 1 to 575"),
        (dict(method="pyramiddrop", tokens=36), "--tokens from 38 to 287"),
        (dict(method="visionzip", class_token=False), "tops or divprune"),
        (dict(method="tops", compat=True), "Leave it out"),
        (dict(method="tops", saliency="key-norm"), "Leave it out"),
        (dict(saliency="norm"), "key-norm, attention"),
        (dict(method="wanda"), "Use one of cover, vitcop"),
        (dict(layers=2), "tops or divprune"),
        (dict(method="fastv", layers=1), "layer 1 or a later one"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(arguments, words):
    with pytest.raises(UsageError) as error:
        made(**arguments)
    assert words in error.value.hint


def test_the_range_that_a_refusal_names_works_at_both_ends():
    for tokens in (9, 430):
        made(tokens=tokens)
    for tokens in (8, 431):
        with pytest.raises(UsageError):
            made(tokens=tokens)


@given(st.sampled_from(sorted(TOKEN_METHODS)), st.integers(4, 64), st.integers(4, 1500), st.floats(0.01, 0.99), st.booleans())
def test_schedules_of_any_size_fall_at_every_stage_and_keep_the_mean_or_are_refused(method, layers, image_tokens, share, cls):
    model = {"layers": layers, "image_tokens": image_tokens, "class_token": cls}
    try:
        found = made(method, max(1, round(share * image_tokens)), **model)
    except UsageError as error:
        assert error.hint
        return
    counts = [image_tokens, *(stage.keep for stage in found)]
    assert all(0 < after < before for before, after in zip(counts, counts[1:], strict=False))
    places = [stage.layer for stage in found]
    assert places == sorted(set(places)) and places[-1] < layers
    published = image_tokens == 576 and method == "sparsevlm"
    if method in STAGED and not published:  # each stage is rounded to whole tokens
        assert abs(mean_tokens(found, image_tokens, layers) - max(1, round(share * image_tokens))) <= 1.5


@given(st.sampled_from(sorted(TOKEN_METHODS)), st.integers(4, 64), st.floats(0.01, 0.99), st.booleans())
def test_shares_fall_at_every_stage_and_keep_the_mean_or_are_refused(method, layers, share, cls):
    try:
        found = made(method, None, share, fixed_size=False, layers=layers, class_token=cls)
    except UsageError as error:
        assert error.hint
        return
    counts = [1.0, *(stage.share for stage in found)]
    assert all(0 < after < before for before, after in zip(counts, counts[1:], strict=False))
    if method in STAGED:
        assert mean_tokens(found, 10**6, layers) / 10**6 == pytest.approx(share, abs=2e-5)


def test_stages_are_read_one_by_one():
    assert parse_stages("0:172,2:77,22:15", "vitcop", **LLAVA) == made(tokens=64)
    found = parse_stages("0:0.3, 2:0.13,22:0.03", "vitcop", **LLAVA)
    assert [stage.share for stage in found] == [0.3, 0.13, 0.03] and found[0].settings == {"centre_share": 0.12}
    assert parse_stages("1:9", "random-token", **LLAVA) == (TokenStage(1, "random", 9),)
    twice = parse_stages("0:128,16:32", "tops", **LLAVA)
    assert [stage.settings["relevance"] for stage in twice] == ["class", "last"]


@pytest.mark.parametrize(
    "text, method",
    [
        ("", "tops"),
        ("0", "tops"),
        ("0:a", "tops"),
        ("0:1:2", "tops"),
        ("0:576", "tops"),
        ("0:0", "tops"),
        ("0:-3", "tops"),
        ("-1:5", "tops"),
        ("32:5", "tops"),
        ("0:1.5", "tops"),
        ("0:0.5,2:9", "tops"),
        ("0:nan,1.:3", "tops"),
        ("2:9,2:8", "tops"),
        ("3:9,2:8", "tops"),
        ("2:9,3:9", "tops"),
        ("0:64", "fastv"),
        ("0:64", "vitcop"),
        ("1:172,2:77,22:15", "vitcop"),
        ("2:64", "visionzip"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_a_hint(text, method):
    with pytest.raises(UsageError) as error:
        parse_stages(text, method, **LLAVA)
    assert error.value.hint


def test_the_mean_is_over_layers():
    found = (TokenStage(1, "stride", 50), TokenStage(3, "stride", share=0.05))
    assert mean_tokens(found, 100, 4) == (100 + 50 + 50 + 5) / 4
    assert mean_tokens((), 100, 4) == 100


def test_every_stage_has_a_rule_of_the_runtime_that_may_stand_there():
    for method in TOKEN_METHODS:
        for cls in (True, False):
            if method == "visionzip" and not cls:
                continue
            for stage in made(method, class_token=cls):
                assert stage.layer > 0 or may_be_first(stage.rule, stage.settings)
    assert {name for name, rule in STAGE_RULES.items() if rule.needs & OF_THE_LAYER_BEFORE} == INSIDE
    assert BEFORE < STAGE_RULES.keys()


def test_it_is_light_to_import():
    code = "import sys, comp_cli.engine.token_schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
