"""Where a run speaks: streams that fail, terminals of any width, and clocks that leave out what is not training."""

import errno
import io
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.loops import display as displays
from wmjax.loops.display import Clock, Display, SafeStream
from wmjax.loops.report import Left, Report, read_metrics


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Failing(io.StringIO):
    """Raises on writing or on flushing, for as long as it is told to."""

    def __init__(self, error, when="write"):
        super().__init__()
        self.error, self.when = error, when

    def write(self, text):
        if self.error and self.when == "write":
            raise self.error
        return super().write(text)

    def flush(self):
        if self.error and self.when == "flush":
            raise self.error


FAILURES = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("I/O operation on closed file"),
    RuntimeError("of the caller's own"),
    AttributeError("write"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["write", "flush"])
def test_a_stream_that_fails_costs_the_lines_and_is_said_once(error, when, tmp_path, capsys):
    stream = Failing(error, when)
    with Display(stream) as display, Report(tmp_path, display=display) as report:
        display.say("before")
        for step in (1, 2):
            report.log("train", step, step, {}, left=Left(step, 3))
        with display.working("something"):
            pass
        stream.error = None  # as a disk that has room again
        report.log("train", 3, 3, {}, left=Left(3, 3))
    assert "3 env steps" in stream.getvalue()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("wmjax: warning: output is lost (")


def test_a_closed_stream_and_one_that_only_writes_are_streams_too(tmp_path):
    closed = io.StringIO()
    closed.close()

    class Minimal:
        text = ""

        def write(self, text):
            self.text += text

    minimal = Minimal()
    for stream in (closed, minimal):
        with Display(stream) as display:
            display.say("line")
    assert minimal.text == "line\n"


def test_an_interruption_by_the_stream_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        SafeStream(Failing(KeyboardInterrupt())).write("x")


def test_what_a_stream_has_no_code_for_becomes_a_question_mark():
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, "ascii"))
    stream.write("jeu → ø\n")
    stream.flush()
    assert raw.getvalue() == b"jeu ? ?\n"


FIRST, REST = ["return 0.250", "ETA 0:03:06"], ["train", "12,000/40,000 env steps", "103 steps/s", "120 updates"]


