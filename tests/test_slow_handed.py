"""Runs on environments of a user's own, found again by new processes, and not by those that have no leave to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wmjax
from tests.envs.test_handed import Walk
from tests.marks import partly_long
from tests.test_run import TINY
from wmjax.cli import main
from wmjax.types import UntrustedError, UsageError

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs" / "environments.md"


def command(folder, *argv):
    """A new process in a folder: exit code, standard output, standard error."""
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the example of the page on environments was run, for fewer steps and with a smaller agent."""
    code = next(x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "class Walk" in x)
    assert "steps=20_000" in code
    folder = tmp_path_factory.mktemp("example")
    tiny = ", ".join(f"{name}={value!r}" for name, value in TINY.items())
    (folder / "walk.py").write_text(code.replace("steps=20_000", f"steps=64, {tiny}"))
    code, out, err = command(folder, "walk.py")
    assert code == 0 and out.count("run folder runs/walk") == 2, out + err  # it has trained once
    return folder


@pytest.mark.long
def test_the_example_of_the_page_is_evaluated_and_dreamt_of_in_a_new_shell(folder):
    said = json.loads((folder / "runs/walk/config.json").read_text())
    assert said["env"] == f"gym:{folder / 'walk.py'}:Walk" and said["env_args"] == {"max_episode_steps": 50}
    for name, more in (("eval", ["--episodes", "2"]), ("dream", ["--context", "2", "--horizon", "2"])):
        argv = ["-m", "wmjax", name, "runs/walk", *more]
        code, out, err = command(folder, *argv)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.rstrip().endswith(f"wmjax {' '.join(argv[2:])} --trust-env")
        code, out, err = command(folder, *argv, "--trust-env")
        assert code == 0 and f"wrote runs/walk/{name if name == 'dream' else 'eval'}" in out, out + err
    code, out, err = command(
        folder, "-m", "wmjax", "eval", "runs/walk", "--episodes", "1", "--env", "gym:walk.py:Walk-v0"
    )
    assert code == 0, err


@pytest.mark.long
def test_the_example_is_a_module_too(folder):
    code = "import wmjax, walk; run = wmjax.load('runs/walk', env=walk.Walk); print(run.evaluate(1).episodes)"
    assert command(folder, "-c", code)[:2] == (0, "1\n")
    text = (folder / "walk.py").read_text().replace("runs/walk", "runs/module").replace('"gym:Walk-v0"', "Walk")
    (folder / "as_module.py").write_text(text)
    code, out, err = command(folder, "-m", "as_module")
    assert code == 0, out + err
    assert json.loads((folder / "runs/module/config.json").read_text())["env"] == "gym:as_module:Walk"
    code, out, err = command(folder, "-m", "wmjax", "eval", "runs/module", "--episodes", "1", "--trust-env")
    assert code == 0, out + err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a class, with an argument."""
    out = tmp_path_factory.mktemp("runs") / "walk"
    args = {"start": 1, "max_episode_steps": 8}
    wmjax.train("dreamer_v3", Walk, env_args=args, steps=48, out=out, progress=False, workers=1, **TINY)
    return out


@pytest.mark.long
def test_a_class_is_found_again_with_its_arguments(trained, capsys):
    described = json.loads((trained / "config.json").read_text())
    assert described["env"] == "gym:tests.envs.test_handed:Walk"
    run = wmjax.load(trained)  # its class is imported here already
    assert run.env.spec.max_episode_steps == 8
    assert min(run.evaluate(2).returns) >= 4  # from 1 to 5 at least, each step pays 1
    assert max(run.evaluate(2, env=wmjax.make_env(Walk, env_args={"start": 4, "max_episode_steps": 2})).returns) <= 2
    assert main(["eval", str(trained), "--episodes", "2", "--env-arg", "pay", "0", "--trust-env"]) == 0
    assert "mean return 0.000" in capsys.readouterr().out
    played = lambda *argv: main([*argv, str(trained)]) or json.loads(capsys.readouterr().out.splitlines()[-1])
    for more in (["--trust-env"], []):  # the run's own, named once more, has the run's arguments
        for env in ("gym:tests.envs.test_handed:Walk", "gym:tests/envs/test_handed.py:Walk"):
            found = played("eval", "--episodes", "2", "--json", "--env", env, *more)
            assert found["env_args"] == described["env_args"] and max(found["lengths"]) <= 8
        found = played(
            "eval", "--episodes", "2", "--json", *more, "--env", "gym:tests.envs.test_handed:make_walk", "--env-arg",
            "max_episode_steps", "3",
        )  # fmt: skip
        assert found["env_args"] == {"max_episode_steps": 3} and found["lengths"] == [3, 3]
    argv = ["dream", str(trained), "--context", "2", "--horizon", "2", "--env", "gym:tests.envs.test_handed:Walk"]
    assert main(argv) == 0
    argv = ["eval", str(trained), "--episodes", "1", "--env", "gym:tests.envs.test_handed:make_walk"]
    assert main([*argv, "--env-arg", "start", "4"]) == 0
    wmjax.train("dreamer_v3", Walk, steps=56, out=trained, resume=True, progress=False, workers=1, **TINY)
    with pytest.raises(UsageError, match="env_args cannot change"):
        wmjax.train("dreamer_v3", Walk, env_args={"start": 2}, out=trained, resume=True, progress=False, **TINY)


@pytest.mark.long
def test_what_has_no_name_is_loaded_by_its_value(tmp_path):
    out, make = tmp_path / "run", lambda: Walk(2)
    wmjax.train("dreamer_v3", make, steps=40, out=out, progress=False, workers=1, **TINY)
    with pytest.raises(UsageError, match="from Python, load the run with env="):
        wmjax.load(out)
    assert wmjax.load(out, env=make).evaluate(1).episodes == 1
    assert main(["eval", str(out), "--episodes", "1"]) == 2


@pytest.mark.parametrize(
    "name",
    partly_long(
        ["gym:evil:X-v0", "gym:runs.evil:X-v0", "gym:{folder}/evil.py:X", "gym:evil.py:Walk", "gym:evil:make"],
        kept=("gym:evil:X-v0", "gym:evil.py:Walk"),
    ),
)
def test_a_run_of_somebody_elses_runs_none_of_their_code(trained, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained)
    downloaded = tmp_path / "run2"
    subprocess.run(["cp", "-r", trained, downloaded], check=True)
    for folder in (tmp_path, downloaded, tmp_path / "runs"):
        folder.mkdir(exist_ok=True)
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    config = json.loads((downloaded / "config.json").read_text())
    config["env"] = name.format(folder=tmp_path)
    (downloaded / "config.json").write_text(json.dumps(config))
    path = list(sys.path)
    resume = ["train", "dreamer_v3", "--resume", "--out", str(downloaded)]
    for argv in (["eval", str(downloaded)], ["dream", str(downloaded)], resume):
        assert main(argv) == 2
        *before, last = capsys.readouterr().err.splitlines()
        assert last.endswith(f"wmjax {' '.join(argv)} --trust-env")
        assert all("config.json is not as it was" in line for line in before) and len(before) < 2  # it was edited
    with pytest.raises(UntrustedError):
        wmjax.load(downloaded)
    assert not (tmp_path / "pwned").exists() and sys.path == path
    assert main(["eval", str(downloaded), "--trust-env"]) == 2 and (tmp_path / "pwned").exists()  # with the user's word
    sys.modules.pop("evil", None), sys.modules.pop("runs.evil", None), sys.modules.pop("runs", None)
    sys.path[:] = path
