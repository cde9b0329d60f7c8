"""What the transformer's world model promises beyond equal numbers: what predicts what, and imagination."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import PIXELS, TINY_IRIS, random_action, random_step
from tests.agents.iris.made import BATCH, batch_for, images, jit, made, sequence, update_of
from wmjax import dreaming
from wmjax.agents import iris
from wmjax.agents.iris import dynamics
from wmjax.nets.transformer import TokenTransformer
from wmjax.ops import noise
from wmjax.types import Trajectory


@pytest.mark.slow
def test_each_position_is_paired_with_the_token_that_follows_it_and_the_action_with_the_next_frame():
    """K = 2: positions 0, 1 are a frame, 2 is the action, 3, 4 the next frame, and so on."""
    tokens = jnp.array([[[0, 1], [2, 3], [4, 5]]])
    model = TokenTransformer(tokens=2, max_blocks=3, vocab_size=6, actions=3, layers=1, heads=1, width=4, ff=4)
    positions = [block * model.block + place for block in range(3) for place in model.frame_positions]
    pairs = []
    zero = jnp.zeros((1, 3))
    seen = jnp.ones((1, 3), bool)
    base = (jnp.zeros((1, 6, 6)), jnp.zeros((1, 3, 3)), jnp.zeros((1, 3, 2)))
    loss = lambda frame: iris.world_model_losses((frame, *base[1:]), tokens, zero, zero > 0, seen, seen)["frame"]
    grads = jax.grad(loss)(base[0])[0]
    for entry, grad in enumerate(np.asarray(grads)):
        if grad.any():
            pairs.append((positions[entry], int(grad.argmin())))
    # The first token of the first frame is never predicted, and what would follow the last action is not there.
    assert pairs == [(0, 1), (2, 2), (3, 3), (5, 4), (6, 5)]


def test_the_loss_has_one_term_less_than_there_are_tokens_and_padding_does_not_count_in_the_mean():
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (2, 3, 4), 0, 5)
    logits = jax.random.normal(key, (2, 12, 5)), jax.random.normal(key, (2, 3, 3)), jax.random.normal(key, (2, 3, 2))
    reward, end = jnp.array([[1.0, 0.0, -1.0], [0.0, 9.0, 0.0]]), jnp.zeros((2, 3), bool).at[1, 1].set(True)
    seen = jnp.array([[True, True, True], [True, True, False]])
    acted = jnp.array([[True, True, True], [True, True, False]])
    found = iris.world_model_losses(logits, tokens, reward, end, seen, acted)
    log_probs = [np.asarray(jax.nn.log_softmax(x)) for x in logits]
    labels = np.asarray(tokens).reshape(2, 12)
    terms = [log_probs[0][b, i, labels[b, i + 1]] for b in range(2) for i in range(11) if i + 1 < (12, 8)[b]]
    assert len(terms) == 11 + 7
    np.testing.assert_allclose(found["frame"], -np.mean(terms), rtol=1e-5)
    classes = np.array([[2, 1, 0], [1, 2, 1]])  # signs: a reward of 9 counts as 1
    outcome = [(b, t) for b in range(2) for t in range(3) if acted[b, t]]
    np.testing.assert_allclose(
        found["reward"], -np.mean([log_probs[1][b, t, classes[b, t]] for b, t in outcome]), rtol=1e-5
    )
    np.testing.assert_allclose(
        found["end"], -np.mean([log_probs[2][b, t, int(end[b, t])] for b, t in outcome]), rtol=1e-5
    )


@pytest.mark.slow
def test_the_losses_at_first_are_those_of_uniform_predictions():
    agent, config, _, _ = made(width=64)
    state = jax.jit(agent.init)(jax.random.key(0))
    _, metrics, _ = update_of(agent, "world_model")(state, jax.random.key(0), batch_for(agent, "world_model"))
    expected = [np.log(config.vocab_size), np.log(3), np.log(2)]
    np.testing.assert_allclose([metrics[f"loss/{n}"] for n in ("frame", "reward", "end")], expected, atol=0.02)


@pytest.mark.slow
def test_the_reward_that_arrives_with_the_next_observation_is_that_of_this_action():
    agent, config, nets, state = made()
    batch = batch_for(agent, "world_model")
    length = config.world_model_length + 1
    reward = jnp.arange(length * BATCH, dtype=jnp.float32).reshape(length, BATCH) % 3 - 1
    ends = jnp.zeros((length, BATCH), bool).at[2, 1].set(True)
    step = batch.step._replace(reward=reward, is_terminal=ends)
    mask = batch.mask.at[3:, 1].set(False)
    _, metrics, _ = update_of(agent, "world_model")(state, jax.random.key(0), Trajectory(step, batch.action, mask, ()))
    tokens = jit(iris.encode, nets, config)(state.params, step.obs["image"][:-1]).swapaxes(0, 1)
    action = batch.action[:-1].swapaxes(0, 1)
    logits = jit(sequence, nets)(state.params["world_model"], tokens, action)
    known = np.asarray(mask[1:].T)  # an outcome is known where the next record is
    rewards = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits[1])), np.asarray(reward[1:].T, int)[..., None] + 1, -1
    )
    np.testing.assert_allclose(metrics["loss/reward"], rewards[..., 0][known].mean(), rtol=1e-4)
    end = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[2])), np.asarray(ends[1:].T, int)[..., None], -1)
    np.testing.assert_allclose(metrics["loss/end"], end[..., 0][known].mean(), rtol=1e-4)


@pytest.mark.slow
def test_a_time_limit_is_no_end():
    agent, _, _, state = made()
    batch = batch_for(agent, "world_model")
    last = batch.step.is_last.at[2].set(True)

    def end_loss(step):
        return update_of(agent, "world_model")(state, jax.random.key(0), batch._replace(step=step))[1]["loss/end"]

    assert end_loss(batch.step) == end_loss(batch.step._replace(is_last=last))


@functools.cache
def imagined(horizon, **changes):
    """A generated trajectory from one frame, and everything about it."""
    agent, config, nets, state = made(**changes)
    tokens = jit(iris.encode, nets, config)(state.params, images(BATCH))
    keys = jax.random.split(jax.random.key(3), BATCH)
    run = jax.jit(lambda p, k, t: iris.generate(nets, agent.model, p, k, t, horizon))
    return agent, config, nets, state, keys, tokens, *run(state.params, keys, tokens)


def replayed(nets, state, keys, dream, first, last):
    """Draws tokens, rewards and ends again, with the same noise but by a full pass over frames `first` to `last`."""
    model = nets.world_model
    tokens, action = (x[first : last + 1].swapaxes(0, 1) for x in (dream.tokens, dream.action))
    action = jnp.pad(action, ((0, 0), (0, last + 1 - first - action.shape[1]), (0, 0)))
    frame, reward, end = jit(sequence, nets)(state.params["world_model"], tokens, action)
    for t in range(first, last):
        _, key_model = noise.split(noise.fold_in(keys, t), 2)
        key_outcome, key_frame = noise.split(key_model, 2)
        key_reward, key_end = noise.split(key_outcome, 2)
        yield (
            t,
            jnp.stack(
                [
                    dynamics.draw(noise.fold_in(key_frame, k), frame[:, (t - first + 1) * model.tokens - 1 + k])
                    for k in range(model.tokens)
                ]
            ).T,
            dynamics.draw(key_reward, reward[:, t - first]) - 1,
            dynamics.draw(key_end, end[:, t - first]) == 1,
        )


@pytest.mark.slow
def test_a_generated_trajectory_is_what_a_full_pass_draws_with_the_same_noise():
    _, _, nets, state, keys, _, dream, _ = imagined(3)
    for t, tokens, reward, end in replayed(nets, state, keys, dream, 0, 3):
        np.testing.assert_array_equal(dream.tokens[t + 1], tokens)
        np.testing.assert_array_equal(dream.reward[t], reward)
        np.testing.assert_array_equal(dream.end[t], end)
    assert len(np.unique(dream.tokens)) > 4


@pytest.mark.slow
def test_where_a_step_does_not_fit_the_context_restarts_from_the_current_frame_alone():
    """A context of 4 blocks of 5 tokens holds the first frame and three steps; the fourth restarts it."""
    _, _, nets, state, keys, _, dream, _ = imagined(5)
    for t, tokens, reward, _ in replayed(nets, state, keys, dream, 3, 5):
        np.testing.assert_array_equal(dream.tokens[t + 1], tokens)
        np.testing.assert_array_equal(dream.reward[t], reward)


@pytest.mark.slow
def test_a_context_is_cut_down_where_it_is_full_and_under_vmap_too_nothing_is_computed_where_it_is_not():
    _, _, nets, state = made()
    model, frames = nets.world_model, jnp.arange(2 * 4).reshape(2, 4) % 7
    cache = model.init_cache(2)._replace(length=jnp.array([model.max_tokens, 5]))
    cut = lambda cache, tokens: dynamics.make_room(nets, state.params, cache, tokens, model.block)
    by_row = lambda cache, tokens: jax.tree.map(lambda x: x[0], cut(*jax.tree.map(lambda x: x[None], (cache, tokens))))
    once, mapped = jax.jit(cut)(cache, frames), jax.jit(jax.vmap(by_row))(cache, frames)
    assert once.length.tolist() == mapped.length.tolist() == [4, 5]
    assert all(x[0, :, :4].any() and not x[1].any() for x in once.values)
    chex.assert_trees_all_close(once, mapped, atol=1e-6)
    outside = {eqn.primitive.name for eqn in jax.make_jaxpr(jax.vmap(by_row))(cache, frames).eqns}
    assert "while" in outside and not outside & {"dot_general", "cond"}


@pytest.mark.slow
def test_generated_frames_are_decoded_tokens_in_zero_to_one():
    _, _, nets, state, _, tokens, dream, frames = imagined(3)
    np.testing.assert_array_equal(dream.tokens[0], tokens)
    np.testing.assert_allclose(frames, jit(iris.decode, nets)(state.params, dream.tokens), atol=1e-5)
    assert frames.min() >= 0 and frames.max() <= 1


@pytest.mark.slow
def test_imagination_has_no_dropout():
    *_, dream, frames = imagined(3)
    *_, with_dropout, more = imagined(3, dropout=0.5)
    chex.assert_trees_all_equal((dream, frames), (with_dropout, more))


@pytest.mark.slow
def test_observing_what_was_imagined_leads_to_the_same_context():
    agent, _, _, state, keys, tokens, dream, _ = imagined(3)
    model, params = agent.model, state.params

    @jax.jit
    def filtered(params):
        prev_action = jnp.concatenate([jnp.zeros_like(dream.action[:1]), dream.action])
        is_first = jnp.zeros((4, BATCH), bool).at[0].set(True)
        start = model.init_state(params, BATCH)
        return dreaming.observe(model, params, keys, start, prev_action, dream.tokens, is_first)[0]

    @jax.jit
    def dreamed(params):
        start = jit(iris.start_state, iris.networks(PIXELS, TINY_IRIS), model)(params, tokens)
        policy, carry = dreaming.given_actions(dream.action)
        return dreaming.imagine(model, params, keys, start, policy, 3, policy_carry=carry)[0]

    a, b = filtered(params), dreamed(params)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.cache.length, b.cache.length)
    np.testing.assert_allclose(a.reward_mean, b.reward_mean, atol=1e-5)
    np.testing.assert_allclose(a.cont, b.cont, atol=1e-5)
    length = int(a.cache.length[0])
    for x, y in zip(a.cache.values, b.cache.values, strict=True):
        np.testing.assert_allclose(x[:, :, :length], y[:, :, :length], atol=1e-5)


@pytest.mark.slow
def test_a_new_episode_starts_its_own_context_and_so_does_a_row_that_has_none():
    agent, _, _, state, keys, tokens, dream, _ = imagined(3)
    model, params = agent.model, state.params
    observe = jit(model.observe)
    start = model.init_state(params, BATCH)
    first = observe(params, keys, start, dream.action[0], tokens, jnp.ones(BATCH, bool))
    warm = observe(params, keys, first, dream.action[1], dream.tokens[1], jnp.zeros(BATCH, bool))
    assert warm.cache.length.tolist() == [9] * BATCH
    again = observe(params, keys, warm, dream.action[2], tokens, jnp.arange(BATCH) < 2)
    assert again.cache.length.tolist() == [4, 4, 14, 14]
    assert again.cont[:2].tolist() == [1.0, 1.0]
    for x, y in zip(again.cache.keys, first.cache.keys, strict=True):
        np.testing.assert_allclose(x[:2, :, :4], y[:2, :, :4], atol=1e-5)
    unknown = observe(params, keys, start, dream.action[0], tokens, jnp.zeros(BATCH, bool))
    assert unknown.cache.length.tolist() == [4] * BATCH


@pytest.mark.slow
def test_functions_of_the_model_take_any_leading_axes():
    agent, _, _, state, keys, tokens, dream, _ = imagined(3)
    model, params = agent.model, state.params
    start = jit(iris.start_state, iris.networks(PIXELS, TINY_IRIS), model)(params, tokens)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), tree)
    flat = jit(model.imagine)(params, keys, start, dream.action[0])
    boxed = jit(model.imagine)(params, keys.reshape(2, 2), split(start), split(dream.action[0]))
    one = jit(model.imagine)(params, keys[0], *jax.tree.map(lambda x: x[0], (start, dream.action[0])))
    np.testing.assert_array_equal(boxed.tokens.reshape(flat.tokens.shape), flat.tokens)
    np.testing.assert_array_equal(one.tokens, flat.tokens[0])
    assert model.decode(params, boxed)["image"].shape == (2, 2, 16, 16, 3)


@pytest.mark.slow
def test_the_dream_is_an_environment_that_goes_on_past_the_window():
    agent, _, _, state, _, tokens, _, _ = imagined(3)
    nets = iris.networks(PIXELS, TINY_IRIS)

    @jax.jit
    def play(params, key):
        starts = jit(iris.start_state, nets, agent.model)(params, tokens)
        env = dreaming.dream_env(agent.model, params, starts, PIXELS, horizon=7)
        carry, first = jax.vmap(env.reset)(jax.random.split(key, 3))

        def step(carry, key):
            carry, record = jax.vmap(env.step)(jax.random.split(key, 3), carry, jnp.zeros(3, jnp.int32))
            return carry, record

        return first, jax.lax.scan(step, carry, jax.random.split(key, 9))[1]

    first, steps = play(state.params, jax.random.key(0))
    assert first.obs["image"].dtype == jnp.uint8 and first.is_first.all()
    assert steps.is_last.any() and np.isfinite(steps.reward).all()


@pytest.mark.slow
def test_open_loop_prediction_does_not_keep_the_caches_of_all_steps():
    agent, config, _, state = made(width=64, max_blocks=20)
    lead = (8, 16)
    batch = Trajectory(random_step(PIXELS, lead), random_action(PIXELS, lead), jnp.ones(lead, bool), ())
    run = jax.jit(lambda p, k, b: dreaming.open_loop(agent.model, p, k, b, 3))
    memory = run.lower(state.params, jax.random.key(0), batch).compile().memory_analysis()
    cache = 2 * config.layers * 16 * 100 * 64 * 4  # bytes of one step's cache
    assert memory.temp_size_in_bytes < 5 * cache
