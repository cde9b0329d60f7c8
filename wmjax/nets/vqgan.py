"""The convolutional autoencoder of VQGAN, which IRIS tokenizes images with.

Parameters start as PyTorch's layers do: uniform within 1 / √fan-in, biases too.

Source: Esser et al. 2021 (VQGAN), appendix A, in the sizes of Micheli et al. 2023 (IRIS), table 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
        contracts.floating(None, None, None, x=x)
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
        contracts.floating(None, None, None, x=x)
        # Statistics of each image and channel first: two sums over long runs of memory. Groups are sums of those.
        channels = x.shape[-1]
        groups = min(GROUPS, channels)
        scale = self.param("scale", nn.initializers.ones_init(), (channels,))
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        y = x.astype(jnp.float32)

        def group_mean(moment: Array) -> Array:
            mean = moment.mean((-3, -2), keepdims=True)
            return mean.reshape(*mean.shape[:-1], groups, -1).mean(-1).repeat(channels // groups, -1)

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
        contracts.floating(None, None, None, x=x)
        *lead, height, width, channels = x.shape
        y = Norm(activate=False, name="norm")(x)
        q, k, v = (
            Conv(channels, 1, dtype=self.dtype, name=name)(y).reshape(*lead, height * width, channels) for name in "qkv"
        )
        weights = jax.nn.softmax((q @ jnp.swapaxes(k, -1, -2)).astype(jnp.float32) * channels**-0.5)
        y = (weights.astype(v.dtype) @ v).reshape(x.shape)
        return x + Conv(channels, 1, dtype=self.dtype, name="proj")(y)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of an encoder, and of the decoder that mirrors it."""

    channels: int  # of level i, times multipliers[i]
    multipliers: tuple[int, ...]  # one for each level; between levels the image is halved
    res_blocks: int  # of each level
    attention: tuple[int, ...]  # sides of the levels whose blocks are followed by attention
    patch: int = 1  # the first convolution sees patches of this side, without overlap; 1 is the paper's 3x3 convolution
    dtype: str = "float32"
    remat: bool = False  # recompute blocks in the backward pass instead of storing their insides


def _res(x: Array, features: int, sizes: Sizes, name: str) -> Array:
    return (nn.remat(ResBlock) if sizes.remat else ResBlock)(features, sizes.dtype, name=name)(x)


def _attend(x: Array, sizes: Sizes, name: str) -> Array:
    return (nn.remat(AttnBlock) if sizes.remat else AttnBlock)(sizes.dtype, name=name)(x)


def _middle(x: Array, sizes: Sizes) -> Array:
    x = _res(x, x.shape[-1], sizes, "mid_res0")
    return _res(_attend(x, sizes, "mid_attn"), x.shape[-1], sizes, "mid_res1")


def _level(x: Array, sizes: Sizes, level: int, blocks: int) -> Array:
    for block in range(blocks):
        x = _res(x, sizes.multipliers[level] * sizes.channels, sizes, f"res{level}_{block}")
        if x.shape[-3] in sizes.attention:
            x = _attend(x, sizes, f"attn{level}_{block}")
    return x


class Encoder(nn.Module):
    """Images `[..., H, W, C]` in [-1, 1] to latents `[..., h, w, latents]`, h = H / (patch 2^(levels - 1))."""

    sizes: Sizes
    latents: int  # channels of the output

    @nn.compact
    def __call__(self, x: Array) -> Array:
        sizes, dtype = self.sizes, self.sizes.dtype
        first = dict(size=sizes.patch, stride=sizes.patch) if sizes.patch > 1 else {}
        x = Conv(sizes.channels, **first, dtype=dtype, name="conv_in")(x)
        for level in range(len(sizes.multipliers)):
            if level:
                x = Conv(x.shape[-1], stride=2, dtype=dtype, name=f"down{level - 1}")(x)
            x = _level(x, sizes, level, sizes.res_blocks)
        x = _middle(x, sizes)
        return Conv(self.latents, dtype=dtype, name="conv_out")(Norm(name="norm_out")(x))


class Decoder(nn.Module):
    """Latents `[..., h, w, latents]` to images `[..., H, W, features]`, unbounded.

    A level has one block more than the encoder's.
    """

    sizes: Sizes
    features: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        contracts.floating(None, None, None, z=z)
        sizes, dtype = self.sizes, self.sizes.dtype
        x = Conv(sizes.multipliers[-1] * sizes.channels, dtype=dtype, name="conv_in")(z)
        x = _middle(x, sizes)
        for level in reversed(range(len(sizes.multipliers))):
            x = _level(x, sizes, level, sizes.res_blocks + 1)
            if level:
                x = Conv(x.shape[-1], upsample=True, dtype=dtype, name=f"up{level - 1}")(x)
        x = Norm(name="norm_out")(x)
        if sizes.patch == 1:
            return Conv(self.features, dtype=dtype, name="conv_out")(x)
        return _draw_patches(x, self.features, sizes)


class PatchEncoder(nn.Module):
    """An MLP on each patch by itself, `[..., H, W, C]` to `[..., H / patch, W / patch, latents]`.

    Not of VQGAN: cheap, and a token says something of its own patch only, so that what does not change in an image does
    not change in its tokens. Of the sizes, `channels` are its units and `res_blocks` its layers.
    """

    sizes: Sizes
    latents: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = _layers(x, self.sizes, self.sizes.patch)
        return Conv(self.latents, 1, dtype=self.sizes.dtype, name="layer_out")(x)


class PatchDecoder(nn.Module):
    """The reverse: `[..., h, w, latents]` to images `[..., h patch, w patch, features]`, unbounded."""

    sizes: Sizes
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _draw_patches(_layers(x, self.sizes, 1), self.features, self.sizes)


def _layers(x: Array, sizes: Sizes, first: int) -> Array:
    """Layers on single positions; those of the first are patches of a side."""
    for layer in range(sizes.res_blocks):
        size = 1 if layer else first
        x = nn.silu(Conv(sizes.channels, size, size, dtype=sizes.dtype, name=f"layer{layer}")(x))
    return x


def _draw_patches(x: Array, features: int, sizes: Sizes) -> Array:
    """Every position draws its own patch."""
    init, patch = uniform_within(x.shape[-1] ** -0.5), sizes.patch
    options = dict(kernel_init=init, bias_init=init, dtype=sizes.dtype, name="conv_out")
    return conv.ConvTranspose(features, patch, patch, **options)(x)


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
        contracts.floating(None, None, None, image=image)
        return self.pre_quant(self.encoder(image))

    def decode(self, quantized: Array) -> Array:
        """Quantized latents `[..., h, w, embed_dim]` to images `[..., H, W, C]`, about [-1, 1] but unbounded."""
        contracts.floating(None, None, self.embed_dim, quantized=quantized)
        return self.decoder(self.post_quant(quantized))

    def everything(self, image: Array) -> tuple[Array, Array]:
        """Initializes all parameters at once."""
        z = self.encode(image)
        return self.decode(z), self.codebook
