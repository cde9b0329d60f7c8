"""Runs side by side, by a command that trains nothing: what is kept, resumed, tried again and passed on."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from wmjax.cli.output import say
from wmjax.comparison import cells
from wmjax.comparison.cells import Cell, _Attempt, read_outcome, run_cells
from wmjax.comparison.check import check
from wmjax.run_folder import alone
from wmjax.types import UsageError

# As `wmjax train`: makes its folder, then ends as a file of the cell's name says, on the attempt that it says.
FAKE = """
import os, pathlib, signal, sys, time
out, place = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
(out / "config.json").write_text("{}")
with (out / "attempts").open("a") as file:
    file.write(" ".join(sys.argv[2:]) + chr(10))
how = place.read_text()
if how == "fail":
    print("wmjax: error: horizon: 0 is not valid", file=sys.stderr)
    sys.exit(2)
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (out / "waiting").touch()
    time.sleep(60)
"""


@pytest.fixture
def how(tmp_path):
    place = tmp_path / "how"
    place.write_text("")
    return place


def cell(tmp_path, how, name="a"):
    return Cell("iris", "catch", "", (0,), tmp_path / "runs" / name, (str(how), "iris", name))


def run(*cells, **options):
    said = []
    found = run_cells(cells, command=[sys.executable, "-c", FAKE], say=said.append, **options)
    return found, said


def attempts(cell):
    return (cell.path / "attempts").read_text().splitlines()


def test_a_run_that_is_done_is_kept(tmp_path, how):
    one = cell(tmp_path, how)
    for _ in range(2):
        found, said = run(one)
        assert found[one].done and found[one].peak_memory_bytes > 1e6
    assert len(attempts(one)) == 1 and "finished before" in said[0]


def test_a_failure_is_an_outcome_with_its_reason_and_is_tried_again_as_a_resumed_run(tmp_path, how):
    one, other = cell(tmp_path, how), cell(tmp_path, how, "b")
    how.write_text("fail")
    found, _ = run(one, other)
    assert [outcome.code for outcome in found.values()] == [2, 2]
    assert found[one].reason == "failed with exit code 2: horizon: 0 is not valid"
    how.write_text("")
    found, _ = run(one, other)
    assert found[one].done and found[other].done
    assert [line.endswith("--resume") for line in attempts(one)] == [False, True]
    assert "horizon: 0" in one.path.with_name("a.log").read_text()


def test_a_kill_says_so(tmp_path, how):
    one = cell(tmp_path, how)
    how.write_text("kill")
    found, _ = run(one)
    assert found[one].code == -9 and found[one].reason == "killed by SIGKILL, as where memory is full"


def test_a_run_that_ends_as_a_signal_comes_has_its_outcome(tmp_path, how):
    attempt = _Attempt(cell(tmp_path, how), [sys.executable, "-c", FAKE])
    os.waitid(os.P_PID, attempt.process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    attempt.pass_on(signal.SIGTERM)
    assert attempt.poll(print).done


def test_other_arguments_make_a_run_go_on(tmp_path, how):
    one = cell(tmp_path, how)
    run(one)
    other = one._replace(arguments=(*one.arguments, "--steps", "9"))
    assert read_outcome(other) is None
    run(other)
    assert [("--steps" in line) for line in attempts(one)] == [False, True]


def test_what_is_left_of_a_process_that_ended_before_it_was_a_run_is_no_hindrance(tmp_path, how):
    one = cell(tmp_path, how)
    one.path.mkdir(parents=True)
    (one.path / ".lock").touch()
    assert run(one)[0][one].done and not attempts(one)[0].endswith("--resume")


def test_a_folder_with_checkpoints_is_not_removed_where_its_description_is_gone(tmp_path, how):
    one = cell(tmp_path, how)
    (one.path / "checkpoints").mkdir(parents=True)
    run(one)
    assert (one.path / "checkpoints").exists() and not attempts(one)[0].endswith("--resume")


def test_an_error_of_its_own_stops_what_is_running(tmp_path, how, monkeypatch):
    one, started, begin = cell(tmp_path, how), [], cells.subprocess.Popen
    how.write_text("wait")

    def fail(seconds):
        if (one.path / "waiting").exists():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells.time, "sleep", fail)
    monkeypatch.setattr(cells.subprocess, "Popen", lambda *a, **k: started.append(begin(*a, **k)) or started[-1])
    with pytest.raises(OSError, match="No space"):
        run(one)
    assert [process.wait() for process in started] == [143]


def test_a_folder_of_runs_is_trained_in_by_one_comparison_at_a_time(tmp_path):
    with alone(tmp_path / "runs"), pytest.raises(UsageError, match=r"out: .* is locked"), alone(tmp_path / "runs"):
        pass
    with alone(tmp_path / "runs"):
        (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"out: .*file/runs' cannot be written"), alone(tmp_path / "file" / "runs"):
        pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_is_passed_on_and_nothing_new_begins(tmp_path, how, jobs):
    cells = [cell(tmp_path, how, name) for name in "abc"]
    how.write_text("wait")

    def stop():
        while sum((each.path / "waiting").exists() for each in cells) < jobs:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(*cells, jobs=jobs)
    assert stopped.value.signum == signal.SIGTERM
    assert [each.path.exists() for each in cells] == [True, jobs == 2, False]
    how.write_text("")
    assert all(outcome.done for outcome in run(*cells)[0].values())
    assert len(attempts(cells[0])) == 2 and len(attempts(cells[2])) == 1


NO_RECORDS = [
    ("seconds", "x"),
    ("code", "0"),
    ("reason", 3),
    ("arguments", 3),
    ("other", 1),
    ("peak_memory_bytes", "x"),
]


@pytest.mark.parametrize(("name", "value"), NO_RECORDS)
def test_a_record_that_is_not_one_is_none(name, value, tmp_path, how):
    one = cell(tmp_path, how)
    run(one)
    place = cells.record_path(one)
    place.write_text(json.dumps(json.loads(place.read_text()) | {name: value}))
    assert read_outcome(one) is None
    found, _ = run(one)
    assert found[one].done and attempts(one)[1].endswith("--resume")


@pytest.mark.parametrize("line", ["3", "[]", "null", '{"stage": "train", "step": 1, "updates": 1, "time": null}'])
def test_how_far_a_run_is_may_be_unknown(line, tmp_path, how):
    one = cell(tmp_path, how)
    run(one)
    (one.path / "metrics.jsonl").write_text(line + "\n")
    assert cells._progress(one.path) == "starting"


def test_what_a_run_prints_is_not_written_through_a_link(tmp_path, how):
    one = cell(tmp_path, how)
    one.path.parent.mkdir()
    (tmp_path / "victim").write_text("mine")
    cells.log_path(one).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        run(one)
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_working_folder_is_not_imported_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("json", "numpy", "wmjax"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (found,) = check([{"agent": "dreamer_v3", "env": "catch", "steps": None}])
    assert found.error is None and not (tmp_path / "ran").exists()
    one = Cell("dreamer_v3", "catch", "", (0,), tmp_path / "runs" / "a", ("dreamer_v3", "--seed", "-1"))
    assert "seed: -1 is not valid" in run_cells([one], say=print)[one].reason and not (tmp_path / "ran").exists()


def test_a_stream_that_is_gone_costs_what_it_would_have_said(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    say("trained")
