"""Convolutions over images, [..., H, W, C], that are fast on a CPU too.

On an accelerator every function here is one plain `lax.conv_general_dilated`. On a CPU XLA's own convolutions are slow:
their weight gradient by itself, and nearly everything about them inside a `lax.scan`, where every update of a device
loop runs. There the same numbers come from *block convolution*: the image is cut into blocks, a block of output pixels
is one column of a matrix product, and the kernel is spread out (with zeros) into the matrix that maps the input blocks
under a block of outputs to that block. A few more multiplications buy far fewer copies, and a shape of product that
runs at full speed: with a 5x5 kernel and 2x2 outputs at once the copies fall from 25 to 9 numbers per pixel and
channel, and the products rise by 1.44. A stride is a larger block of input, upsampling a larger block of output, so
strided, transposed and upsampling convolutions are all the same few lines.

The CPU formulation is made of pads, slices and matrix products alone, so reverse mode, forward mode and `vmap` follow
(but for forward mode of `conv2d_transpose`, whose other lowering has a gradient of its own).
Both lowerings live in one traced function (`lax.platform_dependent`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wmjax.ops import contracts
from wmjax.types import Array, UsageError

Padding = str | int  # "SAME", "VALID", or so many zeros on every side
After = Callable[[Array, int], Array]  # what follows on each pixel, whose channels lie on an axis

_DIMS = ("NHWC", "HWIO", "NHWC")
_TILES = tuple(itertools.product((1, 2, 4), repeat=2))  # blocks of output pixels worth trying
_CHUNK_BYTES = 4 << 20  # of patches and products at once, so that they stay in cache
_MIN_CHUNK = 8  # images at once: the innermost axis, so one SIMD register

# ---------------------------------------------------------------------------------------------------------------------
# Functions


def conv2d(
    x: Array,
    kernel: Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    max_pool: bool = False,
    after: After | None = None,
) -> Array:
    """Correlates images with a kernel.

    Args:
      x: [..., H, W, C], any leading axes.
      kernel: [kh, kw, C, O].
      stride: pixels between outputs, both ways.
      padding: "SAME" (ceil(H / stride) outputs, the extra zero below and right), "VALID", or zeros on every side.
      max_pool: `max_pool2d` of the result, without ever storing the large image in between; stride 1 only. A bias may
        be added afterwards: max(y + b) = max(y) + b.
      after: `(y, axis) -> y`, what follows on each pixel, whose channels lie on `axis`: bias, norm, activation. On a
        CPU it costs much less here than afterwards, for the numbers are still in cache.

    Returns:
      [..., Ho, Wo, O], with `max_pool` [..., Ho // 2, Wo // 2, O], in the dtype of `x`. Products are accumulated in
      float32.

    Raises:
      UsageError: `padding` or `stride` is not one of these, channels differ, or the kernel is larger than the image.
    """
    _check(x, kernel, stride, 2)
    if max_pool and stride != 1:
        raise UsageError(f"stride: {stride} is not valid with max_pool; use 1")
    sides = list(zip(kernel.shape[:2], x.shape[-3:-1], strict=True))
    pads = [_pads(n, k, stride, padding) for k, n in sides]
    outs = [(lo + n + hi - k) // stride + 1 for (k, n), (lo, hi) in zip(sides, pads, strict=True)]
    if min(outs) < 1:
        raise UsageError(
            f"kernel_size: {tuple(kernel.shape[:2])} does not fit images of {tuple(x.shape[-3:-1])} pixels"
        )
    if kernel.shape[:2] == (1, 1) and stride == 1 and pads == [(0, 0), (0, 0)]:
        y = jnp.matmul(x, kernel[0, 0].astype(x.dtype))  # nothing but a matrix product
        return _then(after, max_pool2d(y) if max_pool else y)

    def fast(x, kernel):
        return _block_conv(x, kernel[:, :, :, None, None], stride, [lo for lo, _ in pads], outs, max_pool, after)

    def plain(x, kernel):
        y = lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=_DIMS)
        return _then(after, max_pool2d(y) if max_pool else y)

    return _either(fast, plain, x, kernel)


def conv2d_transpose(x: Array, kernel: Array, *, stride: int) -> Array:
    """Transposed convolution with a Keras kernel: y[stride * i + k] = sum of x[i] kernel[k], the adjoint of `conv2d`.

    The same numbers as `lax.conv_transpose(..., "VALID", transpose_kernel=True)`, so Keras kernels load unchanged.

    Args:
      x: [..., H, W, C], any leading axes.
      kernel: [kh, kw, O, C], the layout of Keras.
      stride: output pixels per input pixel, both ways.

    Returns:
      [..., stride * H + max(kh - stride, 0), stride * W + max(kw - stride, 0), O] in the dtype of `x`.

    Raises:
      UsageError: as `conv2d`.
    """
    _check(x, kernel, stride, 3)
    sides = kernel.shape[:2]
    outs = [stride * n + max(k - stride, 0) for k, n in zip(sides, x.shape[-3:-1], strict=True)]

    def fast(x, kernel):
        if x.shape[1:3] == (1, 1) and stride <= min(sides):  # blocks would be mostly zeros
            return jnp.einsum("nc,hwoc->nhwo", x[:, 0, 0], kernel, preferred_element_type=jnp.float32).astype(x.dtype)
        return _block_conv(x, _transposed_phases(kernel, stride), 1, [-(-k // stride) - 1 for k in sides], outs)

    return _either(fast, functools.partial(_plain_transpose, stride), x, kernel)


def upsample_conv2d(x: Array, kernel: Array, *, after: After | None = None) -> Array:
    """Nearest-neighbor upsampling by 2, then `conv2d` with "SAME" padding and stride 1.

    Each output sees only few distinct inputs: the 25 taps of a 5x5 kernel fall on 9 pixels, and are summed first.

    Args:
      x: [..., H, W, C], any leading axes.
      kernel: [kh, kw, C, O], odd sides.
      after: as for `conv2d`.

    Returns:
      [..., 2H, 2W, O] in the dtype of `x`.

    Raises:
      UsageError: a side of the kernel is even, or channels differ.
    """
    _check(x, kernel, 1, 2)
    if not all(k % 2 for k in kernel.shape[:2]):
        raise UsageError(f"kernel_size: {tuple(kernel.shape[:2])} is not valid for upsampling; use odd sides")
    lows = [-(-(k // 2) // 2) for k in kernel.shape[:2]]
    outs = [2 * n for n in x.shape[-3:-1]]

    def fast(x, kernel):
        rows, cols = (jnp.asarray(_upsampling_sums(k)) for k in kernel.shape[:2])
        phases = jnp.einsum("pak,qbl,klco->abcpqo", rows, cols, kernel.astype(jnp.float32), precision="highest")
        return _block_conv(x, phases, 1, lows, outs, after=after)

    def plain(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return _then(after, lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_DIMS))

    return _either(fast, plain, x, kernel)


def max_pool2d(x: Array) -> Array:
    """Maximum over 2x2 windows with stride 2; an odd last row or column is dropped.

    The gradient goes to the first maximum of a window in row-major order, as in XLA's select-and-scatter, but by
    comparisons: that operation is slow on a CPU. NaN wins.

    Args:
      x: [..., H, W, C].

    Returns:
      [..., H // 2, W // 2, C].
    """
    contracts.floating(None, None, None, x=x)
    *batch, h, w, c = x.shape
    x = x[..., : h // 2 * 2, : w // 2 * 2, :].reshape(*batch, h // 2, 2, w // 2, 2, c)
    return _max_of_windows(x, x.ndim - 4, x.ndim - 2)


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class Conv(nn.Module):
    """`conv2d` with parameters `kernel` [k, k, C, features] and `bias` [features], float32.

    `max_pool=True` adds 2x2 max-pooling (stride 1 only), which costs much less here than afterwards.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = "SAME"
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    dtype: Any = jnp.float32
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Array, after: After | None = None) -> Array:
        """Maps [..., H, W, C] to [..., Ho, Wo, features] in `dtype`. `after`: as for `conv2d`, behind the bias."""
        options = dict(stride=self.stride, padding=self.padding, max_pool=self.max_pool)
        return _apply(self, functools.partial(conv2d, **options), x, after)


class ConvTranspose(nn.Module):
    """`conv2d_transpose` with parameters `kernel` [k, k, features, C] (as Keras) and `bias` [features], float32.

    Note for initializers: the fan-in is the *last* axis of this kernel.
    """

    features: int
    kernel_size: int
    stride: int = 1
    kernel_init: Callable = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
    bias_init: Callable = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., H, W, C] to [..., Ho, Wo, features] in `dtype`."""
        x, kernel, bias = _parameters(self, x, transposed=True)
        return conv2d_transpose(x, kernel, stride=self.stride) + bias


class UpsampleConv(nn.Module):
    """`upsample_conv2d` with parameters `kernel` [k, k, C, features] and `bias` [features], float32."""

    features: int
    kernel_size: int
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, after: After | None = None) -> Array:
        """Maps [..., H, W, C] to [..., 2H, 2W, features] in `dtype`. `after`: as for `conv2d`, behind the bias."""
        return _apply(self, upsample_conv2d, x, after)


def _parameters(module: Any, x: Array, transposed: bool = False) -> tuple[Array, Array, Array]:
    """What a module convolves, its kernel and its bias, in its dtype."""
    contracts.floating(None, None, None, x=x)
    channels = (module.features, x.shape[-1]) if transposed else (x.shape[-1], module.features)
    kernel = module.param("kernel", module.kernel_init, (module.kernel_size, module.kernel_size, *channels))
    bias = module.param("bias", module.bias_init, (module.features,))
    return x.astype(module.dtype), kernel.astype(module.dtype), bias.astype(module.dtype)


def _apply(module: Any, function: Callable, x: Array, after: After | None) -> Array:
    """A convolution by the parameters of a module, plus its bias, and what comes after them."""
    x, kernel, bias = _parameters(module, x)

    def finish(y: Array, axis: int) -> Array:
        return _then(after, y + along(bias, axis, y.ndim), axis)

    return function(x, kernel, after=finish)


def along(x: Array, axis: int, ndim: int) -> Array:
    """A vector of channels with `ndim` axes, to be broadcast along one of them."""
    contracts.exactly(None, x=x)
    contracts.floating(x=x)
    return x.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def _then(after: After | None, y: Array, axis: int = -1) -> Array:
    return y if after is None else after(y, axis)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing between the lowerings


def _either(fast: Callable, plain: Callable, x: Array, kernel: Array) -> Array:
    """`fast` on a CPU and `plain` elsewhere, on images with one batch axis."""
    batch = x.shape[:-3]
    flat = x.reshape(-1, *x.shape[-3:])
    y = lax.platform_dependent(flat, kernel.astype(x.dtype), cpu=fast, default=plain)
    return y.reshape(*batch, *y.shape[1:])


def _pads(n: int, k: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after an axis of `n` pixels."""
    if padding == "VALID":
        return 0, 0
    if padding == "SAME":
        total = max((-(-n // stride) - 1) * stride + k - n, 0)
        return total // 2, total - total // 2
    if isinstance(padding, int) and padding >= 0:
        return padding, padding
    raise UsageError(f"padding: {padding!r} is not valid; use 'SAME', 'VALID' or a number of pixels >= 0")


def _check(x: Array, kernel: Array, stride: int, axis: int) -> None:
    """Demands images and a kernel with their channels on some axis."""
    contracts.exactly(None, None, None, None, kernel=kernel)
    contracts.floating(x=x, kernel=kernel)
    if stride < 1:
        raise UsageError(f"stride: {stride} is not valid; use an integer >= 1")
    if x.ndim < 3 or x.shape[-1] != kernel.shape[axis]:
        wanted = f"[..., H, W, {kernel.shape[axis]}]"
        raise UsageError(f"x: shape {x.shape} is not valid; use {wanted} for a kernel {kernel.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain_transpose(stride, x, kernel):
    return lax.conv_transpose(x, kernel, (stride, stride), "VALID", dimension_numbers=_DIMS, transpose_kernel=True)


def _plain_transpose_forward(stride, x, kernel):
    return _plain_transpose(stride, x, kernel), (x, kernel)


def _plain_transpose_backward(stride, saved, dy):
    """The kernel's gradient as that of the convolution which this is the adjoint of, with output and input swapped.

    Derived automatically it is a convolution of images with kernels of the size of an image, which on a GPU runs as it
    stands, many times slower than the weight gradient that it is.
    """
    x, kernel = saved
    adjoint = lambda y, kernel: lax.conv_general_dilated(y, kernel, (stride, stride), "VALID", dimension_numbers=_DIMS)
    return adjoint(dy, kernel), jax.vjp(functools.partial(adjoint, dy), kernel)[1](x)[0]


_plain_transpose.defvjp(_plain_transpose_forward, _plain_transpose_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Block convolution


def _block_conv(x, kernel, stride, lows, outs, pool=False, after=None):
    """Correlates [N, H, W, C] with [kh, kw, C, ph, pw, O], each position giving a patch of [ph, pw] output pixels.

    `stride` is between positions, `lows` are zeros above and to the left, `outs` rows and columns of output to keep.
    `pool`, 2x2 max-pooling, needs ph = pw = 1; `after` as for `conv2d`. Gives [N, *outs, O], or half as large, in the
    dtype of `x`.
    """
    (num, *side, c), (*_, ph, pw, o), dtype = x.shape, kernel.shape, x.dtype
    grid = [-(-n // p) for n, p in zip(outs, (ph, pw), strict=True)]
    tile = _best_tile(kernel.shape, stride, grid, pool)
    spans = _spans(tile, kernel.shape[:2], stride)
    tiles = [-(-g // t) for g, t in zip(grid, tile, strict=True)]  # blocks of output, and below blocks of input
    blocks = [(n + s - 1, t * stride) for n, s, t in zip(tiles, spans, tile, strict=True)]
    matrix = _spread(kernel.astype(jnp.float32), tile, spans, stride)  # [Q, K]
    chunk = _chunk(num, (matrix.shape[0] + matrix.shape[1]) * tiles[0] * tiles[1])
    count = -(-num // chunk)
    chunk = -(-num // count)  # all about equally full
    # Zeros on both sides; fewer than none where the last pixels of the image are not used.
    margins = [(lo, n * size - side - lo, 0) for lo, (n, size), side in zip(lows, blocks, side, strict=True)]

    def one_chunk(matrix, x):
        taps = itertools.product(range(spans[0]), range(spans[1]))
        patches = jnp.stack([x[:, :, :, i : i + tiles[0], j : j + tiles[1]] for i, j in taps])
        y = matrix @ patches.reshape(matrix.shape[1], -1)
        if pool:
            y = _max_of_windows(y.reshape(tile[0] // 2, 2, tile[1] // 2, 2, o, *tiles, chunk), 1, 3)
        else:
            y = y.reshape(tile[0] * ph, tile[1] * pw, o, *tiles, chunk)
        return _then(after, checkpoint_name(y.astype(dtype), "product"), 2)

    # Patches are many times larger than the image: make them again for the gradient rather than keep them. Which pixel
    # won is kept, and the product where what follows needs it, so that the gradient needs no second forward product.
    policy = jax.checkpoint_policies.save_only_these_names("winner", "product")
    one_chunk = jax.checkpoint(one_chunk, policy=policy, prevent_cse=False)
    # Images last: every copy in a chunk is long.
    (bh, sh), (bw, sw) = blocks
    x_blocks = lax.pad(x.astype(jnp.float32), jnp.float32(0), ((0, count * chunk - num, 0), *margins, (0, 0, 0)))
    x_blocks = x_blocks.reshape(count, chunk, bh, sh, bw, sw, c).transpose(0, 3, 5, 6, 2, 4, 1)
    if count == 1:
        y = one_chunk(matrix, x_blocks[0])[None]
    else:
        y = lax.scan(lambda _, x: (None, one_chunk(matrix, x)), None, x_blocks)[1]
    _, rows, cols, *_ = y.shape  # in a block of output
    y = y.transpose(0, 6, 4, 1, 5, 2, 3).reshape(count * chunk, rows * tiles[0], cols * tiles[1], o)
    height, width = (n // (2 if pool else 1) for n in outs)
    return y[:num, :height, :width]


def _spans(tile, sides, stride):
    """Input blocks, each way, under one block of output."""
    return [-(-((t - 1) * stride + k) // (t * stride)) for t, k in zip(tile, sides, strict=True)]


def _best_tile(shape, stride, grid, pool):
    """The block of output positions with the least estimated time: multiplications against copies.

    Larger blocks copy less and multiply more zeros. A number copied into a patch is taken to cost as much as 16
    multiply-adds: of 8, 16, 25, 36, 52 and 90 that made DreamerV3's encoder and decoder fastest inside a scan.
    """

    def cost(tile):
        spans = _spans(tile, shape[:2], stride)
        window = np.prod([s * t * stride for s, t in zip(spans, tile, strict=True)])
        count = np.prod([-(-g // t) for g, t in zip(grid, tile, strict=True)])
        return count * window * (np.prod(tile) * np.prod(shape[3:]) + 16)

    return min((t for t in _TILES if not pool or (t[0] > 1 and t[1] > 1)), key=cost)


def _chunk(num, floats):
    """At most how many images at once: a power of two (or all there are), where one takes `floats` numbers."""
    fits = max(_CHUNK_BYTES // (4 * floats), 1)
    return min(num, max(_MIN_CHUNK, 1 << (fits.bit_length() - 1)))


def _spread(kernel, tile, spans, stride):
    """The matrix [Q, K] from the input blocks under a block of outputs to those outputs.

    Q runs over (tile row, ph, tile column, pw, O), K over (span row, span column, block row, column, C).
    """

    def shifted(kernel, axis, count, span):
        room = span * count * stride - kernel.shape[axis]
        pads = [(i * stride, room - i * stride) for i in range(count)]
        return jnp.stack([jnp.pad(kernel, [p if d == axis else (0, 0) for d in range(kernel.ndim)]) for p in pads])

    kernel = shifted(kernel, 0, tile[0], spans[0])  # [th, rows, kw, C, ph, pw, O]
    kernel = shifted(kernel, 2, tile[1], spans[1])  # [tw, th, rows, columns, C, ph, pw, O]
    tw, th, _, _, c, ph, pw, o = kernel.shape
    kernel = kernel.reshape(tw, th, spans[0], th * stride, spans[1], tw * stride, c, ph, pw, o)
    return kernel.transpose(1, 7, 0, 8, 9, 2, 4, 3, 5, 6).reshape(th * ph * tw * pw * o, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_of_windows(x, row_axis, col_axis):
    """The maximum over two axes of length 2, which it removes. NaN wins.

    The derivative is that of the first of equals in row-major order, as one comparison per pixel: the gradient of the
    slices below would be a sum of four padded arrays.
    """
    return _max_and_winner(x, row_axis, col_axis)[0]


@_max_of_windows.defjvp
def _max_of_windows_jvp(row_axis, col_axis, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    y, winner = _max_and_winner(x, row_axis, col_axis)
    place = 2 * lax.broadcasted_iota(jnp.uint8, x.shape, row_axis) + lax.broadcasted_iota(jnp.uint8, x.shape, col_axis)
    won = place == jnp.expand_dims(checkpoint_name(winner, "winner"), (row_axis, col_axis))
    return y, jnp.sum(jnp.where(won, x_dot, 0), (row_axis, col_axis))


def _max_and_winner(x, row_axis, col_axis):
    def pick(row, col):
        at = [slice(None)] * x.ndim
        at[row_axis], at[col_axis] = row, col
        return x[tuple(at)]

    y, winner = pick(0, 0), jnp.uint8(0)
    for place in (1, 2, 3):
        other = pick(place // 2, place % 2)
        larger = (other > y) | (other != other)
        y, winner = jnp.where(larger, other, y), jnp.where(larger, jnp.uint8(place), winner)
    return y, winner


def _transposed_phases(kernel, stride):
    """From a Keras kernel [kh, kw, O, C] to [positions, positions, C, stride, stride, O] for `_block_conv`.

    Output stride * q + p takes kernel[p + stride * d] from input q - d.
    """
    kh, kw, o, c = kernel.shape
    dh, dw = -(-kh // stride), -(-kw // stride)
    kernel = jnp.pad(kernel, ((0, dh * stride - kh), (0, dw * stride - kw), (0, 0), (0, 0)))
    return kernel.reshape(dh, stride, dw, stride, o, c)[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)


def _upsampling_sums(k):
    """Which taps of an odd kernel fall on which input pixel: 0/1 of shape [2 phases, pixels, k]."""
    pixel = (np.arange(2)[:, None] + np.arange(k) - k // 2) // 2  # of each phase and tap, relative to the position
    return (pixel[:, None] == np.arange(pixel.min(), pixel.max() + 1)[:, None]).astype(np.float32)
