"""A ratio that is advised where another is out of reach works when it is followed."""

import re

import pytest
import tiny

import comp_cli
from comp_cli.errors import DeadEnd

FEW = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}


def advised(folder, ratio, **more):
    """What the refusal of a ratio says to try."""
    with pytest.raises(DeadEnd, match="cannot be reached") as caught:
        comp_cli.prune(folder, ratio=ratio, dry_run=True, **FEW, **more)
    (found,) = re.findall(r"^Try --ratio (0\.\d+)\.$", caught.value.hint)
    return float(found)


@pytest.mark.parametrize(
    "family, more",
    [
        ("clip", {}),
        ("siglip", {"looks": 1}),
        ("blip-vqa", {"modes": "language_params"}),
        ("clip", {"method": "comp-paper", "stages": 3}),
        ("clip-text", {"method": "joint"}),
        ("clip-vision", {"method": "wanda"}),
        ("siglip", {"method": "tokens-first"}),
        ("llava", {}),
        ("llava", {"modes": "language_params", "tokens_method": None}),
        ("qwen2-vl", {"uniform": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "comp",
)
def test_it_works_for_every_kind_of_method(tmp_path, family, more):
    folder = tiny.write(family, tmp_path / family)
    ratio = advised(folder, 0.98, **more)
    report = comp_cli.prune(folder, ratio=ratio, dry_run=True, **FEW, **more)
    assert report.ratio == pytest.approx(ratio, abs=0.0101)


def test_between_two_plans_the_nearer_is_named(tmp_path):
    """A model whose heads are so dear that few ratios have a plan: every hundredth has one, or says which has."""
    folder = tiny.write("llava", tmp_path / "llava")
    gaps = 0
    for hundredth in range(5, 40, 5):
        ratio, more = hundredth / 100, {"uniform": True, "modes": "language_params"}
        try:
            comp_cli.prune(folder, ratio=ratio, dry_run=True, **FEW, **more)
        except DeadEnd:
            gaps += 1
            comp_cli.prune(folder, ratio=advised(folder, ratio, **more), dry_run=True, **FEW, **more)
    assert gaps
