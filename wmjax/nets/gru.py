"""Gated recurrent units, one time step: the same idea, and two conventions that must not be mixed up."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.mlp import Linear, Norm, dense_init
from wmjax.ops import contracts
from wmjax.types import Array


def gated_update(deter: Array, reset: Array, cand: Array, update: Array) -> Array:
    """h' = u ⊙ c + (1 - u) ⊙ h with c = tanh(r ⊙ cand), r = σ(reset), u = σ(update - 1): starts out remembering.

    Source: DreamerV2 code, kept by DreamerV3. `update` admits the new here; in `GRU` it keeps the old.
    """
    contracts.alike(deter=deter, reset=reset, cand=cand, update=update)
    cand = jnp.tanh(jax.nn.sigmoid(reset) * cand)
    update = jax.nn.sigmoid(update - 1.0)
    return update * cand + (1.0 - update) * deter


def _check(features: int, deter: Array, x: Array) -> None:
    contracts.floating(features, deter=deter)
    contracts.floating(None, x=x)
    contracts.leading(deter.ndim - 1, deter=deter, x=x)


class GRU(nn.Module):
    """The GRU of Keras (`reset_after`) and of PyTorch, `[..., D]`, `[..., X]` -> `[..., D]`.

        u = σ(x K_u + h R_u + b_u),   r = σ(x K_r + h R_r + b_r)
        c = tanh(x K_c + b_c + r ⊙ (h R_c + b'_c)),   h' = u ⊙ h + (1 - u) ⊙ c

    Parameters as Keras has them, columns in the order u, r, c: `kernel` [X, 3D], `recurrent_kernel` [D, 3D], `bias`
    [2, 3D] (input, recurrent).

    Source: Cho et al. 2014; DreamerV1 uses Keras' cell.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, x: Array) -> Array:
        _check(self.features, deter, x)
        kernel = self.param("kernel", dense_init("glorot", x.shape[-1]), (x.shape[-1], 3 * self.features))
        init = nn.initializers.orthogonal()
        recurrent = self.param("recurrent_kernel", init, (self.features, 3 * self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (2, 3 * self.features)).astype(self.dtype)
        from_x = x.astype(self.dtype) @ kernel.astype(self.dtype) + bias[0]
        from_h = deter.astype(self.dtype) @ recurrent.astype(self.dtype) + bias[1]
        (u, r, c), (hu, hr, hc) = (jnp.split(part, 3, -1) for part in (from_x, from_h))
        u, r = jax.nn.sigmoid(u + hu), jax.nn.sigmoid(r + hr)
        return u * deter + (1.0 - u) * jnp.tanh(c + r * hc)


class LayerNormGRU(nn.Module):
    """A GRU whose gates are normalized together, `[..., D]`, `[..., X]` -> `[..., D]`.

        reset, cand, update = LN(W [x, h] + b),   then `gated_update`

    Source: DreamerV2 code; LayerNorm runs over all 3D numbers jointly, in float32, ε = 1e-3.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, deter: Array, x: Array) -> Array:
        _check(self.features, deter, x)
        x = jnp.concatenate([x.astype(self.dtype), deter.astype(self.dtype)], -1)
        gates = Linear(3 * self.features, dtype=self.dtype, init_kind="glorot", name="dense")(x)
        reset, cand, update = jnp.split(Norm("layer", name="norm")(gates), 3, -1)
        return gated_update(deter, reset, cand, update)
