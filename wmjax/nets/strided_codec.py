"""Encoder and decoder on strided convolutions without padding, as DreamerV1 and DreamerV2 have them.

A 64x64 image shrinks 64, 31, 14, 6, 2 and grows 1, 5, 13, 30, 64. Other sizes take fewer stages, or start the decoder
from a larger map: with n stages, sides of 2^(n + 2) + 2^n k are reached exactly.

Source: DreamerV1 and DreamerV2, code of the networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import optax

from wmjax.nets.conv import Conv, ConvTranspose
from wmjax.nets.heads import vector_heads
from wmjax.nets.mlp import MLP, Linear, normed
from wmjax.nets.spaces import Spaces, is_image, output_shape, read_obs, split_images, split_spaces
from wmjax.ops import contracts
from wmjax.ops.distributions import UnitNormal
from wmjax.types import Array, Discrete, Space

MULTIPLIERS = (1, 2, 4, 8)  # channels of an encoder stage / depth
KERNELS = (5, 5, 6, 6)  # of the decoder's stages
_GLOROT = nn.initializers.glorot_uniform()


def stages(side: int) -> int:
    """How many convolutions an image of so many pixels takes: 4 from 64 pixels on as published, 3 from 32, 2 below."""
    return 4 if side >= 64 else 3 if side >= 32 else 2


def fits(side: int) -> bool:
    """Whether the decoder can draw images of this side: 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, ..."""
    return side >= 16 and side % 2 ** stages(side) == 0


def start_side(side: int) -> int:
    """Side of the map that the decoder starts from: 1 for 16, 32 and 64 pixels, 3 for 96."""
    return side // 2 ** stages(side) - 3


class StridedEncoder(nn.Module):
    """Observation entries `[..., *shape]` to one embedding `[..., E]`, the image part before the vector part.

    Attributes:
      spaces: the entries, sorted by name.
      depth: channels of the stages are depth * (1, 2, 4, 8); where there are fewer stages, the first are left out.
      units: layer widths of the MLP on vectors and one-hot Discrete entries.
      padding: zeros around the image of each 4x4 convolution of stride 2: "VALID", "SAME" or a number of pixels.
      embed: size of a last linear layer on the image features, or None for no layer.
      conv_activation: after the convolutions; `activation` is that of the MLP.
    """

    spaces: Spaces
    depth: int
    units: Sequence[int]
    padding: str | int = "VALID"
    embed: int | None = None
    norm: str = "none"
    activation: str = "elu"
    conv_activation: str = "elu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, obs: dict[str, Array]) -> Array:
        image, vector = read_obs(self.spaces, obs, self.dtype)
        parts = []
        if image is not None:
            x = self._image(image.reshape(-1, *image.shape[-3:]))  # one batch axis: sums are those of a batch of rows
            parts.append(x.reshape(*image.shape[:-3], -1))
        if vector is not None:
            parts.append(MLP(self.units, self.norm, self.activation, self.dtype, "glorot", name="mlp")(vector))
        return jnp.concatenate(parts, -1)

    def _image(self, x: Array) -> Array:
        for index, multiplier in enumerate(MULTIPLIERS[-stages(x.shape[-3]) :]):
            width, name = self.depth * multiplier, f"conv{index}"
            x = Conv(width, 4, 2, self.padding, kernel_init=_GLOROT, dtype=self.dtype, name=name)(x)
            x = normed(x, self.norm, self.conv_activation, f"norm{index}")
        x = x.reshape(x.shape[0], -1)
        return x if self.embed is None else Linear(self.embed, dtype=self.dtype, init_kind="glorot", name="embed")(x)


class StridedDecoder(nn.Module):
    """Features `[..., F]` to predictions of each entry, as their networks give them, float32.

    Images: means in [-0.5, 0.5], not bounded, `[..., H, W, C]`. Vectors: means `[..., D]`. Discrete entries: logits
    `[..., n]`. Attributes as in `StridedEncoder`.
    """

    spaces: Spaces
    depth: int
    units: Sequence[int]
    norm: str = "none"
    activation: str = "elu"
    conv_activation: str = "elu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, feat: Array) -> dict[str, Array]:
        contracts.floating(None, feat=feat)
        images, vectors = split_spaces(self.spaces)
        outputs = {}
        if images:
            rows = feat.reshape(-1, feat.shape[-1])
            x = self._image(rows, images[0][1].shape[0], sum(space.shape[-1] for _, space in images))
            outputs |= split_images(images, x.astype(jnp.float32).reshape(*feat.shape[:-1], *x.shape[1:]))
        if vectors:
            outputs |= vector_heads(vectors, feat, self.units, self.norm, self.activation, self.dtype, "glorot")
        return outputs

    def _image(self, feat: Array, side: int, channels: int) -> Array:
        count, start = stages(side), start_side(side)
        widths = [self.depth * multiplier for multiplier in MULTIPLIERS[-count:-1][::-1]] + [channels]
        x = Linear(start * start * 32 * self.depth, dtype=self.dtype, init_kind="glorot", name="dense")(feat)
        x = x.reshape(x.shape[0], start, start, 32 * self.depth)
        for index, (width, kernel) in enumerate(zip(widths, KERNELS[-count:], strict=True)):
            x = ConvTranspose(width, kernel, 2, kernel_init=_GLOROT, dtype=self.dtype, name=f"conv{index}")(x)
            if index + 1 < count:
                x = normed(x, self.norm, self.conv_activation, f"norm{index}")
        return x


def log_prob(output: Array, target: Array, space: Space) -> Array:
    """How likely an observation is under the decoder's output for its entry, `[...]`, summed over the entry.

    Images (as value / 255 - 0.5) and vectors are normal with deviation 1, constants included; Discrete entries are
    categorical.
    """
    contracts.floating(*output_shape(space), output=output)
    contracts.exactly(*output.shape[: output.ndim - isinstance(space, Discrete)], target=target)
    if isinstance(space, Discrete):
        contracts.integers(target=target)
        return -optax.softmax_cross_entropy_with_integer_labels(output, target)
    if is_image(space):
        return UnitNormal(output, 3).log_prob(target.astype(jnp.float32) / 255 - 0.5)
    return UnitNormal(output, len(space.shape)).log_prob(target)


def mean(output: Array, space: Space) -> Array:
    """What to expect of an entry: images float32 in [0, 255], vectors as they are, the likeliest Discrete choice."""
    contracts.floating(*output_shape(space), output=output)
    if isinstance(space, Discrete):
        return jnp.argmax(output, -1)
    return jnp.clip((output + 0.5) * 255, 0, 255) if is_image(space) else output
