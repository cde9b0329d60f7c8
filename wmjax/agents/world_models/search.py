"""How C is searched for: CMA-ES by the returns of a population, in the environment or in dreams."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wmjax import dreaming, evolution
from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.controller import controller_size
from wmjax.agents.world_models.vision import unpack_latent
from wmjax.ops import noise
from wmjax.types import EnvSpec, Evolve, Sampling, WorldModel

FULL_CMA = 1100  # parameters, beyond which a full covariance costs more than it gives; Doom has 1,088


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
        max_steps=search.horizon or spec.max_episode_steps or 1000,
        population=search.population,
        generations=min(search.mean_every, search.generations),
        mean_rollouts=search.mean_rollouts,
        common=search.common,
        starts=dream_starts(model, search.starts, first),
        sampling=Sampling(length, starts=search.start_from),
        batch_size=rows,
        restarts=search.restarts,
    )
