import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nets import perceptual
from wmjax.types import UsageError


def image(seed, side=16):
    return jax.random.uniform(jax.random.key(seed), (2, side, side, 3), minval=-1.0)


@pytest.mark.slow
def test_the_distance_is_zero_to_itself_positive_otherwise_and_has_a_finite_gradient():
    stack = perceptual.random_stack()
    x, y = image(0), image(1)
    for distance in (lambda x, y: perceptual.distance(stack, x, y), perceptual.multiscale):
        np.testing.assert_allclose(distance(x, x), 0, atol=1e-6)
        assert (distance(x, y) > 0.01).all()
        assert np.isfinite(jax.grad(lambda y, d=distance: d(x, y).sum())(x)).all()


def test_the_distance_is_the_one_of_the_paper_for_a_stack_that_can_be_computed_by_hand():
    kernel = np.zeros((3, 3, 3, 2), np.float32)
    kernel[1, 1, 0, 0] = kernel[1, 1, 1, 1] = 1.0  # two of the three colors
    stack = perceptual.Stack((((kernel, np.zeros(2, np.float32)),),), (np.array([1.0, 3.0], np.float32),))
    x, y = image(0), image(1)

    def unit(image):
        scaled = (np.float64(image) - perceptual.SHIFT) / perceptual.SCALE
        features = np.maximum(scaled[..., :2], 0)
        return features / (np.linalg.norm(features, axis=-1, keepdims=True) + 1e-10)

    expected = (((unit(x) - unit(y)) ** 2) @ [1.0, 3.0]).mean((1, 2))
    np.testing.assert_allclose(perceptual.distance(stack, x, y), expected, rtol=1e-4)


@pytest.mark.slow
def test_dropout_of_lpips_is_off_by_default_and_unbiased():
    stack, x, y = perceptual.random_stack(), image(0), image(1)
    plain = perceptual.distance(stack, x, y)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 2))(jnp.arange(200))
    noisy = jax.jit(jax.vmap(lambda keys: perceptual.distance(stack, x, y, keys, 0.5)))(keys)
    assert noisy.std(0).min() > 0
    np.testing.assert_allclose(noisy.mean(0), plain, rtol=0.02)
    np.testing.assert_array_equal(perceptual.distance(stack, x, y, keys[0], 0.0), plain)


def test_lpips_without_its_weights_is_refused_with_the_file_and_the_converter(tmp_path):
    with pytest.raises(UsageError, match=r"lpips_weights: '.*absent.npz'.*tools/lpips_to_npz.py"):
        perceptual.load_lpips(str(tmp_path / "absent.npz"))
    np.savez(tmp_path / "wrong.npz", **{"conv0/kernel": np.zeros((3, 3, 3, 8))})
    with pytest.raises(UsageError, match=r"conv0 of shape \(3, 3, 3, 64\).*tools/lpips_to_npz.py"):
        perceptual.load_lpips(str(tmp_path / "wrong.npz"))


@pytest.mark.slow
def test_lpips_runs_on_weights_of_its_shapes_and_refuses_negative_ones():
    rng, arrays, inputs, number = np.random.default_rng(0), {}, 3, 0
    for stage, widths in enumerate(perceptual.VGG16):
        for features in widths:
            scale = (2 / (9 * inputs)) ** 0.5
            arrays[f"conv{number}/kernel"] = scale * rng.normal(size=(3, 3, inputs, features)).astype(np.float32)
            arrays[f"conv{number}/bias"] = np.zeros(features, np.float32)
            inputs, number = features, number + 1
        arrays[f"linear{stage}"] = np.full(features, 1 / features, np.float32)
    stack = perceptual.stack_of(arrays)
    found = jax.jit(lambda x, y: perceptual.distance(stack, x, y))(image(0), image(1))
    assert found.shape == (2,) and (found > 0).all()
    with pytest.raises(UsageError, match="at least 0"):
        perceptual.stack_of(arrays | {"linear2": -arrays["linear2"]})
