"""Encoder and decoder for observations of several entries: images on convolutions, the rest on an MLP.

Source: DreamerV3 (2024 code), encoder and decoder; Hafner et al. 2023, appendix on networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.conv import After, Conv, UpsampleConv, along
from wmjax.nets.heads import vector_heads
from wmjax.nets.mlp import ACTIVATIONS, MLP, BlockLinear, Linear, Norm, normalize, normed, truncated_normal_in
from wmjax.nets.spaces import Spaces, is_image, output_shape, read_obs, split_images, split_spaces
from wmjax.ops import contracts
from wmjax.ops.symlog import symexp, symlog
from wmjax.types import Array, Discrete, Space

MULTIPLIERS = (2, 3, 4, 4)  # channels of a stage / depth
SMALLEST, LARGEST = 4, 16  # side of the last feature map


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


def mean(output: Array, space: Space, squash: bool) -> Array:
    """What to expect of an entry: images float32 in [0, 255], vectors out of symlog, the likeliest Discrete choice."""
    contracts.floating(*output_shape(space), output=output)
    if is_image(space):
        return output * 255
    if isinstance(space, Discrete):
        return jnp.argmax(output, -1)
    return symexp(output) if squash else output


def _normed_after(features: int, norm: str, activation: str, name: str) -> After:
    """`normed` of channels that lie on some axis, for a convolution to be followed by, inside a module."""
    weights = Norm(norm, name=name).weights(features)

    def after(y: Array, axis: int) -> Array:
        return ACTIVATIONS[activation](normalize(norm, y, *(along(w, axis, y.ndim) for w in weights), axis=axis))

    return after


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
    squash: bool = True  # vectors, by symlog

    @nn.compact
    def __call__(self, obs: dict[str, Array]) -> Array:
        image, vector = read_obs(self.spaces, obs, self.dtype, symlog if self.squash else lambda x: x)
        parts = []
        if vector is not None:
            parts.append(MLP(self.units, self.norm, self.activation, self.dtype, name="mlp")(vector))
        if image is not None:
            x = getattr(self, f"_{self.stem}")(
                image.reshape(-1, *image.shape[-3:])
            )  # one batch axis, as in the decoder
            parts.append(x.reshape(*image.shape[:-3], -1))
        return jnp.concatenate(parts, -1)

    def _layer(self, x: Array, index: int, features: int, kernel: int, **options) -> Array:
        init = truncated_normal_in(kernel * kernel * x.shape[-1])
        after = _normed_after(features, self.norm, self.activation, f"norm{index}")
        return Conv(features, kernel, kernel_init=init, dtype=self.dtype, name=f"conv{index}", **options)(x, after)

    def _pool(self, image: Array) -> Array:
        x = image
        for index, channels in enumerate(stage_channels(image.shape[-3], self.depth)):
            x = self._layer(x, index, channels, 5, max_pool=True)
        return x

    def _patch(self, image: Array) -> Array:
        patch = 2 ** (image_stages(image.shape[-3]) - 1)  # leaves a grid of twice the final side
        channels = 2 * MULTIPLIERS[-1] * self.depth  # two layers can be wider than four
        return self._layer(self._layer(image, 0, channels, patch, stride=patch), 1, channels, 4, stride=2)

    def _flat(self, image: Array) -> Array:
        x = image.reshape(*image.shape[:-3], -1)
        return MLP(self.units, self.norm, self.activation, self.dtype, name="flat")(x)


class Decoder(nn.Module):
    """Latents to predictions of each entry, as their networks give them.

    Images: float32 means in [0, 1] `[..., H, W, C]`. Vectors: float32 means `[..., D]`, in symlog space
    where they are seen so.
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
        contracts.shaped(None, deter=deter)
        contracts.shaped(None, None, stoch=stoch)
        contracts.leading(deter.ndim - 1, deter=deter, stoch=stoch)
        contracts.floating(deter=deter, stoch=stoch)
        images, vectors = split_spaces(self.spaces)
        stoch = stoch.reshape(*stoch.shape[:-2], -1)
        outputs = {}
        if vectors:
            x = jnp.concatenate([stoch, deter], -1)
            outputs |= vector_heads(vectors, x, self.units, self.norm, self.activation, self.dtype)
        if images:
            make = self._flat if self.stem == "flat" else self._image
            shape = (*images[0][1].shape[:2], sum(space.shape[-1] for _, space in images))
            lead, rows = deter.shape[:-1], lambda x: x.reshape(-1, x.shape[-1])
            x = jax.nn.sigmoid(make(rows(deter), rows(stoch), shape).astype(jnp.float32))
            outputs |= split_images(images, x.reshape(*lead, *shape))
        return outputs

    def _image(self, deter: Array, stoch: Array, shape: tuple[int, int, int]) -> Array:
        channels = stage_channels(shape[0], self.depth)
        height, width = shape[0] >> len(channels), shape[1] >> len(channels)
        top, blocks, rows = channels[-1], self.blocks, deter.shape[0]
        features = height * width * top
        # Each block of `deter` fills its own channels, over the whole map: (block, h, w, c) -> (h, w, block * c).
        x0 = BlockLinear(blocks, features // blocks, self.dtype, name="deter_in")(deter.reshape(rows, blocks, -1))
        x0 = x0.reshape(rows, blocks, height, width, top // blocks)
        x0 = x0.transpose(0, 2, 3, 1, 4).reshape(rows, height, width, top)
        x1 = Linear(2 * self.units[0], dtype=self.dtype, name="stoch_in")(stoch)
        x1 = normed(x1, self.norm, self.activation, "stoch_norm")
        x1 = Linear(features, dtype=self.dtype, name="stoch_out")(x1).reshape(x0.shape)
        x = normed(x0 + x1, self.norm, self.activation, "norm_in")
        for index, features in reversed(list(enumerate(channels[:-1]))):
            after = _normed_after(features, self.norm, self.activation, f"norm{index}")
            x = self._upsample(x, f"conv{index}", features, after)
        return self._upsample(x, "image_out", shape[-1])

    def _upsample(self, x: Array, name: str, features: int, after: After | None = None) -> Array:
        init = truncated_normal_in(25 * x.shape[-1])
        return UpsampleConv(features, 5, kernel_init=init, dtype=self.dtype, name=name)(x, after)

    def _flat(self, deter: Array, stoch: Array, shape: tuple[int, int, int]) -> Array:
        x = jnp.concatenate([stoch, deter], -1)
        x = MLP(self.units[::-1], self.norm, self.activation, self.dtype, name="flat")(x)
        return Linear(math.prod(shape), dtype=self.dtype, name="image_out")(x)
