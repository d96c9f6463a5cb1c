"""Where a curve falls through zero: known curves, noise, steps, and ends that nothing reaches."""

import math
import random

import pytest

from comp_cli.engine.crossing import crossing, settle

CURVES = {
    "a line": lambda ratio: 0.37 - ratio,
    "a bend": lambda ratio: math.log((1 - ratio) / (1 - 0.37)),
    "flat, then steep": lambda ratio: 1.0 if ratio < 0.37 else -50.0,
    "steep, then flat": lambda ratio: 50.0 if ratio < 0.37 else -1e-6,
}


def counted(curve):
    asked = []

    def call(ratio):
        asked.append(ratio)
        return at(curve)(ratio)

    return call, asked


def at(curve):
    """A curve that has every ratio at which it has a value."""
    return lambda ratio: None if (value := curve(ratio)) is None else (ratio, value)


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_that_falls_is_bracketed(name):
    curve, asked = counted(CURVES[name])
    found = crossing(curve, 0.0, 0.95, 0.01)
    assert found.above <= 0.37 + 1e-6 and 0.37 - 1e-6 <= found.below <= found.above + 0.01 + 1e-6
    assert len(asked) == len(set(asked)) <= 16
    assert all(ratio == round(ratio, 3) for ratio in asked)


def test_a_line_takes_few_questions():
    curve, asked = counted(CURVES["a line"])
    crossing(curve, 0.0, 0.95, 0.01)
    assert len(asked) <= 6


@pytest.mark.parametrize("seed", range(20))
def test_noise_leaves_a_bracket_of_measured_ends_near_the_crossing(seed):
    noise, seen = random.Random(seed), {}

    def curve(ratio):
        return seen.setdefault(ratio, 0.5 - ratio + noise.gauss(0, 0.01))

    found = crossing(at(curve), 0.0, 0.95, 0.01)
    assert seen[found.above] > 0 >= seen[found.below] and 0 < found.below - found.above <= 0.01 + 1e-6
    assert abs(found.above - 0.5) < 0.06


def test_a_curve_that_rises_again_ends_at_one_of_its_crossings():
    found = crossing(at(lambda ratio: math.cos(12 * ratio)), 0.0, 0.95, 0.01)
    assert math.cos(12 * found.above) > 0 >= math.cos(12 * found.below)


def test_what_nothing_reaches_has_no_lower_end():
    curve, asked = counted(lambda ratio: 2 - ratio)
    assert crossing(curve, 0.0, 0.95, 0.01).below is None and asked[-1] == 0.95
    found = crossing(at(lambda ratio: 1 - ratio if ratio <= 0.52 else None), 0.0, 0.95, 0.01)
    assert found.below is None and 0.51 <= found.above <= 0.52


def test_ratios_that_no_plan_has_lie_beyond():
    found = crossing(at(lambda ratio: 0.5 - ratio if ratio <= 0.52 else None), 0.0, 0.95, 0.01)
    assert found.above <= 0.5 <= found.below <= 0.52


def test_the_end_itself_may_be_what_reaches():
    assert crossing(at(lambda ratio: 0.949 - ratio), 0.0, 0.95, 0.01).below == 0.95


@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize("bias", [-0.1, 0.0, 0.1])
def test_a_guide_that_errs_is_anchored_where_the_curve_was_measured(least, bias):
    """The guide is off by `bias`, and right at the last ratio that was measured."""
    last = {"ratio": None}
    asked = []

    def whole(ratio):
        asked.append(ratio)
        last["ratio"] = ratio
        return 0.4 - ratio

    def guide(ratio):
        off = bias if last["ratio"] is None else bias * abs(ratio - last["ratio"])
        return 0.4 - ratio + off

    found = settle(at(whole), at(guide), 0.0, 0.95, 0.01, 0.4, least=least, most=6)
    assert len(asked) <= 6
    if least:
        assert 0.4 <= found.below <= 0.43
    else:
        assert 0.37 <= found.above <= 0.4


@pytest.mark.parametrize("least", [True, False])
def test_a_right_guide_needs_few_measurements(least):
    whole, asked = counted(CURVES["a bend"])
    found = settle(whole, at(CURVES["a bend"]), 0.0, 0.95, 0.01, 0.46, least=least, most=6)
    assert len(asked) <= 2 and abs((found.below if least else found.above) - 0.37) <= 0.01


def test_a_guide_that_sees_no_way_is_left_for_small_steps():
    whole, asked = counted(lambda ratio: 0.015 - ratio)
    assert settle(whole, lambda ratio: None, 0.0, 0.95, 0.01, 0.015, least=True, most=6).below == 0.02
    assert asked == [0.01, 0.02]


def test_nothing_settles_where_every_ratio_is_out_of_reach():
    found = settle(lambda ratio: None, at(lambda ratio: 0.3 - ratio), 0.0, 0.95, 0.01, 0.3, least=True, most=4)
    assert found.above == 0.0 and found.below is None


def test_where_plans_have_gaps_the_plan_beside_is_taken():
    """Plans at every twentieth: what is asked between them is answered by the next one."""

    def whole(ratio):
        near = math.ceil(round(20 * ratio, 6)) / 20
        return near, 0.37 - near

    found = settle(whole, at(lambda ratio: 0.37 - ratio), 0.0, 0.95, 0.01, 0.37, least=True, most=6)
    assert found.below == 0.4
    found = crossing(whole, 0.0, 0.95, 0.01)
    assert found.below == 0.4


def test_ends_that_are_known_are_not_asked_again():
    curve, asked = counted(lambda ratio: 0.5 - ratio)
    assert crossing(curve, 0.4, 0.6, 0.01, 0.1, -0.1).below == pytest.approx(0.5, abs=0.01)
    assert set(asked) <= {ratio for ratio in asked if 0.4 < ratio < 0.6} and len(asked) <= 3
