"""A search for parameters by the returns they earn, where the environments run outside of compiled programs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import evolution
from wmjax.loops.host.rollout import act_program, first_episodes, seed_words
from wmjax.ops import noise
from wmjax.types import Agent, AgentState, Array, Evolve, HostEnv, HostEnvs, Metrics, PyTree, Trajectory

_ask, _tell, _is_over, _restart_if_done, _keep_mean = (
    jax.jit(function, static_argnums=0)
    for function in (
        evolution.ask,
        evolution.tell,
        evolution.is_over,
        evolution.restart_if_done,
        evolution.keep_mean,
    )
)


class Search:
    """As `evolution.iteration`, from the same keys: some generations, then an evaluation of the mean.

    In dreams that is one compiled program. In environments on the host a generation asks and tells in compiled
    programs; between them its episodes are played, as many at once as there are environments, candidate i in slot i
    where there are as many environments as candidates. Candidates that play the same episodes (`evolve.common`) play
    them from the same seeds.

    Args:
      agent: acts, and brings the model that is dreamed by.
      env: takes what the agent emits.
      evolve: what is searched for, and where.
    """

    def __init__(self, agent: Agent, env: HostEnv, evolve: Evolve) -> None:
        slots = agent.recipe.num_envs
        self._evolve, self._slots = evolve, slots
        self._dream = jax.jit(partial(evolution.iteration, agent, env, evolve))
        self._act = act_program(agent.act, env, explore=True)
        self._carry = jax.jit(lambda params: agent.act_carry(params, slots))
        self._keys = jax.jit(lambda key, count: noise.row_keys(jax.random.fold_in(key, count), slots))

    def __call__(
        self, envs: HostEnvs, state: AgentState, key: Array, batch: Trajectory | None
    ) -> tuple[AgentState, Metrics] | None:
        """The state and metrics; None where the environments were told to stop."""
        evolve, rows = self._evolve, []
        if evolve.where == "dream":
            return self._dream(state, key, batch)
        key_search, key_mean, _ = jax.random.split(key, 3)
        nothing = _is_over(evolve, state)
        for key_generation in jax.random.split(key_search, evolve.generations):
            if _is_over(evolve, state):
                rows.append(evolution.rest(evolve, state)[1])
                continue
            search = evolution.populations(evolve)[int(evolution.restarts_so_far(evolve, state))]
            key_ask, key_tell, key_play, _, key_restart = evolution.generation_keys(evolve, key_generation)
            candidates, asked = _ask(search, key_ask, state)
            played = self._play(envs, state.variables, key_play, candidates, evolve.rollouts, evolve.common)
            if played is None:
                return None
            state, metrics = _tell(search, key_tell, asked, candidates, *played)
            state = _restart_if_done(evolve, key_restart, state)
            rows.append(metrics)
        metrics = evolution.means_of_generations(state, evolve, jax.tree.map(lambda *x: jnp.stack(x), *rows))
        if nothing:
            state, more = evolution.keep_all(evolve, state)
            return state, metrics | more
        mean = evolution.distribution_mean(evolve, state)[None]
        played = self._play(envs, state.variables, key_mean, mean, evolve.mean_rollouts, True)
        if played is None:
            return None
        state, more = _keep_mean(evolve, state, played[0])
        return state, metrics | more

    def _play(
        self, envs: HostEnvs, params: PyTree, key: Array, candidates: Array, rollouts: int, common: bool
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns and lengths `[candidates, rollouts]`."""
        candidates, words, slots = np.asarray(candidates, np.float32), seed_words(key), self._slots
        pairs = [(i, k) for k in range(rollouts) for i in range(len(candidates))]
        returns, lengths = np.zeros((2, len(candidates), rollouts), np.float32)
        for begin in range(0, len(pairs), slots):
            flown = pairs[begin : begin + slots]
            filled = flown + flown[-1:] * (slots - len(flown))  # what is left over flies for nothing
            own = self._evolve.set(params, jnp.asarray(candidates[[i for i, _ in filled]]))
            seeds = [[*words, k] if common else [*words, k, i] for i, k in filled]
            keys, carry = self._keys(key, begin), self._carry(own)
            played = first_episodes(envs, self._act, own, keys, carry, seeds, self._evolve.max_steps)
            if played is None:
                return None
            for (i, k), earned, length in zip(flown, played.returns, played.lengths, strict=False):
                returns[i, k], lengths[i, k] = earned, length
        return returns, lengths
