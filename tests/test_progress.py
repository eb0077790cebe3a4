"""What a run says: on stderr, in full lines, with a time left that is about right; nothing where nobody asked."""

import io
import logging
import re

import pytest

from kbne_edit import progress as module
from kbne_edit.progress import Stages, clock, progress, say, show_progress


@pytest.fixture
def watch(monkeypatch):
    """A clock that the test turns."""

    class Watch:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Watch.now)
    return Watch


def test_python_is_silent_and_the_logger_has_the_lines(capsys, caplog):
    with caplog.at_level(logging.INFO, logger="kbne_edit"):
        say("one line")
        with progress("work", 10) as update:
            update(10)
    assert capsys.readouterr() == ("", "") and caplog.messages == ["one line"]


def test_lines_in_a_log(capsys, shown, watch):
    with Stages(2) as stages:
        stages.next("fold")
        with progress("copying", 200, "question") as update:
            watch.now += 6
            update(20)  # a tenth of the work in six seconds: 54 are left
            watch.now += 1
            update(2)  # too soon for another line
            watch.now += 55
            update(178)
            update(0)
    say("after")
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] fold",
        "[1/2] copying: 10 % (20 of 200 questions), about 54 s left",
        "[1/2] copying: 100 % (200 of 200 questions), 1 min 2 s in all",
        "after",
    ]


def test_work_that_was_done_before_does_not_count_for_the_pace(capsys, shown, watch):
    with progress("resumed", 100, done=90) as update:
        watch.now += 10
        update(5)
    assert "95 % (95 of 100), about 10 s left" in capsys.readouterr().err


def test_short_work_says_nothing(capsys, shown, watch):
    with progress("short", 3, "B") as update:
        update(3)
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal(monkeypatch, shown):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("outer", 4) as outer, progress("inner", 2_000_000, "B") as inner:
        inner(1_000_000)
        say("a line between")
        outer(1)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "outer" in text and "1 of 4" in text and "1 of 2 MB" in text and "25%" in text
    assert "a line between" in [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (125, "2 min 5 s"), (4200, "1 h 10 min")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_shown_twice_is_said_once(capsys, shown):
    show_progress()
    say("once")
    assert capsys.readouterr().err == "once\n"
