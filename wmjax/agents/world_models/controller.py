"""C: a small network acts. Its numbers are searched for by CMA-ES, in the environment or in dreams."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wmjax import dreaming, evolution
from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.vision import unpack_latent
from wmjax.nets.spaces import action_size
from wmjax.ops import noise
from wmjax.types import Array, Discrete, EnvSpec, Evolve, Sampling, WorldModel

FULL_CMA = 1100  # parameters, beyond which a full covariance costs more than it gives; Doom has 1,088


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
    """tanh(x W + b), layer after layer: inputs `[..., layers[0]]` to actions float32 `[..., layers[-1]]` in (-1, 1).

    `theta` is `[n]`, for each layer its bias (if there are biases), then W `[inputs, outputs]` row by row, as in the
    authors' files; or `[P, n]`, where rows belong to P controllers, side by side.
    """
    theta, lead = jnp.atleast_2d(theta), inputs.shape[:-1]
    x, used = inputs.reshape(theta.shape[0], -1, layers[0]), 0
    for size, outputs in itertools.pairwise(layers):
        offset = 0.0
        if bias:
            offset, used = theta[:, None, used : used + outputs], used + outputs
        kernel = theta[:, used : used + size * outputs].reshape(-1, size, outputs)
        x, used = jnp.tanh(jnp.matmul(x, kernel, precision="highest") + offset), used + size * outputs
    assert used == theta.shape[1], (used, theta.shape)
    return x.reshape(*lead, layers[-1])


def as_action(output: Array, spec: EnvSpec) -> Array:
    """Numbers `[..., A]` as an agent's action: one-hot of the largest, or themselves clipped to [-1, 1]."""
    if isinstance(spec.action, Discrete):
        return jax.nn.one_hot(jnp.argmax(output, -1), spec.action.n)
    return jnp.clip(output, -1.0, 1.0)


def dream_starts(model: WorldModel, count: int, first: bool = False) -> Callable:
    """States to dream from: `(params, key, Trajectory [T, B]) -> States [count]`.

    M reads the records, and states are drawn from all of them but those that ended an episode. Where records are
    `first` frames, T is 1 and M's memory is empty.
    """

    def starts(params, key, trajectory):
        key_observe, key_choice = jax.random.split(key)
        keys = noise.row_keys(key_observe, trajectory.action.shape[1])
        prev_action = jnp.concatenate([jnp.zeros_like(trajectory.action[:1]), trajectory.action[:-1]])
        init = model.init_state(params, trajectory.action.shape[1])
        embed = unpack_latent(trajectory.latent)
        is_first = trajectory.step.is_first | first
        _, states = dreaming.observe(model, params, keys, init, prev_action, embed, is_first)
        states = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        going = ~trajectory.step.is_last.reshape(-1)
        logits = jnp.where(going | ~going.any(), 0.0, -jnp.inf)
        index = jax.random.categorical(key_choice, logits, shape=(count,))
        return jax.tree.map(lambda x: x[index], states)

    return starts


def evolve(spec: EnvSpec, config: WorldModelsConfig, model: WorldModel) -> Evolve:
    """The search as a value."""
    search, size = config.evolve, controller_size(spec, config)
    kind = {"auto": "sep_cma_es" if size > FULL_CMA else "cma_es"}.get(search.strategy, search.strategy)
    strategy = evolution.make_strategy(
        evolution.StrategyConfig(size, search.population, kind, search.sigma_init, weight_decay=search.weight_decay)
    )
    first = search.start_from == "first"
    length = 1 if first else min(32, config.memory_length)
    rows = min(search.starts if first else 64, search.starts, config.replay_capacity // length)
    rows = 2 ** (rows.bit_length() - 1)  # a power of two, which devices can share
    return Evolve(
        "controller",
        strategy,
        get=lambda params: params["controller"],
        set=lambda params, theta: params | {"controller": theta},
        where=search.where,
        rollouts=search.rollouts,
        population=search.population,
        mean_rollouts=search.mean_rollouts,
        common=search.common,
        restarts=search.restarts,
        max_steps=search.horizon or spec.max_episode_steps or 1000,
        generations=min(search.mean_every, search.generations),
        starts=dream_starts(model, search.starts, first),
        sampling=Sampling(length, starts=search.start_from),
        batch_size=rows,
    )
