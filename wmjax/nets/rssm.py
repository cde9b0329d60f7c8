"""Recurrent state-space models, one time step at a time.

`RSSM` is DreamerV3's: categorical latents, block-diagonal GRU. `DenseRSSM` is that of DreamerV1 and DreamerV2: dense
layers around one GRU, for latents of any distribution.

Source: Hafner et al. 2019 (PlaNet), equation 4, which named it; Hafner et al. 2023 (DreamerV3), equation 3 and the
block-diagonal GRU of the 2024 version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets.gru import GRU, LayerNormGRU, gated_update
from wmjax.nets.mlp import ACTIVATIONS, BlockLinear, ConcatLinear, Linear, Norm, normalize
from wmjax.ops import contracts
from wmjax.types import Array, PyTree


class LatentState(NamedTuple):
    """h, z, and the distribution that z was drawn from (`ops.latents`), float32."""

    deter: Array  # [..., D]
    stoch: Array  # [..., Z] or [..., S, K], as `dist` draws it, with its gradient where it was just drawn
    dist: PyTree  # NamedTuple of arrays; DreamerV3's is from before the uniform mix, which its losses and draws add


def feature(state: LatentState) -> Array:
    """[z, h], `[..., Z + D]`: what decoder, heads, actor and critic of DreamerV1 and DreamerV2 see."""
    contracts.floating(None, deter=state.deter, stoch=state.stoch)
    contracts.leading(state.deter.ndim - 1, deter=state.deter, stoch=state.stoch)
    stoch = state.stoch.reshape(*state.deter.shape[:-1], -1)
    return jnp.concatenate([stoch.astype(state.deter.dtype), state.deter], -1)


def zero_first(tree: PyTree, is_first: Array) -> PyTree:
    """The tree `[B, ...]` with zeros in the rows where an episode begins, bool `[B]`."""
    contracts.booleans(is_first=is_first)
    keep = lambda x: jnp.where(is_first.reshape(*is_first.shape, *[1] * (x.ndim - is_first.ndim)), 0, x)
    return jax.tree.map(keep, tree)


def _normalized_side_by_side(norms: Sequence[Norm], xs: Sequence[Array]) -> Array:
    """Each `[..., F]` by its own norm, side by side `[..., len(norms) F]`: as many kernels as one of them."""
    x = jnp.stack(xs, -2)
    weights = [jnp.stack(each) for each in zip(*(norm.weights(x.shape[-1]) for norm in norms), strict=True)]
    return normalize(norms[0].kind, x, *weights).reshape(*x.shape[:-2], -1)


def _everything(rssm, deter: Array, stoch: Array, action: Array, embed: Array) -> tuple[Array, Array, Array]:
    """One filtering step without sampling: the new h, prior and posterior."""
    deter = rssm.advance(deter, stoch, action)
    return deter, rssm.prior(deter), rssm.posterior(deter, rssm.project(embed))


class RSSM(nn.Module):
    """Sequence model, prior and posterior; sampling is the caller's.

    Attributes:
      deter, hidden, stoch, classes: D, width of the layers, S latents of K classes.
      embed, action: sizes of the embedding and of the action.
      blocks: block count of the GRU; must divide `deter`.
      prior_layers, posterior_layers: hidden layers of the two.
      cell: `block_gru` (DreamerV3) or `gru` (one layer-normed GRU on [h, z, a], DreamerV2).
      outputs: numbers that describe the latents of one state; None: S K, a logit for each class.
    """

    deter: int
    hidden: int
    stoch: int
    classes: int
    embed: int
    action: int
    blocks: int = 8
    prior_layers: int = 2
    posterior_layers: int = 1
    cell: str = "block_gru"
    norm: str = "rms"
    activation: str = "silu"
    dtype: str = "float32"
    outputs: int | None = None

    everything = _everything

    def setup(self):
        self.act = ACTIVATIONS[self.activation]
        logits = self.stoch * self.classes if self.outputs is None else self.outputs
        if self.cell == "block_gru":
            self.dynin = [Linear(self.hidden, dtype=self.dtype) for _ in range(3)]
            self.dynin_norm = [Norm(self.norm) for _ in range(3)]
            self.dynhid = BlockLinear(self.blocks, self.deter // self.blocks, self.dtype)
            self.dynhid_norm = Norm(self.norm)
            self.dyngru = BlockLinear(self.blocks, 3 * self.deter // self.blocks, self.dtype)
        else:
            self.gru = Linear(3 * self.deter, dtype=self.dtype)
            self.gru_norm = Norm("layer")
        self.prior_layer = [Linear(self.hidden, dtype=self.dtype) for _ in range(self.prior_layers)]
        self.prior_norm = [Norm(self.norm) for _ in range(self.prior_layers)]
        self.prior_logits = Linear(logits, dtype=self.dtype)
        self.posterior_first = ConcatLinear((self.deter, self.embed), self.hidden, self.dtype)
        self.posterior_layer = [Linear(self.hidden, dtype=self.dtype) for _ in range(self.posterior_layers - 1)]
        self.posterior_norm = [Norm(self.norm) for _ in range(self.posterior_layers)]
        self.posterior_logits = Linear(logits, dtype=self.dtype)

    def advance(self, deter: Array, stoch: Array, action: Array) -> Array:
        """h' = f(h, z, a): `[..., D]`, `[..., S, K]`, `[..., A]` -> `[..., D]`."""
        contracts.floating(self.deter, deter=deter)
        contracts.floating(self.stoch, self.classes, stoch=stoch)
        contracts.floating(self.action, action=action)
        contracts.leading(deter.ndim - 1, deter=deter, stoch=stoch, action=action)
        # Actions are stored as drawn, so continuous ones may be large; this maps them to [-1, 1], gradient kept.
        action = action / jax.lax.stop_gradient(jnp.maximum(1.0, jnp.abs(action)))
        stoch = stoch.reshape(*stoch.shape[:-2], self.stoch * self.classes)
        if self.cell == "gru":
            gates = self.gru_norm(self.gru(jnp.concatenate([stoch, action, deter], -1)))
            reset, cand, update = jnp.split(gates, 3, -1)
            return gated_update(deter, reset, cand, update)
        inputs = [layer(value) for layer, value in zip(self.dynin, (deter, stoch, action), strict=True)]
        x = self.act(_normalized_side_by_side(self.dynin_norm, inputs))
        h = deter.reshape(*deter.shape[:-1], self.blocks, -1)
        y = self.dynhid(h, shared=x)
        y = self.act(self.dynhid_norm(y.reshape(deter.shape))).reshape(h.shape)
        reset, cand, update = jnp.split(self.dyngru(y), 3, -1)  # within each block
        return gated_update(h, reset, cand, update).reshape(deter.shape)

    def prior(self, deter: Array) -> Array:
        """Logits of p(z | h): `[..., D] -> [..., S K]` float32."""
        contracts.floating(self.deter, deter=deter)
        x = deter
        for layer, norm in zip(self.prior_layer, self.prior_norm, strict=True):
            x = self.act(norm(layer(x)))
        return self.prior_logits(x).astype(jnp.float32)

    def project(self, embed: Array) -> Array:
        """The embedding's part of the posterior's first layer, `[..., E] -> [..., hidden]`, for `posterior`."""
        contracts.floating(self.embed, embed=embed)
        return self.posterior_first.part(1, embed)

    def posterior(self, deter: Array, projected: Array) -> Array:
        """Logits of q(z | h, x): `[..., D]` and `project`'s output -> `[..., S K]` float32."""
        contracts.floating(self.deter, deter=deter)
        contracts.floating(self.hidden, projected=projected)
        contracts.leading(deter.ndim - 1, deter=deter, projected=projected)
        x = self.posterior_first.combine(self.posterior_first.part(0, deter), projected)
        x = self.act(self.posterior_norm[0](x))
        for layer, norm in zip(self.posterior_layer, self.posterior_norm[1:], strict=True):
            x = self.act(norm(layer(x)))
        return self.posterior_logits(x).astype(jnp.float32)


