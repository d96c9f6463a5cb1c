"""What a report says of the pairs that were used: rows that were left out, and texts that were cut, for each purpose."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import WORDS, table, write

from comp_cli.cli.output import Output
from comp_cli.commands import export, judging
from comp_cli.commands.analyze import analyze
from comp_cli.commands.prune import prune
from comp_cli.data.rows import Pair
from comp_cli.models.dense import longest_text, open_dense
from comp_cli.options import AnalyzeOptions, DataOptions, ExportOptions, PruneOptions, Training

LONG = " ".join((WORDS * 2)[:17])  # 19 tokens with [CLS] and [SEP]; the tiny model takes 24
TOO_LONG = " ".join((WORDS * 2)[:30])
SIZES = {"num_samples": 100, "eval_samples": 100, "text_tokens": 8, "method": "joint", "device": "cpu"}
PURPOSES = {"calibration", "evaluation"}


def mixed(number: int) -> str:
    """A third long, a third longer than the model takes, a third short."""
    return (LONG, TOO_LONG, WORDS[number % 5])[number % 3]


def halves(number: int) -> str:
    return "train" if number < 6 else "val"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataOptions:
    place = tmp_path_factory.mktemp("counted")
    return DataOptions(table(place, caption=mixed, match=lambda number: int(number % 4 > 0), split=halves))


@pytest.fixture(scope="module")
def pruned(tiny_folder, data, tmp_path_factory):
    """A retrieval model, pruned on the pairs: folder, report, and what was said."""
    out, folder = Output("human"), tmp_path_factory.mktemp("pruned") / "compact"
    out.say = (said := []).append
    report = prune(PruneOptions(str(tiny_folder), 0.5, task="retrieval", data=data, **SIZES), folder, out).to_json()
    return folder, report, said, out.warnings


def test_the_report_counts_rows_of_each_purpose(pruned):
    folder, report, said, warnings = pruned
    assert report["pairs"].keys() == PURPOSES
    assert report["pairs"] == json.loads((folder / "comp_report.json").read_text())["pairs"]
    rows = {found["rows"] for found in report["pairs"].values()}
    assert len(rows) == 1
    for purpose, found in report["pairs"].items():
        assert found["asked"] == 100 and found["pairs"] + sum(found["left_out"].values()) == found["rows"]
        (line,) = (line for line in said if line.startswith(f"{purpose}: "))
        assert line.startswith(f"{purpose}: {found['pairs']} pairs (100 were asked for) of {found['rows']} rows; left out: ")
        mismatches = found["left_out"]["labelled as mismatches"]
        assert any(
            f"{mismatches} of {mismatches + found['pairs']} pairs are labelled as mismatches" in said for said in warnings
        )
    assert report["quality"]["samples"] == report["pairs"]["evaluation"]["pairs"]


def test_the_words_say_what_is_compared(pruned):
    _, _, said, _ = pruned
    assert any("every pair counts as a match" in line for line in said) and not any("no labels" in line for line in said)


def test_texts_that_are_cut_are_counted_and_said(pruned):
    """Calibration at --text-tokens, evaluation only where the model takes no more."""
    _, report, _, warnings = pruned
    calibration, evaluation = report["texts"]["calibration"], report["quality"]["texts"]
    assert calibration["at"] == 8 and 0 < calibration["cut"] < calibration["of"] == report["pairs"]["calibration"]["pairs"]
    assert evaluation["at"] == 24 and 0 < evaluation["cut"] < evaluation["of"] == report["pairs"]["evaluation"]["pairs"]
    for purpose, found, why in ("calibration", calibration, "--text-tokens"), ("evaluation", evaluation, "takes no more"):
        (line,) = (line for line in warnings if line.startswith(purpose) and "cut at" in line)
        assert f"{found['cut']} of {found['of']} texts are cut at {found['at']} tokens" in line and why in line


def test_evaluation_reads_whole_texts(tiny_folder):
    """What a user feeds: as many tokens as the tokenizer makes; two texts that differ behind --text-tokens are two."""
    dense = open_dense(str(tiny_folder), Output("quiet"), text_tokens=8, task="retrieval")
    pairs = [Pair(torch.zeros(3, 48, 48), f"{LONG} {word}") for word in WORDS[:2]]
    cut, whole = dense.collate(pairs), dense.collate_whole(pairs)
    expected = dense.processor.tokenizer([pair.text for pair in pairs], return_tensors="pt")["input_ids"]
    assert torch.equal(whole.inputs["input_ids"], expected) and whole.cut == 0
    assert len(cut.inputs["input_ids"].unique(dim=0)) == 1 and cut.cut == 2


def test_max_drop_judges_whole_texts(tiny_folder, tmp_path, monkeypatch):
    """The batches that dense and compact are compared on hold every token."""
    widths, evaluate = [], judging.evaluate

    def spy(model, task, batches, *rest):
        widths.extend(batch.inputs["input_ids"].shape[1] for batch in batches)
        return evaluate(model, task, batches, *rest)

    monkeypatch.setattr(judging, "evaluate", spy)
    data = DataOptions(table(tmp_path, caption=lambda number: LONG))
    prune(
        PruneOptions(str(tiny_folder), 0.5, data=data, task="retrieval", **SIZES),
        tmp_path / "compact",
        Output("quiet"),
        max_drop=100,
    )
    assert set(widths) == {19}


@pytest.mark.parametrize(("limit", "longest"), [(10**30, 24), (9, 9), (24, 24), (None, 24)])
def test_what_the_model_takes(dense, limit, longest):
    """The smaller of what model and tokenizer say, which may say nothing."""

    class Processor:
        if limit:
            model_max_length = limit

    assert longest_text(dense.hf_config.to_dict(), dense.family, Processor()) == longest


def stop(*arguments, **options):
    """In place of what takes a minute."""
    raise InterruptedError


def test_export_counts_texts_that_are_cut(pruned, data, tmp_path, monkeypatch):
    """Parity is checked on the user's texts as they are, up to what the model takes."""
    folder, *_ = pruned
    made, make_cases = [], export.parity.make_cases
    monkeypatch.setattr(export.parity, "make_cases", lambda *a, **k: made.extend(make_cases(*a, **k)) or made)
    monkeypatch.setattr(export, "write_graphs", stop)
    out, options = Output("quiet"), ExportOptions(data=data)
    with pytest.raises(InterruptedError):
        export.export(folder, tmp_path / "served", options, out)
    assert any(line == "parity: 2 of 6 texts are cut at 24 tokens (the model takes no more)." for line in out.warnings)
    assert {case.inputs["input_ids"].shape[1] for case in made if case.name == "real"} == {19, 24}


