"""Acting in environments that run outside of compiled programs: evaluation, and records to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from wmjax import checks, distributed
from wmjax.loops import compiler
from wmjax.loops.rollout import PERIODIC_EPISODES, Evaluation, step_limit
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, HostEnv, HostEnvs, PyTree, RunError, TimeStep


class Options(NamedTuple):
    """How to run; none of it changes what is computed, except `overlap`."""

    workers: int | None = None  # processes that step environments; None: one per processor
    timeout: float = 60.0  # seconds for a step
    max_restarts: int = 10  # environments that may be lost within an hour
    memory_map: bool = False  # whether replay is read from its files instead of kept in memory
    overlap: bool = True  # whether to learn while environments step
    eval_envs: int | None = None  # that evaluations play in at once; 0: in the place of those of training


DEFAULTS = Options()


def act_program(act: Callable, env: HostEnv, step_keys: Callable = noise.fold_in, *, explore: bool) -> Callable:
    """`(params, key, t, carry, timestep) -> (carry, action, native action, latent)`, compiled.

    The keys of environments in step t are `step_keys(key, t)`.
    """

    def program(params: PyTree, key: Array, t: Array, carry: PyTree, timestep: TimeStep) -> tuple:
        key_act, _ = noise.split(step_keys(key, t), 2)
        carry, action, latent = act(params, key_act, carry, timestep, explore=explore)
        return carry, action, jax.vmap(env.native)(action), latent

    return jax.jit(program, compiler_options=compiler.options())


def seed_words(key: Array) -> list[int]:
    """A key as entropy for the seeds of environments."""
    return [int(word) for word in np.ravel(jax.random.key_data(key))]


class HostEvaluator:
    """Plays evaluation episodes in processes of their own, some at once. Episode i depends on the key and i only.

    By default there are as many environments as in training, at most `PERIODIC_EPISODES`: who trains in one may have
    room for one. There are never more than episodes.

    Args:
      agent: who acts.
      env: takes what the agent emits.
      options: how to run.
      say: is told of environments that are lost; where too many are, returns are NaN. None: that is an error.
      stop: whether to give up; returns are then NaN.
      make_way: ends the environments of training, which begin again when they are needed. With `eval_envs` 0 it is
        called before each evaluation; otherwise once an evaluation beside them has failed, which is then tried again.
      max_steps: agent steps after which an episode is cut; by default `step_limit`.
      shared: whether all processes call, and share out the episodes.
    """

    def __init__(
        self,
        agent: Agent,
        env: HostEnv,
        options: Options = DEFAULTS,
        say: Callable[[str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        make_way: Callable[[], None] | None = None,
        max_steps: int | None = None,
        shared: bool = False,
    ) -> None:
        self._env, self._options, self._stop, self._make_way = env, options, stop, make_way
        self._shared = shared and distributed.count() > 1
        self._strict, self._say = say is None, say or (lambda text: None)
        here = agent.recipe.num_envs // distributed.count() if self._shared else agent.recipe.num_envs
        self._most = options.eval_envs or min(PERIODIC_EPISODES, here)
        self._beside = options.eval_envs != 0 and make_way is not None  # training's environments stay as they are
        self._max_steps = max_steps or step_limit(env.spec)
        self._act = act_program(agent.act, env, explore=False)
        self._carry = jax.jit(agent.act_carry, static_argnums=1)
        self._draws = jax.jit(self._keys_and_words)

    def __call__(self, params: PyTree, key: Array, episodes: int) -> Evaluation:
        """Of `[episodes]`. Raises `UsageError` unless `episodes` is an integer of at least 1."""
        episodes = checks.number("episodes", episodes)
        numbers = np.arange(episodes)
        if not self._shared:
            return self._some(params, key, numbers)
        size = -(-episodes // distributed.count())
        own = np.resize(numbers[distributed.index() :: distributed.count()], size)  # all play as many
        told = distributed.gather(self._some(params, key, own if len(own) else numbers[:1].repeat(size)))
        found = np.moveaxis(told, 0, -1).reshape(len(Evaluation._fields), -1)[:, :episodes]
        return Evaluation(*(x.astype(kind) for x, kind in zip(found, (np.float32, np.int32, bool), strict=True)))

    def _some(self, params: PyTree, key: Array, numbers: np.ndarray) -> Evaluation:
        """The episodes of these numbers."""
        try:
            if self._beside:
                try:
                    return self._evaluate(params, key, numbers)
                except RunError as error:
                    self._beside = False
                    self._say(
                        f"warning: an evaluation beside the environments of training failed ({error}); from now on "
                        "they are closed for evaluations, and begin new episodes after them (as with eval_envs 0)"
                    )
            if self._make_way is not None:
                self._make_way()
            return self._evaluate(params, key, numbers)
        except RunError as error:
            if self._strict:
                raise
            self._say(f"warning: evaluation was given up: {error}")
            return _not_played(len(numbers))

    def _evaluate(self, params: PyTree, key: Array, numbers: np.ndarray) -> Evaluation:
        width = min(self._most, len(numbers))
        more = numbers[-1] + 1 + np.arange(-len(numbers) % width)  # play for nothing
        rounds = np.concatenate([numbers, more]).reshape(-1, width)
        how = dict(training=False, say=self._say, stop=self._stop)
        with contextlib.closing(start(self._env, width, self._options, **how)) as envs:
            played = [self._play(envs, params, key, each) for each in rounds]
        return Evaluation(*(np.concatenate(x)[: len(numbers)] for x in zip(*played, strict=True)))

    def _play(self, envs: HostEnvs, params: PyTree, key: Array, numbers: np.ndarray) -> Evaluation:
        keys, words = self._draws(key, numbers)
        last = (numbers % PERIODIC_EPISODES).tolist()
        seeds = [[*row, i] for row, i in zip(np.asarray(words).tolist(), last, strict=True)]
        carry = self._carry(params, len(numbers))
        played = first_episodes(envs, self._act, params, keys, carry, seeds, self._max_steps)
        return _not_played(len(numbers)) if played is None else played

    @staticmethod
    def _keys_and_words(key: Array, numbers: Array) -> tuple[Array, Array]:
        """For each episode, its key to act by and what its environment's seed begins with."""
        rounds = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers // PERIODIC_EPISODES)
        return jax.vmap(jax.random.fold_in)(rounds, numbers % PERIODIC_EPISODES), jax.random.key_data(rounds)


