import io
import json
import os
import re
import signal

import jax
import numpy as np
import pytest

import wmjax
from wmjax import run as runs
from wmjax.loops import checkpoint
from wmjax.loops.report import read_metrics
from wmjax.types import Agent, Box, Env, EnvSpec, UsageError

TINY = dict(
    deter=8, hidden=8, stoch=2, classes=4, units=8, blocks=1, bins=5, stem="patch", length=4, batch_size=2, num_envs=2,
    train_ratio=4.0, prefill=16, horizon=3, imagine_last=0, replay_capacity=64, actor_layers=1, critic_layers=1,
    prior_layers=1, learning_rate=1e-2, warmup=0,
)  # fmt: skip
ENV = "probe:act_obs"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one shape compile once for all tests."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def train(out, steps=60, *, env=ENV, stream=None, **arguments):
    """A tiny run, and the digest that it printed."""
    stream = stream or io.StringIO()
    run = wmjax.train("dreamer_v3", env, steps=steps, out=out, progress=stream, **TINY | arguments)
    return run, re.findall(r"^state sha256 ([0-9a-f]{64})$", stream.getvalue(), re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "whole", eval_every=20)


class Signalling(io.StringIO):
    """A stream that has the process interrupted when training reports for the first time."""

    def __init__(self, signum):
        super().__init__()
        self.signum = signum

    def write(self, text):
        if text.startswith("train") and self.signum:
            os.kill(os.getpid(), self.signum)
            self.signum = None
        return super().write(text)


def test_a_run_in_two_parts_is_the_same_run_byte_for_byte(trained, tmp_path):
    _, half = train(tmp_path / "parts", 40)
    _, whole = train(tmp_path / "parts", 60, resume=True)
    assert whole == trained[1]
    assert half != whole


