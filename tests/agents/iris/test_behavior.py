"""What the actor-critic promises beyond equal numbers."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import PIXELS, random_step
from tests.agents.iris.made import BATCH, PAPER, images, jit, look, made
from wmjax.agents import iris
from wmjax.agents.iris import behavior
from wmjax.ops import distributions, noise


def test_lambda_returns_of_a_rollout_worked_out_by_hand():
    reward, value, end = [1.0, 0.0, -1.0], [0.5, 0.4, 0.3, 0.2], [False, True, False]
    found = behavior.lambda_returns(*map(jnp.array, (reward, end, value)), 0.995, 0.95)
    np.testing.assert_allclose(found, [1.0199, 0.0, -0.801, 0.2], atol=1e-4)


def test_imagination_goes_on_after_a_drawn_end_where_only_the_returns_are_cut():
    logits = jax.random.normal(jax.random.key(0), (4, 1, 3))
    value = jnp.array([0.5, 0.4, 0.3, 0.2])[:, None]
    action = jax.nn.one_hot(jnp.array([[0], [1], [2]]), 3)
    reward, end = jnp.array([[1.0], [0.0], [-1.0]]), jnp.array([[False], [True], [False]])
    config = dataclasses.replace(PAPER, entropy_scale=0.1)
    losses, target = behavior.actor_critic_losses(logits, value, action, reward, end, config)
    np.testing.assert_allclose(target[:, 0], [1.0199, 0.0, -0.801, 0.2], atol=1e-4)
    # All three steps count, the one after the end like the others; the last frame supplies a value only.
    log_probs = np.asarray(jax.nn.log_softmax(logits))[:3, 0]
    advantage = np.array([1.0199 - 0.5, 0.0 - 0.4, -0.801 - 0.3])
    np.testing.assert_allclose(losses["actor"], -np.mean(log_probs[range(3), range(3)] * advantage), rtol=1e-3)
    np.testing.assert_allclose(losses["critic"], np.mean(advantage**2), rtol=1e-3)
    np.testing.assert_allclose(losses["entropy"], 0.1 * np.mean((np.exp(log_probs) * log_probs).sum(-1)), rtol=1e-4)


@pytest.mark.slow
def test_padded_burn_in_frames_leave_the_memory_as_it_is():
    _, config, nets, state = made()
    frames = images(5, 3) / 255.0
    mask = jnp.array([[False, False, True], [False, True, True], [False, True, True], [True, True, True], [True] * 3])
    together = jit(behavior.burn_in, nets, config)(state.params, frames, mask)
    for row, start in enumerate((3, 1, 0)):
        alone = jit(behavior.burn_in, nets, config)(
            state.params, frames[start:, row : row + 1], jnp.ones((5 - start, 1), bool)
        )
        np.testing.assert_allclose(together.hidden[row], alone.hidden[0], atol=1e-6)
        np.testing.assert_allclose(together.cell[row], alone.cell[0], atol=1e-6)


@pytest.mark.slow
def test_the_policy_sees_reconstructions_alone_while_collecting_evaluating_and_imagining():
    agent, config, nets, state = made()
    step = jax.tree.map(lambda x: x[0], random_step(PIXELS, (1, BATCH)))
    image = step.obs["image"]
    seen = jit(iris.decode, nets)(state.params, jit(iris.encode, nets, config)(state.params, image))
    assert seen.min() >= 0.0 and seen.max() <= 1.0
    memory = agent.policy_carry(state.params, BATCH)
    expected, _ = jit(look, nets)(state.params, memory, seen)
    keys = jax.random.split(jax.random.key(0), BATCH)
    frame_state = jit(iris.start_state, nets, agent.model)(
        state.params, jit(iris.encode, nets, config)(state.params, image)
    )
    act, policy = (jax.jit(f, static_argnames="explore") for f in (agent.act, agent.policy))
    for explore in (True, False):
        carry, _, _ = act(state.params, keys, memory, step, explore=explore)
        chex.assert_trees_all_close(carry, expected, atol=1e-5)
        carry, _ = policy(state.params, keys, memory, frame_state, explore=explore)
        chex.assert_trees_all_close(carry, expected, atol=1e-5)


@pytest.mark.slow
def test_replaying_the_frames_gives_the_numbers_of_the_rollout():
    """Imagination runs without gradients first; the loss then sees the same logits."""
    agent, config, nets, state = made()
    dist, logits = distributions.OneHotCategorical, []
    tokens = jit(iris.encode, nets, config)(state.params, images(BATCH))
    keys = jax.random.split(jax.random.key(3), BATCH)
    memory = agent.policy_carry(state.params, BATCH)

    def policy(key, carry, frame):
        carry, logits = jit(look, nets)(state.params, carry[0], frame)
        return (carry, logits), dist(logits).sample(seed=key)

    for horizon in (1, 2, 3):
        start = memory, jnp.zeros((BATCH, 3))
        dream, frames = iris.generate(nets, agent.model, state.params, keys, tokens, horizon, policy, start)
        logits.append(jit(behavior.replay_frames, nets)(state.params["actor_critic"], memory, frames)[0])
        drawn = dist(logits[-1][:-1]).log_prob(dream.action)
        assert np.isfinite(drawn).all()
    np.testing.assert_allclose(logits[2][:2], logits[0], atol=1e-5)
    # The rollout's own choice at every step is the one that its noise makes of these logits.
    for t in range(3):
        key_policy, _ = noise.split(noise.fold_in(keys, t), 2)
        np.testing.assert_array_equal(dream.action[t], dist(logits[2][t]).sample(seed=key_policy))
