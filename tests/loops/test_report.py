import io
import json
import math
import os
import resource
import sys

import jax.numpy as jnp
import pytest

from wmjax.loops.display import Display
from wmjax.loops.report import Left, Report, read_metrics
from wmjax.types import UsageError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def quick(folder, stream=None, **kwargs):
    return Report(folder, display=Display(stream), **kwargs)


def test_each_report_is_one_json_object_with_null_for_what_is_not_finite(tmp_path):
    with quick(tmp_path) as report:
        report.log("train", 64, 2, {"model/loss": jnp.float32(1.5), "episode/return": jnp.float32(math.nan)}, 16.0)
        report.log("train", 128, 4, {"model/loss": float("inf")}, 16.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    one, two = [json.loads(line) for line in text.splitlines()]
    assert (one["step"], one["updates"], one["stage"], one["replay_ratio"]) == (64, 2, "train", 16.0)
    assert one["model/loss"] == 1.5 and one["episode/return"] is None and two["model/loss"] is None
    assert 0 <= one["time"] <= two["time"]


def test_a_resumed_run_drops_the_lines_beyond_where_it_resumes_and_its_time_goes_on(tmp_path):
    with quick(tmp_path) as report:
        for step in (10, 20, 30):
            report.log("train", step, step, {})
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) | {"time": 100.0 + i} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "upd')  # killed while writing
    with quick(tmp_path, resume_step=20) as report:
        report.log("train", 30, 30, {"again": 1})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["again"] == 1 and lines[-1]["time"] >= 101


def test_stages_that_take_no_env_steps_are_resumed_by_their_iterations(tmp_path):
    stream = io.StringIO()
    with quick(tmp_path, stream) as report:
        report.log("collect", 64, 0, {}, iteration=2)
        for i in (3, 4, 5):
            left = Left(i - 2, 3, last=False, collects=False)
            report.log("vision", 64, i, {"search/mean_return": float(i)}, iteration=i, left=left)
    assert "vision 3/3  64 env steps" in stream.getvalue() and "return 5.000" in stream.getvalue()
    with quick(tmp_path, resume_step=64, resume_iteration=3):
        pass
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [2, 3]


def test_a_new_run_starts_its_metrics_afresh(tmp_path):
    for _ in range(2):
        with quick(tmp_path) as report:
            report.log("train", 10, 1, {})
    assert len(read_metrics(tmp_path)) == 1


def test_progress_says_where_the_run_is_in_plain_lines(tmp_path):
    stream = io.StringIO()
    with quick(tmp_path, stream, total_steps=40_000) as report:
        report.log("train", 12_000, 120, {"episode/return": 0.25}, 16.0, left=Left(120, 400))
        report.log("train", 20_000, 200, {"episode/return": math.nan}, 16.0, left=Left(200, 400))
        Display(stream).say("saved")
    first, second, third = stream.getvalue().splitlines()
    for word in (
        "train",
        "12,000/40,000 env steps",
        "120 updates",
        "steps/s",
        "replay ratio 16",
        "return 0.250",
        "ETA",
    ):
        assert word in first
    assert "return 0.250" in second  # the last one known
    assert third == "saved"


def test_on_a_terminal_the_line_is_redrawn_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Display(stream) as display, Report(tmp_path, display=display) as report:
        for step in (1_000, 2_000):
            report.log("train", step, 1, {}, left=Left(step, 4_000))
    assert "\x1b[2K" in stream.getvalue() and "2,000 env steps" in stream.getvalue()


def test_tensorboard_events_are_written_beside_the_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    with Report(tmp_path) as report:
        report.log("train", 1, 1, {"model/loss": 2.0})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"model/loss" in events.read_bytes()


