"""What the accuracy benchmark is made of: the settings that its lines are known by."""

from pathlib import Path

import accuracy
import tiny

RESULTS = Path(accuracy.__file__).parent / "results"


def test_lines_that_were_made_of_the_demo_still_count():
    runs = accuracy.read_runs(RESULTS / "accuracy.jsonl", accuracy.Subject.open("demo"))
    assert {run["name"] for run in runs} >= set(accuracy.METHODS)


def test_a_line_of_a_clip_is_known_by_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "SAMPLES", 16)
    subject = accuracy.Subject.open(str(tiny.write("clip", tmp_path / "clip")))
    pairs = accuracy.batches_of(subject.dense, subject.scenes, "evaluation", 8, 4)
    (run,) = accuracy.measure(subject, "sjp", 0.3, 0, 0, pairs)
    assert 0 <= run["accuracy"] <= 1 and run["samples"] == 8 and abs(run["reached"] - 0.3) < 0.01
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert subject.identity != accuracy.Subject.open(str(tmp_path / "clip")).identity
