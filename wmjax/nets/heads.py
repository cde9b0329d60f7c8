"""Heads: an MLP, then one linear layer for each output."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from wmjax.nets.mlp import MLP, Linear
from wmjax.nets.spaces import Spaces, output_shape
from wmjax.ops import contracts
from wmjax.types import Array


class Head(nn.Module):
    """`[..., features] -> {name: float32 [..., size]}`, raw outputs for `ops.distributions` to read.

    `outscale` scales the last layers' initial weights: 0 starts a head at exactly zero, 0.01 near it.
    """

    outputs: Sequence[tuple[str, int]]
    units: Sequence[int]
    outscale: float = 1.0
    norm: str = "rms"
    activation: str = "silu"
    dtype: str = "float32"
    init_kind: str = "truncated_normal"  # see `mlp.dense_init`
    multiple: int = 1  # see `mlp.Linear`

    @nn.compact
    def __call__(self, feat: Array) -> dict[str, Array]:
        contracts.floating(None, feat=feat)
        x = MLP(self.units, self.norm, self.activation, self.dtype, self.init_kind, name="mlp")(feat)
        how = (self.outscale, self.dtype, self.init_kind, self.multiple)
        return {name: Linear(size, *how, name=name)(x).astype(jnp.float32) for name, size in self.outputs}


def number_head(kind: str, bins: int, units: Sequence[int], **style) -> Head:
    """A head that starts at exactly zero, with the outputs that `ops.distributions.number` reads as `kind`."""
    if kind != "two_hot":
        return Head((("mean", 1),), units, 0.0, **style)
    # Bins reach ±5e8: far ones cancel in a mean where equal weights give logits that are equal to the bit. A multiple
    # of 32 fills the registers of any processor, and the tiles of a tensor core.
    return Head((("logits", bins),), units, 0.0, multiple=32, **style)


def vector_heads(
    vectors: Spaces,
    feat: Array,
    units: Sequence[int],
    norm: str,
    activation: str,
    dtype: str,
    init_kind: str = "truncated_normal",
) -> dict[str, Array]:
    """Raw outputs for entries that are no images, float32 `[..., *shape]` or `[..., n]`, inside a module: parts `mlp`
    and `NAME_out`.
    """
    contracts.floating(None, feat=feat)
    x = MLP(units, norm, activation, dtype, init_kind, name="mlp")(feat)
    outputs = {}
    for name, space in vectors:
        shape = output_shape(space)
        y = Linear(math.prod(shape), 1.0, dtype, init_kind, name=f"{name}_out")(x).astype(jnp.float32)
        outputs[name] = y.reshape(*y.shape[:-1], *shape)
    return outputs