def test_analyze_counts_too(tiny_folder, data):
    sizes = {"num_samples": 4, "batch_size": 3, "text_tokens": 8, "score_rows": 0, "device": "cpu", "seed": 0}
    document = analyze(AnalyzeOptions(str(tiny_folder), data=data, **sizes), (out := Output("quiet"))).to_json()
    assert document["pairs"]["calibration"]["pairs"] == 4 and document["texts"]["at"] == 8
    assert any(line.startswith("calibration: ") and "cut at 8 tokens" in line for line in out.warnings)


def test_a_question_and_its_answer_that_are_cut_count_once(tmp_path, capsys):
    """And what the model takes no more of is not put down to --text-tokens."""
    place = write("blip-vqa", tmp_path / "asked")
    data = DataOptions(table(tmp_path, question=lambda number: TOO_LONG, answer=lambda number: TOO_LONG))
    sizes = {"num_samples": 4, "batch_size": 3, "text_tokens": 24, "score_rows": 0, "device": "cpu", "seed": 0}
    document = analyze(AnalyzeOptions(str(place), data=data, **sizes), (out := Output("quiet"))).to_json()
    assert document["texts"] == {"cut": 4, "of": 4, "at": 24, "tokens": {"language": 24, "answer": 24}}
    assert "calibration: 4 of 4 texts are cut at 24 tokens (the model takes no more)." in out.warnings


def test_training_counts_texts_that_are_cut(tiny_folder, data, tmp_path):
    """And with --epochs the rows that it goes through."""
    training = Training(epochs=1, batch_size=8, lr=1e-4)
    options = replace(PruneOptions(str(tiny_folder), 0.5, data=data, **SIZES), num_samples=8, eval_samples=8, training=training)
    report = prune(options, tmp_path / "compact", (out := Output("quiet"))).to_json()
    assert report["pairs"].keys() == PURPOSES | {"training"} and report["pairs"]["training"]["asked"] is None
    assert any(line.startswith("fine-tuning: ") and "texts are cut at 8 tokens" in line for line in out.warnings)


def test_pictures_with_one_caption_are_counted(tiny_folder, tmp_path):
    data = DataOptions(table(tmp_path, caption=lambda number: WORDS[number % 2], split=halves))
    out = Output("human")
    out.say = (said := []).append
    report = prune(
        PruneOptions(str(tiny_folder), 0.5, data=data, task="retrieval", **SIZES), tmp_path / "compact", out
    ).to_json()
    quality = report["quality"]
    assert quality["shared_texts"] == quality["samples"] == 6
    assert any(
        line.startswith(f"{quality['samples']} of {quality['samples']} texts are those of several images") for line in said
    )
