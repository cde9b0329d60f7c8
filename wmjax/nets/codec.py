"""Encoder and decoder for observations of several entries: images on convolutions, the rest on an MLP.

Source: DreamerV3 (2024 code), encoder and decoder; Hafner et al. 2023, appendix on networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.conv import Conv, UpsampleConv
from wmjax.nets.mlp import ACTIVATIONS, MLP, BlockLinear, Linear, Norm, truncated_normal_in
from wmjax.ops import contracts
from wmjax.ops.symlog import symlog
from wmjax.types import Array, Box, Discrete, Space

Spaces = tuple[tuple[str, Space], ...]  # sorted by name: hashable, and the order of all concatenations

MULTIPLIERS = (2, 3, 4, 4)  # channels of a stage / depth
SMALLEST, LARGEST = 4, 16  # side of the last feature map


def split_spaces(spaces: Spaces) -> tuple[Spaces, Spaces]:
    """Image entries (uint8 of rank 3) and the others."""
    images = tuple((name, space) for name, space in spaces if is_image(space))
    return images, tuple((name, space) for name, space in spaces if not is_image(space))


def is_image(space: Space) -> bool:
    """Whether the entry is an image: uint8, `[height, width, channels]`."""
    return isinstance(space, Box) and space.dtype == "uint8" and len(space.shape) == 3


def size_of(space: Space) -> int:
    """Length of a non-image entry as the networks see it."""
    if isinstance(space, Discrete):
        return space.n
    return space.shape[0] if space.shape else 1


def image_stages(side: int) -> int | None:
    """How many times a side is halved before the features are flattened, or None where no number fits.

    As often as it stays even and at least 4: 64 and 96 are halved four times as in the paper, 32 three times.
    """
    stages = 0
    while side % 2 == 0 and side // 2 >= SMALLEST:
        side, stages = side // 2, stages + 1
    return stages if stages and side <= LARGEST else None


def stage_channels(side: int, depth: int) -> tuple[int, ...]:
    """Channels of each stage of an image of `side` pixels; the last is always the widest, 4 * depth."""
    before = image_stages(side) - 1
    multipliers = (MULTIPLIERS + MULTIPLIERS[-1:] * before)[:before] + MULTIPLIERS[-1:]
    return tuple(depth * multiplier for multiplier in multipliers)


def check_obs(spaces: Spaces, obs: dict[str, Array]) -> None:
    """Demands that every entry ends with the shape of its space, and that all begin with the same axes."""
    for name, space in spaces:
        contracts.shaped(*space.shape, **{name: obs[name]})
    lead = min((obs[name].ndim - len(space.shape) for name, space in spaces), default=0)
    contracts.leading(lead, **{name: obs[name] for name, _ in spaces})


def vector_input(spaces: Spaces, obs: dict[str, Array], dtype: str, squash: bool = True) -> Array:
    """Concatenates the non-image entries: one-hot where discrete, symlog otherwise."""
    parts = []
    for name, space in spaces:
        if isinstance(space, Discrete):
            parts.append(jax.nn.one_hot(obs[name], space.n, dtype=dtype))
        else:
            x = obs[name].astype(jnp.float32)
            x = x if space.shape else x[..., None]
            parts.append((symlog(x) if squash else x).astype(dtype))
    return jnp.concatenate(parts, -1)


class Encoder(nn.Module):
    """Observation entries `[..., *shape]` to one embedding `[..., E]`, the vector part before the image part.

    Attributes:
      spaces: the entries, sorted by name.
      depth: channels of stage i are depth * (2, 3, 4, 4)[i].
      units: layer widths of the MLP.
      stem: `pool` (5x5 convolutions, each with a 2x2 max-pool, as published), `patch` (a patch embedding to twice the
        final side, then one 4x4 convolution of stride 2: several times cheaper), or `flat` (an MLP on the pixels).
    """

    spaces: Spaces
    depth: int
    units: Sequence[int]
    stem: str = "pool"
    norm: str = "rms"
    activation: str = "silu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, obs: dict[str, Array]) -> Array:
        check_obs(self.spaces, obs)
        images, vectors = split_spaces(self.spaces)
        parts = []
        if vectors:
            x = vector_input(vectors, obs, self.dtype)
            parts.append(MLP(self.units, self.norm, self.activation, self.dtype, name="mlp")(x))
        if images:
            x = jnp.concatenate([obs[name] for name, _ in images], -1)
            lead = x.shape[:-3]
            x = x.reshape(-1, *x.shape[-3:])
            x = getattr(self, f"_{self.stem}")(x)
            parts.append(x.reshape(*lead, -1))
        return jnp.concatenate(parts, -1)

    def _pixels(self, image: Array) -> Array:
        return image.astype(self.dtype) / 255 - 0.5

    def _layer(self, x: Array, name: str, features: int, kernel: int, stride: int = 1, max_pool: bool = False) -> Array:
        init = truncated_normal_in(kernel * kernel * x.shape[-1])
        return Conv(features, kernel, stride, kernel_init=init, dtype=self.dtype, max_pool=max_pool, name=name)(x)

    def _finish(self, x: Array, name: str) -> Array:
        return ACTIVATIONS[self.activation](Norm(self.norm, name=name)(x))

    def _pool(self, image: Array) -> Array:
        x = self._pixels(image)
        for index, channels in enumerate(stage_channels(image.shape[-3], self.depth)):
            x = self._finish(self._layer(x, f"conv{index}", channels, 5, max_pool=True), f"norm{index}")
        return x

    def _patch(self, image: Array) -> Array:
        patch = 2 ** (image_stages(image.shape[-3]) - 1)  # leaves a grid of twice the final side
        channels = 2 * MULTIPLIERS[-1] * self.depth  # two layers can be wider than four
        x = self._finish(self._layer(self._pixels(image), "conv0", channels, patch, patch), "norm0")
        return self._finish(self._layer(x, "conv1", channels, 4, 2), "norm1")

    def _flat(self, image: Array) -> Array:
        x = self._pixels(image).reshape(image.shape[0], -1)
        return MLP(self.units, self.norm, self.activation, self.dtype, name="flat")(x)


class Decoder(nn.Module):
    """Latents to predictions of each entry, as their networks give them.

    Images: float32 means in [0, 1] `[..., H, W, C]`. Vectors: float32 means in symlog space `[..., D]`.
    Discrete entries: float32 logits `[..., n]`.

    Attributes:
      spaces, depth, units, stem: as in `Encoder`; `pool` and `patch` share one convolutional decoder.
      blocks: block count of the layer that spreads `deter` over the smallest feature map.
    """

    spaces: Spaces
    depth: int
    units: Sequence[int]
    blocks: int = 8
    stem: str = "pool"
    norm: str = "rms"
    activation: str = "silu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, stoch: Array) -> dict[str, Array]:
        images, vectors = split_spaces(self.spaces)
        contracts.shaped(None, deter=deter)
        contracts.shaped(None, None, stoch=stoch)
        contracts.leading(deter.ndim - 1, deter=deter, stoch=stoch)
        contracts.floating(deter=deter, stoch=stoch)
        stoch = stoch.reshape(*stoch.shape[:-2], -1)
        outputs = {}
        if vectors:
            x = jnp.concatenate([stoch, deter], -1)
            x = MLP(self.units, self.norm, self.activation, self.dtype, name="mlp")(x)
            for name, space in vectors:
                y = Linear(size_of(space), dtype=self.dtype, name=f"{name}_out")(x).astype(jnp.float32)
                outputs[name] = y[..., 0] if isinstance(space, Box) and not space.shape else y
        if images:
            channels = [space.shape[-1] for _, space in images]
            height, width = images[0][1].shape[:2]
            lead = deter.shape[:-1]
            deter, stoch = deter.reshape(-1, deter.shape[-1]), stoch.reshape(-1, stoch.shape[-1])
            make = self._flat if self.stem == "flat" else self._image
            x = make(deter, stoch, (height, width, sum(channels)))
            x = jax.nn.sigmoid(x.astype(jnp.float32)).reshape(*lead, height, width, -1)
            start = 0
            for (name, _), count in zip(images, channels, strict=True):
                outputs[name] = x[..., start : start + count]
                start += count
        return outputs

    def _finish(self, x: Array, name: str) -> Array:
        return ACTIVATIONS[self.activation](Norm(self.norm, name=name)(x))

    def _image(self, deter: Array, stoch: Array, shape: tuple[int, int, int]) -> Array:
        channels = stage_channels(shape[0], self.depth)
        height, width = shape[0] >> len(channels), shape[1] >> len(channels)
        top = channels[-1]
        blocks, rows = self.blocks, deter.shape[0]
        features = height * width * top
        # Each block of `deter` fills its own channels, over the whole map: (block, h, w, c) -> (h, w, block * c).
        x0 = BlockLinear(blocks, features // blocks, self.dtype, name="deter_in")(deter.reshape(rows, blocks, -1))
        x0 = x0.reshape(rows, blocks, height, width, top // blocks)
        x0 = x0.transpose(0, 2, 3, 1, 4).reshape(rows, height, width, top)
        x1 = Linear(2 * self.units[0], dtype=self.dtype, name="stoch_in")(stoch)
        x1 = self._finish(x1, "stoch_norm")
        x1 = Linear(features, dtype=self.dtype, name="stoch_out")(x1).reshape(x0.shape)
        x = self._finish(x0 + x1, "norm_in")
        for index, features in reversed(list(enumerate(channels[:-1]))):
            x = self._finish(self._upsample(x, f"conv{index}", features), f"norm{index}")
        return self._upsample(x, "image_out", shape[-1])

    def _upsample(self, x: Array, name: str, features: int) -> Array:
        init = truncated_normal_in(25 * x.shape[-1])
        return UpsampleConv(features, 5, kernel_init=init, dtype=self.dtype, name=name)(x)

    def _flat(self, deter: Array, stoch: Array, shape: tuple[int, int, int]) -> Array:
        x = jnp.concatenate([stoch, deter], -1)
        x = MLP(self.units[::-1], self.norm, self.activation, self.dtype, name="flat")(x)
        return Linear(shape[0] * shape[1] * shape[2], dtype=self.dtype, name="image_out")(x)