class DenseRSSM(nn.Module):
    """Sequence model, prior and posterior as raw numbers; distributions and sampling are the caller's.

    Attributes:
      deter, hidden: D, and the width of the layers.
      outputs: numbers that describe the distribution of a latent.
      embed: size of the embedding.
      cell: `gru` (Keras; DreamerV1) or `layer_norm_gru` (DreamerV2).
      input_layer: a layer of `hidden` units between [z, a] and the GRU.
      norm: of the layers, not of the GRU.
    """

    deter: int
    hidden: int
    outputs: int
    embed: int
    cell: str = "gru"
    input_layer: bool = True
    norm: str = "none"
    activation: str = "elu"
    dtype: str = "float32"

    everything = _everything

    def setup(self):
        self.act = ACTIVATIONS[self.activation]
        style = dict(dtype=self.dtype, init_kind="glorot")
        if self.input_layer:
            self.input = Linear(self.hidden, **style)
            self.input_norm = Norm(self.norm)
        self.gru = {"gru": GRU, "layer_norm_gru": LayerNormGRU}[self.cell](self.deter, self.dtype)
        self.prior_layer = Linear(self.hidden, **style)
        self.prior_norm = Norm(self.norm)
        self.prior_out = Linear(self.outputs, **style)
        self.posterior_layer = ConcatLinear((self.deter, self.embed), self.hidden, **style)
        self.posterior_norm = Norm(self.norm)
        self.posterior_out = Linear(self.outputs, **style)

    def advance(self, deter: Array, stoch: Array, action: Array) -> Array:
        """h' = f(h, z, a): `[..., D]`, `[..., Z]` or `[..., S, K]`, `[..., A]` -> `[..., D]`."""
        contracts.floating(self.deter, deter=deter)
        contracts.leading(deter.ndim - 1, deter=deter, stoch=stoch, action=action)
        contracts.floating(deter=deter, stoch=stoch, action=action)
        x = jnp.concatenate([stoch.reshape(*deter.shape[:-1], -1).astype(deter.dtype), action.astype(deter.dtype)], -1)
        if self.input_layer:
            x = self.act(self.input_norm(self.input(x)))
        return self.gru(deter, x)

    def prior(self, deter: Array) -> Array:
        """What describes p(z | h): `[..., D] -> [..., outputs]` float32."""
        contracts.floating(self.deter, deter=deter)
        return self.prior_out(self.act(self.prior_norm(self.prior_layer(deter)))).astype(jnp.float32)

    def project(self, embed: Array) -> Array:
        """The embedding's part of the posterior's layer, `[..., E] -> [..., hidden]`, for `posterior`."""
        contracts.floating(self.embed, embed=embed)
        return self.posterior_layer.part(1, embed)

    def posterior(self, deter: Array, projected: Array) -> Array:
        """What describes q(z | h, x): `[..., D]` and `project`'s output -> `[..., outputs]` float32."""
        contracts.floating(self.deter, deter=deter)
        contracts.floating(self.hidden, projected=projected)
        contracts.leading(deter.ndim - 1, deter=deter, projected=projected)
        x = self.posterior_layer.combine(self.posterior_layer.part(0, deter), projected)
        return self.posterior_out(self.act(self.posterior_norm(x))).astype(jnp.float32)
