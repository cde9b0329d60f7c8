from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.ops import action_distributions as actions
from wmjax.ops.action_distributions import (
    TanhNormal,
    TruncatedNormal,
    explore,
    random_action,
    tanh_normal,
    truncated_normal,
)
from wmjax.types import Box, Discrete, MultiDiscrete, UsageError

KEY = jax.random.key(0)
GRID = jnp.linspace(-0.99999, 0.99999, 40_001)[:, None]


def integral(values):
    return float(jnp.trapezoid(values, GRID[:, 0]))


@pytest.mark.parametrize(
    "dist", [TanhNormal(jnp.array([0.3]), jnp.array([0.8])), TruncatedNormal(jnp.array([0.7]), jnp.array([0.5]))]
)
def test_the_density_integrates_to_one_and_has_the_moments_of_the_samples(dist):
    density = jnp.exp(jax.vmap(dist.log_prob)(GRID))
    assert integral(density) == pytest.approx(1, abs=2e-3)
    keys = jax.random.split(KEY, 20_000)
    samples = jax.vmap(lambda key: dist.sample(seed=key))(keys)[:, 0]
    for power in (1, 2):
        assert float((samples**power).mean()) == pytest.approx(integral(density * GRID[:, 0] ** power), abs=0.015)
    assert np.abs(samples).max() < 1


def test_entropies_are_those_of_the_densities():
    trunc = TruncatedNormal(jnp.array([0.7]), jnp.array([0.5]))
    log_prob = jax.vmap(trunc.log_prob)(GRID)
    assert float(trunc.entropy()) == pytest.approx(-integral(jnp.exp(log_prob) * log_prob), abs=1e-3)
    squashed = TanhNormal(jnp.array([0.3]), jnp.array([0.4]))
    log_prob = jax.vmap(squashed.log_prob)(GRID)
    assert float(squashed.entropy(KEY, 20_000)) == pytest.approx(-integral(jnp.exp(log_prob) * log_prob), abs=0.03)


def test_a_truncated_sample_has_slope_one_in_location_and_its_noise_in_scale():
    loc, scale = jnp.array([0.9, -0.2, 0.0]), jnp.array([0.8, 0.3, 1.0])
    sample = lambda loc, scale: TruncatedNormal(loc, scale).sample(KEY)
    value, slope = jax.jvp(sample, (loc, scale), (jnp.array([1.0, 0.0, 2.0]), jnp.array([0.0, 1.0, 1.0])))
    eps = (value - loc) / scale
    # The derivative of the sample itself would know that it cannot leave [-1, 1].
    np.testing.assert_allclose(slope, [1.0, eps[1], 2.0 + eps[2]], rtol=1e-5)


def test_the_clip_of_truncated_samples_passes_gradients(monkeypatch):
    monkeypatch.setattr(actions, "truncated_noise", lambda key, low, high: high)
    sample = lambda loc: TruncatedNormal(loc, jnp.ones(1)).sample(KEY)[0]
    value, grad = jax.value_and_grad(sample)(jnp.array([0.5]))
    assert value == pytest.approx(1 - 1e-6, abs=1e-7) and grad[0] == 1.0


@pytest.mark.slow
def test_noise_differs_between_the_rows_of_a_batch():
    for dist in (
        tanh_normal(jnp.zeros((64, 2)), jnp.full((64, 2), -5.0)),
        truncated_normal(jnp.zeros((64, 2)), jnp.zeros((64, 2))),
    ):
        assert len(np.unique(dist.sample(KEY)[:, 0])) == 64
        rows = jax.random.split(KEY, 64)
        np.testing.assert_allclose(
            dist.sample(rows)[3], jax.tree.map(lambda x: x[3:4], dist).sample(rows[3:4])[0], rtol=1e-6
        )


def test_the_mode_of_a_tanh_normal_is_the_likeliest_draw_of_each_row_by_itself():
    dist = TanhNormal(jnp.array([[-1.0], [2.0], [0.0]]), jnp.array([[0.5], [0.5], [0.05]]))
    draws = jnp.tanh(dist._draw(KEY, 100))  # [100, 3, 1]
    scores = jax.vmap(dist.log_prob)(draws)
    best = np.argmax(scores, 0)
    assert len(set(best.tolist())) > 1  # the first row's index would be wrong for others
    np.testing.assert_allclose(dist.mode(KEY), [draws[i, row] for row, i in enumerate(best)], rtol=1e-6)


def test_the_density_at_the_very_bounds_is_finite():
    dist = tanh_normal(jnp.zeros(2), jnp.zeros(2))
    assert np.isfinite(dist.log_prob(jnp.array([1.0, -1.0])))


def test_exploration_replaces_a_share_of_choices_or_adds_clipped_noise():
    action = jax.nn.one_hot(jnp.zeros(20_000, int), 4)
    np.testing.assert_allclose(explore(KEY, action, 0.4, (4,)).mean(0), [0.7, 0.1, 0.1, 0.1], atol=0.02)
    np.testing.assert_array_equal(explore(KEY, action, 0.0, (4,)), action)
    both = jnp.concatenate([action, action[:, :2]], -1)
    chosen = explore(KEY, both, 0.4, (4, 2))
    np.testing.assert_allclose(chosen.mean(0), [0.7, 0.1, 0.1, 0.1, 0.8, 0.2], atol=0.02)
    np.testing.assert_allclose((chosen[:, 0] * chosen[:, 4]).mean(), 0.7 * 0.8, atol=0.02)  # independently
    noisy = explore(KEY, jnp.full((20_000, 1), 0.9), 0.3, None)
    assert noisy.max() == 1.0 and float((noisy == 1.0).mean()) == pytest.approx(0.369, abs=0.02)


def test_random_actions_of_a_box_fill_minus_one_to_one_whatever_its_bounds():
    draw = jax.vmap(partial(random_action, Box(-30.0, 70.0, (2,))))
    action = draw(jax.random.split(jax.random.key(0), 2000))
    assert action.shape == (2000, 2) and action.min() >= -1 and action.max() <= 1
    np.testing.assert_allclose(action.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(action.std(0), 3**-0.5, atol=0.03)
    assert random_action(Discrete(4), jax.random.key(0)).shape == (4,)


def test_random_actions_of_several_choices_are_independent_one_hots_side_by_side():
    draw = jax.vmap(partial(random_action, MultiDiscrete((2, 3))))
    action = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    assert action.shape == (3000, 5) and (action[:, :2].sum(-1) == 1).all() and (action[:, 2:].sum(-1) == 1).all()
    both = action[:, :2, None] * action[:, None, 2:]
    np.testing.assert_allclose(both.mean(0), 1 / 6, atol=0.03)


def test_action_spaces_that_agents_do_not_speak_are_refused():
    with pytest.raises(UsageError, match="action space"):
        random_action(Box(0, 1, (2, 2)), jax.random.key(0))
