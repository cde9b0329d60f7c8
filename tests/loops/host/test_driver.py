"""The driver over the host loop: saving, going on, and what may go wrong in between."""

import contextlib
import io

import jax
import numpy as np
import pytest

from tests.loops.fakes import fake_agent, fake_recipe
from tests.loops.host.fakes import host_env
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint
from wmjax.loops.display import Display
from wmjax.loops.driver import Driver, Plan
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import Options
from wmjax.loops.report import read_metrics
from wmjax.replay import chunks
from wmjax.run_folder import CHECKPOINTS
from wmjax.types import RunError


def drive(path, env, steps, *, resume=False, caught=(), actions=3, said=None, **kwargs):
    """Trains the fake agent as `wmjax.train` does; its state, and what was said."""
    said, seconds = [] if said is None else said, kwargs.get("checkpoint_seconds", 0.0)
    agent = fake_agent(fake_recipe(fake_agent(actions=actions).act, capacity=32), actions=actions)
    options, stream = kwargs.pop("options", Options(workers=1)), io.StringIO()
    loop = HostLoop(agent, env, path, options, said.append, kwargs.pop("stop", lambda: bool(caught)))
    with contextlib.closing(loop):
        callback = kwargs.get("callback")
        plan = Plan(
            agent,
            env,
            path,
            (0,),
            steps,
            kwargs.get("eval_every", 10**6),
            seconds,
            100,
            Display(stream),
            options,
            callback=callback,
        )
        driver = Driver(plan, loop, caught)
        state = driver.start(resume, said.append)
        try:
            state = driver.run(state)
        finally:
            said += stream.getvalue().splitlines()
        return loop.gather(state), said


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 150)


def test_a_run_saves_itself_evaluates_and_goes_on(tmp_path, small_chunks):
    env, begun = host_env()
    state, _ = drive(tmp_path, env, 104, eval_every=60)
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] == 104 == checkpoint.latest(tmp_path / CHECKPOINTS)
    assert [line["eval/return"] for line in lines if "eval/return" in line] == [8.0]  # the last action, four times
    assert checkpoint.info(tmp_path / "best")["mean"] == 8.0
    assert len(list((tmp_path / "replay").iterdir())) > 2
    again, said = drive(tmp_path, env, 144, resume=True)
    assert any("begin new episodes" in text for text in said) and not any("torn" in text for text in said)
    assert (int(again.steps), int(again.replay.ring.added)) == (36, 36)  # two environments, two frames for each action
    assert int(again.agent.step) > int(state.agent.step)
    assert all(envs.log[-1] == "closed" for envs in begun)


def test_a_stage_that_took_long_is_saved_before_the_next_is_compiled(tmp_path, monkeypatch):
    def at_once(saver, *args, save=checkpoint.Saver.save, **options):
        save(saver, *args, **options)
        saver._pending[args[0]][1].result()  # else the next stage may begin while this is being written

    monkeypatch.setattr(checkpoint.Saver, "save", at_once)
    monkeypatch.setattr("wmjax.loops.driver.STAGE_SECONDS", 0.0)
    caught, places = [], tmp_path / CHECKPOINTS
    env, begun = host_env()
    stop = lambda: bool(caught) or (bool(checkpoint.steps(places)) and not caught.append(15))
    drive(tmp_path, env, 10**6, caught=caught, stop=stop, checkpoint_seconds=1e6)
    assert min(checkpoint.steps(places)) == 6 * 4 and begun[0].steps <= 8  # prefill


def test_told_to_stop_it_ends_at_once_and_saves(tmp_path):
    caught = []
    env, begun = host_env()
    stop = lambda: bool(caught) or (begun and begun[0].steps > 12 and not caught.append(15))
    state, _ = drive(tmp_path, env, 10**6, caught=caught, stop=stop)
    assert int(state.steps) <= 14
    assert checkpoint.latest(tmp_path / CHECKPOINTS) == int(state.steps) * 4
    assert int(drive(tmp_path, env, 80, resume=True)[0].steps) == 20


