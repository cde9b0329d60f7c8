import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops.returns import discount_weights, lambda_returns

LAMBDA = 0.95


def replay_returns(last, term, reward, boot, discount, lambda_):
    """The official generic function, as DreamerV3 calls ours: `[T + 1, ...]` in, `[T, ...]` out."""
    return lambda_returns(reward[1:], discount * (1 - term[1:]), boot[1:], lambda_ * (1 - last[1:]))


def by_definition(reward, discount, value, lambda_):
    """(1 - λ) Σₙ λⁿ⁻¹ (n-step return), the last one with all the remaining weight."""
    steps = len(reward)
    returns = np.zeros(steps)
    for t in range(steps):
        for n in range(1, steps - t + 1):
            path = np.cumprod(np.append(1.0, discount[t : t + n]))
            n_step = (path[:-1] * reward[t : t + n]).sum() + path[-1] * value[t + n - 1]
            weight = lambda_ ** (n - 1) * (1.0 if n == steps - t else 1 - lambda_)
            returns[t] += weight * n_step
    return returns


def test_a_time_limit_cuts_the_sum_and_keeps_the_bootstrap():
    last, term = jnp.array([0.0, 0, 1, 0]), jnp.zeros(4)
    reward, boot = jnp.array([9.0, 1, 2, 3]), jnp.array([0.1, 0.2, 0.3, 0.4])
    returns = replay_returns(last, term, reward, boot, 0.9, LAMBDA)
    np.testing.assert_allclose(returns, [2.9498498, 2.27, 3.36], rtol=1e-6)


def test_a_terminal_step_cuts_both_sum_and_bootstrap():
    last, term = jnp.zeros(4), jnp.array([0.0, 0.1, 0.2, 1.0])
    reward, boot = jnp.array([9.0, 1, 2, 3]), jnp.array([0.1, 0.2, 0.3, 0.4])
    returns = replay_returns(last, term, reward, boot, 1.0, LAMBDA)
    np.testing.assert_allclose(returns, [4.6786594, 4.292, 3.0], rtol=1e-6)


def test_same_state_reward_and_next_value_give_the_returns_of_dreamer_v1():
    returns = lambda_returns(jnp.array([1.0, 2, 3]), jnp.array([0.9, 0.8, 0.7]), jnp.array([0.2, 0.3, 0.4]), LAMBDA)
    np.testing.assert_allclose(returns, [4.860604, 4.5048, 3.28], rtol=1e-6)


def test_is_the_weighted_mean_of_n_step_returns():
    rng = np.random.default_rng(0)
    reward, discount, value = rng.normal(size=7), rng.uniform(0.5, 1, 7), rng.normal(size=7)
    returns = lambda_returns(jnp.array(reward), jnp.array(discount), jnp.array(value), 0.8)
    np.testing.assert_allclose(returns, by_definition(reward, discount, value, 0.8), rtol=1e-5)


def test_lambda_0_is_one_step_and_lambda_1_the_discounted_sum():
    reward, discount, value = jnp.array([1.0, 2, 4]), jnp.full(3, 0.5), jnp.array([10.0, 20, 40])
    np.testing.assert_allclose(lambda_returns(reward, discount, value, 0.0), [6, 12, 24])
    np.testing.assert_allclose(lambda_returns(reward, discount, value, 1.0), [1 + 1 + 1 + 5, 2 + 2 + 10, 24])


def test_any_trailing_shape_is_as_many_separate_sequences():
    rng = np.random.default_rng(1)
    reward, discount, value = (jnp.array(rng.uniform(size=(5, 2, 3)), jnp.float32) for _ in range(3))
    together = lambda_returns(reward, discount, value, LAMBDA)
    alone = lambda_returns(reward[:, 1, 2], discount[:, 1, 2], value[:, 1, 2], LAMBDA)
    assert together.shape == (5, 2, 3)
    np.testing.assert_allclose(together[:, 1, 2], alone, rtol=1e-6)


def test_is_float32_under_bfloat16_inputs():
    ones = jnp.ones(300, jnp.bfloat16)
    returns = lambda_returns(ones, ones, 0 * ones, 1.0)
    assert returns.dtype == jnp.float32
    assert returns[0] == 300  # bfloat16 would stop counting at 256


def test_a_gradient_reaches_every_later_reward():
    gradient = jax.grad(lambda r: lambda_returns(r, jnp.full(3, 0.5), jnp.zeros(3), 0.5)[0])(jnp.zeros(3))
    np.testing.assert_allclose(gradient, [1, 0.25, 0.0625])


def test_weights_include_the_first_step():
    np.testing.assert_allclose(discount_weights(jnp.full((3, 1), 0.9))[:, 0], [0.9, 0.81, 0.729], rtol=1e-6)


def test_weights_are_zero_after_the_end_of_an_episode():
    np.testing.assert_array_equal(discount_weights(jnp.array([1.0, 0.5, 0.0, 1.0])), [1, 0.5, 0, 0])


@pytest.mark.parity
def test_agrees_with_the_official_generic_function():
    f = load("dreamer_v3_losses")
    cases = sorted({name.split("/")[1] for name in f if name.startswith("in/lambda_return")})
    assert len(cases) > 1
    for case in cases:
        x = f.tree(f"in/{case}")
        flows = (jnp.array(x[name]).T for name in ("last", "term", "rew", "boot"))
        returns = replay_returns(*flows, x["disc"], x["lam"])
        np.testing.assert_allclose(returns.T, f[f"out/{case}/ret"], rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_agrees_with_the_official_replay_returns():
    f = load("dreamer_v3_losses")
    x = {name: jnp.array(array, jnp.float32).T for name, array in f.tree("in/repl").items() if array.ndim == 2}
    returns = replay_returns(
        x["last"], x["term"], x["reward"], x["boot"], 1 - 1 / f.config["horizon"], f.config["repl_loss"]["lam"]
    )
    np.testing.assert_allclose(returns.T, f["out/repl/ret"], rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_agrees_with_the_official_imagined_returns():
    f = load("dreamer_v3_losses")
    reward, cont, value = (
        jnp.array(a).T for a in (f["in/imag/reward"], f["in/imag/cont"], f["out/imag_disc/value_pred"])
    )
    returns = lambda_returns(reward[1:], cont[1:], value[1:], f.config["imag_loss"]["lam"])
    np.testing.assert_allclose(returns.T, f["out/imag_disc/ret"], rtol=1e-4, atol=1e-4)
