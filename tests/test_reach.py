"""A ratio that is advised where another is out of reach works when it is followed."""

import re

import pytest
import tiny

import comp_cli
from comp_cli.errors import DeadEnd

FEW = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}


def planned(folder, ratio, **more):
    """A search without its model."""
    how = FEW | more | {"plan_only": True, "overwrite": True}
    return comp_cli.prune(folder, ratio=ratio, output=folder.parent / "plan.json", **how)


def advised(folder, ratio, **more):
    """What the refusal of a ratio says to try."""
    with pytest.raises(DeadEnd, match="cannot be reached") as caught:
        planned(folder, ratio, **more)
    (found,) = re.findall(r"^Try --ratio (0\.\d+)\.$", caught.value.hint)
    return float(found)


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "family, more",
    [
        pytest.param("clip", {"looks": 1}, id="comp"),
        pytest.param("clip-text", {"method": "joint"}, id="phases of tokens and parameters"),
        pytest.param("llava", {"looks": 1}, id="a decoder"),
        pytest.param("qwen2-vl", {"uniform": True}, id="uniform"),
        pytest.param("siglip", {}, id="all looks", marks=SLOW),
        pytest.param("clip-vision", {"method": "wanda"}, id="one phase", marks=SLOW),
        pytest.param("clip-vision", {"method": "comp-paper", "stages": 2}, id="stages", marks=SLOW),
        pytest.param("blip-vqa", {"modes": "language_params", "looks": 1}, id="some modes", marks=SLOW),
        pytest.param("llava", {"modes": "language_params", "looks": 1}, id="parameters of a decoder", marks=SLOW),
    ],
)
def test_it_works_for_every_kind_of_method(tmp_path, family, more):
    folder = tiny.write(family, tmp_path / family)
    ratio = advised(folder, 0.98, **more)
    report = planned(folder, ratio, **more)
    assert report.ratio == pytest.approx(ratio, abs=0.0101)


def test_between_two_plans_the_nearer_is_named(tmp_path):
    """A model whose heads are so dear that some ratios lie between two plans, both further than the tolerance."""
    folder, more = tiny.write("clip", tmp_path / "clip"), {"method": "magnitude"}
    for ratio in (0.221, 0.225, 0.215, 0.205, 0.2):
        try:
            planned(folder, ratio, **more)
        except DeadEnd:
            break
    else:
        pytest.fail("every ratio has a plan")
    works = advised(folder, ratio, **more)
    found = planned(folder, works, **more)
    assert abs(works - ratio) < 0.1 and found.ratio == pytest.approx(works, abs=0.0101)