class FakeWandb:
    """Remembers what it is told; fails when told to."""

    def __init__(self, fails=False):
        self.fails, self.logged, self.begun, self.finished = fails, [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.drawn_over = name, step_metric

    def log(self, numbers):
        if self.fails:
            raise RuntimeError("no network\nat all")
        self.logged.append(numbers)

    def finish(self):
        self.finished += 1


def test_metrics_go_to_wandb_where_a_project_is_named(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with quick(tmp_path, wandb="dreams") as report:
        report.log("train", 5, 2, {"loss": 1.5, "missing": float("nan")})
        report.log("train", 5, 4, {"loss": 1.0})  # in stages that take no env steps every line counts too
    assert fake.drawn_over == ("*", "step")
    assert (fake.begun[0]["project"], fake.begun[0]["resume"], fake.finished) == ("dreams", "allow", 1)
    numbers, more = fake.logged
    assert numbers["step"] == 5 and numbers["loss"] == 1.5 and numbers["updates"] == 2 and "missing" not in numbers
    assert more["step"] == 5 and more["updates"] == 4 and more["updates_per_second"] > 0


def test_a_run_goes_on_without_wandb_when_that_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=True))
    stream = io.StringIO()
    with quick(tmp_path, stream, wandb="dreams") as report:
        report.log("train", 5, 2, {"loss": 1.5})
        report.log("train", 6, 3, {"loss": 1.5})
    assert stream.getvalue().count("warning: wandb: no network; training goes on without it") == 1
    assert len(read_metrics(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Lines that are not of metrics

GOOD = [json.dumps({"step": step, "iteration": step, "time": 1.5, "updates": 0, "stage": "x"}) for step in (10, 20, 30)]
BAD = [
    b"garbage",
    b"3",
    b"null",
    b"[]",
    b"{}",
    b'"step"',
    b'{"step": null}',
    b'{"step": "10"}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b'{"step": -1}',
    b'{"step": 15, "loss": "high"}',
    b'{"step": 15, "loss": [1]}',
    b'{"step": 15, "loss": {}}',
    b'{"step": 15, "loss": NaN}',
    b'{"step": 15, "loss": 1e999}',
    b'{"step": 15, "updates": true}',
    b'{"step": 15, "iteration": null}',
    b'{"step": 15, "iteration": 1.5}',
    b'{"step": 15, "stage": 3}',
    b'{"step": 15, "step": 16}',
    b'{"step": 1' + b"0" * 30 + b"}",
    b'{"step": 15, "lo',
    b"\xff\xfe\x00",
    b"\0" * 100,
    b"[" * 100_000,
    b'{"step": 15, "x": "' + b"y" * 3_000_000 + b'"}',
]


def test_lines_that_are_not_of_metrics_are_counted_skipped_and_kept_and_nothing_after_them_is_lost(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    good = [line.encode() for line in GOOD]
    path.write_bytes(b"\n".join([good[0], *BAD, good[1], b"more", b"", good[2], b'{"step": 40, "upd']))
    assert [line["step"] for line in read_metrics(tmp_path, said.append)] == [10, 20, 30]
    assert len(said) == 1 and f"{len(BAD) + 1} lines are not of metrics" in said[0] and str(path) in said[0]
    stream = io.StringIO()
    with quick(tmp_path, stream, resume_step=20) as report:
        report.log("train", 25, 5, {})
    assert stream.getvalue().count(f"{len(BAD) + 1} lines are not of metrics") == 1
    *kept, new, end = path.read_bytes().split(b"\n")
    assert kept == [good[0], *BAD, good[1], b"more", b""] and json.loads(new)["step"] == 25 and not end


def test_metrics_without_times_or_updates_are_gone_on_with(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4, "time": null}')
    with quick(tmp_path, resume_step=4) as report:
        report.log("train", 5, 1, {})
        report.log("train", 6, 3, {})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    assert "updates_per_second" not in lines[2] and lines[3]["updates_per_second"] > 0


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.truncate(path.open("w").name, 2**40)])
def test_metrics_that_cannot_be_read_are_refused_and_cost_a_run_its_metrics_only(make, tmp_path):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match=r"metrics.jsonl' cannot be read"):
        read_metrics(tmp_path)
    stream = io.StringIO()
    with quick(tmp_path, stream, resume_step=4) as report:
        report.log("train", 5, 1, {})
    assert stream.getvalue().count("warning: metrics in") == 1


def test_metrics_that_are_a_link_are_not_written_to(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text('{"step": 3}\n')
    for number, link in enumerate((os.symlink, os.link)):
        folder = tmp_path / str(number)
        folder.mkdir()
        link(victim, folder / "metrics.jsonl")
        with quick(folder, resume_step=4) as report:
            report.log("train", 5, 1, {})
        assert victim.read_text() == '{"step": 3}\n'
        assert [line["step"] for line in read_metrics(folder)] == [3, 5]


def test_a_line_that_does_not_fit_on_the_disk_spoils_none_after_it(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = io.StringIO()
    with Report(tmp_path, display=Display(stream)) as report:
        report.log("train", 1, 1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
        try:
            report.log("train", 2, 2, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        report.log("train", 3, 3, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path, pytest.fail)] == [1, 3]
    assert stream.getvalue().count("training goes on") == 1


def test_a_full_disk_at_the_start_costs_the_metrics_not_the_run(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stream = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with Report(tmp_path, display=Display(stream)) as report:
            report.log("train", 1, 1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stream.getvalue().count("training goes on") == 1
