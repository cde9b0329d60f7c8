import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.ops.latents import Categorical, Gaussian
from wmjax.ops.masks import masked_mean
from wmjax.types import UsageError

KEY = jax.random.key(0)
LOGITS = jnp.array([[2.0, 0.0, -1.0, 0.5]])
PROBS = np.asarray(jax.nn.softmax(LOGITS))


def test_the_kl_of_gaussians_is_its_integral_and_zero_only_where_equal():
    p, q = Gaussian(jnp.array([0.5]), jnp.array([0.7])), Gaussian(jnp.array([-0.3]), jnp.array([1.4]))
    x = jnp.linspace(-8, 8, 40_001)
    log = lambda d: -0.5 * ((x - d.mean) / d.std) ** 2 - jnp.log(d.std) - 0.5 * jnp.log(2 * jnp.pi)
    expected = jnp.trapezoid(jnp.exp(log(p)) * (log(p) - log(q)), x)
    assert float(p.kl(q)[0]) == pytest.approx(float(expected), rel=1e-4)
    assert float(p.kl(p)[0]) == 0
    assert float(p.entropy()[0]) == pytest.approx(float(-jnp.trapezoid(jnp.exp(log(p)) * log(p), x)), rel=1e-4)


def test_gaussian_noise_differs_between_the_rows_of_a_batch():
    batch = Gaussian(jnp.zeros((50, 3)), jnp.ones((50, 3)))
    assert len(np.unique(batch.sample(KEY))) == 150
    assert len(np.unique(batch.sample(jax.random.split(KEY, 50)))) == 150


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_straight_through"])
def test_categorical_samples_come_as_often_as_their_probabilities_say(estimator):
    sample = Categorical(jnp.broadcast_to(LOGITS, (50_000, 1, 4))).sample(KEY, estimator)
    assert set(np.unique(sample)) == {0.0, 1.0}
    np.testing.assert_allclose(sample.mean(0), PROBS, atol=0.012)


def test_the_estimators_differ_in_their_gradients_only():
    slope = lambda estimator: jax.jacobian(lambda x: Categorical(x[None]).sample(KEY, estimator)[0])(LOGITS[0])
    np.testing.assert_allclose(slope("straight_through"), np.diag(PROBS[0]) - np.outer(PROBS[0], PROBS[0]), atol=1e-6)
    noisy = jax.nn.softmax(LOGITS[0] + jax.random.gumbel(KEY, (1, 4))[0])
    np.testing.assert_allclose(slope("gumbel_straight_through"), np.diag(noisy) - np.outer(noisy, noisy), atol=1e-6)
    assert not np.any(slope("argmax"))
    assert Categorical(LOGITS).sample(KEY, "argmax").tolist() == [[1, 0, 0, 0]]
    with pytest.raises(UsageError, match="latent_estimator 'soft'"):
        Categorical(LOGITS).sample(KEY, "soft")


def test_masked_means_over_two_devices_average_to_the_mean_over_all_that_counts():
    x, mask = jnp.array([[1.0, 5.0, 9.0], [2.0, 4.0, 8.0]]), jnp.array([[1.0, 0, 0], [1, 1, 0]])
    each = jax.vmap(lambda x, mask: masked_mean(x, mask, "devices"), axis_name="devices")(x, mask)
    assert float(each.mean()) == pytest.approx((1 + 2 + 4) / 3)
    assert float(masked_mean(x[:, :2], jnp.array([1.0, 0.0]))) == 1.5  # a mask of rows, over two steps
    assert float(masked_mean(x, jnp.zeros(3))) == 0
