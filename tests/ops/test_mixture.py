import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.ops.mixture import Mixture

RNG = np.random.default_rng(0)


def random_mixture(lead=(4,), components=3, dims=5, shared=False):
    draw = lambda width: jnp.asarray(RNG.normal(size=(*lead, components, width)), jnp.float32)
    return Mixture(draw(1 if shared else dims), draw(dims), 0.3 * draw(dims))


def normal_pdf(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("shared", [False, True])
def test_log_prob_is_the_log_of_the_weighted_sum_of_densities(shared):
    mixture, x = random_mixture(shared=shared), RNG.normal(size=(4, 5))
    weights = np.asarray(jax.nn.softmax(mixture.logits, -2), np.float64)
    density = normal_pdf(x[:, None], np.asarray(mixture.mean, np.float64), np.exp(np.asarray(mixture.log_std)))
    if shared:
        expected = np.log((weights[..., 0] * density.prod(-1)).sum(-1, keepdims=True))
    else:
        expected = np.log((weights * density).sum(-2))
    found = mixture.log_prob(jnp.asarray(x, jnp.float32))
    assert found.shape == (4, 1 if shared else 5)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_batch_of_one_is_a_row_of_a_larger_batch():
    """PyTorch versions that squeeze their axes mix up time and batch there."""
    mixture = random_mixture((7, 2), shared=True)
    x = jnp.asarray(RNG.normal(size=(7, 2, 5)), jnp.float32)
    alone = Mixture(*(y[:, :1] for y in mixture)).log_prob(x[:, :1])
    assert alone.shape == (7, 1, 1)
    np.testing.assert_allclose(alone, mixture.log_prob(x)[:, :1], rtol=1e-6)


def test_temperature_multiplies_the_variance_not_the_deviation():
    sigma = 0.7
    one = Mixture(jnp.zeros((1, 1)), jnp.full((1, 1), 3.0), jnp.full((1, 1), np.log(sigma)))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (40_000, *x.shape)), one)
    drawn = rows.sample(jax.random.key(0), 2.0)
    assert np.var(drawn) == pytest.approx(2 * sigma**2, rel=0.03)
    assert np.mean(drawn) == pytest.approx(3.0, abs=0.02)


def test_temperature_sharpens_and_flattens_the_choice_of_components():
    logits = jnp.log(jnp.array([[0.8], [0.2]]))
    mixture = Mixture(logits, jnp.array([[0.0], [100.0]]), jnp.full((2, 1), -5.0))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (20_000, *x.shape)), mixture)
    for tau in (0.5, 1.0, 2.0):
        share = np.mean(np.asarray(rows.sample(jax.random.key(1), tau)) > 50)
        odds = (0.2 / 0.8) ** (1 / tau)
        assert share == pytest.approx(odds / (1 + odds), abs=0.015)


@pytest.mark.parametrize("shared", [False, True])
def test_dimensions_choose_their_components_together_only_where_they_share_them(shared):
    dims = 6
    logits = jnp.zeros((2, 1 if shared else dims))
    mixture = Mixture(logits, jnp.array([[0.0] * dims, [100.0] * dims]), jnp.full((2, dims), -5.0))
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (2_000, *x.shape)), mixture)
    high = np.asarray(rows.sample(jax.random.key(0))) > 50
    together = (high.all(1) | ~high.any(1)).mean()
    assert together == 1 if shared else together < 0.1
    assert high.mean() == pytest.approx(0.5, abs=0.05)


def test_rows_with_keys_of_their_own_do_not_depend_on_the_batch():
    mixture = random_mixture((4,))
    keys = jax.random.split(jax.random.key(0), 4)
    alone = Mixture(*(x[:1] for x in mixture)).sample(keys[:1])
    np.testing.assert_allclose(mixture.sample(keys)[:1], alone, rtol=1e-6)


def test_a_uniform_number_of_almost_one_takes_the_last_component():
    mixture = Mixture(jnp.zeros((7, 1)), jnp.arange(7.0)[:, None], jnp.full((7, 1), -9.0))
    found = mixture.draw(jnp.array([np.nextafter(1, 0, dtype=np.float32)]), jnp.zeros(1))
    assert float(found[0]) == 6.0


def test_the_expected_value_is_the_mean_of_samples():
    mixture = random_mixture((1,))
    expected = jnp.sum(jax.nn.softmax(mixture.logits, -2) * mixture.mean, -2)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (40_000, *x.shape[1:])), mixture)
    np.testing.assert_allclose(rows.sample(jax.random.key(0)).mean(0), expected[0], atol=0.04)