def _not_played(episodes: int) -> Evaluation:
    nothing = np.zeros(episodes, np.int32)
    return Evaluation(np.full(episodes, np.nan, np.float32), nothing, nothing.astype(bool))


def first_episodes(
    envs: HostEnvs, act: Callable, params: PyTree, key: Array, carry: PyTree, seeds: list[list[int]], max_steps: int
) -> Evaluation | None:
    """Plays the first episode of every environment, all at once; one that is lost with its environment is begun again.

    Args:
      envs: the environments, which are reset.
      act: `act_program`.
      params, key, carry: of `act`.
      seeds: of the episodes, one for each environment.
      max_steps: steps after which an episode is cut.

    Returns:
      The episodes; None where the environments were told to stop.
    """
    width = len(seeds)
    returns, lengths = np.zeros(width, np.float32), np.zeros(width, np.int32)
    ended, cut = np.zeros((2, width), bool)
    timestep, t = envs.reset(seeds), 0
    while timestep is not None:
        again = timestep.is_first & ~ended  # at the start, or lost with its environment
        returns = np.where(again, 0, returns) + np.where(ended, 0, timestep.reward)
        lengths = np.where(again, 0, lengths + ~ended)
        cut |= (lengths >= max_steps) & ~ended & ~timestep.is_last
        ended |= timestep.is_last | cut
        if ended.all():
            return Evaluation(returns.astype(np.float32), lengths.astype(np.int32), cut)
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


def play(agent: Agent, env: HostEnv, params: PyTree, key: Array, streams: int, steps: int) -> Record:
    """Records `[steps, streams, ...]` of acting as in evaluation, without latents.

    As many at once as there are environments in training; stream i depends on the key and i only.
    """
    act, words = act_program(agent.act, env, explore=False), seed_words(key)
    keys_of = jax.jit(lambda numbers: jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
    width = min(streams, agent.recipe.num_envs)
    played = []
    with contextlib.closing(start(env, width, DEFAULTS, training=False)) as envs:
        for numbers in (np.arange(i, i + width) for i in range(0, streams, width)):
            carry, keys, records = agent.act_carry(params, width), keys_of(numbers), []
            timestep = envs.reset([[*words, i] for i in numbers.tolist()])
            for t in range(steps):
                carry, action, native, _ = act(params, keys, t, carry, timestep)
                records.append(Record(timestep, np.asarray(action), ()))
                envs.send(np.asarray(native))
                timestep = envs.receive()
            played.append(jax.tree.map(lambda *x: np.stack(x), *records))
    return jax.tree.map(lambda *x: np.concatenate(x, 1)[:, :streams], *played)
