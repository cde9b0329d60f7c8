"""Dense bricks: linear layers, norms, and the stack of them that every head is built on.

Layers go Linear -> norm -> activation. Parameters are float32; the computation runs in `dtype`, norm statistics in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array

# A standard normal cut at two standard deviations has 1 / 1.1368 of its spread left.
TRUNCATION = 1.1368

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": nn.silu, "relu": nn.relu, "elu": nn.elu}
ACTIVATIONS["gelu"] = lambda x: nn.gelu(x, approximate=False)  # exact: JAX's default is the tanh form


def truncated_normal_in(fan_in: int, outscale: float = 1.0) -> Callable:
    """Initializer with standard deviation outscale / sqrt(fan_in), cut at two (untruncated) standard deviations.

    Source: DreamerV3 code, `trunc_normal_in`. The fan-in is the caller's to give: a block-diagonal layer counts all of
    its inputs, a convolution its window.
    """
    if outscale == 0.0:
        return nn.initializers.zeros_init()
    return nn.initializers.truncated_normal(outscale * TRUNCATION / fan_in**0.5)


def dense_init(kind: str, fan_in: int, outscale: float = 1.0) -> Callable:
    """Initializer of a dense kernel: `truncated_normal` (DreamerV3) or `glorot`, uniform (Keras; DreamerV1 and V2)."""
    if kind == "glorot" and outscale:
        return nn.initializers.variance_scaling(outscale**2, "fan_avg", "uniform")
    return truncated_normal_in(fan_in, outscale)


class Linear(nn.Module):
    """x W + b over the last axis; `[..., inputs] -> [..., features]`.

    `multiple` fills the product's columns up with zeros to a multiple of it. Compilers round the last ones, those that
    do not fill a register, in another order than the rest; filled up, equal weights give outputs equal to the bit.
    """

    features: int
    outscale: float = 1.0
    dtype: str = "float32"
    init_kind: str = "truncated_normal"  # see `dense_init`
    multiple: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracts.floating(None, x=x)
        init = dense_init(self.init_kind, x.shape[-1], self.outscale)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        if missing := -self.features % self.multiple:
            kernel = jnp.pad(kernel, [(0, 0), (0, missing)])
        return (x.astype(self.dtype) @ kernel.astype(self.dtype))[..., : self.features] + bias.astype(self.dtype)


class ConcatLinear(nn.Module):
    """A linear layer on the concatenation of several inputs, which can also be applied one input at a time.

    Inside a scan, what does not depend on the carry then needs no matrix product: its part is computed for all time
    steps before. The kernel stays one tensor, so optimizers see the layer that the papers describe.
    """

    inputs: Sequence[int]
    features: int
    dtype: str = "float32"
    init_kind: str = "truncated_normal"  # see `dense_init`

    def setup(self):
        total = sum(self.inputs)
        self.kernel = self.param("kernel", dense_init(self.init_kind, total), (total, self.features))
        self.bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))

    def part(self, index: int, x: Array) -> Array:
        """The product of input `index`, `[..., inputs[index]] -> [..., features]`, without the bias."""
        contracts.floating(self.inputs[index], x=x)
        start = sum(self.inputs[:index])
        return x.astype(self.dtype) @ self.kernel[start : start + self.inputs[index]].astype(self.dtype)

    def combine(self, *parts: Array) -> Array:
        """The layer's output from the parts of all inputs."""
        return sum(parts) + self.bias.astype(self.dtype)


class BlockLinear(nn.Module):
    """`blocks` independent linear layers side by side, `[..., blocks, inputs] -> [..., blocks, features]`.

    `shared` inputs `[..., shared]` go to every block, after the block's own: as one wide product they cost less than
    copies of them in each block.

    Source: DreamerV3, appendix on the block-diagonal GRU. Kernel (blocks, inputs + shared, features).
    """

    blocks: int
    features: int  # per block
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, shared: Array | None = None) -> Array:
        contracts.floating(self.blocks, None, x=x)
        if shared is not None:
            contracts.floating(None, shared=shared)
            contracts.leading(x.ndim - 2, x=x, shared=shared)
        own, extra = x.shape[-1], 0 if shared is None else shared.shape[-1]
        # The official code counts the inputs of all blocks as fan-in, not those that one output sees.
        init = truncated_normal_in(self.blocks * (own + extra))
        kernel = self.param("kernel", init, (self.blocks, own + extra, self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.blocks * self.features,)).astype(self.dtype)
        y = jnp.einsum("...gi,gio->...go", x.astype(self.dtype), kernel[:, :own])
        if shared is not None:
            wide = kernel[:, own:].transpose(1, 0, 2).reshape(extra, self.blocks * self.features)
            y = y + (shared.astype(self.dtype) @ wide).reshape(y.shape)
        return y + bias.reshape(self.blocks, self.features)


