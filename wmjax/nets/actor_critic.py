"""A policy and a value on images, with a memory: convolutions, then an LSTM.

Parameters start as PyTorch's layers do. Source: Micheli et al. 2023 (IRIS), appendix A.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from wmjax.nets import conv
from wmjax.nets.vqgan import uniform_within
from wmjax.ops import contracts
from wmjax.types import Array


class Memory(NamedTuple):
    """State of the LSTM."""

    hidden: Array  # float32 [B, units]
    cell: Array  # float32 [B, units]


def zero_memory(batch: int, units: int) -> Memory:
    """The memory at the start of an episode."""
    return Memory(jnp.zeros((batch, units)), jnp.zeros((batch, units)))


class ConvStack(nn.Module):
    """Images `[..., H, W, C]` to flat features `[..., F]`; attributes as in `ActorCritic`."""

    channels: Sequence[int]
    patch: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracts.floating(None, None, None, x=x)
        for index, channels in enumerate(self.channels):
            stem = index == 0 and self.patch > 1
            size = self.patch if stem else 3
            init = uniform_within((size**2 * x.shape[-1]) ** -0.5)
            options = dict(kernel_init=init, bias_init=init, dtype=self.dtype, name=f"conv{index}")
            options |= dict(stride=size) if stem else dict(max_pool=True)
            x = jax.nn.relu(conv.Conv(channels, size, **options)(x))
        return x.reshape(*x.shape[:-3], -1)


class ActorCritic(nn.Module):
    """Images to action logits and value. Convolutions are 3x3, pooled by 2, then rectified.

    Where `patch` is not 1, the first one sees patches of this side, without overlap and without pooling.
    """

    actions: int  # A
    channels: Sequence[int]  # of each convolution
    units: int  # of the LSTM
    patch: int = 1  # the paper's
    dtype: str = "float32"  # of convolutions and matrix products; the memory and outputs are float32

    def setup(self):
        init = uniform_within(self.units**-0.5)
        self.convs = ConvStack(self.channels, self.patch, self.dtype)
        # Two biases, as PyTorch has them: only their sum matters, but each is trained.
        linear = lambda features: nn.Dense(features, dtype=self.dtype, kernel_init=init, bias_init=init)
        self.input_gates, self.hidden_gates = linear(4 * self.units), linear(4 * self.units)
        self.actor, self.critic = linear(self.actions), linear(1)

    def features(self, image: Array) -> Array:
        """Images `[..., H, W, C]` in [0, 1] to what the LSTM takes in, `[..., 4 units]`; no time in it."""
        contracts.floating(None, None, None, image=image)
        return self.input_gates(self.convs(2 * image - 1)).astype(jnp.float32)

    def remember(self, memory: Memory, features: Array) -> Memory:
        """One step of the LSTM, gates in the order i, f, g, o; `features` `[B, 4 units]`."""
        contracts.floating(self.units, hidden=memory.hidden, cell=memory.cell)
        contracts.floating(4 * self.units, features=features)
        contracts.leading(features.ndim - 1, features=features, hidden=memory.hidden, cell=memory.cell)
        i, f, g, o = jnp.split(features + self.hidden_gates(memory.hidden).astype(jnp.float32), 4, -1)
        cell = jax.nn.sigmoid(f) * memory.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return Memory(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)

    def outputs(self, hidden: Array) -> tuple[Array, Array]:
        """Action logits `[..., A]` and value `[...]` from the LSTM's hidden state."""
        contracts.floating(self.units, hidden=hidden)
        return self.actor(hidden).astype(jnp.float32), self.critic(hidden)[..., 0].astype(jnp.float32)

    def __call__(self, memory: Memory, image: Array) -> tuple[Memory, Array, Array]:
        """One more image `[B, H, W, C]`: the memory after it, action logits and value."""
        memory = self.remember(memory, self.features(image))
        return memory, *self.outputs(memory.hidden)
