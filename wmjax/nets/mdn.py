"""The MDN-RNN of World Models: an LSTM whose output is a mixture of Gaussians over the next latent.

Source: Ha & Schmidhuber 2018, appendix "Recurrent neural network"; cells and layouts as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.ops.mixture import Mixture
from wmjax.types import Array

_glorot = nn.initializers.glorot_uniform()


class MDNRNN(nn.Module):
    """One step of the memory, in three parts: what needs no state, the cell, and the heads on its output.

    Inputs are [z, action], then 1 where an episode begins if `restart_input`. Parameters `kernel` [inputs + H, 4 H],
    rows of the inputs first, gates in the order input, candidate, forget, output, and `bias` [4 H] without the
    `forget_bias`, which is added in the cell: TensorFlow's BasicLSTMCell.
    """

    latent: int  # Z
    action: int  # A
    hidden: int = 256  # H
    mixtures: int = 5  # components K
    mixture: str = "per_dim"  # weights for each latent dimension; or `shared`, one set of weights for all
    reward_head: str = "none"  # `mse`, a mean; `gaussian`, a mean and a log standard deviation
    done_head: bool = False  # a logit of the end of the episode
    restart_input: bool = False
    layer_norm: bool = False  # of each gate and the cell state that is put out: TensorFlow's LayerNormBasicLSTMCell
    forget_bias: float = 1.0
    dtype: str = "float32"  # of the matrix products; the state, what is made of gates, and outputs are float32
    action_map: Callable[[Array], Array] | None = None  # of actions before they are fed in; None: as they are

    def setup(self):
        self.inputs_size = self.latent + self.action + self.restart_input
        shape = (self.inputs_size + self.hidden, 4 * self.hidden)
        self.kernel = self.param("kernel", _glorot, shape)
        if self.layer_norm:
            self.norms = [nn.LayerNorm(epsilon=1e-12, name=f"norm_{name}") for name in ("i", "j", "f", "o", "c")]
        else:
            self.bias = self.param("bias", nn.initializers.zeros_init(), (4 * self.hidden,))
        weights = self.latent if self.mixture == "per_dim" else 1
        self.sizes = (weights, self.latent, self.latent)
        dense = lambda size, name: nn.Dense(size, dtype=self.dtype, kernel_init=_glorot, name=name)
        self.mixture_out = dense(self.mixtures * sum(self.sizes), "mixture_out")
        if self.reward_head != "none":
            self.reward_out = dense(2 if self.reward_head == "gaussian" else 1, "reward_out")
        if self.done_head:
            self.done_out = dense(1, "done_out")

    def inputs(self, z: Array, action: Array, is_first: Array) -> Array:
        """The inputs' part of the gates, `[..., Z]`, `[..., A]`, bool `[...]` -> `[..., 4 H]`: no state is needed."""
        contracts.floating(self.latent, z=z)
        contracts.floating(self.action, action=action)
        contracts.leading(z.ndim - 1, z=z, action=action)
        contracts.exactly(*z.shape[:-1], is_first=is_first)
        contracts.booleans(is_first=is_first)
        action = action if self.action_map is None else self.action_map(action)
        parts = [z, action, *([is_first[..., None].astype(z.dtype)] if self.restart_input else [])]
        gates = self._product(jnp.concatenate(parts, -1), self.kernel[: self.inputs_size])
        return gates if self.layer_norm else gates + self.bias

    def _product(self, x: Array, kernel: Array) -> Array:
        return (x.astype(self.dtype) @ kernel.astype(self.dtype)).astype(jnp.float32)

    def advance(self, h: Array, c: Array, gates: Array) -> tuple[Array, Array]:
        """The cell: c' = c σ(f + 1) + σ(i) tanh(j), h' = tanh(c') σ(o); `[..., H]`, `[..., H]`, `[..., 4 H]`."""
        contracts.floating(self.hidden, h=h, c=c)
        contracts.floating(4 * self.hidden, gates=gates)
        contracts.leading(h.ndim - 1, h=h, c=c, gates=gates)
        parts = jnp.split(gates + self._product(h, self.kernel[self.inputs_size :]), 4, -1)
        if self.layer_norm:
            parts = [norm(x) for norm, x in zip(self.norms, parts, strict=False)]
        i, j, f, o = parts
        c = c * jax.nn.sigmoid(f + self.forget_bias) + jax.nn.sigmoid(i) * jnp.tanh(j)
        out = self.norms[-1](c) if self.layer_norm else c
        return jnp.tanh(out) * jax.nn.sigmoid(o), c

    def predict_latent(self, h: Array) -> Mixture:
        """The next latent, from the output of the step before it."""
        contracts.floating(self.hidden, h=h)
        raw = self.mixture_out(h).astype(jnp.float32)
        weights, means, _ = (self.mixtures * size for size in self.sizes)
        parts = jnp.split(raw, (weights, weights + means), -1)
        return Mixture(*(x.reshape(*h.shape[:-1], self.mixtures, -1) for x in parts))

    def predict_outcome(self, h: Array) -> dict[str, Array]:
        """Raw outputs of the reward head `[..., 1 or 2]` and of the done head `[..., 1]`, those that there are."""
        contracts.floating(self.hidden, h=h)
        outputs = {"reward": self.reward_out(h)} if self.reward_head != "none" else {}
        outputs |= {"done": self.done_out(h)} if self.done_head else {}
        return {name: x.astype(jnp.float32) for name, x in outputs.items()}

    def everything(self, h: Array, c: Array, z: Array, action: Array, is_first: Array) -> tuple:
        """One whole step; touches every parameter."""
        h, c = self.advance(h, c, self.inputs(z, action, is_first))
        return h, c, self.predict_latent(h), self.predict_outcome(h)
