"""What a log sees of long work: few plain lines, with what is reached and the time left."""

import pytest

from comp_cli.cli.output import Lines, Output, duration
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
    assert lines([(20, None)] * 5, 3) == ["pruning: 1/3", "pruning: 2/3, about 20 s left"]


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
