"""Two agents side by side through the command line, stopped in the middle and gone on with."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.comparison.test_report import Page

pytestmark = pytest.mark.slow


def test_a_comparison_that_is_stopped_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    options = ["--agents", "dreamer_v1,dreamer_v2,iris", "--env", "probe:act", "--seeds", "1", "--steps", "1200"]
    command = [sys.executable, "-m", "wmjax", "compare", *options, "--out", str(out)]
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "runs" / "dreamer_v1-probe-act-seed-0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert stopped.poll() is None, stopped.communicate()[0]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate()
    assert stopped.returncode == 143, said
    record = json.loads((out / "runs" / "dreamer_v1-probe-act-seed-0.json").read_text())
    assert record["code"] == 143 and not (out / "runs" / "dreamer_v2-probe-act-seed-0").exists()

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: iris cannot be trained on probe:act" in done.stdout
    assert (metrics.parent.parent / "dreamer_v1-probe-act-seed-0.log").read_text().count("$ wmjax train") == 2
    report = json.loads((out / "report.json").read_text())
    (env,) = report["environments"]
    assert [group["label"] for group in env["groups"]] == ["dreamer_v1", "dreamer_v2"]
    for group in env["groups"]:
        assert group["end"]["by_seed"][0] is not None and group["steps"][0] >= 1200
        assert group["compile_seconds"] > 0 and group["peak_memory_bytes"] > 1e8 and group["update_seconds"] > 0
    assert set(env["open_loop"]["entries"]["vector"]["agents"]) == {"dreamer_v1", "dreamer_v2"}
    assert env["open_loop"]["entries"]["vector"]["repeat_last"][0] is not None
    Page((out / "report.html").read_text())

    handed = subprocess.run(
        [*command[:4], "--runs", *map(str, sorted((out / "runs").glob("*-seed-0"))), "--out", str(tmp_path / "again")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert handed.returncode == 0, handed.stderr
    (again,) = json.loads((tmp_path / "again" / "report.json").read_text())["environments"]
    assert again == env
    strict = subprocess.run([*command, "--strict"], capture_output=True, text=True)
    assert strict.returncode == 2 and "iris cannot be trained on probe:act" in strict.stderr
