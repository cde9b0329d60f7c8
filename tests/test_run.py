import io
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import wmjax
from wmjax import run as runs
from wmjax import settings
from wmjax.loops import checkpoint
from wmjax.loops.driver import NotFiniteError
from wmjax.loops.report import read_metrics
from wmjax.types import Agent, Box, Env, EnvSpec, RunError, UsageError

TINY = dict(
    deter=8, hidden=8, stoch=2, classes=4, units=8, blocks=1, bins=5, stem="patch", length=4, batch_size=2, num_envs=2,
    train_ratio=4.0, prefill=16, horizon=3, imagine_last=0, replay_capacity=64, actor_layers=1, critic_layers=1,
    prior_layers=1, learning_rate=1e-2, warmup=0,
)  # fmt: skip
ENV = "probe:act_obs"


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
        if "train  " in text and "env steps" in text and self.signum:
            os.kill(os.getpid(), self.signum)
            self.signum = None
        return super().write(text)


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_same_run_byte_for_byte(trained, tmp_path):
    _, half = train(tmp_path / "parts", 40)
    _, whole = train(tmp_path / "parts", 60, resume=True)
    assert whole == trained[1]
    assert half != whole


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_is_saved_and_goes_on_as_if_it_had_not_been(trained, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(wmjax.Interrupted) as caught:
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
        *((dict(episodes=value), f"episodes: {value!r}") for value in (0, -1, 1.5, True, 10**10, "3", None)),
        *((dict(seed=value), f"seed: {value!r}") for value in (-1, 0.5, True, 2**31, None)),
        *((dict(max_steps=value), f"max_steps: {value!r}") for value in (0, 2.0, True)),
        *((dict(eval_envs=value), f"eval_envs: {value!r}") for value in (0, -1, 1.5)),
        *((dict(action=value), f"action: {value!r}") for value in ("modes", 3, "")),
        *((dict(env=value), re.escape(f"env: {value!r}")) for value in (5, ())),
        (dict(env="probe:act_continuous"), "action Box"),
    ):
        with pytest.raises(UsageError, match=words):
            run.evaluate(**{"episodes": 1, **arguments})


def test_a_run_is_shown_in_one_line(trained, tmp_path):
    run, _ = trained
    assert (
        repr(run) == str(run) == f"Run(dreamer_v3 on {ENV}, preset small, seed 0, step 60 (latest), {str(run.path)!r})"
    )
    best = wmjax.load(run.path, which="best")
    assert f"step {checkpoint.latest(run.path / 'best')} (best)" in repr(best)


def test_acting_repeats_itself_after_a_reset_and_gives_native_actions(trained):
    run, _ = trained
    episode = [np.array([1.0]), np.array([-1.0]), np.array([1.0])] * 3
    first, second = ([int(run.act(obs, is_first=t == 0, seed=5)) for t, obs in enumerate(episode)] for _ in range(2))
    assert first == second
    assert set(first) <= {0, 1}


@pytest.mark.parametrize(
    ("name", "values", "valid"),
    [
        (
            "reward",
            [None, "x", "1.5", [], {}, [1.0], float("nan"), 1e39, 1e300, 10**400, 1j, object()],
            "a finite number",
        ),
        (
            "is_first",
            [None, "x", "no", 1, 1.5, 1j, [True], np.ones(2, bool), {}, 10**400, object(), float("nan")],
            "True or False",
        ),
    ],
)
def test_what_comes_with_an_observation_is_checked(trained, name, values, valid):
    for value in values:
        with pytest.raises(UsageError, match=f"^{name}: .* is not valid; {valid} is$"):
            trained[0].act(np.zeros(1), **{name: value})
    assert runs._scalar("reward", np.float32(2), float) == runs._scalar("reward", jax.numpy.array(2), float) == 2.0
    assert runs._scalar("is_first", np.array(True), bool) is runs._scalar("is_first", jax.numpy.ones((), bool), bool)


