"""The transformer's traps: the cache, positions, and the constants of its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from wmjax.nets import transformer
from wmjax.nets.transformer import TokenTransformer, restart


def tiny(**changes):
    sizes = dict(tokens=2, max_blocks=4, vocab_size=7, actions=3, layers=2, heads=2, width=8, ff=16)
    return TokenTransformer(**sizes | changes)


@functools.cache
def with_params(**changes):
    module = tiny(**changes)
    inputs = jnp.zeros((1, 1, module.tokens), jnp.int32), jnp.zeros((1, 1, 3)), jnp.zeros((1, 1))
    params = jax.jit(lambda key: module.init(key, *inputs))(jax.random.key(0))["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return module, {"params": jax.tree.unflatten(structure, leaves)}


def kept_positions(tokens, block, kinds, past=0):
    """Of the next `tokens` tokens, those whose position in their block is one of `kinds`; relative to the first."""
    return tuple(i for i in range(tokens) if (past + i) % block in kinds)


def test_gelu_is_exact():
    x = np.linspace(-4, 4, 81)
    np.testing.assert_allclose(transformer.ACTIVATIONS["gelu"](x), x * (1 + erf(x / 2**0.5)) / 2, atol=1e-6)


def test_layer_norm_has_an_epsilon_of_1e_minus_5():
    x = 1e-3 * np.random.default_rng(0).normal(size=(5, 8))
    found = transformer.LayerNorm().apply({"params": {"scale": np.ones(8), "bias": np.zeros(8)}}, jnp.float32(x))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm, activation", [("pre", "gelu"), ("post", "relu")])
def test_a_cached_pass_equals_the_full_one_however_the_tokens_are_cut_and_with_rows_of_different_lengths(
    norm, activation
):
    module, params = with_params(norm=norm, activation=activation)
    x = jax.random.normal(jax.random.key(2), (2, 12, 8))
    apply = functools.partial(jax.jit(module.apply, static_argnames="method"), params)
    full, _ = apply(x, method="full")
    for rows, cache in ((2, module.init_cache(2)), (1, transformer.in_step(module.init_cache(2)))):
        parts, begin = [], 0
        for size in (5, 1, 1, 5):
            hidden, cache = apply(x[:, begin : begin + size], cache, method="advance")
            parts.append(hidden)
            begin += size
        np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)
        assert cache.length.tolist() == [12] * rows
    # The second row is three tokens behind the first: each continues its own context.
    ahead = apply(x[:1, :5], module.init_cache(1), method="advance")[1]
    behind = apply(x[1:, :2], module.init_cache(1), method="advance")[1]
    cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ahead, behind)
    hidden, _ = apply(jnp.stack([x[0, 5:7], x[1, 2:4]]), cache, method="advance")
    np.testing.assert_allclose(hidden, jnp.stack([full[0, 5:7], full[1, 2:4]]), atol=2e-5)


def test_no_output_sees_a_later_token():
    module, params = with_params()
    x = jax.random.normal(jax.random.key(2), (1, 12, 8))
    full = lambda x: module.apply(params, x, method="full")[0]
    changed = full(x.at[0, 7, 0].add(1.0)) - full(x)
    assert not np.any(changed[0, :7]) and np.all(np.abs(changed[0, 7:]).max(-1) > 0)


@pytest.mark.slow
def test_a_restarted_row_holds_the_given_tokens_alone_and_the_others_are_left_as_they_were():
    module, params = with_params()
    x = jax.random.normal(jax.random.key(2), (2, 6, 8))
    _, cache = module.apply(params, x, module.init_cache(2), method="advance")
    _, new = module.apply(params, x[:, 4:], method="full")
    cut = restart(cache, new, jnp.array([True, False]))
    assert cut.length.tolist() == [2, 6]
    more = jax.random.normal(jax.random.key(3), (2, 1, 8))
    after, _ = module.apply(params, more, cut, method="advance")
    alone = restart(module.init_cache(2), new, jnp.array([True, True]))
    alone, _ = module.apply(params, more, alone, method="advance")
    went_on, _ = module.apply(params, more, cache, method="advance")
    np.testing.assert_allclose(after[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(after[1], went_on[1], atol=1e-5)


def test_positions_that_heads_read_in_two_blocks_of_seventeen():
    module = tiny(tokens=16)
    assert kept_positions(34, module.block, module.frame_positions) == (
        *range(15), 16, *range(17, 32), 33,
    )  # fmt: skip
    assert kept_positions(34, module.block, (module.tokens,)) == (16, 33)


@pytest.mark.slow
def test_with_reward_tokens_the_next_frame_is_predicted_at_the_reward_and_the_outcome_at_the_action():
    module, params = with_params(reward_tokens=True)
    assert (module.block, module.max_tokens, module.frame_positions) == (4, 16, (0, 3))
    tokens = jnp.array([[[1, 2], [3, 4]]])
    action, reward = jnp.eye(3)[None, :2], jnp.array([[0.0, 1.0]])
    sequence = lambda action, reward: module.apply(params, tokens, action, reward)
    base, other_reward = sequence(action, reward), sequence(action, reward.at[0, 0].set(-1.0))
    changed = [np.abs(a - b).max(-1)[0] > 1e-6 for a, b in zip(base, other_reward, strict=True)]
    # The first reward is seen by the prediction of the second frame and by all that follows, not by its own outcome.
    assert changed[0].tolist() == [False, True, True, True]
    assert changed[1].tolist() == changed[2].tolist() == [False, True]


def test_dropout_keeps_the_mean_and_draws_by_row():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 20_000))
    dropped = transformer.dropout(keys, x, 0.1)
    np.testing.assert_allclose(jnp.mean(dropped == 0), 0.1, atol=5e-3)
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=5e-3)
    np.testing.assert_array_equal(transformer.dropout(keys[2:], x[2:], 0.1), dropped[2:])
    np.testing.assert_array_equal(transformer.dropout(None, x, 0.1), x)


@pytest.mark.slow
def test_training_drops_and_acting_does_not():
    module, params = with_params(rate=0.5)
    x = jax.random.normal(jax.random.key(2), (2, 6, 8))
    full = lambda keys: module.apply(params, x, keys, method="full")[0]
    keys = jax.random.split(jax.random.key(0), 2)
    assert not np.allclose(full(keys), full(None))
    again, _ = module.apply(params, x, module.init_cache(2), method="advance")
    np.testing.assert_allclose(again, full(None), atol=1e-5)
