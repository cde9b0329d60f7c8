"""A search for parameters by the returns they earn, where the environments run outside of compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import distributed, evolution
from wmjax.loops import compiler
from wmjax.loops.host.columns import Columns
from wmjax.loops.host.rollout import act_program, first_episodes, seed_words
from wmjax.types import Agent, AgentState, Array, Evolve, HostEnv, HostEnvs, Metrics, PyTree, Trajectory


class _Stopped(Exception):
    """The environments were told to stop."""


def _scan(body: Callable, state: AgentState, keys: Array) -> tuple[AgentState, Metrics]:
    rows = []
    for key in keys:
        state, row = body(state, key)
        rows.append(row)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *rows)


def _flow() -> evolution.Flow:
    return evolution.Flow(
        _scan,
        lambda condition, then, otherwise, state: (then if condition else otherwise)(state),
        lambda index, branches, state: branches[int(index)](state),
        cache(partial(jax.jit, static_argnums=0)),
    )


class Search:
    """As `evolution.iteration`, from the same keys: some generations, then an evaluation of the mean.

    In dreams that is one compiled program. In environments on the host a generation asks and tells in compiled
    programs; between them its episodes are played, as many at once as there are environments, candidate i in slot i
    where there are as many environments as candidates. Candidates that play the same episodes (`evolve.common`) play
    them from the same seeds. Of several processes each plays in its own environments, and all tell the same; what is
    dreamed, all dream.

    Args:
      agent: acts, and brings the model that is dreamed by.
      env: takes what the agent emits.
      evolve: what is searched for, and where.
    """

    def __init__(self, agent: Agent, env: HostEnv, evolve: Evolve) -> None:
        slots, columns = agent.recipe.num_envs, Columns(agent.recipe.num_envs)
        self._evolve, self._slots, self._mine, self._flow = evolve, slots, columns.mine, _flow()
        self._dream = jax.jit(partial(evolution.iteration, agent, env, evolve), compiler_options=compiler.options())
        self._act = act_program(agent.act, env, explore=True)
        self._carry = jax.jit(lambda params: agent.act_carry(params, columns.num_envs))
        self._keys = jax.jit(columns.row_keys)

    def __call__(
        self, envs: HostEnvs, state: AgentState, key: Array, batch: Trajectory | None
    ) -> tuple[AgentState, Metrics] | None:
        """The state and metrics; None where the environments were told to stop."""
        if self._evolve.where == "dream":
            return self._dream(state, key, batch)
        try:
            return evolution.iterate(self._evolve, partial(self._play, envs), state, key, self._flow)
        except _Stopped:
            return None

    def _play(self, envs: HostEnvs, params: PyTree, theta: Array, key: Array, _: Array) -> np.ndarray:
        """As `returns_of` of `evolution.generate`: returns and lengths `[2, candidates, rollouts]`."""
        evolve, slots, words = self._evolve, self._slots, seed_words(key)
        rollouts, common = (evolve.rollouts, evolve.common) if theta.ndim == 2 else (evolve.mean_rollouts, True)
        candidates = np.atleast_2d(np.asarray(theta, np.float32))
        pairs = [(i, k) for k in range(rollouts) for i in range(len(candidates))]
        played = np.zeros((2, len(candidates), rollouts), np.float32)
        for begin in range(0, len(pairs), slots):
            flown = pairs[begin : begin + slots]
            filled = (flown + flown[-1:] * (slots - len(flown)))[self._mine]  # what is left over flies for nothing
            own = evolve.set(params, jnp.asarray(candidates[[i for i, _ in filled]]))
            seeds = [[*words, k] if common else [*words, k, i] for i, k in filled]
            keys, carry = self._keys(key, begin), self._carry(own)
            how = self._act, own, keys, carry, seeds, evolve.max_steps
            episodes = distributed.at_once(lambda how=how: first_episodes(envs, *how))
            if not distributed.every(episodes is not None):
                raise _Stopped
            told = np.concatenate(distributed.gather([episodes.returns, episodes.lengths]), 1)
            for (i, k), *found in zip(flown, *told, strict=False):
                played[:, i, k] = found
        return played
