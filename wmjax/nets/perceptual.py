"""Distances between images as networks see them, for tokenizers; without downloads.

`lpips` needs weights, which the user converts once with `tools/lpips_to_npz.py`; `random_features` has the same
arithmetic on a small fixed random stack; `multiscale` has no network.

Source: Zhang et al. 2018 (LPIPS), equation 1; VGG16 of Simonyan & Zisserman 2015, configuration D.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.nets import conv
from wmjax.nets.transformer import dropout
from wmjax.ops import contracts, noise
from wmjax.types import Array, UsageError

CONVERTER = "tools/lpips_to_npz.py"
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RANDOM = ((16,), (32,), (64,))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Stack(NamedTuple):
    """A fixed network: its weights are constants, not parameters."""

    stages: tuple[tuple[tuple[np.ndarray, np.ndarray], ...], ...]  # (kernel [3, 3, C, O], bias [O]) of each layer
    weights: tuple[np.ndarray, ...]  # [O] of each stage, at least 0


def random_stack(seed: int = 0) -> Stack:
    """Three stages of one orthogonal 3x3 convolution each; all channels count alike."""
    rng = np.random.default_rng(seed)
    stages, inputs = [], 3
    for (features,) in RANDOM:
        rows, cols = 9 * inputs, features
        q, _ = np.linalg.qr(rng.normal(size=(max(rows, cols), min(rows, cols))))
        kernel = (q if rows >= cols else q.T)[:rows, :cols].reshape(3, 3, inputs, features) * 2**0.5
        stages.append(((kernel.astype(np.float32), np.zeros(features, np.float32)),))
        inputs = features
    return Stack(tuple(stages), tuple(np.full(f, 1 / f, np.float32) for (f,) in RANDOM))


def load_lpips(path: str | None) -> Stack:
    """Reads the weights that the converter wrote.

    Raises:
      UsageError: there is no such file, or it does not hold these weights; names the converter.
    """
    if path is None or not Path(path).is_file():
        raise UsageError(
            f"lpips_weights: {path!r} is not a file; perceptual='lpips' needs the .npz that {CONVERTER} writes from "
            "VGG16 and LPIPS weights (or use perceptual='random_features', 'multiscale' or 'none')"
        )
    with np.load(path) as file:
        return stack_of({name: file[name] for name in file.files}, path)


def stack_of(arrays: Mapping[str, np.ndarray], path: str = "") -> Stack:
    """VGG16 from `conv0/kernel`, `conv0/bias`, ... `conv12/bias` and `linear0` to `linear4`; see `load_lpips`."""
    stages, inputs, number = [], 3, 0
    for stage in VGG16:
        layers = []
        for features in stage:
            kernel, bias = (arrays.get(f"conv{number}/{part}") for part in ("kernel", "bias"))
            if kernel is None or bias is None or kernel.shape != (3, 3, inputs, features) or bias.shape != (features,):
                raise UsageError(
                    f"lpips_weights: {path!r} has no conv{number} of shape (3, 3, {inputs}, {features}); "
                    f"write it with {CONVERTER}"
                )
            layers.append((kernel, bias))
            inputs, number = features, number + 1
        stages.append(tuple(layers))
    weights = tuple(arrays.get(f"linear{i}") for i in range(len(VGG16)))
    if any(w is None or w.shape != (s[-1],) or (w < 0).any() for w, s in zip(weights, VGG16, strict=True)):
        raise UsageError(f"lpips_weights: {path!r} lacks linear0 to linear4, all at least 0; write it with {CONVERTER}")
    return Stack(tuple(stages), weights)


@functools.cache
def _stack(lpips_weights: str | None) -> Stack:
    return random_stack() if lpips_weights is None else load_lpips(lpips_weights)


def _check(x: Array, y: Array, channels: int | None = None) -> None:
    contracts.exactly(None, None, None, channels, x=x)
    contracts.alike(x=x, y=y)


def loss(
    kind: str, x: Array, y: Array, lpips_weights: str | None = None, keys: Array | None = None, rate: float = 0.0
) -> Array:
    """By its name: 0 ("none"), `multiscale`, or `distance` ("random_features", "lpips"); arguments and result as there.

    `lpips_weights` is the file of those of "lpips". Raises `UsageError` for another name.
    """
    _check(x, y)
    if kind == "none":
        return jnp.zeros(x.shape[0])
    if kind == "multiscale":
        return multiscale(x, y)
    if kind not in ("random_features", "lpips"):
        raise UsageError(f"perceptual: {kind!r} is not valid; none, multiscale, random_features and lpips are")
    return distance(_stack(lpips_weights if kind == "lpips" else None), x, y, keys, rate)


def distance(stack: Stack, x: Array, y: Array, keys: Array | None = None, rate: float = 0.0) -> Array:
    """How differently a network sees two images.

        d = Σ_stages mean_pixels Σ_channels w (f̂(x) - f̂(y))²,   f̂ = f / (‖f‖ + 1e-10)

    Args:
      x, y: `[B, H, W, 3]` in [-1, 1].
      keys: `[B]`, for dropout of the squared differences with probability `rate`; None for none. The official IRIS
        trains with 0.5, by accident.

    Returns:
      float32 `[B]`, at least 0.
    """
    _check(x, y, 3)
    total = 0.0
    x, y = ((image - jnp.array(SHIFT)) / jnp.array(SCALE) for image in (x, y))
    both = jnp.concatenate([x, y])
    for index, (layers, weight) in enumerate(zip(*stack, strict=True)):
        both = conv.max_pool2d(both) if index else both
        for kernel, bias in layers:
            both = jax.nn.relu(conv.conv2d(both, jnp.asarray(kernel)) + bias)
        # The norm's gradient at 0 is not a number.
        norm = jnp.sqrt(jnp.sum(both * both, -1, keepdims=True) + 1e-20)
        unit_x, unit_y = jnp.split(both / (norm + 1e-10), 2)
        squared = dropout(None if keys is None else noise.fold_in(keys, index), (unit_x - unit_y) ** 2, rate)
        total = total + jnp.sum(squared * weight, -1).mean((1, 2))
    return total


def multiscale(x: Array, y: Array) -> Array:
    """Mean absolute differences of three levels of a Laplacian pyramid and of Sobel gradients; `[B]`.

    Args:
      x, y: `[B, H, W, C]`; H and W can be halved twice.
    """
    _check(x, y)
    error = x - y  # all that follows is linear in the image
    total = jnp.abs(_sobel(error)).mean((1, 2, 3, 4))
    for _ in range(2):
        height, width = error.shape[1:3]
        if height % 2 or width % 2:
            break
        small = error.reshape(-1, height // 2, 2, width // 2, 2, error.shape[-1]).mean((2, 4))
        total = total + jnp.abs(error - small.repeat(2, 1).repeat(2, 2)).mean((1, 2, 3))
        error = small
    return total + jnp.abs(error).mean((1, 2, 3))


def _sobel(x: Array) -> Array:
    """Gradients down and to the right, inside the image: `[B, 2, H - 2, W - 2, C]`."""
    across = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    along = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return jnp.stack([across[:, 2:] - across[:, :-2], along[:, :, 2:] - along[:, :, :-2]], 1) / 8
