"""The convolutional autoencoder of VQGAN, which IRIS tokenizes images with.

Parameters start as PyTorch's layers do: uniform within 1 / √fan-in, biases too.

Source: Esser et al. 2021 (VQGAN), appendix A, in the sizes of Micheli et al. 2023 (IRIS), table 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets import conv
from wmjax.ops import contracts
from wmjax.types import Array

GROUPS = 32


def uniform_within(bound: float) -> Callable:
    """Initializer: uniform in [-bound, bound]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """`nets.conv.Conv` with the initialization above; `upsample` doubles the image first."""

    features: int
    size: int = 3
    stride: int = 1
    upsample: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = uniform_within((self.size**2 * x.shape[-1]) ** -0.5)
        options = dict(kernel_init=init, bias_init=init, dtype=self.dtype, name="conv")
        if self.upsample:
            return conv.UpsampleConv(self.features, self.size, **options)(x)
        # Stride 2 pads right and below only, as "SAME" does for even sizes.
        return conv.Conv(self.features, self.size, self.stride, "SAME", **options)(x)


class Norm(nn.Module):
    """Group normalization with 32 groups (as many as channels where there are fewer), ε = 1e-6, then swish."""

    activate: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Statistics of each image and channel first: two sums over long runs of memory. Groups are sums of those.
        channels = x.shape[-1]
        groups = min(GROUPS, channels)
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        y = x.astype(jnp.float32)

        def group_mean(moment: Array) -> Array:
            mean = moment.mean((-3, -2), keepdims=True)
            grouped = mean.reshape(*mean.shape[:-1], groups, channels // groups).mean(-1, keepdims=True)
            return jnp.broadcast_to(grouped, (*mean.shape[:-1], groups, channels // groups)).reshape(mean.shape)

        y = y - group_mean(y)
        y = y * (jax.lax.rsqrt(group_mean(y * y) + 1e-6) * scale) + bias
        return (nn.silu(y) if self.activate else y).astype(x.dtype)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), the skip through a 1x1 convolution where channels differ."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.features, dtype=self.dtype, name="conv1")(Norm(name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv2")(Norm(name="norm2")(y))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        return x + y


class AttnBlock(nn.Module):
    """x + proj(attention(norm(x))): one head over all pixels, scaled by 1 / √channels."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        *lead, height, width, channels = x.shape
        y = Norm(activate=False, name="norm")(x)
        q, k, v = (
            Conv(channels, 1, dtype=self.dtype, name=name)(y).reshape(*lead, height * width, channels) for name in "qkv"
        )
        weights = jax.nn.softmax((q @ jnp.swapaxes(k, -1, -2)).astype(jnp.float32) * channels**-0.5)
        y = (weights.astype(v.dtype) @ v).reshape(x.shape)
        return x + Conv(channels, 1, dtype=self.dtype, name="proj")(y)


def _middle(x: Array, dtype: str) -> Array:
    x = ResBlock(x.shape[-1], dtype, name="mid_res0")(x)
    x = AttnBlock(dtype, name="mid_attn")(x)
    return ResBlock(x.shape[-1], dtype, name="mid_res1")(x)


class Encoder(nn.Module):
    """Images `[..., H, W, C]` in [-1, 1] to latents `[..., h, w, latents]`, h = H / (patch 2^(levels - 1)).

    Attributes:
      channels: of level i, times multipliers[i].
      multipliers: one for each level; between levels the image is halved.
      res_blocks: of each level.
      attention: sides of the levels whose blocks are followed by attention.
      latents: channels of the output.
      patch: the first convolution sees patches of this side, without overlap; 1 is the paper's 3x3 convolution.
    """

    channels: int
    multipliers: Sequence[int]
    res_blocks: int
    attention: Sequence[int]
    latents: int
    patch: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first = dict(size=self.patch, stride=self.patch) if self.patch > 1 else {}
        x = Conv(self.channels, **first, dtype=self.dtype, name="conv_in")(x)
        for level, multiplier in enumerate(self.multipliers):
            if level:
                x = Conv(x.shape[-1], stride=2, dtype=self.dtype, name=f"down{level - 1}")(x)
            for block in range(self.res_blocks):
                x = ResBlock(multiplier * self.channels, self.dtype, name=f"res{level}_{block}")(x)
                if x.shape[-3] in self.attention:
                    x = AttnBlock(self.dtype, name=f"attn{level}_{block}")(x)
        x = _middle(x, self.dtype)
        return Conv(self.latents, dtype=self.dtype, name="conv_out")(Norm(name="norm_out")(x))


class Decoder(nn.Module):
    """Latents `[..., h, w, latents]` to images `[..., H, W, features]`, unbounded. Attributes as in `Encoder`.

    A level has one block more than the encoder's.
    """

    features: int
    channels: int
    multipliers: Sequence[int]
    res_blocks: int
    attention: Sequence[int]
    patch: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, z: Array) -> Array:
        x = Conv(self.multipliers[-1] * self.channels, dtype=self.dtype, name="conv_in")(z)
        x = _middle(x, self.dtype)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for block in range(self.res_blocks + 1):
                x = ResBlock(multiplier * self.channels, self.dtype, name=f"res{level}_{block}")(x)
                if x.shape[-3] in self.attention:
                    x = AttnBlock(self.dtype, name=f"attn{level}_{block}")(x)
            if level:
                x = Conv(x.shape[-1], upsample=True, dtype=self.dtype, name=f"up{level - 1}")(x)
        x = Norm(name="norm_out")(x)
        if self.patch == 1:
            return Conv(self.features, dtype=self.dtype, name="conv_out")(x)
        return _draw_patches(x, self.features, self.patch, self.dtype)


class PatchEncoder(nn.Module):
    """An MLP on each patch by itself, `[..., H, W, C]` to `[..., H / patch, W / patch, latents]`.

    Not of VQGAN: cheap, and a token says something of its own patch only, so that what does not change in an image does
    not change in its tokens.
    """

    units: int
    layers: int
    latents: int
    patch: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in range(self.layers):
            size = 1 if layer else self.patch
            x = nn.silu(Conv(self.units, size, size, dtype=self.dtype, name=f"layer{layer}")(x))
        return Conv(self.latents, 1, dtype=self.dtype, name="layer_out")(x)


class PatchDecoder(nn.Module):
    """The reverse: `[..., h, w, latents]` to images `[..., h patch, w patch, features]`, unbounded."""

    features: int
    units: int
    layers: int
    patch: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in range(self.layers):
            x = nn.silu(Conv(self.units, 1, dtype=self.dtype, name=f"layer{layer}")(x))
        return _draw_patches(x, self.features, self.patch, self.dtype)


def _draw_patches(x: Array, features: int, patch: int, dtype: str) -> Array:
    """Every position draws its own patch."""
    init = uniform_within(x.shape[-1] ** -0.5)
    return conv.ConvTranspose(features, patch, patch, kernel_init=init, bias_init=init, dtype=dtype, name="conv_out")(x)


class Tokenizer(nn.Module):
    """Encoder, codebook and decoder, to be called through its methods. Quantizing is the caller's (`ops.vq`)."""

    encoder: Encoder | PatchEncoder
    decoder: Decoder | PatchDecoder
    vocab_size: int
    embed_dim: int
    dtype: str = "float32"

    def setup(self):
        self.pre_quant = Conv(self.embed_dim, 1, dtype=self.dtype)
        self.post_quant = Conv(self.encoder.latents, 1, dtype=self.dtype)
        init = uniform_within(1.0 / self.vocab_size)
        self.codebook = self.param("codebook", init, (self.vocab_size, self.embed_dim))

    def encode(self, image: Array) -> Array:
        """Images `[..., H, W, C]` in [-1, 1] to latents `[..., h, w, embed_dim]`, not yet quantized."""
        contracts.shaped(None, None, None, image=image)
        contracts.floating(image=image)
        return self.pre_quant(self.encoder(image))

    def decode(self, quantized: Array) -> Array:
        """Quantized latents `[..., h, w, embed_dim]` to images `[..., H, W, C]`, about [-1, 1] but unbounded."""
        contracts.shaped(None, None, self.embed_dim, quantized=quantized)
        return self.decoder(self.post_quant(quantized))

    def everything(self, image: Array) -> tuple[Array, Array]:
        """Initializes all parameters at once."""
        z = self.encode(image)
        return self.decode(z), self.codebook
