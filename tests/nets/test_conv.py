"""On a CPU the block formulation must be the convolution that an accelerator runs; and that one must be plain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from wmjax.nets import conv
from wmjax.types import UsageError

DIMS = ("NHWC", "HWIO", "NHWC")


def conv2d_max_pool(x, kernel):
    return conv.conv2d(x, kernel, max_pool=True)


def plain_conv(x, kernel, stride=1, padding="SAME"):
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=DIMS)


def plain_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def plain_transpose(x, kernel, stride):
    return lax.conv_transpose(x, kernel, (stride, stride), "VALID", dimension_numbers=DIMS, transpose_kernel=True)


def plain_upsample(x, kernel):
    return plain_conv(x.repeat(2, 1).repeat(2, 2), kernel)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_same(fast, plain, x, kernel):
    """Values, and gradients of a nonlinear function of them, with respect to image and kernel."""

    def both(f):
        y, pull = jax.vjp(f, x, kernel)
        return y, *pull(jnp.cos(y) + 0.1)

    for got, want in zip(jax.jit(lambda: both(fast))(), jax.jit(lambda: both(plain))(), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((8, 8), (5, 5, 3, 4), 1, "SAME"),
        ((7, 10), (5, 3, 2, 3), 1, "SAME"),
        ((9, 9), (3, 3, 2, 80), 1, 1),  # many channels: no blocks
        ((9, 7), (4, 4, 3, 5), 2, "VALID"),
        ((8, 9), (4, 4, 3, 5), 2, 1),
        ((11, 8), (3, 3, 2, 3), 2, "SAME"),
        ((16, 16), (8, 8, 3, 6), 8, "VALID"),
        ((7, 7), (2, 3, 2, 3), 3, "SAME"),
        ((7, 7), (1, 1, 2, 3), 2, "VALID"),  # the last pixels of the image are left over
        ((5, 6), (1, 1, 2, 3), 1, "SAME"),
    ],
)
def test_convolution_is_the_plain_one(size, kernel, stride, padding):
    x, k = normal(0, 3, *size, kernel[2]), normal(1, *kernel)
    assert_same(
        lambda x, k: conv.conv2d(x, k, stride=stride, padding=padding),
        lambda x, k: plain_conv(x, k, stride, padding),
        x,
        k,
    )


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_pooled_convolution_is_convolution_then_pooling(size):
    x, k = normal(0, 3, *size, 3), normal(1, 5, 5, 3, 4)
    assert_same(conv2d_max_pool, lambda x, k: plain_pool(plain_conv(x, k)), x, k)


@pytest.mark.parametrize(("size", "k", "stride"), [((1, 1), 5, 2), ((4, 5), 6, 2), ((3, 4), 2, 3), ((5, 3), 4, 1)])
def test_transposed_convolution_is_the_plain_one(size, k, stride):
    x, kernel = normal(0, 2, *size, 3), normal(1, k, k, 4, 3)
    plain = lambda x, kernel: plain_transpose(x, kernel, stride)
    assert_same(lambda x, kernel: conv.conv2d_transpose(x, kernel, stride=stride), plain, x, kernel)
    # What accelerators run has a gradient of its own.
    assert_same(functools.partial(conv._plain_transpose, stride), plain, x, kernel)


@pytest.mark.parametrize("kernel", [(5, 5, 3, 4), (3, 7, 2, 3), (1, 3, 2, 40)])
def test_upsampling_convolution_is_repeating_then_convolving(kernel):
    x, k = normal(0, 2, 4, 5, kernel[2]), normal(1, *kernel)
    assert_same(conv.upsample_conv2d, plain_upsample, x, k)


@pytest.mark.parametrize("chunks", [1, 3])
def test_what_follows_a_convolution_in_it_is_what_follows_it(chunks, monkeypatch):
    monkeypatch.setattr(conv, "_chunk", lambda num, floats: -(-num // chunks))
    x, k, scale = normal(0, 5, 7, 8, 3), normal(1, 5, 5, 3, 4), normal(2, 4)

    def after(kernel, y, axis):  # depends on channels, and on what a gradient is taken of
        y = y - jnp.mean(y, axis, keepdims=True)
        return jnp.tanh(y * conv.along(scale * kernel[0, 0, 0], axis, y.ndim))

    for convolve, options in ((conv.conv2d, {}), (conv.conv2d, {"max_pool": True}), (conv.upsample_conv2d, {})):
        inside = lambda x, k, f=convolve, o=options: f(x, k, **o, after=functools.partial(after, k))
        behind = lambda x, k, f=convolve, o=options: after(k, f(x, k, **o), -1)
        assert_same(inside, behind, x, k)
    assert_same(
        lambda x, k: conv.conv2d(x, k[:1, :1], after=functools.partial(after, k)),
        lambda x, k: after(k, x @ k[0, 0], -1),
        x,
        k,
    )


@pytest.mark.slow
def test_every_block_size_gives_the_same_numbers(monkeypatch):
    x, k = normal(0, 2, 8, 6, 2), normal(1, 5, 5, 2, 3)
    want, want_up = plain_conv(x, k), plain_upsample(x, k)
    for tile in conv._TILES:
        monkeypatch.setattr(conv, "_best_tile", lambda *_, tile=tile: tile)
        np.testing.assert_allclose(conv.conv2d(x, k), want, atol=1e-4)
        np.testing.assert_allclose(conv.upsample_conv2d(x, k), want_up, atol=1e-4)


def test_a_batch_cut_into_chunks_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr(conv, "_CHUNK_BYTES", 1)
    x, k = normal(0, 19, 6, 6, 2), normal(1, 3, 3, 2, 3)  # 19 images: three chunks of 7, the last not full
    assert_same(conv.conv2d, plain_conv, x, k)
    assert_same(conv2d_max_pool, lambda x, k: plain_pool(plain_conv(x, k)), x, k)


def test_leading_axes_are_batch_axes():
    x, k = normal(0, 2, 3, 4, 4, 2), normal(1, 3, 3, 2, 5)
    want = plain_conv(x.reshape(6, 4, 4, 2), k)
    np.testing.assert_allclose(conv.conv2d(x, k), want.reshape(2, 3, 4, 4, 5), atol=1e-5)
    np.testing.assert_allclose(conv.conv2d(x[0, 0], k), want[0], atol=1e-5)


def test_vmap_over_seeds_and_forward_mode_agree_with_plain():
    x, k = normal(0, 2, 3, 8, 8, 2), normal(1, 2, 5, 5, 2, 3)

    def grads(f):
        return jax.jit(jax.vmap(jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), (0, 1))))(x, k)

    fast, plain = conv2d_max_pool, lambda x, k: plain_pool(plain_conv(x, k))
    for got, want in zip(grads(fast), grads(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()))
    tangents = [jax.jvp(f, (x[0], k[0]), (x[1], k[1]))[1] for f in (conv.conv2d, plain_conv)]
    np.testing.assert_allclose(*tangents, rtol=1e-4, atol=1e-4)


def test_bfloat16_in_gives_bfloat16_out_accumulated_in_float32():
    x, k = normal(0, 2, 6, 6, 64), normal(1, 3, 3, 64, 4)
    got = conv.conv2d(x.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    want = plain_conv(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, k)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)  # one rounding, at the end


def test_an_impulse_prints_a_keras_kernel_unflipped():
    kernel = normal(1, 4, 3, 2, 5)
    x = jnp.zeros((1, 3, 3, 5)).at[0, 1, 2, 4].set(1.0)
    want = np.zeros((1, 8, 7, 2), np.float32)
    want[0, 2:6, 4:7] = kernel[..., 4]  # input (1, 2) with stride 2 lands at (2, 4)
    np.testing.assert_allclose(conv.conv2d_transpose(x, kernel, stride=2), want, atol=1e-6)


def test_pooling_gradient_goes_to_the_first_maximum_in_row_major_order():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 8, 9, 3)), jnp.float32)  # full of ties
    weight = normal(1, 2, 4, 4, 3)
    got, want = (jax.grad(lambda x, f=f: jnp.sum(f(x) * weight))(x) for f in (conv.max_pool2d, plain_pool))
    np.testing.assert_array_equal(conv.max_pool2d(x), plain_pool(x))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("place", range(4))
def test_pooling_shows_nan(place):
    window = jnp.arange(4.0).at[place].set(jnp.nan).reshape(1, 2, 2, 1)
    assert jnp.isnan(conv.max_pool2d(window)).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_runs_plain_convolutions(platform):
    x, k = jnp.zeros((2, 8, 8, 3)), jnp.zeros((5, 5, 3, 3))

    def loss(x, k):
        x = conv.upsample_conv2d(conv2d_max_pool(conv.conv2d(x, k), k), k)
        return jnp.sum(conv.conv2d_transpose(x, k, stride=2))

    step = jax.jit(jax.grad(loss, (0, 1)))
    text = step.trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") >= 8 and "stablehlo.dot_general" not in text
    text = step.trace(x, k).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in text and "stablehlo.dot_general" in text


@pytest.mark.parametrize(
    ("module", "kernel", "out"),
    [
        (conv.Conv(4, 5), (5, 5, 3, 4), (2, 6, 6, 4)),
        (conv.Conv(4, 5, max_pool=True), (5, 5, 3, 4), (2, 3, 3, 4)),
        (conv.ConvTranspose(4, 5, 2), (5, 5, 4, 3), (2, 15, 15, 4)),
        (conv.UpsampleConv(4, 3), (3, 3, 3, 4), (2, 12, 12, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_modules_keep_float32_parameters_and_compute_in_dtype(module, kernel, out, dtype):
    x = normal(0, 2, 6, 6, 3)
    module = module.clone(dtype=dtype, bias_init=lambda *_: jnp.arange(4.0))
    params = module.init(jax.random.key(0), x)["params"]
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {
        "kernel": (kernel, jnp.float32),
        "bias": ((4,), jnp.float32),
    }
    y = module.apply({"params": params}, x)
    assert (y.shape, y.dtype) == (out, dtype)
    without = module.apply({"params": params | {"bias": jnp.zeros(4)}}, x)
    np.testing.assert_array_equal(y, without + jnp.arange(4, dtype=dtype))


def test_default_initial_kernels_preserve_variance():
    x = jnp.zeros((1, 8, 8, 32))
    for module in (conv.Conv(64, 5), conv.ConvTranspose(64, 5), conv.UpsampleConv(64, 5)):
        kernel = module.init(jax.random.key(0), x)["params"]["kernel"]
        np.testing.assert_allclose(kernel.std(), (25 * 32) ** -0.5, rtol=0.02)


def test_mistakes_name_the_field_and_the_value():
    x, k = jnp.zeros((1, 4, 4, 3)), jnp.zeros((5, 5, 3, 2))
    with pytest.raises(UsageError, match=r"padding: 'same'.*'SAME', 'VALID'"):
        conv.conv2d(x, k, padding="same")
    with pytest.raises(UsageError, match=r"kernel_size: \(5, 5\).*\(4, 4\)"):
        conv.conv2d(x, k, padding="VALID")
    with pytest.raises(UsageError, match=r"x: shape \(1, 4, 4, 2\)"):
        conv.conv2d(x[..., :2], k)
    with pytest.raises(UsageError, match="stride: 0"):
        conv.conv2d(x, k, stride=0)
    with pytest.raises(UsageError, match=r"kernel_size: \(4, 5\).*odd"):
        conv.upsample_conv2d(x, k[:4])
    with pytest.raises(UsageError, match=r"stride: 2 .*max_pool"):
        conv.Conv(4, 5, stride=2, max_pool=True).init(jax.random.key(0), x)
