"""C: a small network acts. Its numbers, θ, are searched for in `search`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.nets.spaces import action_size
from wmjax.types import Array, Discrete, EnvSpec


def controller_layers(spec: EnvSpec, config: WorldModelsConfig) -> tuple[int, ...]:
    """Sizes from inputs to outputs."""
    inputs = {"z": config.latent, "h": config.hidden, "c": config.hidden}
    hidden = (config.controller_units,) if config.controller_units else ()
    return sum(inputs[name] for name in config.inputs), *hidden, action_size(spec)


def controller_size(spec: EnvSpec, config: WorldModelsConfig) -> int:
    """n, numbers of theta: 867 for CarRacing with [z, h]."""
    layers = controller_layers(spec, config)
    return sum((a + config.controller_bias) * b for a, b in itertools.pairwise(layers))


def controller(theta: Array, inputs: Array, layers: tuple[int, ...], bias: bool = True) -> Array:
    """tanh(x W + b), layer after layer, to actions in (-1, 1).

    Args:
      theta: `[n]`: for each layer its bias, then W `[inputs, outputs]` row by row, as in the authors' files; or
        `[P, n]`, where rows belong to P controllers, side by side.
      inputs: `[..., layers[0]]`.
      layers: sizes from inputs to outputs.
      bias: whether there are biases.

    Returns:
      float32 `[..., layers[-1]]`.
    """
    theta, lead = jnp.atleast_2d(theta), inputs.shape[:-1]
    x, used = inputs.reshape(theta.shape[0], -1, layers[0]), 0
    for size, outputs in itertools.pairwise(layers):
        offset = 0.0
        if bias:
            offset, used = theta[:, None, used : used + outputs], used + outputs
        kernel = theta[:, used : used + size * outputs].reshape(-1, size, outputs)
        x, used = jnp.tanh(x @ kernel + offset), used + size * outputs
    assert used == theta.shape[1], (used, theta.shape)
    return x.reshape(*lead, layers[-1])


def as_action(output: Array, spec: EnvSpec) -> Array:
    """Numbers `[..., A]` as an agent's action: one-hot of the largest, or themselves clipped to [-1, 1]."""
    if isinstance(spec.action, Discrete):
        return jax.nn.one_hot(jnp.argmax(output, -1), spec.action.n)
    return jnp.clip(output, -1.0, 1.0)