def test_environments_that_are_lost_end_it_with_everything_saved(tmp_path):
    with pytest.raises(RunError, match="the environments are gone"):
        drive(tmp_path, host_env(breaks=15)[0], 10**6)
    assert checkpoint.latest(tmp_path / CHECKPOINTS) == 14 * 4 == read_metrics(tmp_path)[-1]["step"]


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, small_chunks, monkeypatch):
    drive(tmp_path, host_env()[0], 64)
    said = []

    def full(folder, arrays):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "write", full)
        with pytest.raises(RunError, match="the end of the run could not be saved"):
            drive(tmp_path, host_env()[0], 144, resume=True, said=said)
    assert any("chunk could not be written" in text for text in said)
    kept = checkpoint.latest(tmp_path / CHECKPOINTS)  # the last that needed no file but those there were
    assert 64 <= kept < 80
    assert any("step 144 could not be saved" in text and f"step {kept} is kept" in text for text in said)
    state, said = drive(tmp_path, host_env()[0], 104, resume=True)
    assert int(state.steps) == 26 and not any("torn" in text for text in said)


def test_a_torn_replay_file_is_left_out(tmp_path, small_chunks):
    drive(tmp_path, host_env()[0], 104)
    for path in (tmp_path / "replay").iterdir():  # those that only an older checkpoint names too
        path.write_bytes(path.read_bytes()[:-3])
    state, said = drive(tmp_path, host_env()[0], 120, resume=True)
    assert any("of 6 chunks are torn or missing" in text for text in said)
    assert int(state.replay.ring.added) < int(state.steps) == 30


@pytest.mark.slow
def test_it_trains_in_an_environment_of_gymnasium(tmp_path):
    env = agent_actions(make_env("gym:CartPole-v1"))
    state, _ = drive(tmp_path, env, 60, actions=2, eval_every=30)
    assert int(state.steps) == 30 and int(state.agent.step) > 0
    lines = read_metrics(tmp_path)
    assert lines[-1]["envs/restarts"] == 0 and 8 <= max(line.get("eval/return") or 0 for line in lines) <= 11
    assert np.isfinite(jax.tree.leaves(state.agent.params)[0]).all()


@pytest.mark.parametrize("answer", [False, np.False_])
def test_a_callback_sees_every_line_and_its_false_stops_the_run_which_goes_on_later(answer, tmp_path):
    seen = []

    def callback(metrics, agent):
        seen.append((metrics, int(agent.step)))
        return answer if metrics["updates"] else None

    state, _ = drive(tmp_path, host_env()[0], 1000, callback=callback)
    assert [metrics for metrics, _ in seen] == read_metrics(tmp_path)
    assert [metrics["updates"] for metrics, _ in seen] == [step for _, step in seen]
    step = seen[-1][0]["step"]
    assert step < 1000 and checkpoint.latest(tmp_path / CHECKPOINTS) == step
    assert int(state.agent.step) == seen[-1][1] > 0
    drive(tmp_path, host_env()[0], step + 8, resume=True, callback=lambda metrics, agent: seen.append(metrics))
    assert read_metrics(tmp_path)[-1]["step"] == step + 8


@pytest.mark.parametrize("error", [ZeroDivisionError("of a logger"), SystemExit(3)], ids=lambda error: str(error))
def test_what_a_callback_raises_comes_after_the_run_is_saved(error, tmp_path):
    def callback(metrics, agent):
        if metrics["updates"]:
            raise error

    with pytest.raises(type(error)) as caught:
        drive(tmp_path, host_env()[0], 1000, callback=callback)
    assert caught.value is error
    assert checkpoint.latest(tmp_path / CHECKPOINTS) == read_metrics(tmp_path)[-1]["step"] < 1000
