"""The driver over either loop: when it stops because updates are not finite, and how it goes on."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe
from tests.loops.host.fakes import host_env
from wmjax.loops import checkpoint, parallel
from wmjax.loops.driver import Driver, NotFiniteError, Plan
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import Options
from wmjax.loops.rollout import Evaluation
from wmjax.run_folder import BEST, CHECKPOINTS

share = [0.0]  # of the updates, those that are not finite: drawn by their keys


@functools.cache
def failing_agent():
    agent = fake_agent()
    recipe = fake_recipe(agent.act, capacity=32)
    prefill, train = recipe.stages
    (update,) = train.updates

    def learn(state, key, batch):
        state, metrics, latent = update.fn(state, key, batch)
        now = jax.pure_callback(lambda: np.float32(share[0]), jnp.float32(0), vmap_method="sequential")
        failed = jax.random.bernoulli(jax.random.fold_in(key, 7), now)
        return state, metrics | {"loss": jnp.where(failed, jnp.nan, 0.0)}, latent

    train = train._replace(updates=(update._replace(fn=learn),))
    return agent._replace(recipe=recipe._replace(stages=(prefill, train)))


@functools.cache
def device_programs(seeds):
    """Those of the device loop, compiled once for all tests."""
    programs = parallel.programs(failing_agent(), counter_env(), seeds=seeds)
    programs.compile_stage = functools.cache(programs.compile_stage)
    return programs


def drive(path, failing, steps, *, on_host=False, seeds=(0,), resume=False, most=5):
    """Trains it, as `wmjax.train` does: the last state."""
    share[0] = failing
    agent, env = failing_agent(), host_env()[0] if on_host else counter_env()
    with contextlib.ExitStack() as stack:
        if on_host:
            programs = stack.enter_context(contextlib.closing(HostLoop(agent, env, path)))
        else:
            programs = device_programs(len(seeds))
        plan = Plan(agent, env, path, seeds, steps, 10**6, 1e6, most, None, Options(workers=1))
        driver = Driver(plan, programs, [])
        return programs.gather(driver.run(driver.start(resume, print)))


PLACES = [
    pytest.param(dict(), id="device"),
    pytest.param(dict(seeds=(0, 1)), id="seeds", marks=pytest.mark.slow),
    pytest.param(dict(on_host=True), id="host", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_stopped_for_updates_that_were_not_finite_goes_on_where_they_are(place, tmp_path):
    with pytest.raises(NotFiniteError, match="updates in a row"):
        drive(tmp_path, 1.0, 200, **place)
    assert checkpoint.latest(tmp_path / CHECKPOINTS) < 200
    with pytest.raises(NotFiniteError, match="updates in a row"):  # a new count, and not an end to counting
        drive(tmp_path, 1.0, 200, resume=True, **place)
    state = drive(tmp_path, 0.0, 200, resume=True, **place)
    assert checkpoint.latest(tmp_path / CHECKPOINTS) == 200
    assert (state.agent.step > 0).all() and (state.skips.total > 5).all()
    assert (state.skips.longest == 0).all() and (state.skips.in_a_row == 0).all()


@pytest.mark.parametrize("place", PLACES[:2])
def test_a_run_in_parts_that_skips_updates_is_the_same_run_byte_for_byte(place, tmp_path):
    whole = drive(tmp_path / "whole", 0.5, 200, most=50, **place)
    assert (whole.skips.longest > 1).all()
    for steps in (60, 104, 148, 200):
        parts = drive(tmp_path / "parts", 0.5, steps, most=50, resume=steps > 60, **place)
    assert checkpoint.digest(parts) == checkpoint.digest(whole)


def test_a_limit_below_what_was_skipped_before_counts_from_there(tmp_path):
    drive(tmp_path, 0.5, 100, most=50)
    state = drive(tmp_path, 0.0, 200, most=1, resume=True)
    assert int(state.skips.longest) == 0 and int(state.skips.total) > 0


def go_on(path, steps, returns):
    """Trains it to so many steps, or goes on; periodic evaluations come to `returns`, one after the other."""
    said, returns = [], iter(returns)
    agent, programs, env = failing_agent(), device_programs(1), counter_env()
    driver = Driver(Plan(agent, env, path, (0,), steps, 16, 1e6, 5), programs, [])
    ones = lambda episodes: np.ones(episodes, np.float32)
    driver.evaluator = lambda params, key, n: Evaluation(next(returns) * ones(n), ones(n), ones(n) > 1)
    driver.run(driver.start(True, said.append))
    assert next(returns, None) is None
    return said


def test_a_run_that_goes_on_from_an_earlier_step_has_the_best_agent_of_its_own_history(tmp_path):
    share[0] = 0.0
    assert go_on(tmp_path, 40, [1.0]) == []
    assert go_on(tmp_path, 64, [5.0, 9.0]) == []
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [40, 64]
    assert checkpoint.steps(tmp_path / BEST) == [32, 48, 64]  # whichever checkpoint it goes on from
    (tmp_path / CHECKPOINTS / "000000000064" / "manifest.json").unlink()
    (tmp_path / BEST / "000000000900").mkdir()  # not of this history, and nothing in it
    damaged, aside = go_on(tmp_path, 64, [0.5, 0.7])
    assert "000000000064" in damaged and "using step 40" in damaged
    assert "step 48, 64, 900 is set aside" in aside and "that of step 32" in aside
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [40, 64] and checkpoint.steps(tmp_path / BEST) == [32]
    assert checkpoint.info(tmp_path / BEST)["mean"] == 1.0
    for step in (48, 64, 900):
        assert (tmp_path / BEST / f"{step:012d}.damaged").is_dir()
    for iteration in ("x", None, 10**9):  # of a manifest that somebody else wrote
        shutil.copytree(tmp_path / BEST / "000000000032", tmp_path / BEST / "000000000064")
        checkpoint._write_manifest(
            tmp_path / BEST / "000000000064" / "manifest.json",
            {"format": 1, "step": 64, "info": {"mean": 2.0, "iteration": iteration}, "leaves": {}},
        )
        go_on(tmp_path, 64, [])
        assert (checkpoint.latest(tmp_path / BEST) == 32) == (iteration == 10**9)
        shutil.rmtree(tmp_path / BEST / "000000000064", ignore_errors=True)
    (tmp_path / BEST / "000000000032" / "manifest.json").write_text("{}")
    go_on(tmp_path, 80, [0.2])  # what is damaged is worse than nothing
    assert checkpoint.steps(tmp_path / BEST) == [80]
    place = shutil.copytree(tmp_path / CHECKPOINTS / "000000000080", tmp_path / CHECKPOINTS / "000000000999")
    content = {name: x for name, x in json.loads((place / "manifest.json").read_text()).items() if name != "sha256"}
    checkpoint._write_manifest(place / "manifest.json", content | {"step": 999})  # which is not that of its state
    go_on(tmp_path, 96, [0.1])
    assert checkpoint.steps(tmp_path / CHECKPOINTS) == [80, 96]