def screen(text):
    """The last line that was drawn."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", re.sub(r"\x1b\[[0-9;]*m", "", text))
    return [line for line in plain.splitlines() if line.strip()][-1]


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 100, 140])
def test_on_a_terminal_return_and_eta_come_first_and_a_bar_fits_the_width(columns, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with Display(stream) as display:
        display.show(0.3, FIRST, REST)
        line = screen(stream.getvalue())
    assert len(line) < columns
    assert line.startswith("return 0.250  ETA 0:03:06"[: columns - 1])
    if columns >= 40:
        assert "30%" in line and re.search("[━╸╺]" * (4 if columns == 40 else 10), line)
    assert (REST[1] in line) == (columns >= 80) and (REST[3] in line) == (columns >= 140)
    assert "…" not in line


def test_elsewhere_lines_are_plain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    with Display(stream) as display:
        display.say("header")
        display.show(0.3, FIRST, REST)
        with display.working("compiling"):
            pass
    assert stream.getvalue() == f"header\n{'  '.join(FIRST + REST)}\ncompiling\n"


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Display(stream) as display:
        display.show(0.5, [], ["train"])
    assert stream.getvalue() == "train\n"


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_takes_long_tells_for_how_long_it_has(monkeypatch):
    monkeypatch.setattr(displays, "TICKS", (0.02, 0.05))
    stream, threads = io.StringIO(), threading.active_count()
    with Display(stream) as display:
        with display.working("compiling the stage `train`"):
            wait_for(lambda: stream.getvalue().count("so far") == 2)
        with display.working("evaluating", say=False):  # is over before the first tick
            pass
    lines = stream.getvalue().splitlines()
    assert lines[0] == "compiling the stage `train`"
    assert lines[1:] == ["compiling the stage `train`: 0:00:00 so far"] * 2
    assert threading.active_count() == threads


def test_on_a_terminal_the_note_is_redrawn_and_gives_way_to_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(displays, "REDRAW_SECONDS", 0.01)
    stream = Terminal()
    with Display(stream) as display:
        display.show(0.5, ["return 1.000"], ["train"])
        with display.working("evaluating"):
            wait_for(lambda: stream.getvalue().count("evaluating 0:00:00") > 2)
        assert "return 1.000" in screen(stream.getvalue())


def test_compiling_and_pauses_do_not_count_as_time_spent_training():
    clock = Clock()
    start, wall = clock.seconds(), time.monotonic()
    jax.jit(lambda x: jnp.linalg.svd(x @ x).S)(np.ones((37, 37)))  # compiles
    with clock.pause():
        time.sleep(0.05)
        jax.jit(lambda x: jnp.linalg.svd(x @ x + 1).S)(np.ones((38, 38)))  # is not left out twice
    time.sleep(0.02)
    spent, passed = clock.seconds() - start, time.monotonic() - wall
    assert 0.02 <= spent < passed - 0.06


def test_programs_compiled_at_the_same_time_or_within_each_other_are_counted_once(monkeypatch):
    heard = displays._Compiling()
    now = [100.0]
    monkeypatch.setattr(displays.time, "monotonic", lambda: now[0])
    for end, seconds in ((101, 1), (103, 1), (104, 3.5), (106, 1), (107, 2)):  # [100.5, 104] holds [102, 103]
        now[0] = float(end)
        heard._hear("/jax/core/compile/backend_compile_duration", float(seconds))
    heard._hear("/jax/other", 50.0)
    assert heard.seconds == pytest.approx((104 - 100) + (107 - 105))
    jax.monitoring.unregister_event_duration_listener(heard._hear)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is set by hand, for reports."""

    class Manual(Clock):
        now = 0.0

        def seconds(self):
            return self.now

    return Manual()


def test_speed_and_the_time_left_are_of_training(tmp_path, ticking):
    stream = io.StringIO()
    report = Report(tmp_path, total_steps=1000, display=Display(stream), clock=ticking)
    with report:
        ticking.now = 50.0  # before the stage began
        report.starts("train", 0)
        ticking.now += 2.0
        report.log("train", 10, 1, {}, left=Left(1, 100))
        ticking.now += 8.0
        first = report.log("train", 90, 9, {"episode/return": 0.5}, left=Left(9, 100))
        report.log("train", 90, 9, {}, left=Left(9, 100))  # nothing was done: the pace is what it was
    one, two, three = stream.getvalue().splitlines()
    assert "5 steps/s" in one and one.startswith("ETA 0:03:18  train  10/1,000 env steps")
    assert "10 steps/s" in two and two.startswith("return 0.500  ETA 0:01:31  train")
    assert three.startswith("return 0.500  ETA 0:01:31  train")
    assert (first["steps_per_second"], first["updates_per_second"], first["episode/return"]) == (10.0, 1.0, 0.5)


def test_a_stage_before_the_last_tells_the_time_until_it_ends(tmp_path, ticking):
    stream = io.StringIO()
    with Report(tmp_path, display=Display(stream), clock=ticking) as report:
        report.starts("prefill", 0)
        ticking.now = 1.0
        report.log("prefill", 10, 0, {}, left=Left(1, 4, last=False))
        report.starts("train", 0)
        ticking.now = 31.0
        report.log("train", 20, 1, {}, left=Left(1, 3))
    one, two = stream.getvalue().splitlines()
    assert one.startswith("stage ETA 0:00:03") and two.startswith("ETA 0:01:00")


def test_evaluations_to_come_are_part_of_the_time_left(tmp_path, ticking, monkeypatch):
    stream = io.StringIO()
    with Report(tmp_path, display=Display(stream), clock=ticking) as report:
        report.starts("train", 0)
        report._evaluation_seconds = 30.0
        ticking.now = 1.0
        report.log("train", 10, 1, {}, left=Left(1, 2, evaluations=2))
    assert stream.getvalue().startswith("ETA 0:01:01")
