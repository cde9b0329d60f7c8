"""What happens to long runs: killed at any moment, on a full disk, for days. All of it in processes of its own."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_run import ENV, TINY
from tests.test_slow import environment
from wmjax.loops import checkpoint

pytestmark = pytest.mark.slow
FIELDS = [word for name, value in TINY.items() for word in (f"--agent.{name}", str(value))]
STEPS = 4_000
KILLS = 8


def command(out: Path, *more: str, steps: int = STEPS) -> list[str]:
    options = [
        "--env",
        ENV,
        "--steps",
        str(steps),
        "--eval-every",
        "100",
        "--checkpoint-seconds",
        "0",
        "--out",
        str(out),
    ]
    return [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", *options, *FIELDS, *more]


def run(out: Path, env: dict[str, str], *more: str, steps: int = STEPS) -> subprocess.CompletedProcess:
    return subprocess.run(command(out, *more, steps=steps), env=env, capture_output=True, text=True)


def digest(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"^state sha256 ([0-9a-f]{64})$", done.stdout, re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The environment of the process, and an uninterrupted run's digest."""
    env = environment()
    return env, digest(run(tmp_path_factory.mktemp("whole") / "run", env))


@pytest.fixture(scope="module")
def again(whole, tmp_path_factory):
    """The digest of the same command once more, and the seconds that it took with all programs compiled."""
    start = time.monotonic()
    return digest(run(tmp_path_factory.mktemp("again") / "run", whole[0])), time.monotonic() - start


@pytest.mark.long
def test_the_same_command_twice_ends_in_the_same_state(whole, again):
    assert whole[1] == again[0]


@pytest.mark.long
def test_a_run_killed_again_and_again_at_random_moments_ends_like_one_that_was_not(whole, again, tmp_path):
    (env, expected), (_, seconds) = whole, again
    rng, out, killed = random.Random(0), tmp_path / "run", 0
    while killed < KILLS:
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = subprocess.Popen(command(out, *resume), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=rng.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        else:
            said = process.stdout.read().decode()
            assert process.returncode == 0, said[-3000:]
            assert expected in said
            shutil.rmtree(out)  # it came to its end before it was killed: once more from the start
        if out.exists() and not (out / "config.json").exists():
            shutil.rmtree(out)  # killed before it was a run
    resume = ["--resume"] if out.exists() else []
    assert digest(run(out, env, *resume)) == expected


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_a_signal_saves_the_run_and_leaves_with_its_code(whole, tmp_path, signum, code):
    env, expected = whole
    process = subprocess.Popen(
        command(tmp_path / "run"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "train  " in line and "env steps" in line:  # a line of progress
            process.send_signal(signum)
            break
    _, complaint = process.communicate()
    assert process.returncode == code and "interrupted; saved in" in complaint
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    assert digest(run(tmp_path / "run", env, "--resume")) == expected


@pytest.mark.long
def test_a_full_disk_keeps_the_checkpoint_warns_and_trains_on(whole, tmp_path):
    env, _ = whole
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        out = disk / "run"
        digest(run(out, env, steps=200))
        kept = checkpoint.latest(out / "checkpoints")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 20_000))
        done = run(out, env, "--resume", steps=2_000)
        assert re.search(r"warning: checkpoint .* could not be saved", done.stdout)
        assert "2,000/2,000 env steps" in done.stdout  # trained on to its end
        assert done.returncode == 1 and "the end of the run could not be saved" in done.stderr
        assert checkpoint.latest(out / "checkpoints") == kept
        (disk / "filler").unlink()
        digest(run(out, env, "--resume", steps=400))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_memory_stays_flat_over_many_updates(whole, tmp_path):
    """The peak of a run ten times as long is that of the short one, within a tenth."""
    env, _ = whole
    peaks = []
    for steps in (2_000, 20_000):
        process = subprocess.Popen(command(tmp_path / str(steps), steps=steps), env=env, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.1 * peaks[0], peaks
