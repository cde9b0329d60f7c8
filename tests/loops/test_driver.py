"""The driver over either loop: when it stops because updates are not finite, and how it goes on."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe
from tests.loops.test_host import host_env
from wmjax.folder import CHECKPOINTS
from wmjax.loops import checkpoint, host, parallel
from wmjax.loops.driver import Driver, NotFiniteError, Plan
from wmjax.loops.host_rollout import Options

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
    return programs._replace(compile_stage=functools.cache(programs.compile_stage))


def drive(path, failing, steps, *, on_host=False, seeds=(0,), resume=False, most=5):
    """Trains it, as `wmjax.train` does: the last state."""
    share[0] = failing
    agent, env = failing_agent(), host_env()[0] if on_host else counter_env()
    with contextlib.ExitStack() as stack:
        if on_host:
            loop = stack.enter_context(contextlib.closing(host.HostLoop(agent, env, path, path / CHECKPOINTS)))
            programs = host.programs(loop)
        else:
            programs = device_programs(len(seeds))
        plan = Plan(agent, env, path, seeds, steps, 10**6, 1e6, most, None, Options(workers=1))
        driver = Driver(plan, programs, [])
        return driver.gather(driver.run(driver.start(resume, print)))


PLACES = [
    pytest.param(dict(), id="device"),
    pytest.param(dict(seeds=(0, 1)), id="seeds", marks=pytest.mark.slow),
    pytest.param(dict(on_host=True), id="host", marks=pytest.mark.slow),
]


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
