"""The FLOPs ratio at texts as long as the user's, beside that of the reference input."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny import WORDS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import comp_cli
from comp_cli.cli.output import Output
from comp_cli.data.rows import Pair
from comp_cli.engine import flops
from comp_cli.models.dense import open_dense
from comp_cli.models.own_texts import at_own_texts, warn_less
from comp_cli.models.pairs import cut_texts
from comp_cli.report.base import Sizes, Texts
from comp_cli.report.prune import AtOwnTexts
from comp_cli.report.prune_tables import print_pruned

FAST = {"num_samples": 8, "eval_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
FULL, SHORT = " ".join(WORDS[:10]), "a red circle"  # 12 and 5 tokens with [CLS] and [SEP]
BLACK = Image.new("RGB", (48, 48))


def halves(number: int) -> str:
    return "train" if number < 6 else "val"


def opened(family: str, folder: Path, text_tokens: int = 12):
    return open_dense(str(tiny.write(family, folder)), Output("quiet"), text_tokens=text_tokens)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Calibration on texts of 12 tokens, so that some of them go; evaluation on texts of 5, and one of 9."""
    longer = " ".join(WORDS[:7])

    def text(number: int) -> str:
        return FULL if number < 6 else longer if number == 6 else SHORT

    return tiny.table(tmp_path_factory.mktemp("own"), caption=text, split=halves)


@pytest.fixture(scope="module")
def pruned(tiny_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "compact"
    return folder, comp_cli.prune(tiny_folder, ratio=0.5, output=folder, data=data, method="token", **FAST)


def run_flops(model, dense, text_tokens: int) -> int:
    """Counted from what runs."""
    inputs = dense.random_inputs(1, text_tokens)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


# How long texts are ---------------------------------------------------------------------------------------------------


def test_tokens_of_texts_are_counted_without_padding(tmp_path):
    """[CLS] a red circle [SEP], [CLS] blue [SEP]; of an answer [DEC] and [SEP] as well."""
    pairs = [Pair(BLACK, SHORT, answers=("blue",)), Pair(BLACK, "blue", answers=("two small",))]
    expected = {
        "blip": {"language": 8},
        "clip": {"language": 8},
        "clip-text": {"language": 8},
        "blip-caption": {"language": 8},
        "blip-vqa": {"language": 8, "answer": 7},
        "siglip": {"language": 48},  # which was trained on texts that are padded to 24
        "clip-vision": {},
    }
    for family, tokens in expected.items():
        assert opened(family, tmp_path / family).collate(pairs).text_tokens == tokens, family


def test_the_mean_is_that_of_the_texts_whatever_the_batches(dense):
    """(5 + 3 + 12) / 3 tokens, padded to 12 or not."""
    pairs = [Pair(BLACK, text) for text in (SHORT, "blue", FULL)]
    for size in (1, 2, 3):
        assert cut_texts(list(dense.collate.batches(pairs, size)), 12) == Texts(0, 3, 12, {"language": 6.67})


def test_texts_of_five_tokens_by_hand(dense):
    """Width 72, 4 layers, 37 image tokens: what the texts cost, but the keys and values of the image."""
    n, width, image, hidden = 5, 72, 37, 200
    own = n * 4 * width**2 + 2 * n * n * width
    cross = n * 2 * width**2 + image * 2 * width**2 + 2 * n * image * width
    expected = 4 * 2 * (own + cross + n * 2 * width * hidden)
    assert flops.count(dense.plan, dense.reference.with_texts({"language": n})).tower("language") == expected


# The report -----------------------------------------------------------------------------------------------------------


def test_the_ratio_at_the_evaluation_texts_is_that_of_what_runs(pruned, dense):
    """The mean of five texts of 5 tokens and one of 9 is 5.67: 6. All of them stay, of the 12 of the reference not."""
    folder, report = pruned
    own = report.at_own_texts
    assert report.quality.texts.tokens == {"language": 5.67} and report.texts["calibration"].tokens == {"language": 12.0}
    assert (own.purpose, own.tokens) == ("evaluation", {"vision": 37, "language": 6})
    counted = [run_flops(model, dense, 6) for model in (dense.runtime(dense.plan), comp_cli.load(folder))]
    assert own.flops == Sizes(*counted) and own.ratio == pytest.approx(1 - counted[1] / counted[0], abs=1e-5)
    assert own.ratio < report.ratio - 0.01


def test_the_folder_and_its_card_hold_it(pruned):
    folder, report = pruned
    own, written = report.at_own_texts, json.loads((folder / "comp_report.json").read_text())
    assert written["at_own_texts"] == report.to_json()["at_own_texts"] and written["at_own_texts"]["tokens"]["language"] == 6
    card = (folder / "README.md").read_text()
    assert "for one sample (37 image tokens, 12 text tokens); at 6 text tokens, the mean of the evaluation pairs," in card
    assert f"ratio {own.ratio:.2f}." in card


def test_the_table_shows_both(pruned):
    _, report = pruned

    class Paper:
        said: list[str] = []

        def table(self, title, columns, rows):
            self.said += [row[0] for row in rows]

        def line(self, message):
            self.said.append(message)

    print_pruned(report, Paper())
    assert "FLOPs per pair" in Paper.said and "FLOPs per pair of 6 text tokens" in Paper.said
    assert f"At 6 text tokens, the mean of the evaluation pairs, the ratio is {report.at_own_texts.ratio:.3f}." in Paper.said


def test_a_warning_says_what_to_do(pruned):
    _, report = pruned
    (said,) = (line for line in report.warnings if "FLOPs ratio" in line)
    assert said == (
        f"at 6 text tokens, the mean of the evaluation pairs, the FLOPs ratio is {report.at_own_texts.ratio:.3f}, not 0.500. "
        "Raise --ratio, or count at such texts: --text-tokens 6 (calibration cuts those that are longer)."
    )


def test_what_is_said_to_do_gives_the_ratio(tiny_folder, data, tmp_path):
    sizes = FAST | {"text_tokens": 6, "method": "joint"}
    report = comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "c", data=data, **sizes)
    assert report.ratio >= 0.49 and report.at_own_texts is None and not any("FLOPs ratio" in line for line in report.warnings)


