"""What a log sees of long work: few plain lines, with what is reached and the time left."""

import io
import sys

import pytest

from comp_cli.cli.output import Lines, Output, TerminalBar, column_widths, duration
from comp_cli.progress import NoBar


def lines(steps, total, resumed=0):
    """What is said when each step takes so many seconds."""
    now, said = [100.0], []
    bar = Lines(said.append, "pruning", total, clock=lambda: now[0])
    if resumed:
        bar.advance(by=resumed)
    for index, (seconds, title) in enumerate(steps):
        now[0] += seconds
        bar.advance(title and f"{title} {index}")
    return said


def test_a_line_at_most_every_15_seconds():
    assert lines([(6, None)] * 10, 10) == ["pruning: 3/10, about 42 s left", "pruning: 6/10, about 24 s left",
                                          "pruning: 9/10, about 6 s left"]  # fmt: skip
    assert lines([(0.1, None)] * 100, 100) == []


def test_the_line_says_what_was_reached():
    said = lines([(60, "ratio")] * 3, 40)
    assert said == [
        "pruning: 1/40, ratio 0",
        "pruning: 2/40, ratio 1, about 38 min left",
        "pruning: 3/40, ratio 2, about 37 min left",
    ]


def test_more_steps_than_expected_promise_nothing():
    assert lines([(20, None)] * 5, 3) == [
        "pruning: 1/3",
        "pruning: 2/3, about 20 s left",
        "pruning: 4, 3 were expected",
        "pruning: 5, 3 were expected",
    ]


def test_steps_of_an_earlier_run_do_not_shorten_the_time_left():
    assert lines([(60, None)], 40, resumed=20) == ["pruning: 21/40, about 19 min left"]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 99, 100, 3599, 3900)] == ["0 s", "99 s", "2 min", "1 h 00 min", "1 h 05 min"]


@pytest.mark.parametrize(("mode", "progress"), [("json", True), ("quiet", True), ("human", False)])
def test_other_modes_keep_silent(mode, progress, capsys):
    with Output(mode, progress).track("work", 3) as bar:
        assert type(bar) is NoBar
    assert capsys.readouterr().err == ("work ...\n" if mode == "human" else "")


def test_a_log_gets_lines():
    with Output().track("work", 3) as bar:
        assert isinstance(bar, Lines)


@pytest.mark.parametrize("steps", [0, 4, 6, 10])
def test_a_bar_ends_at_its_total_whatever_was_expected(steps):
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=io.StringIO())) as progress:
        task = progress.add_task("pruning", total=6)
        bar = TerminalBar(progress, task, 6)
        for _ in range(steps):
            bar.advance()
            assert progress.tasks[0].completed <= progress.tasks[0].total
        bar.end()
        assert progress.tasks[0].completed == progress.tasks[0].total == steps


def shown(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    results = io.StringIO()
    monkeypatch.setattr(sys, "stdout", results)
    return Output(), results


def test_headers_wrap_at_words_and_numbers_stay_whole():
    header = ["", "stock, same backend", "efficiency"]
    row = ["ONNX Runtime, batch 8", "12.34x", "0.85"]
    assert column_widths([header, row], 80) == ([21, 19, 10], 1)
    assert column_widths([header, row], 50) == ([21, 7, 10], 1)
    assert column_widths([header, row], 42) == ([15, 7, 10], 1)  # the first column wraps, at words
    assert column_widths([header, row], 35) == ([8, 7, 10], 1)
    assert column_widths([header, row], 30) == ([9, 7, 10], 0)


def test_lines_wrap_at_words_in_a_terminal_and_commands_do_not(monkeypatch):
    out, results = shown(monkeypatch, 40)
    out.line("FLOPs are 2 x multiply-accumulates, one sample, and what is written is long.")
    out.line("Wrote a-folder/with-a-very-long-name/and-another-one.html.")
    out.line("Next: comp export a-folder-with-a-name/compact --onnx")
    said = results.getvalue().splitlines()
    assert said[:2] == ["FLOPs are 2 x multiply-accumulates, one", "sample, and what is written is long."]
    assert said[2:4] == ["Wrote", "a-folder/with-a-very-long-name/and-another-one.html."]
    assert said[-1] == "Next: comp export a-folder-with-a-name/compact --onnx"


def test_without_a_terminal_a_line_is_a_line(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    results = io.StringIO()
    monkeypatch.setattr(sys, "stdout", results)
    Output().line("word " * 60)
    assert results.getvalue().count("\n") == 1
