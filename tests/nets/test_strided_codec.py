import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nets import strided_codec
from wmjax.nets.strided_codec import StridedDecoder, StridedEncoder
from wmjax.types import Box, Discrete

SIDES = (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)


def image(side, channels=3):
    return (("image", Box(0, 255, (side, side, channels), "uint8")),)


def shape_of(encoder, side, channels=3):
    obs = {"image": jnp.zeros((2, side, side, channels), jnp.uint8)}
    return jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), obs)[0]).shape


@pytest.mark.parametrize("side", SIDES)
def test_the_decoder_draws_exactly_the_sizes_that_fit(side):
    decoder = StridedDecoder(image(side), 2, (8,))
    out = jax.eval_shape(lambda: decoder.init_with_output(jax.random.key(0), jnp.zeros((2, 3, 5)))[0])
    assert out["image"].shape == (2, 3, side, side, 3)
    assert shape_of(StridedEncoder(image(side), 2, (8,)), side)[0] == 2


def test_sizes_that_fit_are_those():
    assert [side for side in range(1, 129) if strided_codec.fits(side)] == list(SIDES)


@pytest.mark.parametrize(
    ("side", "padding", "features"), [(64, "VALID", 2 * 2), (64, 1, 4 * 4), (96, "VALID", 4 * 4), (32, "VALID", 2 * 2)]
)
def test_the_encoder_ends_at_the_published_maps(side, padding, features):
    assert shape_of(StridedEncoder(image(side), 32, (), padding), side) == (2, features * 256)
    assert shape_of(StridedEncoder(image(side), 32, (), padding, embed=1024), side) == (2, 1024)


@pytest.mark.slow
def test_convolutions_are_not_padded_so_border_pixels_count_less():
    encoder = StridedEncoder(image(16, 1), 1, (), conv_activation="relu")
    obs = lambda row: {"image": jnp.full((1, 16, 16, 1), 128, jnp.uint8).at[0, row, 8, 0].set(255)}
    params = encoder.init(jax.random.key(0), obs(8))
    # All-positive kernels, so that every ReLU passes; the first layer sums 4x4 windows at every second pixel.
    params = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim > 1 else x + 1e3, params)
    embed = lambda row: float(jax.jit(encoder.apply)(params, obs(row)).sum())
    base = float(encoder.apply(params, {"image": jnp.full((1, 16, 16, 1), 128, jnp.uint8)}).sum())
    border, inner = embed(0) - base, embed(3) - base
    assert border > 0 and inner == pytest.approx(2 * border, rel=0.02)


def test_images_come_before_vectors_and_vectors_are_not_squashed():
    spaces = (("a", Box(-9, 9, (2,))), ("b", Discrete(3)), *image(16, 1))
    encoder = StridedEncoder(spaces, 2, (4,))
    obs = {"a": jnp.ones((5, 2)), "b": jnp.zeros(5, jnp.int32), "image": jnp.zeros((5, 16, 16, 1), jnp.uint8)}
    params = encoder.init(jax.random.key(0), obs)
    embed = lambda **changes: encoder.apply(params, obs | changes)
    moved = np.abs(embed(a=100 * jnp.ones((5, 2))) - embed()).max(0)
    size = embed().shape[-1]
    assert not moved[: size - 4].any() and moved[size - 4 :].max() > 20  # symlog of 100 would be 4.6
    assert params["params"]["mlp"]["linear0"]["kernel"].shape == (2 + 3, 4)


def test_log_likelihoods_sum_over_the_entry_and_keep_their_constants():
    space = Box(0, 255, (64, 64, 3), "uint8")
    value = jnp.full((1, 64, 64, 3), 255, jnp.uint8)
    perfect = strided_codec.log_prob(jnp.full((1, 64, 64, 3), 0.5), value, space)
    assert float(perfect[0]) == pytest.approx(-64 * 64 * 3 * 0.5 * np.log(2 * np.pi), rel=1e-5)
    off = strided_codec.log_prob(jnp.full((1, 64, 64, 3), 0.5).at[0, 0, 0, 0].set(-0.5), value, space)
    assert float(perfect[0] - off[0]) == pytest.approx(0.5, abs=2e-3)
    logits = jnp.array([[0.0, 0.0]])
    assert float(strided_codec.log_prob(logits, jnp.array([1]), Discrete(2))[0]) == pytest.approx(-np.log(2))


def test_means_of_images_are_pixels():
    found = strided_codec.mean(jnp.array([-0.5, 0.0, 0.5, 9.0]).reshape(1, 2, 2, 1), image(2, 1)[0][1])
    assert found.ravel().tolist() == [0.0, 127.5, 255.0, 255.0]
    assert strided_codec.mean(jnp.array([[0.0, 2.0]]), Discrete(2)).tolist() == [1]
