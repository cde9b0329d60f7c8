"""World Models as a user runs it: stages one after the other, interrupted, resumed, evaluated and drawn."""

import dataclasses
import io
import json
import os
import re
import signal

import numpy as np
import pytest

import wmjax
from tests.envs.gymnasium_envs import register
from wmjax.agents.world_models import EvolveConfig
from wmjax.cli import main
from wmjax.loops.report import read_metrics

pytestmark = pytest.mark.slow
SEARCH = EvolveConfig(
    where="dream", population=4, rollouts=2, generations=24, mean_every=2, mean_rollouts=4, horizon=6, starts=8
)
FIELDS = dict(
    latent=4, depth=2, hidden=6, mixtures=2, num_envs=2, collect_steps=128, replay_capacity=128, vision_updates=40,
    vision_batch_size=4, memory_updates=40, memory_batch_size=4, memory_length=6, collection="random", evolve=SEARCH,
)  # fmt: skip


class Signalling(io.StringIO):
    """A stream that has the process interrupted when a stage is reported for the first time."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def write(self, text):
        if self.stage and re.search(rf"\b{self.stage} .*env steps", text):
            self.stage = None
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def train(out, stage=None, **arguments):
    stream = Signalling(stage)
    wmjax.train("world_models", "catch", out=out, progress=stream, **FIELDS | arguments)
    return re.findall(r"^state sha256 ([0-9a-f]{64})$", stream.getvalue(), re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, train(path)


def test_a_run_interrupted_in_every_stage_is_the_same_run_and_its_metrics_have_no_line_twice(whole, tmp_path):
    out, resume = tmp_path / "parts", False
    for stage in ("collect", "vision", "encode", "memory", "controller"):
        with pytest.raises(wmjax.Interrupted):
            train(out, stage, resume=resume)
        resume = True
    assert train(out, resume=True) == whole[1]
    iterations = [line["iteration"] for line in read_metrics(out)]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == read_metrics(whole[0])[-1]["iteration"]


def test_a_run_is_evaluated_dreamt_and_plotted_from_the_command_line(whole, capsys):
    path, _ = whole
    lines = read_metrics(path)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == ["collect", "vision", "encode", "memory", "controller"]
    assert {line["step"] for line in lines if line["stage"] != "collect"} == {128}  # no real step after collection
    assert len([line for line in lines if "eval/return" in line]) == 10
    assert lines[-1]["controller/generation"] == 24
    assert main(["eval", str(path), "--episodes", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 8
    assert main(["dream", str(path), "--context", "2", "--horizon", "3"]) == 0
    said = capsys.readouterr().out
    assert "error of the reconstruction" in said and "reconstructions.png" in said.splitlines()[-1]
    assert (path / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert (path / "dream.gif").read_bytes().startswith(b"GIF")
    assert 0 < json.loads((path / "dream.json").read_text())["reconstruction"]["image"] < 1
    assert main(["plot", str(path)]) == 0
    assert (path / "fitness_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_several_seeds_search_in_one_program(tmp_path, capsys):
    search = dataclasses.replace(SEARCH, generations=4, where="env")
    train(tmp_path / "run", seeds=2, evolve=search)
    run = wmjax.load(tmp_path / "run")
    thetas = run.state.params["controller"]
    assert thetas.shape[0] == 2 and np.abs(thetas[0] - thetas[1]).max() > 1e-2
    assert main(["plot", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "fitness_curve.png").exists()


@pytest.mark.parametrize("where", ["env", pytest.param("dream", marks=pytest.mark.long)])
def test_a_controller_is_evolved_for_an_environment_on_the_host(tmp_path, where):
    register("WmjaxPictured-v0", "Pictured")
    out = tmp_path / "run"
    search = dataclasses.replace(SEARCH, where=where, generations=12, sigma_init=0.5)
    fields = FIELDS | dict(env="gym:WmjaxPictured-v0", reward_head="mse", evolve=search, workers=1)
    stream = Signalling("controller")
    with pytest.raises(wmjax.Interrupted):
        wmjax.train("world_models", out=out, progress=stream, **fields)
    run = wmjax.train("world_models", out=out, progress=False, resume=True, **fields)
    lines = read_metrics(out)
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [
        "collect",
        "vision",
        "encode",
        "memory",
        "controller",
    ]
    assert lines[-1]["controller/generation"] == 12 and np.isfinite(lines[-1]["controller/kept_return"])
    if where == "env":  # five steps; the action is the sign of an output
        assert run.evaluate(4).mean == lines[-1]["controller/kept_return"] == 5
