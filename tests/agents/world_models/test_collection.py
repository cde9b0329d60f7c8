"""How the first records are made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.world_models.made import CAR, CATCH, TINY, tiny
from wmjax.agents import world_models as wm
from wmjax.types import TimeStep, UsageError


def collected(kind, spec, steps=400, envs=8, first_at=()):
    agent, config, _, state = tiny(spec, collection=kind)
    act, carry = agent.recipe.stages[0].act, agent.act_carry(state.params, envs)
    image = jnp.zeros((envs, 64, 64, 3), jnp.uint8)
    flag = jnp.zeros(envs, bool)

    def step(carry, t):
        first = jnp.full(envs, False) | jnp.isin(t, jnp.array([0, *first_at]))
        record = TimeStep({"image": image}, jnp.zeros(envs), first, flag, flag)
        carry, action, latent = act(state.params, jax.random.fold_in(jax.random.key(0), t), carry, record, explore=True)
        return carry, (action, latent)

    _, (actions, latent) = jax.jit(lambda: jax.lax.scan(step, carry, jnp.arange(steps)))()
    assert latent["mu"].shape == (steps, envs, config.latent) and latent["mu"].dtype == jnp.float16
    return np.asarray(actions)


@pytest.mark.slow
def test_held_actions_change_on_frames_that_their_number_divides():
    actions = collected("held", CAR)
    assert (np.abs(actions) <= 1).all()
    for env in range(8):
        changes = 1 + np.flatnonzero((np.diff(actions[:, env], axis=0) != 0).any(-1))
        # Between two changes some n in 1 ... 10 divides the later frame's number and none before it.
        for before, after in zip([0, *changes[:-1]], changes, strict=True):
            assert any(after == (before // n + 1) * n for n in range(1, 11))
        assert 400 / 10 < len(changes) < 400
    discrete = collected("held", CATCH)
    assert set(discrete.sum(-1).ravel()) == {1.0} and discrete.mean((0, 1)).min() > 0.2


@pytest.mark.slow
def test_linear_policies_are_small_mostly_and_differ_between_episodes():
    actions = collected("linear", CAR, envs=64, first_at=(200,))
    assert np.median(np.abs(actions)) < 0.1 and (np.abs(actions) <= 1).all()
    first, second = np.abs(actions[:200]).mean(0), np.abs(actions[200:]).mean(0)
    assert np.median(np.abs(first - second) / (first + second)) > 0.2
    assert (actions[1:] != actions[:-1]).mean() > 0.99  # z is noise, drawn anew in every step


@pytest.mark.slow
def test_brownian_actions_move_by_the_square_root_of_a_frames_time():
    actions = collected("brown", CAR, envs=32)
    inner = np.abs(actions[:-1]) < 0.5
    assert np.diff(actions, axis=0)[inner].std() == pytest.approx(np.sqrt(1 / 50), rel=0.05)
    assert np.abs(actions).max() == 1
    with pytest.raises(UsageError, match="brown"):
        wm.world_models(CATCH, dataclasses.replace(TINY, collection="brown"))