def test_a_plan_alone_takes_the_calibration_texts(tiny_folder, tmp_path):
    data = tiny.table(tmp_path, caption=lambda number: FULL if number == 1 else SHORT)
    report = comp_cli.prune(
        tiny_folder, ratio=0.4, data=data, method="joint", plan_only=True, output=tmp_path / "plan.json", **FAST
    )
    mean = report.texts["calibration"].tokens["language"]
    assert report.at_own_texts.purpose == "calibration" and report.at_own_texts.tokens["language"] == round(mean) < 12


# Nothing superfluous --------------------------------------------------------------------------------------------------


def test_without_data_nothing_is_said(tiny_folder, tmp_path):
    report = comp_cli.prune(tiny_folder, ratio=0.4, method="joint", plan_only=True, output=tmp_path / "plan.json", **FAST)
    assert report.at_own_texts is None and "at_own_texts" not in report.to_json()


@pytest.mark.parametrize(
    ("family", "text"),
    [("blip", FULL), ("siglip", SHORT), ("clip-vision", SHORT)],
    ids=["as long as the reference", "padded to one length", "no texts"],
)
def test_where_nothing_differs_nothing_is_said(family, text, tmp_path):
    folder, data = tiny.write(family, tmp_path / "dense"), tiny.table(tmp_path, caption=lambda number: text)
    report = comp_cli.prune(folder, ratio=0.4, data=data, method="wanda", plan_only=True, output=tmp_path / "plan.json", **FAST)
    assert report.at_own_texts is None and not any("FLOPs ratio" in line for line in report.warnings)


def test_answers_have_a_length_of_their_own(tmp_path):
    """As long a question, an answer of two tokens more than the reference's: no --text-tokens would change that."""
    dense = opened("blip-vqa", tmp_path / "dense")
    found = at_own_texts(
        dense, tiny.uneven(dense.plan, dense.family), "evaluation", Texts(0, 1, 24, {"language": 12, "answer": 6})
    )
    assert found.tokens == dense.reference.tokens | {"answer": 6}
    warn_less(dense, found, found.ratio + 0.02, out := Output("quiet"))
    assert (
        len(out.warnings) == 1
        and out.warnings[0].startswith("at 6 answer tokens,")
        and out.warnings[0].endswith(" Raise --ratio.")
    )


@pytest.mark.parametrize(("ratio", "warned"), [(0.485, True), (0.495, False), (0.5, False), (0.6, False)])
def test_more_than_a_hundredth_under_the_wanted_ratio_is_warned_of(ratio, warned, dense):
    found = AtOwnTexts("evaluation", {"vision": 37, "language": 3}, ratio, Sizes(2, 1))
    warn_less(dense, found, 0.5, out := Output("quiet"))
    assert len(out.warnings) == warned and all("--text-tokens 4 " in line for line in out.warnings)  # the least that it takes
