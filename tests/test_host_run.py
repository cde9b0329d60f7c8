"""A run in a Gymnasium environment, through the same functions and files as any other run."""

import io
import json
import os
import signal

import jax
import numpy as np
import pytest

import wmjax
from tests.envs import gymnasium_envs as suite
from tests.test_run import TINY
from wmjax.cli import main
from wmjax.loops.report import read_metrics
from wmjax.types import UsageError

ENV = "gym:CartPole-v1"


def train(out, steps, env=ENV, stream=None, **arguments):
    stream = stream or io.StringIO()
    return wmjax.train("dreamer_v3", env, steps=steps, out=out, progress=stream, **TINY | arguments), stream.getvalue()


@pytest.mark.slow
def test_a_run_trains_resumes_evaluates_dreams_and_acts(tmp_path, capsys):
    out = tmp_path / "run"
    _, said = train(out, 128, eval_every=128, workers=1)  # 32 steps of two frames: replay is full
    assert "replay of 64 records: at most" in said and "of memory" in said
    assert len(list((out / "replay").iterdir())) == 1
    run, said = train(out, 140, resume=True, workers=1)
    assert "the 2 environments begin new episodes" in said
    lines = read_metrics(out)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}) and lines[-1]["step"] == 140
    assert lines[-1]["updates"] == int(run.state.step) > 0
    for name in ("time/envs", "time/device", "time/replay", "envs/restarts", "memory/resident_gb", "eval/return"):
        assert any(line.get(name) is not None for line in lines), name
    scores = run.evaluate(3, seed=5)
    assert scores.returns == run.evaluate(3, seed=5).returns and min(scores.returns) >= 8
    assert int(run.act(np.zeros(4), is_first=True)) in (0, 1)
    assert main(["dream", str(out), "--context", "2", "--horizon", "3"]) == 0
    assert main(["eval", str(out), "--episodes", "2", "--action", "mode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    with pytest.raises(UsageError, match="seeds: 2 is not valid with environments on the host"):
        train(tmp_path / "two", 64, seeds=2)
    assert not (tmp_path / "two").exists()


def test_a_run_that_is_refused_leaves_its_folder_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("wmjax.loops.host.loop.available_bytes", lambda: 100)
        for name in ("new", "there"):
            with pytest.raises(UsageError, match="replay_capacity"):
                train(tmp_path / name, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_the_same_agent_and_stream_give_the_same_updates_in_both_loops(tmp_path):
    """DreamerV3 with images, its latents written back to replay, against `fakes.counter_env` and its twin in NumPy."""
    from tests.loops.fakes import counter_env
    from tests.loops.host.fakes import CounterEnvs, run_device, run_host, stored
    from wmjax.agents import AGENTS
    from wmjax.types import HostEnv, TimeStep

    class ImageEnvs(CounterEnvs):
        def observe(self, reward):
            step = super().observe(reward)
            image = np.broadcast_to(self.count.astype(np.uint8)[:, None, None, None], (len(self.count), 16, 16, 3))
            return TimeStep(step.obs | {"image": image}, *step[1:])

    device_env = counter_env(size=16, limit=4)
    device_env = device_env._replace(
        spec=device_env.spec._replace(
            obs=device_env.spec.obs | {"image": wmjax.types.Box(0, 255, (16, 16, 3), "uint8")}
        )
    )
    host_env = HostEnv(
        device_env.spec,
        lambda num_envs, *, stop=lambda: False, **options: ImageEnvs(num_envs, 4, None, stop),
        lambda action: action.argmax(-1).astype("int32"),
    )
    config_class, make, _ = AGENTS["dreamer_v3"]
    # Steps of a size at which the rounding of zeros, which the two programs do not share, stays rounding; and no bins:
    # the outer ones are at 5e8, so that a mean over five of them is mostly rounding.
    steady = dict(epsilon=1e-6, reward_head="symlog_mse", critic_head="symlog_mse")
    agent = make(device_env.spec, config_class(**TINY | steady))
    assert len(agent.recipe.stages) == 2
    iterations = [agent.recipe.stages[0].iterations, 10]
    loop, state, metrics = run_host(agent, host_env, iterations, overlap=False)
    expected, wanted = run_device(agent, device_env, iterations)
    loop._latents.flush()
    step, action, _ = stored(loop)
    jax.tree.map(np.testing.assert_array_equal, (step, action), tuple(expected.replay.data[:2]))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, state.agent.params, expected.agent.params)
    jax.tree.map(close, loop.replay.latent, expected.replay.data.latent)
    assert int(state.agent.step) == int(expected.agent.step) > 0
    for name, value in wanted[1].items():
        np.testing.assert_allclose(metrics[1][name], value, rtol=2e-3, atol=1e-4, err_msg=name)


class Signalling(io.StringIO):
    """A stream that has the process interrupted when training first reports."""

    def write(self, text):
        if "train  " in text and "train  " not in self.getvalue():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


@pytest.mark.slow
def test_a_signal_saves_replay_too_and_resuming_goes_on(tmp_path):
    with pytest.raises(wmjax.Interrupted):
        train(tmp_path / "run", 5000, stream=Signalling())
    before = read_metrics(tmp_path / "run")[-1]["step"]
    _, said = train(tmp_path / "run", before + 40, resume=True)
    assert "chunks are torn" not in said and read_metrics(tmp_path / "run")[-1]["step"] >= before + 40


@pytest.mark.long
@pytest.mark.slow
def test_a_simulator_of_which_one_may_exist_trains_and_is_evaluated(tmp_path, capsys):
    env = suite.register("WmjaxAlone-v0", "Alone", lock=str(tmp_path / "lock"))
    out, one = tmp_path / "run", dict(env=env, num_envs=1, workers=1)
    _, said = train(out, 40, eval_every=20, **one)  # finds out by itself that there is no room beside training
    assert said.count("from now on they are closed for evaluations") == 1
    run, said = train(out, 80, eval_every=20, resume=True, eval_envs=0, trust_env=True, **one)
    assert "warning" not in said and "mean return 4.000 over 16 episodes" in said
    lines = read_metrics(out)
    assert [line["eval/return"] for line in lines if "eval/return" in line] == [4.0] * 4
    assert lines[-1]["step"] == 80 and lines[-1]["updates"] == int(run.state.step) > 0
    capsys.readouterr()
    assert main(["eval", str(out), "--episodes", "1", "--json", "--trust-env"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["returns"], found["lengths"], found["cut"], found["step"]) == ([4.0], [4], 0, 80)
    assert main(["dream", str(out), "--context", "2", "--horizon", "2", "--trust-env"]) == 0


@pytest.mark.slow
def test_episodes_without_end_are_cut_and_the_run_says_how_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wmjax.loops.rollout.EVALUATION_STEPS", 30)
    env = suite.register("WmjaxEndless-v0", "Alone", lock=str(tmp_path / "lock"), length=10**9)
    out = tmp_path / "run"
    _, said = train(out, 40, env, eval_every=0, num_envs=1, workers=1)
    assert "16 of 16 episodes were cut after 30 steps" in said.splitlines()
    assert not [line for line in read_metrics(out) if "eval/return" in line] and not (out / "best").exists()
    capsys.readouterr()
    assert main(["eval", str(out), "--episodes", "2", "--max-steps", "12", "--trust-env"]) == 0
    assert "2 of 2 episodes were cut after 12 steps" in capsys.readouterr().out.splitlines()
    found = [json.loads(path.read_text()) for path in sorted((out / "evals").iterdir())]
    assert sorted((x["cut"], x["episodes"], x["max_steps"]) for x in found) == [(2, 2, 12), (16, 16, None)]
