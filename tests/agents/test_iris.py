"""What IRIS promises beyond equal numbers: sizes, imagination, and each trap of reimplementations by name."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import PIXELS, TINY_IRIS, perturb, perturbed, random_action, random_step
from wmjax import dreaming
from wmjax.agents import iris
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device
from wmjax.nets.transformer import TokenTransformer
from wmjax.ops import distributions, noise, vq
from wmjax.types import Box, Discrete, EnvSpec, MultiDiscrete, Trajectory, UsageError

ATARI = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(4))
PAPER = iris.IRISConfig()
BATCH = 4


@functools.cache
def made(**changes):
    """Agent, config, modules and a state with perturbed parameters: compiling takes longer than the tests."""
    config = dataclasses.replace(TINY_IRIS, **changes)
    agent = iris.iris(PIXELS, config)
    state = jax.jit(agent.init)(jax.random.key(0))
    return agent, config, iris.networks(PIXELS, config), perturbed(state)


def update_named(agent, name):
    return next(u for u in agent.recipe.stages[-1].updates if u.name == name)


jit = functools.cache(lambda function, *static: jax.jit(functools.partial(function, *static)))


def sequence(nets, weights, tokens, action):
    """Logits of frames, rewards and ends."""
    return iris.call(nets.world_model, weights, tokens, action, jnp.zeros(action.shape[:2]), method="sequence")


@functools.cache
def update_of(agent, name):
    return jax.jit(update_named(agent, name).fn)


def batch_for(agent, name, seed=0):
    """Random records of the length that an update samples, nothing masked."""
    sampling = update_named(agent, name).sampling
    lead = sampling.context + sampling.length, BATCH
    return Trajectory(random_step(PIXELS, lead, seed), random_action(PIXELS, lead, seed), jnp.ones(lead, bool), ())


def images(*lead, seed=0):
    return random_step(PIXELS, lead, seed).obs["image"]


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("actions", [4, 6])
def test_the_papers_sizes_have_the_papers_parameter_counts(actions):
    spec = ATARI._replace(action=Discrete(actions))
    params = jax.eval_shape(
        lambda key: iris.init_params(iris.networks(spec, PAPER), spec, PAPER, key), jax.random.key(0)
    )
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert {name: count(value) for name, value in params.items()} == {
        "tokenizer": 4_027_523,
        "world_model": 8_446_469 + 256 * actions,
        "actor_critic": 3_215_905 + 513 * actions,
    }
    assert count(params["tokenizer"]["encoder"]) == 1_418_240
    assert count(params["tokenizer"]["decoder"]) == 1_821_827


def test_the_papers_context_holds_exactly_340_tokens_of_16_to_a_frame():
    model = iris.networks(ATARI, PAPER).world_model
    assert (model.tokens, model.block, model.max_tokens) == (16, 17, 340)
    # The first frame, and 19 steps of an action and a frame; the last action's outcome is not used.
    assert 16 + (PAPER.horizon - 1) * model.block <= model.max_tokens < 16 + PAPER.horizon * model.block


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.mark.slow
def test_the_decoders_gradient_bypasses_the_codebook_which_learns_from_its_own_loss_alone():
    _, config, nets, state = made()
    keys = jax.random.split(jax.random.key(0), BATCH)

    def losses(weights):
        return iris.tokenizer_losses(nets, config, {"tokenizer": weights}, keys, images(BATCH))[0]

    values, pull = jax.vjp(jax.jit(losses), state.params["tokenizer"])
    reached = {}
    for term in ("recon", "commit", "codebook"):
        (grads,) = pull({name: jnp.float32(name == term) for name in values})
        reached[term] = {part for part, g in grads.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(g))}
    assert reached == {
        "recon": {"encoder", "pre_quant", "post_quant", "decoder"},
        "commit": {"encoder", "pre_quant"},
        "codebook": {"codebook"},
    }


def test_the_commitment_loss_has_weight_one():
    assert iris.tokenizer_scales(PAPER) == {"codebook": 1.0, "commit": 1.0, "recon": 1.0, "perceptual": 1.0}


@pytest.mark.slow
def test_codebooks_that_follow_moving_averages_take_no_gradient_and_are_followed_by_the_update():
    for kind in ("ema", "ema_cosine"):
        agent, config, nets, state = made(codebook=kind)
        assert iris.tokenizer_scales(config)["codebook"] == 0.0
        batch = batch_for(agent, "tokenizer")
        if kind == "ema_cosine":
            weights = state.params["tokenizer"]
            unit = weights | {"codebook": vq.normalize(weights["codebook"])}
            state = state._replace(params=state.params | {"tokenizer": unit})
        new, metrics, _ = update_of(agent, "tokenizer")(state, jax.random.key(0), batch)
        z = jit(iris.latents, nets, config)(state.params, batch.step.obs["image"][0] * (2 / 255) - 1)
        codebook = state.params["tokenizer"]["codebook"]
        taken = vq.assigned(z, vq.nearest(z, codebook), config.vocab_size)
        if kind == "ema":
            record, expected = vq.ema_update(state.stats["codebook"], taken, config.codebook_decay)
            np.testing.assert_allclose(new.stats["codebook"].counts, record.counts, rtol=1e-5)
        else:
            expected = vq.cosine_update(codebook, taken, 1 - config.codebook_decay)
        np.testing.assert_allclose(new.params["tokenizer"]["codebook"], expected, rtol=1e-4, atol=1e-5)
        assert {"perplexity", "usage", "dead"} <= set(metrics)


@pytest.mark.slow
def test_the_update_resets_dead_entries_and_leaves_the_living_to_the_gradient():
    agent, config, _, state = made(codebook_reset=0.1)
    usage = jnp.full(config.vocab_size, 1 / config.vocab_size).at[3].set(0.0)
    far = state.params["tokenizer"]["codebook"].at[3].set(1e3)
    params = state.params | {"tokenizer": state.params["tokenizer"] | {"codebook": far}}
    record = state.stats["codebook"]._replace(usage=usage)
    state = state._replace(params=params, stats={"codebook": record})
    new, metrics, _ = update_of(agent, "tokenizer")(state, jax.random.key(0), batch_for(agent, "tokenizer"))
    moved = np.abs(np.asarray(new.params["tokenizer"]["codebook"] - far)).max(-1)
    assert moved[3] > 100 and np.delete(moved, 3).max() < 0.1
    assert metrics["dead"] == pytest.approx(1 / config.vocab_size)


def test_reconstruction_losses_are_means_in_units_of_minus_one_to_one():
    x = jnp.zeros((2, 4, 4, 3))
    y = x.at[0, 1, 1].set(jnp.array([0.5, -1.0, 0.0])).at[1].set(0.2)
    l1 = np.array([1.5 / 48, 0.2])
    np.testing.assert_allclose(iris.reconstruction_loss(x, y, PAPER), l1, rtol=1e-5)
    delta = dataclasses.replace(PAPER, recon_loss="delta_iris")
    expected = 0.1 * l1 + [1.25 / 48, 0.04] + 0.01 * np.array([1.25 / 3, 0.04])
    np.testing.assert_allclose(iris.reconstruction_loss(x, y, delta), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random_features", "multiscale"])
def test_every_perceptual_loss_that_needs_no_file_trains_the_decoder(kind):
    _, config, nets, state = made()
    config = dataclasses.replace(config, perceptual=kind)
    keys = jax.random.split(jax.random.key(0), BATCH)
    loss = lambda w: iris.tokenizer_losses(nets, config, {"tokenizer": w}, keys, images(BATCH))[0]["perceptual"]
    value, grads = jax.jit(jax.value_and_grad(loss))(state.params["tokenizer"])
    assert value > 0 and any(np.any(x) for x in jax.tree.leaves(grads["decoder"]))


def test_dropout_of_lpips_is_off_by_default():
    assert PAPER.lpips_dropout == 0.0


@pytest.mark.slow
def test_logits_losses_and_distances_stay_in_float32_under_bfloat16():
    agent, config, nets, state = made(compute_dtype="bfloat16")
    z = jit(iris.latents, nets, config)(state.params, jnp.zeros((1, 16, 16, 3)))
    assert z.dtype == jnp.float32
    for name in ("tokenizer", "world_model", "actor_critic"):
        new, metrics, _ = update_of(agent, name)(state, jax.random.key(0), batch_for(agent, name))
        assert all(value.dtype == jnp.float32 for value in metrics.values())
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    tokens, action = jnp.zeros((1, 2, 4), jnp.int32), jnp.zeros((1, 2, 3))
    logits = jit(sequence, nets)(state.params["world_model"], tokens, action)
    assert all(x.dtype == jnp.float32 for x in logits)


# ---------------------------------------------------------------------------------------------------------------------
# World model: what predicts what


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


# ---------------------------------------------------------------------------------------------------------------------
# Imagination


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
                    iris._draw(noise.fold_in(key_frame, k), frame[:, (t - first + 1) * model.tokens - 1 + k])
                    for k in range(model.tokens)
                ]
            ).T,
            iris._draw(key_reward, reward[:, t - first]) - 1,
            iris._draw(key_end, end[:, t - first]) == 1,
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


# ---------------------------------------------------------------------------------------------------------------------
# Actor-critic


def test_lambda_returns_of_a_rollout_worked_out_by_hand():
    reward, value, end = [1.0, 0.0, -1.0], [0.5, 0.4, 0.3, 0.2], [False, True, False]
    found = iris.lambda_returns(*map(jnp.array, (reward, end, value)), 0.995, 0.95)
    np.testing.assert_allclose(found, [1.0199, 0.0, -0.801, 0.2], atol=1e-4)


def test_imagination_goes_on_after_a_drawn_end_where_only_the_returns_are_cut():
    logits = jax.random.normal(jax.random.key(0), (4, 1, 3))
    value = jnp.array([0.5, 0.4, 0.3, 0.2])[:, None]
    action = jax.nn.one_hot(jnp.array([[0], [1], [2]]), 3)
    reward, end = jnp.array([[1.0], [0.0], [-1.0]]), jnp.array([[False], [True], [False]])
    config = dataclasses.replace(PAPER, entropy_scale=0.1)
    losses, target = iris.actor_critic_losses(logits, value, action, reward, end, config)
    np.testing.assert_allclose(target[:, 0], [1.0199, 0.0, -0.801, 0.2], atol=1e-4)
    # All three steps count, the one after the end like the others; the last frame supplies a value only.
    log_probs = np.asarray(jax.nn.log_softmax(logits))[:3, 0]
    advantage = np.array([1.0199 - 0.5, 0.0 - 0.4, -0.801 - 0.3])
    np.testing.assert_allclose(losses["actor"], -np.mean(log_probs[range(3), range(3)] * advantage), rtol=1e-3)
    np.testing.assert_allclose(losses["critic"], np.mean(advantage**2), rtol=1e-3)
    np.testing.assert_allclose(losses["entropy"], 0.1 * np.mean((np.exp(log_probs) * log_probs).sum(-1)), rtol=1e-4)


def test_padded_burn_in_frames_leave_the_memory_as_it_is():
    _, config, nets, state = made()
    frames = images(5, 3) / 255.0
    mask = jnp.array([[False, False, True], [False, True, True], [False, True, True], [True, True, True], [True] * 3])
    together = jit(iris.burn_in, nets, config)(state.params, frames, mask)
    for row, start in enumerate((3, 1, 0)):
        alone = jit(iris.burn_in, nets, config)(
            state.params, frames[start:, row : row + 1], jnp.ones((5 - start, 1), bool)
        )
        np.testing.assert_allclose(together.hidden[row], alone.hidden[0], atol=1e-6)
        np.testing.assert_allclose(together.cell[row], alone.cell[0], atol=1e-6)


@pytest.mark.slow
def test_each_update_trains_its_own_module_and_no_other():
    assert gradient_flow() == {name: {name} for name in ("tokenizer", "world_model", "actor_critic")}


def gradient_flow():
    """Which modules each update changes."""
    agent, _, _, state = made()
    flow = {}
    for name in ("tokenizer", "world_model", "actor_critic"):
        new, _, _ = update_of(agent, name)(state, jax.random.key(0), batch_for(agent, name))
        same = lambda module, new=new: all(
            map(np.array_equal, jax.tree.leaves(state.params[module]), jax.tree.leaves(new.params[module]))
        )
        flow[name] = {module for module in state.params if not same(module)}
    return flow


def test_the_policy_sees_reconstructions_alone_while_collecting_evaluating_and_imagining():
    agent, config, nets, state = made()
    step = jax.tree.map(lambda x: x[0], random_step(PIXELS, (1, BATCH)))
    image = step.obs["image"]
    seen = jit(iris.decode, nets)(state.params, jit(iris.encode, nets, config)(state.params, image))
    assert seen.min() >= 0.0 and seen.max() <= 1.0
    memory = agent.policy_carry(state.params, BATCH)
    expected, _ = jit(iris._look, nets)(state.params, memory, seen)
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
def test_random_actions_are_taken_while_collecting_only_and_evaluation_samples_at_half_the_temperature():
    agent, config, nets, state = made(epsilon=0.5, eval_temperature=0.5)
    rows = 4000
    state = state._replace(params=state.params | {"actor_critic": perturb(state.params["actor_critic"], 1, 0.5)})
    step = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), random_step(PIXELS, (1,)))
    memory = agent.policy_carry(state.params, rows)
    tokens = jit(iris.encode, nets, config)(state.params, step.obs["image"][:1])
    one = jax.tree.map(lambda x: x[:1], memory)
    _, logits = jit(iris._look, nets)(state.params, one, jit(iris.decode, nets)(state.params, tokens))
    act = jax.jit(agent.act, static_argnames="explore")
    share = lambda explore: act(state.params, jax.random.key(0), memory, step, explore=explore)[1].mean(0)
    np.testing.assert_allclose(share(True), 0.5 * jax.nn.softmax(logits[0]) + 0.5 / 3, atol=0.03)
    np.testing.assert_allclose(share(False), jax.nn.softmax(logits[0] / 0.5), atol=0.03)
    greedy = jax.jit(iris.iris(PIXELS, dataclasses.replace(config, eval_action="mode")).act, static_argnames="explore")
    assert greedy(state.params, jax.random.key(0), memory, step, explore=False)[1].std(0).max() == 0


@pytest.mark.slow
def test_replaying_the_frames_gives_the_numbers_of_the_rollout():
    """Imagination runs without gradients first; the loss then sees the same logits."""
    agent, config, nets, state = made()
    dist, logits = distributions.OneHotCategorical, []
    tokens = jit(iris.encode, nets, config)(state.params, images(BATCH))
    keys = jax.random.split(jax.random.key(3), BATCH)
    memory = agent.policy_carry(state.params, BATCH)

    def policy(key, carry, frame):
        carry, logits = jit(iris._look, nets)(state.params, carry[0], frame)
        return (carry, logits), dist(logits).sample(seed=key)

    for horizon in (1, 2, 3):
        start = memory, jnp.zeros((BATCH, 3))
        dream, frames = iris.generate(nets, agent.model, state.params, keys, tokens, horizon, policy, start)
        logits.append(jit(iris.replay_frames, nets)(state.params["actor_critic"], memory, frames)[0])
        drawn = dist(logits[-1][:-1]).log_prob(dream.action)
        assert np.isfinite(drawn).all()
    np.testing.assert_allclose(logits[2][:2], logits[0], atol=1e-5)
    # The rollout's own choice at every step is the one that its noise makes of these logits.
    for t in range(3):
        key_policy, _ = noise.split(noise.fold_in(keys, t), 2)
        np.testing.assert_array_equal(dream.action[t], dist(logits[2][t]).sample(seed=key_policy))


# ---------------------------------------------------------------------------------------------------------------------
# Schedule, sampling, optimizers


def test_the_first_epochs_that_train_are_the_6th_the_26th_and_the_51st():
    config = dataclasses.replace(PAPER, collect_epochs=500, final_epochs=100)
    stages = iris.iris(ATARI, config).recipe.stages
    epochs = [(s.iterations, s.collect, [u.name for u in s.updates]) for s in stages]
    names = ["tokenizer", "world_model", "actor_critic"]
    assert epochs == [
        (5, 200, []), (20, 200, names[:1]), (25, 200, names[:2]), (450, 200, names), (100, 0, names)
    ]  # fmt: skip
    updates = {n: sum(s.iterations * u.repeats for s in stages for u in s.updates if u.name == n) for n in names}
    assert updates == {"tokenizer": 119_000, "world_model": 115_000, "actor_critic": 110_000}


def test_batches_come_from_episodes_uniformly_padded_after_for_the_models_and_before_for_the_policy():
    _, _, _, everything = [u.updates for u in iris.iris(ATARI, PAPER).recipe.stages]
    found = {u.name: (u.batch_size, u.sampling) for u in everything}
    assert {name: (s.over, s.pad) for name, (_, s) in found.items()} == {
        "tokenizer": ("episodes", "right"), "world_model": ("episodes", "right"), "actor_critic": ("episodes", "left")
    }  # fmt: skip
    assert {name: (batch, s.context, s.length) for name, (batch, s) in found.items()} == {
        "tokenizer": (256, 0, 1), "world_model": (64, 0, 21), "actor_critic": (64, 20, 1)
    }  # fmt: skip


@pytest.mark.slow
def test_embeddings_positions_biases_and_norms_do_not_decay():
    _, config, _, state = made()
    adam = iris.optimizers(config)["world_model"]
    weights = state.params["world_model"]
    changes, _ = adam.update(jax.tree.map(jnp.zeros_like, weights), adam.init(weights), weights)
    moved = {jax.tree_util.keystr(p): bool(np.any(x)) for p, x in jax.tree_util.tree_leaves_with_path(changes)}
    assert {name for name, value in moved.items() if value} == {name for name in moved if "kernel" in name}


# ---------------------------------------------------------------------------------------------------------------------
# Half batches, resuming


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "world_model"])
@pytest.mark.parametrize("changes", [{}, {"codebook": "ema", "codebook_reset": 0.5, "dropout": 0.3}], ids=str)
def test_half_batches_under_a_named_axis_equal_the_full_batch_where_padding_differs(name, changes):
    """The conformance tests do this for the actor-critic."""
    agent, config, _, state = made(**changes)
    half = iris.iris(PIXELS, config, axis_name="devices")
    batch = batch_for(agent, name)
    if name == "world_model":
        batch = batch._replace(mask=batch.mask.at[2:, 0].set(False).at[1:, 1].set(False))
    expected, metrics, _ = update_of(agent, name)(state, jax.random.key(0), batch)
    split = jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]), batch)
    update = jax.jit(jax.vmap(update_named(half, name).fn, (None, None, 1), axis_name="devices"))
    found, other, _ = update(state, jax.random.key(0), split)
    for new, pair in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_array_equal(pair[0], pair[1])
        np.testing.assert_allclose(pair[0], new, atol=2e-5)
    for term, value in metrics.items():
        np.testing.assert_allclose(other[term][0], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_resumes_byte_for_byte_in_every_phase_of_the_recipe(tmp_path):
    env = agent_actions(make_env("catch", image_size=16))
    agent = iris.iris(env.spec, dataclasses.replace(TINY_IRIS, collect_epochs=5, final_epochs=2))
    run = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    template = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    assert [stage.name for stage in agent.recipe.stages] == ["collect", "tokenizer", "world_model", "train", "final"]
    for number, stage in enumerate(agent.recipe.stages):
        advance = device.compile_stage(agent, env, stage)
        whole, _ = advance(jax.tree.map(jnp.copy, run), 2)
        part, _ = advance(run, 1)
        checkpoint.save(tmp_path, number, part)
        again, _ = advance(checkpoint.restore(tmp_path, template), 1)
        assert checkpoint.digest(again) == checkpoint.digest(whole)
        run = device.next_stage(again)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


REFUSED = [
    (dict(vocab_size=1), "vocab_size"),
    (dict(horizon=1), "horizon"),
    (dict(heads=3), "width must be a multiple of heads=3"),
    (dict(world_model_length=5), r"world_model_length must be in \[1, max_blocks=4\]"),
    (dict(channels=48, multipliers=(1,)), "channels"),
    (dict(multipliers=(), patch=1), "multipliers"),
    (dict(policy_channels=(4, 0)), "policy_channels"),
    (dict(policy_channels=(4, 8, 8, 8)), "policy_channels: 4 layers"),
    (dict(tokenizer_after=9), "tokenizer_after"),
    (dict(final_epochs=3), "final_epochs needs collect_epochs"),
    (dict(collect_epochs=3), "collect_epochs"),
    (dict(replay_capacity=7), "replay_capacity"),
    (dict(dropout=1.5), "dropout"),
    (dict(world_model_rate=float("nan")), "world_model_rate"),
    (dict(grad_clip=float("inf")), "grad_clip"),
    (dict(patch=3), r"image size 16x16 .* 3 pixels .* sides such as"),
    (dict(patch=16, multipliers=(1,)), "image size 16x16"),
    (dict(perceptual="lpips"), "lpips_weights.*tools/lpips_to_npz.py"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_values_out_of_range_or_against_each_other_are_refused_by_name(change, words):
    with pytest.raises(UsageError, match=words) as error:
        iris.iris(PIXELS, dataclasses.replace(TINY_IRIS, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (PIXELS._replace(action=MultiDiscrete((2, 3))), "MultiDiscrete"),
        (PIXELS._replace(action=Box(-1, 1, (2,))), "action space"),
        (PIXELS._replace(obs={"image": Box(0, 255, (20, 20, 3), "uint8")}), "20x20"),
        (PIXELS._replace(obs={"image": Box(0, 255, (16, 32, 3), "uint8")}), "16x32"),
        (PIXELS._replace(obs={"vector": Box(0, 1, (4,))}), "one uint8 image"),
        (PIXELS._replace(obs=PIXELS.obs | {"vector": Box(0, 1, (4,))}), "one uint8 image"),
    ],
)
def test_a_space_it_cannot_take_is_refused_with_those_it_can(spec, word):
    with pytest.raises(UsageError, match=word) as error:
        iris.iris(spec, TINY_IRIS)
    assert "valid" in str(error.value)
