"""What the accuracy benchmark is made of: the settings that its lines are known by."""

import json
from pathlib import Path

import accuracy
import pytest
import tiny
from PIL import Image
from tiny import WORDS

RESULTS = Path(accuracy.__file__).parent / "results"


def test_lines_that_were_made_of_the_demo_still_count():
    runs = accuracy.read_runs(RESULTS / "accuracy.jsonl", accuracy.Subject.open("demo"))
    assert {run["name"] for run in runs} >= set(accuracy.METHODS)


def test_a_line_of_a_clip_is_known_by_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "SAMPLES", 16)
    subject = accuracy.Subject.open(str(tiny.write("clip", tmp_path / "clip")))
    pairs = accuracy.batches_of(subject.dense, subject.pairs, "evaluation", 8, 4)
    (run,) = accuracy.measure(subject, "sjp", 0.3, 0, 0, pairs)
    assert 0 <= run["accuracy"] <= 1 and run["samples"] == 8 and abs(run["reached"] - 0.3) < 0.01
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert subject.identity != accuracy.Subject.open(str(tmp_path / "clip")).identity


def test_pairs_of_a_folder_judge_on_the_split_that_is_named_and_calibrate_on_train_only(tmp_path, monkeypatch):
    for number, split in enumerate(("train", "validation", "test")):
        rows = []
        for k in range(8):
            name = f"{split}{k}.png"
            Image.new("RGB", (32, 32), (30 * k, 100 * number, 9)).save(tmp_path / name)
            rows.append({"file_name": name, "text": f"{split} a {WORDS[k]}", "style": split})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny.write("clip", tmp_path / "clip"))
    subject = accuracy.Subject.open(model, tmp_path)
    assert {pair.text.split()[0] for pair in subject.pairs.read("evaluation")} == {"test"}
    assert {pair.text.split()[0] for pair in subject.pairs.read("calibration")} == {"train"}
    other = accuracy.Subject.open(model, tmp_path, "validation")
    assert {pair.text.split()[0] for pair in other.pairs.read("evaluation")} == {"validation"}
    assert len({found.identity["settings"] for found in (subject, other, accuracy.Subject.open(model))}) == 3
    monkeypatch.setattr(accuracy, "SAMPLES", 8)
    pairs = accuracy.batches_of(subject.dense, subject.pairs, "evaluation", 10**6, 4)
    (run,) = accuracy.measure(subject, "cls", 0.2, 0, 0, pairs)
    assert 0 <= run["accuracy"] <= 1 and run["samples"] == 8
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match="found no split test"):
        accuracy.Subject.open(model, tmp_path)
