"""The convolutional variational autoencoder of World Models.

Source: Ha & Schmidhuber 2018, appendix "Variational Autoencoder"; strides and kernels as in the authors' code.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.conv import Conv, ConvTranspose
from wmjax.ops import contracts
from wmjax.types import Array, UsageError

KERNELS = (5, 5, 6, 6)  # of the decoder; with stride 2 and no padding a side b becomes 16 b + 48
SMALLEST = 64

_glorot = nn.initializers.glorot_uniform()


def decoder_base(side: int) -> int:
    """Side of the map that the decoder starts from, (side - 48) / 16: 1 for 64 pixels, 2 for 80, 3 for 96.

    Raises:
      UsageError: no map gives this side back.
    """
    if side < SMALLEST or side % 16:
        below = max(SMALLEST, side // 16 * 16)
        near = sorted({below, below + 16, max(SMALLEST, below - 16)})
        raise UsageError(
            f"image_size {side}: the decoder draws sides of 16 x base + 48 pixels with base 1, 2, 3, ..., not {side}; "
            f"valid are 64, 80, 96, ..., near it {', '.join(map(str, near))}"
        )
    return side // 16 - 3


class Encoder(nn.Module):
    """uint8 images `[..., H, W, C]` to the mean and log-variance of a Gaussian, float32 `[..., latent]` each."""

    latent: int  # size of z
    depth: int = 32  # channels are depth * (1, 2, 4, 8); 32 as published
    padding: str = "VALID"  # of the four 4x4 convolutions of stride 2: 64 pixels end as 2x2; or SAME: 96 end as 6x6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Array) -> tuple[Array, Array]:
        contracts.integers(None, None, None, image=image)
        lead = image.shape[:-3]
        x = image.reshape(-1, *image.shape[-3:]).astype(self.dtype) / 255
        for i in range(4):
            conv = Conv(self.depth * 2**i, 4, 2, self.padding, kernel_init=_glorot, dtype=self.dtype, name=f"conv{i}")
            x = jax.nn.relu(conv(x))
        x = x.reshape(*lead, -1)
        of = partial(nn.Dense, self.latent, dtype=self.dtype, kernel_init=_glorot)
        return of(name="mu")(x).astype(jnp.float32), of(name="logvar")(x).astype(jnp.float32)


class Decoder(nn.Module):
    """z `[..., latent]` to images, float32 means in [0, 1] `[..., side, side, channels]`."""

    side: int  # of the image; `decoder_base` says which are possible
    channels: int = 3
    depth: int = 32  # channels are depth * (4, 2, 1) after a first map of 32 * depth (1x1) or 8 * depth (larger)
    relu: bool = False  # after the linear layer, which Tallec's PyTorch version has and the authors' does not
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        contracts.floating(None, z=z)
        base, lead = decoder_base(self.side), z.shape[:-1]
        features = self.depth * (32 if base == 1 else 8)
        x = nn.Dense(base * base * features, dtype=self.dtype, kernel_init=_glorot, name="linear")(z)
        x = jax.nn.relu(x) if self.relu else x
        x = x.reshape(-1, base, base, features)
        for i, kernel in enumerate(KERNELS):
            features = self.channels if i == 3 else self.depth * 2 ** (2 - i)
            conv = ConvTranspose(features, kernel, 2, kernel_init=_glorot, dtype=self.dtype, name=f"deconv{i}")
            x = conv(x) if i == 3 else jax.nn.relu(conv(x))
        return jax.nn.sigmoid(x.astype(jnp.float32)).reshape(*lead, *x.shape[1:])
