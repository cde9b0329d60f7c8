"""The traps of the convolutional autoencoder, by numbers that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nets import vqgan


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_group_normalization_has_32_groups_and_an_epsilon_of_1e_minus_6():
    x = 1e-3 * normal(0, 2, 4, 4, 64)
    params = {"scale": jnp.arange(1.0, 65.0), "bias": jnp.ones(64)}
    found = vqgan.Norm(activate=False).apply({"params": params}, x)
    groups = np.float64(x).reshape(2, 4, 4, 32, 2)
    centered = groups - groups.mean((1, 2, 4), keepdims=True)
    expected = centered / np.sqrt((centered**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected.reshape(x.shape) * np.arange(1, 65) + 1, rtol=1e-4, atol=1e-4)


def test_downsampling_pads_below_and_to_the_right_only():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)  # shows the pixel above and to the left of the window's center
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}
    found = vqgan.Conv(1, stride=2).apply({"params": params}, image)
    assert found[0, :, :, 0].tolist() == [[0, 2], [8, 10]]  # padded on both sides it would be zeros and (1, 1)


def test_upsampling_repeats_pixels_before_it_convolves():
    params = {"conv": {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}}
    found = vqgan.Conv(1, upsample=True).apply({"params": params}, jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, ..., None])
    assert found[0, :, :, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_attention_stands_at_the_levels_of_its_sides_and_in_the_middle():
    encoder = vqgan.Encoder(vqgan.Sizes(4, (1, 1, 1), 2, (4, 8)), 8)
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    found = sorted(name for name in params if "attn" in name)
    assert found == ["attn1_0", "attn1_1", "attn2_0", "attn2_1", "mid_attn"]


@pytest.mark.slow
def test_a_patch_of_eight_pixels_is_seen_and_drawn_by_one_position():
    sizes = vqgan.Sizes(8, (1,), 1, (), patch=8)
    tokenizer = vqgan.Tokenizer(vqgan.Encoder(sizes, 4), vqgan.Decoder(sizes, 3), 16, 4)
    params = tokenizer.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), method="everything")
    z = tokenizer.apply(params, jnp.zeros((2, 16, 16, 3)), method="encode")
    image = tokenizer.apply(params, z, method="decode")
    assert z.shape == (2, 2, 2, 4) and image.shape == (2, 16, 16, 3)


@pytest.mark.slow
def test_the_codebook_starts_uniform_within_one_over_its_size():
    sizes = vqgan.Sizes(8, (1,), 1, (), patch=8)
    tokenizer = vqgan.Tokenizer(vqgan.Encoder(sizes, 4), vqgan.Decoder(sizes, 3), 64, 32)
    codebook = tokenizer.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), method="everything")["params"]["codebook"]
    assert 0.98 / 64 < np.abs(codebook).max() <= 1 / 64
    np.testing.assert_allclose(codebook.std(), 1 / 64 / 3**0.5, rtol=0.05)