def test_an_interrupted_run_is_saved_and_goes_on_as_if_it_had_not_been(trained, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(runs.Interrupted) as caught:
        train(tmp_path / "cut", stream=Signalling(signal.SIGTERM))
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert 0 < checkpoint.latest(tmp_path / "cut" / "checkpoints") < 60
    assert train(tmp_path / "cut", resume=True)[1] == trained[1]


def test_a_run_folder_holds_what_was_asked_for_and_what_came_of_it(trained):
    run, _ = trained
    said = json.loads((run.path / "config.json").read_text())
    assert (said["agent"], said["env"], said["seed"], said["preset"]) == ("dreamer_v3", ENV, 0, "small")
    assert said["config"]["horizon"] == TINY["horizon"]
    assert len(json.loads((run.path / "eval.json").read_text())["returns"]) == 100
    assert list(run.path.glob("events.out.tfevents.*"))
    lines = read_metrics(run.path)
    assert lines[-1]["step"] == 60
    assert lines[-1]["replay_ratio"] == pytest.approx(TINY["train_ratio"] * (60 - 16) / 60, rel=1e-3)
    assert [line["step"] for line in lines if "eval/return" in line] == [20, 40, 60]


def test_the_best_of_the_periodic_evaluations_is_kept(trained):
    run, _ = trained
    scores = {line["step"]: line["eval/return"] for line in read_metrics(run.path) if "eval/return" in line}
    step = checkpoint.latest(run.path / "best")
    assert scores[step] == max(scores.values())
    best = wmjax.load(run.path, which="best")
    assert int(best.state.step) == next(line["updates"] for line in read_metrics(run.path) if line["step"] == step)


def test_a_loaded_run_is_the_trained_one(trained):
    run, _ = trained
    loaded = wmjax.load(run.path)
    assert loaded.config == run.config
    assert checkpoint.digest(loaded.state) == checkpoint.digest(run.state)
    assert loaded.evaluate(20).returns == run.evaluate(20).returns


def test_evaluation_depends_on_its_seed_and_not_on_how_many_episodes_follow(trained):
    run, _ = trained
    assert run.evaluate(40, seed=3).returns[:5] == run.evaluate(5, seed=3).returns
    assert run.evaluate(40, seed=3).returns != run.evaluate(40, seed=4).returns


def test_evaluation_refuses_what_it_cannot_do(trained):
    run, _ = trained
    for arguments, words in (
        (dict(episodes=0), "episodes: 0"),
        (dict(action="modes"), "eval_action: 'modes'"),
        (dict(env="probe:act_continuous"), "action Box"),
    ):
        with pytest.raises(UsageError, match=words):
            run.evaluate(**{"episodes": 1, **arguments})


def test_acting_repeats_itself_after_a_reset_and_gives_native_actions(trained):
    run, _ = trained
    episode = [np.array([1.0]), np.array([-1.0]), np.array([1.0])] * 3
    first, second = ([int(run.act(obs, is_first=t == 0, seed=5)) for t, obs in enumerate(episode)] for _ in range(2))
    assert first == second
    assert set(first) <= {0, 1}


def test_acting_rescales_to_the_bounds_of_the_environment():
    space = Box(0.0, 10.0, (1,))
    env = Env(EnvSpec({"vector": Box(-1, 1, (1,))}, space), None, None)
    act = lambda params, key, carry, step, explore: (carry, step.obs["vector"] * 2, ())
    agent = Agent(None, None, None, lambda params, size: (), act, None, None)
    run = runs.Run(None, {}, None, agent, env, wmjax.types.AgentState({}, {}, (), 0))
    np.testing.assert_allclose(run.act(np.array([0.25])), [7.5], rtol=1e-6)
    np.testing.assert_allclose(run.act({"vector": np.array([-1.0])}), [0.0], atol=1e-6)


def test_an_environment_may_be_a_value_and_another_seed_is_another_run(trained, tmp_path):
    env = wmjax.make_env(ENV)
    run, digest = train(tmp_path / "run", env=env, seed=1)
    assert digest != trained[1]
    with pytest.raises(UsageError, match="env="):
        wmjax.load(run.path)
    loaded = wmjax.load(run.path, env=env)
    assert loaded.evaluate(4).returns == run.evaluate(4).returns


def test_scores_of_numbers_that_can_be_checked_by_hand():
    scores = runs.summarize([7.0, 0.0, 100.0, 3.0, 4.0, 5.0, 6.0, -50.0])
    assert scores.mean == pytest.approx(9.375)
    assert scores.iqm == pytest.approx((3 + 4 + 5 + 6) / 4)  # without -50, 0, 7 and 100
    assert scores.ci95[0] < scores.iqm < scores.ci95[1]
    assert runs.summarize([2.0, 2.0]).ci95 == (2.0, 2.0)
    assert runs.summarize(np.tile([0.0, 1.0], 500)).ci95[1] - scores.iqm < 1  # narrows with more episodes


def test_a_folder_is_not_overwritten_and_a_run_not_continued_with_other_settings(trained, tmp_path):
    path = trained[0].path
    before = sorted(p.name for p in path.iterdir())
    for arguments, words in (
        (dict(out=path), "exists and is not empty"),
        (dict(out=path, resume=True, horizon=4), "horizon is 3 .* not 4"),
        (dict(out=path, resume=True, seed=1), "seed is 0 .* not 1"),
        (dict(out=tmp_path, resume=True), "not a run folder"),
        (dict(out=None, resume=True), "resume: needs"),
        (dict(out=tmp_path / "a", steps=0), "steps: 0"),
        (dict(out=tmp_path / "a", seed=-1), "seed: -1"),
        (dict(out=tmp_path / "a", eval_every=0), "eval_every: 0"),
        (dict(out=tmp_path / "a", env="catc"), "'catch'"),
        (dict(out=tmp_path / "a", env=wmjax.make_env(ENV), image_size=32), "image_size"),
    ):
        with pytest.raises(UsageError, match=words):
            train(**arguments)
    assert sorted(p.name for p in path.iterdir()) == before
    assert not (tmp_path / "a").exists()


def test_what_is_not_a_run_is_not_loaded(trained, tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        wmjax.load(tmp_path)
    (tmp_path / "config.json").write_bytes((trained[0].path / "config.json").read_bytes())
    with pytest.raises(UsageError, match="no checkpoint"):
        wmjax.load(tmp_path)
