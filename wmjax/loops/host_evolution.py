"""A search for parameters by the returns they earn, where the environments run outside of compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import evolution
from wmjax.loops.host.rollout import act_program, first_episodes, seed_words
from wmjax.ops import noise
from wmjax.types import Agent, AgentState, Array, Evolve, HostEnv, HostEnvs, Metrics, PyTree, Trajectory

Iteration = Callable[[HostEnvs, AgentState, Array, Trajectory | None], tuple[AgentState, Metrics] | None]


def make_iteration(agent: Agent, env: HostEnv, evolve: Evolve) -> Iteration:
    """As `evolution.make_iteration`, from the same keys: some generations, then an evaluation of the mean.

    In dreams that is one compiled program. In environments on the host a generation asks and tells in compiled
    programs; between them its episodes are played, as many at once as there are environments, candidate i in slot i
    where there are as many environments as candidates. Candidates that play the same episodes (`evolve.common`) play
    them from the same seeds.

    Args:
      agent: acts, and brings the model that is dreamed by.
      env: takes what the agent emits.
      evolve: what is searched for, and where.

    Returns:
      `(envs, AgentState, key, Trajectory or None) -> (AgentState, Metrics)`; it gives None where the environments were
      told to stop.
    """
    if evolve.where == "dream":
        dream = jax.jit(evolution.make_iteration(agent, env, evolve))
        return lambda envs, state, key, batch: dream(state, key, batch)

    slots = agent.recipe.num_envs
    act = act_program(agent.act, env, explore=True)
    carry_of = jax.jit(lambda params: agent.act_carry(params, slots))
    searches = evolution.populations(evolve)
    asks = [jax.jit(functools.partial(evolution.ask, search)) for search in searches]
    tells = [jax.jit(functools.partial(evolution.tell, search)) for search in searches]
    over = jax.jit(lambda state: evolution.is_over(evolve, state))
    again = jax.jit(lambda key, state: evolution.restart_if_done(evolve, key, state))
    keep = jax.jit(lambda state, returns: evolution.keep_mean(evolve, state, returns))
    keys_of = jax.jit(lambda key, count: noise.row_keys(jax.random.fold_in(key, count), slots))

    def play(
        envs: HostEnvs, params: PyTree, key: Array, candidates: Array, rollouts: int, common: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns and lengths `[candidates, rollouts]`."""
        candidates, words = np.asarray(candidates, np.float32), seed_words(key)
        pairs = [(i, k) for k in range(rollouts) for i in range(len(candidates))]
        returns, lengths = np.zeros((2, len(candidates), rollouts), np.float32)
        for begin in range(0, len(pairs), slots):
            flown = pairs[begin : begin + slots]
            filled = flown + flown[-1:] * (slots - len(flown))  # what is left over flies for nothing
            own = evolve.set(params, jnp.asarray(candidates[[i for i, _ in filled]]))
            seeds = [[*words, k] if common else [*words, k, i] for i, k in filled]
            played = first_episodes(envs, act, own, keys_of(key, begin), carry_of(own), seeds, evolve.max_steps)
            if played is None:
                return None
            for (i, k), earned, length in zip(flown, played.returns, played.lengths, strict=False):
                returns[i, k], lengths[i, k] = earned, length
        return returns, lengths

    def iteration(envs: HostEnvs, state: AgentState, key: Array, batch: None) -> tuple[AgentState, Metrics] | None:
        key_search, key_mean, _ = jax.random.split(key, 3)
        restarts, rows, index = evolve.restarts is not None, [], 0
        nothing = restarts and bool(over(state))
        for key_generation in jax.random.split(key_search, evolve.generations):
            if restarts:
                key_restart, key_generation = jax.random.split(key_generation)
                index = int(evolution.restarts_so_far(evolve, state))
                if over(state):
                    rows.append(evolution.rest(evolve, state)[1])
                    continue
            key_ask, key_tell, key_play, _ = jax.random.split(key_generation, 4)
            candidates, asked = asks[index](key_ask, state)
            played = play(envs, state.params, key_play, candidates, evolve.rollouts, evolve.common)
            if played is None:
                return None
            state, metrics = tells[index](key_tell, asked, candidates, *played)
            state = again(key_restart, state) if restarts else state
            rows.append(metrics)
        metrics = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        metrics = evolution.means_of_generations(state, evolve, metrics)
        if nothing:
            state, more = evolution.keep_all(evolve, state)
            return state, metrics | more
        mean = evolution.distribution_mean(evolve, state)[None]
        played = play(envs, state.params, key_mean, mean, evolve.mean_rollouts, True)
        if played is None:
            return None
        state, more = keep(state, played[0])
        return state, metrics | more

    return iteration
