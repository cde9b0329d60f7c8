"""What happens to runs on the host: workers killed, hanging and lying, full disks, torn files. All in processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_run import TINY
from tests.test_slow import tiny_environment
from wmjax.loops import checkpoint
from wmjax.loops.report import read_metrics

pytestmark = pytest.mark.slow
FIELDS = [word for name, value in TINY.items() for word in (f"--agent.{name}", str(value))]
FAULTS = """
import gymnasium
gymnasium.register("Run-v0", entry_point="tests.envs.gymnasium_envs:Faulty", kwargs={kwargs})
"""


@pytest.fixture
def env():
    return tiny_environment()


def command(out: Path, *more: str, steps: int, name: str = "gym:CartPole-v1") -> list[str]:
    options = ["--env", name, "--steps", str(steps), "--eval-every", "100000", "--checkpoint-seconds", "0"]
    return [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", *options, "--out", str(out), *FIELDS, *more]


def run(out, env, *more, steps, name="gym:CartPole-v1", cwd=None):
    arguments = command(out, *more, steps=steps, name=name)
    return subprocess.run(arguments, env=env, capture_output=True, text=True, cwd=cwd, timeout=300)


def begin(out, env, *more, steps):
    """A run in the background that has reported training."""
    process = subprocess.Popen(
        command(out, *more, steps=steps), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "train  " in line and "env steps" in line:
            return process
    raise AssertionError(process.stderr.read()[-3000:])


def workers(process):
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "wmjax.suites.worker"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_a_worker_that_is_killed_or_hangs_is_replaced_and_the_run_ends_well(env, tmp_path, signum):
    process = begin(tmp_path / "run", env, "--workers", "2", "--worker-timeout", "3", steps=2_000)
    before = workers(process)
    os.kill(before[0], signum)
    said, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint[-3000:]
    reason = "died (signal 9)" if signum == signal.SIGKILL else "gave no answer for 3 s"
    assert len(re.findall(rf"worker \d \(environment \d\) {re.escape(reason)}", said)) == 1
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] >= 2_000 and max(line["envs/restarts"] for line in lines) == 1
    assert not Path(f"/proc/{before[0]}").exists()


SHAPE = "has the shape (2,), not (1,)"


@pytest.mark.parametrize(
    ("fault", "reason"), [pytest.param("nan", "is not finite", marks=pytest.mark.long), ("shape", SHAPE)]
)
def test_environments_that_lie_always_stop_the_run_with_everything_saved(env, tmp_path, fault, reason):
    (tmp_path / "mine.py").write_text(FAULTS.format(kwargs={"fault": fault}))
    name, out = "gym:mine:Run-v0", tmp_path / "run"
    done = run(out, env, "--max-restarts", "8", steps=2_000, name=name, cwd=tmp_path)
    assert done.returncode == 1 and "9 environments were lost within an hour" in done.stderr
    assert reason in done.stderr and done.stdout.count("warning: environment") == 8
    kept = checkpoint.latest(out / "checkpoints")
    assert kept and kept == read_metrics(out)[-1]["step"]
    done = run(out, env, "--resume", "--max-restarts", "2", steps=2_000, name=name, cwd=tmp_path)
    assert done.returncode == 1 and checkpoint.latest(out / "checkpoints") >= kept


def test_a_signal_to_all_processes_saves_within_ten_seconds_and_resumes(env, tmp_path):
    process = begin(tmp_path / "run", env, steps=200_000)
    start = time.monotonic()
    for pid in (process.pid, *workers(process)):  # as a machine that is shut down does
        os.kill(pid, signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    seconds = time.monotonic() - start
    assert process.returncode == 143 and "interrupted; saved in" in complaint
    assert seconds < 10, seconds
    step = checkpoint.latest(tmp_path / "run" / "checkpoints")
    done = run(tmp_path / "run", env, "--resume", steps=step + 100)
    assert done.returncode == 0 and "begin new episodes" in done.stdout, done.stderr[-3000:]
    assert read_metrics(tmp_path / "run")[-1]["step"] >= step + 100


@pytest.mark.long
def test_a_torn_replay_file_is_left_out_and_the_run_goes_on(env, tmp_path):
    out = tmp_path / "run"
    assert run(out, env, steps=384).returncode == 0  # three times the replay, which has one chunk
    chunk = next((out / "replay").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-7])
    done = run(out, env, "--resume", steps=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 1 chunks are torn or missing; the 64 records in them are left out" in done.stdout
    done = run(out, env, "--resume", steps=700)
    assert done.returncode == 0 and "chunks are torn" not in done.stdout


def test_two_runs_cannot_write_to_one_folder(env, tmp_path):
    process = begin(tmp_path / "run", env, steps=200_000)
    done = run(tmp_path / "run", env, "--resume", steps=300)
    assert done.returncode == 2 and "another process is training in it" in done.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.long
def test_a_full_disk_keeps_the_checkpoint_warns_and_trains_on(env, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        out = disk / "run"
        assert run(out, env, steps=200).returncode == 0
        kept = checkpoint.latest(out / "checkpoints")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        done = run(out, env, "--resume", steps=2_000)
        assert re.search(r"warning: checkpoint .* could not be saved", done.stdout)
        assert "2,000/2,000 env steps" in done.stdout  # trained on to its end
        assert done.returncode == 1 and "the end of the run could not be saved" in done.stderr
        assert checkpoint.latest(out / "checkpoints") == kept
        (disk / "filler").unlink()
        done = run(out, env, "--resume", steps=400)
        assert done.returncode == 0 and "chunks are torn" not in done.stdout, done.stderr[-3000:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
