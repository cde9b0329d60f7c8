"""Runs on fixed records: a stage does what it learns, and what it would collect is in replay already.

All else is as in a run that collects: its stages, keys, counters and metrics. Env steps are counted as such a run would
take them, so a run of so many steps makes as many updates; none is taken. It begins where the first stage that learns
does. The records are no part of what is saved, which holds latents alone: they come from the data again.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.loops.device import RunState
from wmjax.loops.parallel import Programs
from wmjax.loops.schedule import samplings
from wmjax.replay import device as replays
from wmjax.replay.device import Record, Replay
from wmjax.types import Agent, Array, Env, EnvSpec, HostEnv, Metrics, PyTree, Stage, TimeStep


def spec_alone(spec: EnvSpec) -> Env:
    """An environment of which nobody knows more than its spec: it begins with zeros, and cannot be stepped."""
    zeros = lambda space: jnp.zeros(space.shape, space.dtype)
    flag = lambda value: jnp.bool_(value)

    def reset(key: Array) -> tuple[tuple, TimeStep]:
        obs = {name: zeros(space) for name, space in spec.obs.items()}
        return (), TimeStep(obs, jnp.float32(0), flag(True), flag(False), flag(False))

    return Env(spec, reset, None)


def is_playable(env: Env | HostEnv) -> bool:
    """Whether an environment is more than a spec."""
    return (env.start if isinstance(env, HostEnv) else env.step) is not None


def begun(agent: Agent, run: RunState) -> RunState:
    """The run where all stages before the first that learns are done."""
    stages = agent.recipe.stages
    index = next(i for i, stage in enumerate(stages) if stage.updates or stage.evolve)
    steps = sum(stage.collect * stage.iterations for stage in stages[:index])
    full = lambda like, value: np.full(np.shape(like), value, np.int32)
    return run._replace(stage=full(run.stage, index), steps=full(run.steps, steps))


def _slim(replay: Replay) -> Replay:
    """Of a full replay what changes: latents, and where it is read."""
    return replay._replace(data=Record((), (), replay.data.latent), episodes=())


class OnData(Programs):
    """Programs on one device or several, over a replay that is full of data.

    Args:
      inner: compiled for the agent and an environment that is not stepped (`spec_alone`).
      agent: brings the recipe; its replay has as many rows as there is data.
      records: `[rows, num_envs, ...]`, without latents.
      seeds: how many; each has the records for itself.
    """

    def __init__(self, inner: Programs, agent: Agent, records: Record, seeds: int) -> None:
        self._inner, self._agent, self._several, self._seeds = inner, agent, seeds > 1, seeds
        self.ahead = inner.ahead
        self.template = inner.template._replace(replay=_slim(inner.template.replay))
        self._full = jax.device_get(replays.full(records, samplings(agent.recipe)))

    @property
    def taken(self) -> RunState:
        return self._inner.template

    def init(self, key: Array) -> RunState:
        run = begun(self._agent, self.gather(self._inner.init(key)))
        cursor = np.broadcast_to(self._full.cursor, np.shape(run.replay.cursor))
        return self.place(run._replace(replay=run.replay._replace(cursor=cursor, added=self._spread(self._full.added))))

    def _spread(self, tree: PyTree) -> PyTree:
        spread = lambda x: np.broadcast_to(x, (self._seeds, *np.shape(x)))
        return jax.tree.map(spread, tree) if self._several else tree

    def compile_stage(self, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
        return self._inner.compile_stage(stage)

    def place(self, run: RunState) -> RunState:
        data, episodes = self._spread((self._full.data, self._full.episodes))
        replay = run.replay._replace(data=data._replace(latent=run.replay.data.latent), episodes=episodes)
        return self._inner.place(run._replace(replay=replay))

    def gather(self, run: RunState) -> RunState:
        run = self._inner.gather(run)
        return run._replace(replay=_slim(run.replay))

    def replica(self, tree: PyTree) -> PyTree:
        return self._inner.replica(tree)

    def check_replicas(self, run: RunState) -> None:
        self._inner.check_replicas(run)
