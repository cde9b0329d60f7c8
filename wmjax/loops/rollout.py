"""Acting: an agent, or chance, steps a batch of environments inside one scan."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks, distributed
from wmjax.evolution import play
from wmjax.loops import compiler
from wmjax.loops.ahead import Ahead
from wmjax.ops import noise
from wmjax.ops.action_distributions import random_action
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Env, EnvSpec, PyTree, TimeStep

EVALUATION_STEPS = 10_000  # where an environment has no limit of its own
PERIODIC_EPISODES = 16  # of an evaluation while training; also how many share a key, see `Evaluator`


class Position(NamedTuple):
    """Where a batch of environments and the agent that acts in them stand; leaves are `[num_envs, ...]`."""

    env_state: PyTree
    timestep: TimeStep  # has not been acted on yet
    carry: PyTree


class Evaluation(NamedTuple):
    """One episode of each of several environments; arrays `[(seeds,) episodes]`."""

    returns: Array  # float32, undiscounted sums of reward
    lengths: Array  # int32, in agent steps
    cut: Array  # bool, still going when the step limit came, so the return is that of a part


def random_act(agent: Agent | None, spec: EnvSpec) -> Callable:
    """`Agent.act` by chance. The carry stays as it is, the latents are zeros of the structure that `agent` stores.

    Without an agent there are none.
    """

    def act(params: PyTree, key: Array, carry: PyTree, timestep: TimeStep, *, explore: bool) -> tuple[Any, Array, Any]:
        latent = ()
        if agent is not None:
            _, _, latent = jax.eval_shape(lambda *a: agent.act(*a, explore=explore), params, key, carry, timestep)
        keys = key if key.ndim else noise.row_keys(key, timestep.reward.shape[0])
        action = jax.vmap(lambda k: random_action(spec.action, k))(keys)
        return carry, action, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), latent)

    return act


def rollout(
    act: Callable, env: Env, params: PyTree, key: Array, position: Position, steps: int, axis_name: str | None = None
) -> tuple[Position, Record]:
    """Acts for some steps and records them.

    Args:
      act: `(params, keys [num_envs], carry, TimeStep) -> (carry, action, latent)`.
      env: takes what `act` emits.
      params: of `act`.
      key: consumed. Step t of environment i uses `fold_in(fold_in(key, t), i)`.
      position: where to start.
      steps: for each environment.
      axis_name: the named axis that the environments are spread over, or None; i then counts over all of them.

    Returns:
      Where it ended, and the records `[steps, num_envs, ...]`; the first holds `position.timestep`.
    """
    num_envs = position.timestep.reward.shape[0]

    def body(position: Position, t: Array) -> tuple[Position, Record]:
        # A key for each row, so that it does not depend on how many others there are.
        key_act, key_env = noise.split(noise.row_keys(jax.random.fold_in(key, t), num_envs, axis_name), 2)
        env_state, timestep, carry = position
        carry, action, latent = act(params, key_act, carry, timestep)
        env_state, following = jax.vmap(env.step)(key_env, env_state, action)
        return Position(env_state, following, carry), Record(timestep, action, latent)

    return jax.lax.scan(body, Position(*position), jnp.arange(steps))


def step_limit(spec: EnvSpec) -> int:
    """Agent steps after which an evaluation cuts an episode: the environment's own limit, or `EVALUATION_STEPS`."""
    return spec.max_episode_steps or EVALUATION_STEPS


class Evaluator:
    """Plays evaluation episodes, `PERIODIC_EPISODES` at once, so that one compiled program serves any number.

    Episode i depends on the key and i only.

    Args:
      agent: who acts.
      env: takes what the agent emits.
      seeds: whether parameters and keys have a leading axis of seeds.
      max_steps: agent steps after which an episode is cut; by default `step_limit`.
      shared: whether all processes call, and share out the episodes.
    """

    def __init__(
        self, agent: Agent, env: Env, *, seeds: bool = False, max_steps: int | None = None, shared: bool = False
    ) -> None:
        self._shared = shared and distributed.count() > 1
        act, limit = partial(agent.act, explore=False), max_steps or step_limit(env.spec)

        def some(params: PyTree, key: Array) -> Evaluation:
            keys, carry = noise.row_keys(key, PERIODIC_EPISODES), agent.act_carry(params, PERIODIC_EPISODES)
            returns, lengths, ended = play(env, act, params, carry, keys, limit)
            return Evaluation(returns, lengths, ~ended)

        self._play = jax.jit(jax.vmap(some) if seeds else some, compiler_options=compiler.options())

    def compile_ahead(self, pool: Executor, params: PyTree, key: Array) -> None:
        """Begins to compile what it plays by, for parameters and keys of these shapes."""
        self._play = Ahead(pool, self._play, params, key)

    def __call__(self, params: PyTree, key: Array, episodes: int) -> Evaluation:
        """Of `[(seeds,) episodes]`. Raises `UsageError` unless `episodes` is an integer of at least 1."""
        episodes = checks.number("episodes", episodes)
        rounds = math.ceil(episodes / PERIODIC_EPISODES)
        if not self._shared:
            played = [self._round(params, key, i) for i in range(rounds)]
        else:
            played = []
            for first in range(0, rounds, distributed.count()):  # each process plays one of so many
                own = first + distributed.index()
                told = distributed.gather(self._round(params, key, own if own < rounds else None))
                played += [*told][: rounds - first]
        kinds = np.float32, np.int32, bool
        found = zip(np.concatenate(played, -1)[..., :episodes], kinds, strict=True)
        return Evaluation(*(values.astype(kind) for values, kind in found))

    def _round(self, params: PyTree, key: Array, i: int | None) -> np.ndarray:
        """Returns, lengths and cuts of a round, float64 `[3, (seeds,) PERIODIC_EPISODES]`; of None, zeros."""
        if i is None:
            return np.zeros((3, *key.shape, PERIODIC_EPISODES))
        return np.stack(jax.device_get(self._play(params, noise.fold_in(key, i)))).astype(np.float64)
