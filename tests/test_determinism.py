"""The settings under which a GPU gives the same bytes every time: who may set them, when, and that they work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import xla_bridge

import wmjax
from tests import test_run
from tests.test_cli import FIELDS
from wmjax import determinism
from wmjax.cli import main
from wmjax.types import UsageError

ALL = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


@pytest.fixture
def not_started(monkeypatch):
    """The environment of a process whose JAX has not started."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return monkeypatch


def flags():
    return os.environ["XLA_FLAGS"].split()


@pytest.mark.parametrize("own", ["", "--xla_dump_to=/x", "--xla_gpu_deterministic_ops", ALL.split()[1] + " --xla_a=b"])
def test_flags_are_added_once_and_those_of_the_user_stay(not_started, own):
    not_started.setenv("XLA_FLAGS", own)
    assert not determinism.is_on()
    for _ in range(2):
        determinism.turn_on()
        assert flags()[: len(own.split())] == own.split() and determinism.is_on()
        assert len({flag.partition("=")[0] for flag in flags()}) == len(flags())


def test_without_the_variable_it_is_made(not_started):
    determinism.turn_on()
    assert os.environ["XLA_FLAGS"] == ALL


@pytest.mark.parametrize("own", ["--xla_gpu_deterministic_ops=false", "--xla_gpu_autotune_level=4"])
def test_flags_that_say_the_contrary_are_named(not_started, own):
    not_started.setenv("XLA_FLAGS", f"--xla_dump_to=/x {own}")
    with pytest.raises(UsageError, match=f"^deterministic: XLA_FLAGS has {own}; .* is valid"):
        determinism.turn_on()
    assert flags() == ["--xla_dump_to=/x", own]


def test_after_jax_has_started_it_says_what_to_set_and_makes_no_folder(monkeypatch, tmp_path):
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
    with pytest.raises(UsageError, match=f"^deterministic: JAX has started, .*XLA_FLAGS='{ALL}' before Python starts"):
        wmjax.train("dreamer_v3", test_run.ENV, out=tmp_path / "run", deterministic=True)
    assert flags() == ["--xla_dump_to=/x"] and not list(tmp_path.iterdir())
    monkeypatch.setenv("XLA_FLAGS", ALL)  # was set in time
    determinism.turn_on()


@pytest.mark.parametrize("platform, lines", [("cpu", 0), ("gpu", 1)])
def test_a_run_that_goes_on_asks_again_and_says_where_that_is_too_late(monkeypatch, platform, lines):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    said = []
    for description in ({}, {"about": None}, {"about": {}}, {"about": {"deterministic": False}}):
        determinism.turn_on_again(description, said.append)
    assert not said
    determinism.turn_on_again({"about": {"deterministic": True}}, said.append)  # JAX of these tests has started
    assert len(said) == lines and all("which are off now" in line for line in said)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    determinism.turn_on_again({"about": {"deterministic": True}}, said.append)
    assert determinism.is_on() and len(said) == lines


def test_a_dry_run_says_so_too_and_names_flags_that_say_the_contrary(not_started, capsys):
    dry = ["train", "dreamer_v3", "--dry-run", "--deterministic"]
    assert main(dry) in (None, 0) and ", deterministic operations; " in capsys.readouterr().out
    not_started.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert main(dry) == 2 and "--xla_gpu_autotune_level=4" in capsys.readouterr().err


def train(*arguments, **env):
    """What `wmjax train` prints in a process of its own."""
    command = [sys.executable, "-m", "wmjax", "train", *map(str, arguments)]
    there = os.environ | env | {"PYTHONPATH": str(Path(wmjax.__file__).parents[1])}
    done = subprocess.run(command, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(out):
    return re.search(r"^state sha256 ([0-9a-f]{64})$", out, re.MULTILINE).group(1)


@pytest.mark.long
@pytest.mark.slow
def test_on_a_cpu_the_option_changes_nothing_and_a_run_that_goes_on_keeps_it(tmp_path):
    _, plain = test_run.train(tmp_path / "plain")
    out, tiny = tmp_path / "asked", ["dreamer_v3", "--env", test_run.ENV, *FIELDS]
    asked = train(*tiny, "--steps", 40, "--out", out, "--deterministic", JAX_PLATFORMS="cpu")
    resumed = train("--resume", "--out", out, "--steps", 60, JAX_PLATFORMS="cpu")
    assert digest(resumed) == plain
    assert all(", deterministic operations; " in printed for printed in (asked, resumed))
    assert json.loads((out / "config.json").read_text())["about"]["deterministic"] is True


@pytest.mark.slow
@pytest.mark.accelerator
@pytest.mark.parametrize("agent", ["dreamer_v3", "iris"])
def test_on_an_accelerator_two_runs_are_equal_byte_for_byte(tmp_path, agent):
    if jax.default_backend() == "cpu":
        pytest.skip("needs a GPU; JAX finds a CPU only")
    # Nothing is cached, so each run chooses its kernels by itself. IRIS makes all of its updates by then.
    steps = {"dreamer_v3": 4_000, "iris": 30_000}[agent]
    alone = {"WMJAX_CACHE": "off", "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    common = (agent, "--deterministic", "--eval-every", 0, "--steps", steps)
    one, two = (digest(train(*common, "--out", tmp_path / name, **alone, XLA_FLAGS="")) for name in ("one", "two"))
    assert one == two