def test_acting_rescales_to_the_bounds_of_the_environment():
    space = Box(0.0, 10.0, (1,))
    env = Env(EnvSpec({"vector": Box(-1, 1, (1,))}, space), None, None)
    act = lambda params, key, carry, step, explore: (carry, step.obs["vector"] * 2, ())
    agent = Agent(None, None, None, lambda params, size: (), act, None, None)
    run = runs.Run(None, {}, None, agent, env, wmjax.types.AgentState({}, {}, (), 0))
    np.testing.assert_allclose(run.act(np.array([0.25])), [7.5], rtol=1e-6)
    np.testing.assert_allclose(run.act({"vector": np.array([-1.0])}), [0.0], atol=1e-6)


@pytest.mark.slow
def test_an_environment_may_be_a_value_and_another_seed_is_another_run(trained, tmp_path):
    env = wmjax.make_env(ENV)
    run, digest = train(tmp_path / "run", env=env, seed=1)
    assert digest != trained[1]
    with pytest.raises(UsageError, match="env="):
        wmjax.load(run.path)
    loaded = wmjax.load(run.path, env=env)
    assert loaded.evaluate(4).returns == run.evaluate(4).returns


def test_a_folder_is_not_overwritten_and_a_run_not_continued_with_other_settings(trained, tmp_path):
    path = trained[0].path
    before = sorted(p.name for p in path.iterdir())
    for arguments, words in (
        (dict(out=path), "exists and is not empty"),
        (dict(out=path, resume=True, deter=16, horizon=4), "deter is 8, not 16, horizon is 3, not 4; .* 'agent/params"),
        (dict(out=path, resume=True, actor_layers=0), "actor_layers is 1, not 0; .* 'agent/params"),
        (dict(out=path, resume=True, seed=1, horizon=4), "seed is 0, not 1, horizon is 3, not 4; seed cannot change"),
        (dict(out=path, resume=True, seeds=2), "seeds is 1, not 2"),
        (dict(out=tmp_path, resume=True), "not a run folder"),
        (dict(out=None, resume=True), "resume: needs"),
        (dict(out=tmp_path / "a", steps=0), "steps: 0"),
        (dict(out=tmp_path / "a", seed=-1), "seed: -1"),
        (dict(out=tmp_path / "a", eval_every=-1), "eval_every: -1"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Settings that change, locks, full disks


@pytest.mark.slow
def test_a_run_may_go_on_with_settings_that_keep_its_shapes_and_says_so(tmp_path):
    train(tmp_path / "run", 40)
    stream = io.StringIO()
    train(tmp_path / "run", 60, resume=True, eval_action="sample", stream=stream)
    said = r"^resume with changed settings: eval_action is 'mode', not 'sample'$"
    assert re.search(said, stream.getvalue(), re.MULTILINE)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["eval_action"] == "sample"


def test_a_run_folder_in_use_is_locked_and_free_again_afterwards(trained, tmp_path):
    import filelock

    path = trained[0].path
    with filelock.FileLock(path / ".lock"), pytest.raises(UsageError, match="locked; another process"):
        train(path, resume=True)
    assert train(path, resume=True)[1] == trained[1]


def test_a_run_goes_on_with_the_settings_it_has_where_none_are_given(trained, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(trained[0].path, path)
    before = json.loads((path / "config.json").read_text())
    stream = io.StringIO()
    wmjax.train("dreamer_v3", out=path, resume=True, progress=stream)
    assert f"state sha256 {trained[1]}" in stream.getvalue() and "changed settings" not in stream.getvalue()
    assert json.loads((path / "config.json").read_text()) == before
    made = settings.setup("dreamer_v3", seed=5, overrides={"horizon": 4}, before=before)
    assert made.description["seed"] == 5 and made.config.horizon == 4 and made.config.deter == TINY["deter"]
    assert (made.description["env"], made.steps) == (ENV, 60)
    # It has to fit what the run has, and not the preset.
    assert settings.setup("dreamer_v3", overrides={"replay_capacity": 72}, before=before).config.replay_capacity == 72
    assert settings.setup("dreamer_v3", preset="small", steps=2000, before=before).config.dimensions.deter == 128
    with pytest.raises(UsageError, match="trained on an Env value"):
        settings.setup("dreamer_v3", before=before | {"env": None})


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(trained, tmp_path):
    path = tmp_path / "run"
    train(path, 40, checkpoint_seconds=0, eval_every=20)
    folder = path / "checkpoints"
    steps = checkpoint.steps(folder)
    assert len(steps) == 2 and steps[-1] == 40
    for file in (folder / f"{40:012d}" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:-50])
    stream = io.StringIO()
    _, digest = train(path, 60, resume=True, stream=stream)
    assert f"using step {steps[0]}, the newest that is whole" in stream.getvalue()
    assert digest == trained[1]
    assert (folder / f"{40:012d}.damaged").is_dir()


@pytest.mark.slow
def test_a_disk_that_is_full_keeps_the_old_checkpoint_warns_and_trains_on(trained, tmp_path, monkeypatch):
    path, write, stream = tmp_path / "run", checkpoint.write, io.StringIO()

    def full_at_first(folder, step, *args, **kwargs):
        if step < 60:
            raise OSError(28, "No space left on device")
        return write(folder, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", full_at_first)
    _, digest = train(path, stream=stream, checkpoint_seconds=0, eval_every=20)
    assert digest == trained[1]
    assert re.search(
        r"^warning: checkpoint .*checkpoints: step \d+ could not be saved .*No space", stream.getvalue(), re.M
    )
    assert checkpoint.steps(path / "checkpoints") == [60]
    monkeypatch.setattr(checkpoint, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunError, match="end of the run could not be saved"):
        train(path, 80, resume=True)
    assert checkpoint.steps(path / "checkpoints") == [60]


# ---------------------------------------------------------------------------------------------------------------------
# Updates that are not finite


def faulty_env(first, last):
    """`probe:act_obs`, whose steps from number `first` to `last` of each environment give NaN for a reward."""
    env = wmjax.make_env(ENV)

    def reset(key):
        state, step = env.reset(key)
        return (state, jax.numpy.int32(0)), step

    def step(key, state, action):
        inner, record = env.step(key, state[0], action)
        time = state[1] + 1
        reward = jax.numpy.where((first <= time) & (time <= last), jax.numpy.nan, record.reward)
        return (inner, time), record._replace(reward=reward)

    return env._replace(reset=reset, step=step)


@pytest.mark.slow
def test_an_environment_that_once_gives_nan_costs_some_updates_which_are_counted(tmp_path):
    run, _ = train(tmp_path / "run", 300, env=faulty_env(20, 20), eval_every=100)
    lines = read_metrics(run.path)
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] == 0 and 0 < skipped[-1] == skipped[-2]  # replay holds 32 steps of each environment
    assert int(run.state.step) == lines[-1]["updates"]
    assert lines[-1]["train/skipped"] == 0 and np.isfinite(lines[-1]["train/loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.state.params))
    whole = sum(line["train/skipped"] for line in lines if "train/skipped" in line)
    assert whole == skipped[-1]


@pytest.mark.slow
def test_an_environment_that_always_gives_nan_stops_the_run_with_its_last_good_agent(tmp_path):
    with pytest.raises(NotFiniteError, match=r"\d+ updates in a row .* \(max_skipped 5\).* step \d+ in .*checkpoints"):
        train(tmp_path / "run", 300, env=faulty_env(20, 10**6), max_skipped=5, eval_every=50)
    loaded = wmjax.load(tmp_path / "run", env=faulty_env(20, 10**6))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.state))


@pytest.mark.slow
def test_a_run_whose_settings_stopped_it_goes_on_with_better_ones(tmp_path):
    with pytest.raises(NotFiniteError):  # the loss is infinite, before there is a checkpoint
        train(tmp_path / "run", 300, reward_scale=3e38, max_skipped=5)
    run, _ = train(tmp_path / "run", 300, reward_scale=1.0, max_skipped=5, resume=True)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == 300 and lines[-1]["skipped"] > 5 and int(run.state.step) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds


def test_seeds_whose_checkpoints_are_of_different_steps_are_said(tmp_path, monkeypatch, capsys):
    for steps, words in (([60, 60], ""), ([60, 42], "seed 0 at 60, seed 1 at 42")):
        made = settings.setup("dreamer_v3", "probe:value", seeds=2)
        (tmp_path / "config.json").write_text(json.dumps(made.description))
        found = iter(steps)
        monkeypatch.setattr(runs, "_read_agent", lambda *args, found=found: (next(found), {"x": np.zeros(1)}))
        assert wmjax.load(tmp_path).step == 60
        assert words in (said := capsys.readouterr().err) and bool(said) == bool(words)


# With its own epsilon of 1e-20 the optimizer turns rounding errors of gradients that are 0 into steps of full size.
SMALL_STEPS = dict(learning_rate=1e-3, epsilon=1e-3, eval_every=20)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return train(tmp_path_factory.mktemp("seeds") / "run", 28, seeds=3, seed=3, **SMALL_STEPS)


@pytest.mark.slow
@pytest.mark.long
def test_each_of_several_seeds_equals_the_same_seed_alone_within_rounding(seeds, tmp_path):
    run, _ = seeds
    alone, _ = train(tmp_path / "alone", 28, seed=4, **SMALL_STEPS)
    start = jax.jit(run.agent.init)(jax.random.split(jax.random.key(4), 4)[0])
    member, moved = run.members[1], 0.0
    assert member.seed == 4 and int(member.state.step) == int(alone.state.step) >= 5
    for old, x, y in zip(*map(jax.tree.leaves, (start.params, member.state.params, alone.state.params)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
        moved = max(moved, float(np.abs(y - old).max()))
    assert moved > 100 * 2e-5
    mine, other = read_metrics(member.path), read_metrics(alone.path)
    assert mine[-1]["episode/count"] == other[-1]["episode/count"]
    assert mine[-1]["train/loss"] == pytest.approx(other[-1]["train/loss"], rel=1e-3)


@pytest.mark.slow
def test_several_seeds_have_metrics_checkpoints_and_scores_of_their_own(seeds):
    run, _ = seeds
    assert [path.name for path in sorted(run.path.glob("seed-*"))] == ["seed-3", "seed-4", "seed-5"]
    scores = run.evaluate(10)
    assert scores.episodes == 30 and list(scores.seeds) == [3, 4, 5]
    assert scores.returns == [x for own in scores.seeds.values() for x in own.returns]
    saved = json.loads((run.path / "eval.json").read_text())
    assert len(saved["returns"]) == 300 and set(saved["seeds"]) == {"3", "4", "5"}
    loaded = wmjax.load(run.path)
    assert checkpoint.digest(loaded.state) == checkpoint.digest(run.state)
    for member in loaded.members:
        assert checkpoint.latest(member.path / "best") is not None
        assert list(member.path.glob("events.out.tfevents.*"))
        own = wmjax.load(member.path)
        assert own.seed == member.seed and own.evaluate(10).returns == scores.seeds[own.seed].returns
        assert len(json.loads((member.path / "eval.json").read_text())["returns"]) == 100
    means = read_metrics(run.path)[-1]["train/loss"]
    assert means == pytest.approx(np.mean([read_metrics(m.path)[-1]["train/loss"] for m in loaded.members]))
    with pytest.raises(UsageError, match="choose one"):
        loaded.act(np.array([1.0]))
    with pytest.raises(UsageError, match="resume the run it is part of"):
        train(loaded.members[0].path, resume=True, seed=3)


@pytest.mark.slow
def test_several_seeds_resume_byte_for_byte(seeds, tmp_path):  # three, for keys have a shape of two numbers
    train(tmp_path / "parts", 22, seeds=3, seed=3, **SMALL_STEPS)
    assert train(tmp_path / "parts", 28, seeds=3, seed=3, resume=True, **SMALL_STEPS)[1] == seeds[1]
