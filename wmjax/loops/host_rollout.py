"""Acting in environments that run outside of compiled programs: evaluation, and records to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from wmjax import checks
from wmjax.loops.rollout import EVALUATION_STEPS
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Discrete, EnvSpec, HostEnv, HostEnvs, PyTree, RunError, TimeStep


class Options(NamedTuple):
    """How to run; none of it changes what is computed, except `overlap`."""

    workers: int | None = None  # processes that step environments; None: one per processor
    timeout: float = 60.0  # seconds for a step
    max_restarts: int = 10  # environments that may be lost within an hour
    memory_map: bool = False  # whether replay is read from its files instead of kept in memory
    overlap: bool = True  # whether to learn while environments step


DEFAULTS = Options()


def timestep_shapes(spec: EnvSpec, num_envs: int) -> TimeStep:
    """Shapes and dtypes of the records of some environments."""
    shape = lambda space: () if isinstance(space, Discrete) else space.shape
    dtype = lambda space: "int32" if isinstance(space, Discrete) else space.dtype
    obs = {name: jax.ShapeDtypeStruct((num_envs, *shape(x)), dtype(x)) for name, x in spec.obs.items()}
    flag = jax.ShapeDtypeStruct((num_envs,), bool)
    return TimeStep(obs, jax.ShapeDtypeStruct((num_envs,), "float32"), flag, flag, flag)


def act_program(act: Callable, env: HostEnv, step_keys: Callable = noise.fold_in, *, explore: bool) -> Callable:
    """`(params, key, t, carry, timestep) -> (carry, action, native action, latent)`, compiled.

    The keys of environments in step t are `step_keys(key, t)`.
    """

    def program(params: PyTree, key: Array, t: Array, carry: PyTree, timestep: TimeStep) -> tuple:
        key_act, _ = noise.split(step_keys(key, t), 2)
        carry, action, latent = act(params, key_act, carry, timestep, explore=explore)
        return carry, action, jax.vmap(env.native)(action), latent

    return jax.jit(program)


def seed_words(key: Array) -> list[int]:
    """A key as entropy for the seeds of environments."""
    return [int(word) for word in np.ravel(jax.random.key_data(key))]


class HostEvaluator:
    """Plays evaluation episodes in processes of their own, some at once. Episode i depends on the key and i only.

    Args:
      agent: who acts.
      env: takes what the agent emits.
      width: episodes at once.
      options: how to run.
      say: is told of environments that are lost; where too many are, returns are NaN. None: that is an error.
      stop: whether to give up; returns are then NaN.
    """

    def __init__(
        self,
        agent: Agent,
        env: HostEnv,
        width: int,
        options: Options = DEFAULTS,
        say: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._agent, self._env, self._width, self._options, self._say, self._stop = (
            agent,
            env,
            width,
            options,
            say,
            stop,
        )
        self._act = act_program(agent.act, env, explore=False)
        self._carry = jax.jit(lambda params: agent.act_carry(params, width))
        self._keys = jax.jit(lambda key: noise.row_keys(key, width))

    def __call__(self, params: PyTree, key: Array, episodes: int) -> np.ndarray:
        """Returns float32 `[episodes]`. Raises `UsageError` unless `episodes` is an integer of at least 1."""
        episodes = checks.number("episodes", episodes)
        try:
            say = self._say or (lambda text: None)
            envs = start(self._env, self._width, self._options, training=False, say=say, stop=self._stop)
            try:
                rounds = range(math.ceil(episodes / self._width))
                played = [self._play(envs, params, noise.fold_in(key, i)) for i in rounds]
            finally:
                envs.close()
        except RunError as error:
            if self._say is None:
                raise
            self._say(f"warning: evaluation was given up: {error}")
            return np.full(episodes, np.nan, np.float32)
        return np.concatenate(played)[:episodes]

    def _play(self, envs: HostEnvs, params: PyTree, key: Array) -> np.ndarray:
        seeds = [[*seed_words(key), i] for i in range(self._width)]
        steps = self._env.spec.max_episode_steps or EVALUATION_STEPS
        played = first_episodes(envs, self._act, params, self._keys(key), self._carry(params), seeds, steps)
        return np.full(self._width, np.nan, np.float32) if played is None else played[0]


def first_episodes(
    envs: HostEnvs, act: Callable, params: PyTree, key: Array, carry: PyTree, seeds: list[list[int]], max_steps: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Plays the first episode of every environment, all at once; one that is lost with its environment is begun again.

    Args:
      envs: the environments, which are reset.
      act: `act_program`.
      params, key, carry: of `act`.
      seeds: of the episodes, one for each environment.
      max_steps: steps after which an episode ends.

    Returns:
      Undiscounted returns, float32, and lengths in steps, int32; None where the environments were told to stop.
    """
    width = len(seeds)
    returns, lengths, ended = np.zeros(width, np.float32), np.zeros(width, np.int32), np.zeros(width, bool)
    timestep, t = envs.reset(seeds), 0
    while timestep is not None:
        again = timestep.is_first & ~ended  # at the start, or lost with its environment
        returns = np.where(again, 0, returns) + np.where(ended, 0, timestep.reward)
        lengths = np.where(again, 0, lengths + ~ended)
        ended |= timestep.is_last | (lengths >= max_steps)
        if ended.all():
            return returns.astype(np.float32), lengths
        carry, _, native, _ = act(params, key, t, carry, timestep)
        envs.send(np.asarray(native))
        timestep, t = envs.receive(), t + 1
    return None


def start(
    env: HostEnv,
    num_envs: int,
    options: Options,
    *,
    training: bool,
    say: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> HostEnvs:
    """Starts environments as the options say."""
    how = dict(workers=options.workers, timeout=options.timeout, max_restarts=options.max_restarts)
    return env.start(num_envs, **how, training=training, say=say, stop=stop)


def play(agent: Agent, env: HostEnv, params: PyTree, key: Array, num_envs: int, steps: int) -> Record:
    """Records `[steps, num_envs, ...]` of acting as in evaluation, without latents."""
    act, keys = act_program(agent.act, env, explore=False), noise.row_keys(key, num_envs)
    envs = start(env, num_envs, DEFAULTS, training=False)
    records = []
    try:
        carry, seed = agent.act_carry(params, num_envs), seed_words(key)
        timestep = envs.reset([[*seed, i] for i in range(num_envs)])
        for t in range(steps):
            carry, action, native, _ = act(params, keys, t, carry, timestep)
            records.append(Record(timestep, np.asarray(action), ()))
            envs.send(np.asarray(native))
            timestep = envs.receive()
    finally:
        envs.close()
    return jax.tree.map(lambda *x: np.stack(x), *records)
