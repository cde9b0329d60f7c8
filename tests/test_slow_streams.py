"""Runs whose output goes where it cannot be written: they train on, and are whole in the end."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.test_cli import FIELDS
from tests.test_run import ENV
from wmjax.loops import checkpoint
from wmjax.loops.report import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")]


def train(out, *more, steps=60):
    words = [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", "--env", ENV, "--steps", steps, "--out", out]
    return shlex.join(map(str, [*words, *FIELDS, *more]))


def bash(script, cwd):
    return subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, cwd=cwd)


def whole(out, steps=60):
    assert read_metrics(out)[-1]["step"] == steps == checkpoint.latest(out / "checkpoints")
    assert (out / "eval.json").exists()
    return True


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The programs are in the cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    done = bash(train(folder / "run"), folder)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout


@pytest.mark.parametrize(
    "script, said",
    [
        ("{train} | head -3", "Broken pipe"),
        pytest.param("{train} > /dev/full", "No space left on device", marks=pytest.mark.long),
        pytest.param("{train} >&-", None, marks=pytest.mark.long),
        pytest.param("{train} 2>&-", None, marks=pytest.mark.long),
        pytest.param("{train} <&- >&- 2>&-", None, marks=pytest.mark.long),
        pytest.param("{train} > /dev/full 2> /dev/full", None, marks=pytest.mark.long),
        pytest.param("{train} 2>&1 | head -1", None, marks=pytest.mark.long),
    ],
)
def test_a_run_is_whole_whatever_becomes_of_its_output(script, said, tmp_path):
    done = bash(script.format(train=train(tmp_path / "run")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "run")
    complaints = [line for line in done.stderr.splitlines() if line.startswith("wmjax: ")]
    assert len(complaints) == (said is not None) and "Traceback" not in done.stderr
    assert said is None or said in complaints[0]


def test_errors_keep_their_exit_code_where_nothing_can_be_said(tmp_path):
    assert bash(train(tmp_path / "run", "--seed", -1) + " >&- 2> /dev/full", tmp_path).returncode == 2


def test_other_commands_fail_where_what_they_print_is_lost(tmp_path):
    list_agents = f"{sys.executable} -m wmjax.cli list agents"
    assert bash(f"{list_agents} | head -1", tmp_path).returncode == 0
    done = bash(f"{list_agents} > /dev/full", tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_on_a_terminal_the_bar_fits(tmp_path):
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        shlex.split(train(tmp_path / "run")), stdout=slave, env=os.environ | {"TERM": "xterm", "COLUMNS": "40"}
    )
    os.close(slave)
    text = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while read := os.read(master, 65536):
            text += read
    os.close(master)
    assert process.wait() == 0 and whole(tmp_path / "run")
    assert b"\x1b[2K" in text and "━".encode() in text and b"compiling the stage" in text