class Norm(nn.Module):
    """Normalizes the last axis with float32 statistics.

    `rms`: x / sqrt(mean x² + ε), scaled, ε = 1e-4 (DreamerV3). `layer`: mean removed too, scaled and shifted,
    ε = 1e-3 (DreamerV2, DreamerV3 of 2023). `none`: the identity.
    """

    kind: str = "rms"

    @nn.compact
    def weights(self, features: int) -> tuple[Array, ...]:
        """Scale and, for `layer`, shift: float32 `[features]` each."""
        if self.kind == "none":
            return ()
        scale = self.param("scale", nn.initializers.ones_init(), (features,))
        return (
            (scale, self.param("bias", nn.initializers.zeros_init(), (features,))) if self.kind == "layer" else (scale,)
        )

    def __call__(self, x: Array) -> Array:
        contracts.floating(None, x=x)
        # Of two axes, for XLA's search for the tiles of a GPU's kernel grows by a factor with each axis.
        rows = x.reshape(-1, x.shape[-1])
        return normalize(self.kind, rows, *self.weights(x.shape[-1])).reshape(x.shape)


def normalize(kind: str, x: Array, scale: Array | float = 1.0, shift: Array | float = 0.0, axis: int = -1) -> Array:
    """What `Norm` says of the last axis of `x`, or another, in the dtype of `x`; weights are broadcast against it."""
    contracts.floating(None, x=x)
    if kind == "none":
        return x
    y = x.astype(jnp.float32)
    if kind == "rms":
        return (y * (jax.lax.rsqrt(jnp.mean(y * y, axis, keepdims=True) + 1e-4) * scale)).astype(x.dtype)
    y = y - jnp.mean(y, axis, keepdims=True)
    return (y * (jax.lax.rsqrt(jnp.mean(y * y, axis, keepdims=True) + 1e-3) * scale) + shift).astype(x.dtype)


def normed(x: Array, norm: str, activation: str, name: str) -> Array:
    """The activation of `Norm`, inside a module, whose part `name` the norm is."""
    return ACTIVATIONS[activation](Norm(norm, name=name)(x))


class MLP(nn.Module):
    """`len(units)` layers of Linear -> norm -> activation, `[..., inputs] -> [..., units[-1]]`."""

    units: Sequence[int]
    norm: str = "rms"
    activation: str = "silu"
    dtype: str = "float32"
    init_kind: str = "truncated_normal"  # see `dense_init`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, units in enumerate(self.units):
            x = Linear(units, dtype=self.dtype, init_kind=self.init_kind, name=f"linear{index}")(x)
            x = normed(x, self.norm, self.activation, f"norm{index}")
        return x


def call(module: nn.Module, params: dict, *args, method: str | None = None):
    """Applies a module to its parameters."""
    return module.apply({"params": params}, *args, method=method)


def init_modules(modules: Mapping[str, nn.Module | None], key: Array, inputs: Mapping[str, tuple]) -> dict:
    """Parameters of several modules by name, without those that are None.

    Args:
      key: consumed; each name has its own part, whatever the other modules are.
      inputs: example inputs of each; a module with a method `everything` is initialized by it.
    """
    contracts.keys(key=key)
    keys = dict(zip(modules, jax.random.split(key, len(modules)), strict=True))
    method = lambda module: "everything" if hasattr(module, "everything") else None
    return {
        name: module.init(keys[name], *inputs[name], method=method(module))["params"]
        for name, module in modules.items()
        if module is not None
    }
