"""Acting: an agent, or chance, steps a batch of environments inside one scan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wmjax.evolution import play
from wmjax.ops import noise
from wmjax.ops.action_distributions import random_action
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Env, EnvSpec, PyTree, TimeStep, UsageError

EVALUATION_STEPS = 10_000  # where an environment has no limit of its own
EVALUATION_ENVS = 128  # that run at once
PERIODIC_EPISODES = 16  # of an evaluation while training; also how many share a key, see `driver.Evaluator`


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


def random_act(agent: Agent, spec: EnvSpec) -> Callable:
    """`Agent.act` by chance. The carry stays as it is, the latents are zeros of the structure that `agent` stores."""

    def act(params: PyTree, key: Array, carry: PyTree, timestep: TimeStep, *, explore: bool) -> tuple[Any, Array, Any]:
        _, _, latent = jax.eval_shape(lambda *a: agent.act(*a, explore=explore), params, key, carry, timestep)
        keys = key if key.ndim else noise.row_keys(key, timestep.reward.shape[0])
        action = jax.vmap(lambda k: random_action(spec.action, k))(keys)
        return carry, action, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), latent)

    return act


def rollout(
    act: Callable,
    env_step: Callable,
    params: PyTree,
    key: Array,
    position: Position,
    steps: int,
    *,
    explore: bool,
    axis_name: str | None = None,
) -> tuple[Position, Record]:
    """Acts for some steps and records them.

    Args:
      act: as `Agent.act`, for instance `random_act(agent, spec)`; gets one key for each environment.
      env_step: `vmap(env.step)` of an environment that takes what the agent emits; restarts episodes by itself.
      params: of the agent.
      key: consumed. Step t of environment i uses `fold_in(fold_in(key, t), i)`.
      position: where to start.
      steps: for each environment.
      explore: whether to act for the sake of learning rather than of return.
      axis_name: the named axis that the environments are spread over, or None; i then counts over all of them.

    Returns:
      Where it ended, and the records `[steps, num_envs, ...]`; the first holds `position.timestep`.
    """
    num_envs = position.timestep.reward.shape[0]

    def body(position: Position, t: Array) -> tuple[Position, Record]:
        # A key for each row, so that it does not depend on how many others there are.
        key_act, key_env = noise.split(noise.row_keys(jax.random.fold_in(key, t), num_envs, axis_name), 2)
        env_state, timestep, carry = position
        carry, action, latent = act(params, key_act, carry, timestep, explore=explore)
        env_state, following = env_step(key_env, env_state, action)
        return Position(env_state, following, carry), Record(timestep, action, latent)

    return jax.lax.scan(body, Position(*position), jnp.arange(steps))


def step_limit(spec: EnvSpec) -> int:
    """Agent steps after which an evaluation cuts an episode: the environment's own limit, or `EVALUATION_STEPS`."""
    return spec.max_episode_steps or EVALUATION_STEPS


def evaluate(
    agent: Agent,
    env: Env,
    params: PyTree,
    key: Array,
    episodes: int,
    *,
    explore: bool = False,
    max_steps: int | None = None,
) -> Evaluation:
    """Plays the first episode of `episodes` fresh environments, in parallel.

    To be compiled by the caller, with `params` and `key` as arguments. Episode i depends on the key and i only.

    Args:
      agent: who acts.
      env: takes what the agent emits.
      params: of the agent.
      key: consumed.
      episodes: how many; at most `EVALUATION_ENVS` run at once.
      explore: whether to act as while collecting.
      max_steps: agent steps after which an episode is cut; by default `step_limit`.
    """
    if episodes < 1:
        raise UsageError(f"episodes {episodes}: must be at least 1")
    limit = max_steps or step_limit(env.spec)
    chunks = -(-episodes // EVALUATION_ENVS)
    width = -(-episodes // chunks)
    keys = noise.row_keys(key, chunks * width).reshape(chunks, width)
    act = functools.partial(agent.act, explore=explore)
    chunk = lambda keys: play(env, act, params, agent.act_carry(params, width), keys, limit)
    returns, lengths, ended = (x.reshape(-1)[:episodes] for x in jax.lax.map(chunk, keys))
    return Evaluation(returns, lengths, ~ended)
