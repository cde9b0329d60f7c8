"""What C sees, how its numbers are laid out, and the search for it at the end of the recipe."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import random_step
from tests.agents.world_models.made import CAR, CATCH, TINY, shapes, size, tiny, trajectory
from wmjax import evolution
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import controller, memory
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import device
from wmjax.types import UsageError


def test_controllers_see_what_their_inputs_say():
    for inputs, count in (("z", 99), ("zh", 867), ("zc", 867), ("zch", 1635)):
        assert size(shapes("paper_car", CAR, inputs=inputs)["controller"]) == count
    assert size(shapes("paper_car", CAR, inputs="z", controller_units=40)["controller"]) == 33 * 40 + 41 * 3


@pytest.mark.slow
def test_the_controller_sees_the_memory_before_the_present_action_is_fed_to_it():
    agent, config, nets, state = tiny(CAR, controller_z="mean")
    step = random_step(CAR, (3, 2))._replace(is_first=jnp.zeros((3, 2), bool).at[0].set(True))
    carry, carries, actions = agent.act_carry(state.params, 2), [], []
    act = jax.jit(lambda key, carry, step: agent.act(state.params, key, carry, step, explore=False))
    for t in range(3):
        carry, action, _ = act(jax.random.key(t), carry, jax.tree.map(lambda x, t=t: x[t], step))
        carries.append(carry.state)
        actions.append(action)
    assert not carries[0].h.any() and not carries[0].c.any()
    zeros, first = jnp.zeros((2, config.hidden)), step.is_first
    z = jnp.stack([s.z for s in carries])
    hidden, _ = memory.unroll(nets, state.params["memory"], zeros, zeros, z, jnp.stack(actions), first)
    np.testing.assert_allclose(carries[1].h, hidden[0], atol=1e-6)
    np.testing.assert_allclose(carries[2].h, hidden[1], atol=1e-6)
    theta = state.params["controller"]
    expected = np.tanh(np.concatenate([carries[2].z, carries[2].h], -1) @ theta[3:].reshape(-1, 3) + theta[:3])
    np.testing.assert_allclose(actions[2], expected, atol=1e-5)


def test_a_controller_is_its_bias_and_then_its_matrix_row_by_row():
    layers = (4, 2)
    bias, kernel = np.array([0.1, -0.2]), np.arange(8.0).reshape(4, 2) / 10
    theta = jnp.asarray(np.concatenate([bias, kernel.ravel()]), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(controller.controller(theta, x, layers), np.tanh(x @ kernel + bias), rtol=1e-5)
    np.testing.assert_allclose(controller.controller(theta[2:], x, layers, bias=False), np.tanh(x @ kernel), rtol=1e-5)


def test_a_population_of_controllers_acts_each_on_its_own_rows():
    layers = (4, 3, 2)
    thetas = jax.random.normal(jax.random.key(0), (3, 5 * 3 + 4 * 2))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    together = controller.controller(thetas, x, layers)
    for p in range(3):
        np.testing.assert_allclose(
            together[2 * p : 2 * p + 2], controller.controller(thetas[p], x[2 * p : 2 * p + 2], layers), atol=1e-6
        )


@pytest.mark.slow
def test_dreams_start_from_what_replay_holds_and_never_from_an_end():
    agent, config, _, state = tiny(controller_z="mean")
    batch = trajectory(config, CATCH, 6, 3)
    last = jnp.zeros((6, 3), bool).at[:, 1].set(True).at[2, 0].set(True)
    batch = batch._replace(step=batch.step._replace(is_last=last))
    starts = jax.jit(controller.dream_starts(agent.model, 300))(state.params, jax.random.key(0), batch)
    mu = np.asarray(batch.latent["mu"], np.float32)
    allowed = {tuple(row) for row in mu[~np.asarray(last)]}
    found = {tuple(row) for row in np.asarray(starts.z)}
    assert found == allowed and len(found) == 11
    assert starts.h.any()  # the memory has read what came before


@pytest.mark.slow
def test_dreams_that_start_from_first_frames_start_with_an_empty_memory():
    _, config, _, state = tiny(controller_z="mean")
    first = dataclasses.replace(config.evolve, where="dream", start_from="first")
    evolve = wm.world_models(CATCH, dataclasses.replace(config, evolve=first)).recipe.stages[-1].evolve
    assert (evolve.sampling.length, evolve.sampling.context, evolve.sampling.starts) == (1, 0, "first")
    batch = trajectory(config, CATCH, 1, 8)
    starts = evolve.starts(state.params, jax.random.key(0), batch)
    assert starts.is_first.all() and not starts.h.any() and not starts.c.any()
    mu = {tuple(row) for row in np.asarray(batch.latent["mu"][0], np.float32)}
    assert {tuple(row) for row in np.asarray(starts.z)} <= mu


@pytest.fixture(scope="module")
def trained():
    """A run through every stage but the last one, on `catch`."""
    env = agent_actions(make_env("catch"))
    agent = wm.world_models(env.spec, dataclasses.replace(TINY, collection="random"))
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    metrics = {}
    for stage in agent.recipe.stages[:-1]:
        run, new = device.compile_stage(agent, env, stage)(run, stage.iterations)
        run = device.next_stage(run)
        metrics |= new
    return agent, env, run, metrics


@pytest.mark.slow
def test_the_recipe_collects_learns_to_see_encodes_and_learns_to_predict(trained):
    agent, _, run, metrics = trained
    assert [stage.name for stage in agent.recipe.stages] == ["collect", "vision", "encode", "memory", "controller"]
    assert int(run.steps) == 32 and int(run.agent.step) == 4 + 4
    assert {"vision/recon", "vision/kl", "encode/kl", "memory/nll", "memory/done", "memory/reward"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_encoding_writes_what_vision_sees_of_every_record_in_half_precision(trained):
    agent, _, run, _ = trained
    latent = run.replay.data.latent
    embed = jax.jit(agent.model.encode)(run.agent.params, run.replay.data.step.obs)
    for name in ("mu", "logvar"):
        assert latent[name].dtype == jnp.float16 and latent[name].shape == (32, 2, TINY.latent)
        np.testing.assert_allclose(np.float32(latent[name]), embed[name], rtol=2e-3, atol=2e-3)


def starts_of(trained, seed=0):
    from wmjax.replay import device as replays

    agent, _, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    return replays.sample(run.replay, jax.random.key(seed), evolve.sampling, evolve.batch_size)[1]


@pytest.mark.slow
def test_a_generation_in_the_dream_is_one_program_that_leaves_nothing_to_the_host(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    play = functools.partial(evolution.player, agent, env, evolve)
    generation = jax.jit(lambda state, key, batch: evolution.generate(evolve, play(batch), state, key))
    key, batch = jax.random.key(1), starts_of(trained)
    warm, _ = generation(run.agent, key, batch)
    traces = generation._cache_size()
    with jax.transfer_guard("disallow"):
        state, metrics = jax.block_until_ready(generation(warm, key, batch))
    assert generation._cache_size() == traces == 1
    assert int(state.opt_state["controller"].strategy.generation) == 2
    assert set(metrics) >= {"fitness_best", "fitness_mean", "sigma", "length"}
    chex.assert_trees_all_equal_shapes_and_dtypes(state, run.agent)
    chex.assert_trees_all_equal(
        {n: state.params[n] for n in ("encoder", "memory")}, {n: run.agent.params[n] for n in ("encoder", "memory")}
    )


@pytest.mark.slow
def test_the_agent_acts_by_an_evaluated_mean_and_never_by_the_best_of_a_population(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve
    iteration = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))
    state, metrics = iteration(run.agent, jax.random.key(1), starts_of(trained))
    evolving = state.opt_state["controller"]
    np.testing.assert_array_equal(state.params["controller"], evolving.strategy.mean)
    assert not np.allclose(state.params["controller"], evolving.strategy.best)
    assert metrics["kept_return"] == metrics["mean_return"] == evolving.kept_return
    # A mean that earns less than one before is not kept.
    proud = state._replace(opt_state=state.opt_state | {"controller": evolving._replace(kept_return=jnp.float32(1e9))})
    after, metrics = iteration(proud, jax.random.key(2), starts_of(trained, 1))
    np.testing.assert_array_equal(after.params["controller"], evolving.kept)
    assert metrics["kept_return"] == 1e9 and metrics["mean_return"] < 1e9


@pytest.mark.slow
def test_the_population_can_be_evaluated_in_the_environment_itself(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where="env", max_steps=9)
    state, metrics = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))(
        run.agent, jax.random.key(0), None
    )
    assert -1 <= metrics["fitness_mean"] <= metrics["fitness_best"] <= 1
    assert metrics["length"] == 9
    assert int(state.opt_state["controller"].strategy.generation) == 2


@pytest.mark.parametrize("where", ["env", pytest.param("dream", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_population_spread_over_devices_evolves_as_on_one(trained, where):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where=where, generations=1)
    batches = jax.tree.map(lambda *x: jnp.stack(x), starts_of(trained, 0), starts_of(trained, 1))
    part = functools.partial(evolution.iteration, agent, env, evolve, axis_name="devices")
    spread = jax.vmap(lambda batch: part(run.agent, jax.random.key(1), batch)[0], axis_name="devices")
    found = jax.jit(spread)(batches).opt_state["controller"]
    for x in jax.tree.leaves(found):
        np.testing.assert_array_equal(x[0], x[1])
    if where == "env":  # dreams on one device start from half as many records
        alone, _ = jax.jit(functools.partial(evolution.iteration, agent, env, evolve))(
            run.agent, jax.random.key(1), None
        )
        expected = alone.opt_state["controller"]
        np.testing.assert_allclose(found.strategy.mean[0], expected.strategy.mean, atol=1e-5)
        np.testing.assert_allclose(found.kept_return[0], expected.kept_return, atol=1e-4)


def test_a_population_that_devices_cannot_share_evenly_is_refused(trained):
    agent, env, run, _ = trained
    evolve = agent.recipe.stages[-1].evolve._replace(where="env", mean_rollouts=3)
    odd = functools.partial(evolution.iteration, agent, env, evolve, axis_name="devices")
    with pytest.raises(UsageError, match="3 cannot be spread evenly over 2 devices"):
        jax.eval_shape(
            jax.vmap(lambda _: odd(run.agent, jax.random.key(1), None)[0].step, axis_name="devices"), jnp.arange(2)
        )
