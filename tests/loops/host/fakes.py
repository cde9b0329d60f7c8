"""Environments on the host that can be worked out by hand, and runs of the host and the device loop."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.loops.fakes import counter_env, fake_agent, fake_recipe
from wmjax.loops import device
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import Options
from wmjax.types import HostEnv, RunError, TimeStep, Trajectory


class CounterEnvs:
    """`fakes.counter_env` in NumPy, in this process."""

    def __init__(self, num_envs, length, breaks, stop):
        self.count, self.length, self.restarts = np.zeros(num_envs, int), length, 0
        self.breaks, self.stop, self.steps, self.log = breaks, stop, 0, []

    def observe(self, reward):
        flag = self.count == self.length
        obs = {"vector": self.count[:, None].astype(np.float32)}
        return TimeStep(obs, reward.astype(np.float32), self.count == 0, flag, flag.copy())

    def reset(self, seeds):
        self.log.append(seeds)
        self.count[:] = 0
        return self.observe(np.zeros(len(self.count)))

    def send(self, action):
        assert action.dtype == np.int32
        self.action, self.steps = action, self.steps + 1

    def receive(self):
        if self.stop():
            return None
        if self.steps == self.breaks:
            raise RunError("the environments are gone")
        over = self.count == self.length
        self.count = np.where(over, 0, self.count + 1)
        return self.observe(np.where(over, 0, self.action))

    def close(self):
        self.log.append("closed")


def host_env(length=4, breaks=None):
    begun = []

    def start(num_envs, *, stop=lambda: False, **options):
        begun.append(CounterEnvs(num_envs, length, breaks, stop))
        return begun[-1]

    return HostEnv(counter_env(length).spec, start, lambda action: action.argmax(-1).astype(jnp.int32)), begun


def with_recipe(**kwargs):
    return fake_agent(fake_recipe(fake_agent().act, **kwargs))


def run_host(agent, env, iterations, *, stop=lambda: False, path=None, key=0, **options):
    loop = HostLoop(agent, env, path, Options(**options), stop=stop)
    state, metrics = loop.init(jax.random.key(key)), []
    for number, stage in enumerate(agent.recipe.stages):
        state, found = loop.compile_stage(stage)(state, iterations[number])
        metrics.append(found)
        if number + 1 < len(agent.recipe.stages) and not loop.failure:
            state = device.next_stage(state)
    return loop, state, metrics


def run_device(agent, env, iterations):
    state = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    metrics = []
    for number, stage in enumerate(agent.recipe.stages):
        state, found = device.compile_stage(agent, env, stage)(state, iterations[number])
        metrics.append(found)
        if number + 1 < len(agent.recipe.stages):
            state = device.next_stage(state)
    return state, metrics


def stored(loop):
    """Records in the order of the ring, by name, with latents."""
    rows = np.arange(loop.replay.rows)[:, None]
    index = np.broadcast_arrays(rows, np.arange(loop.replay.num_envs))
    flags = jax.tree.map(np.asarray, loop.replay.ring.data.step)
    found = loop.replay.gather(Trajectory(flags, None, None, None), tuple(index))
    return found.step, found.action, loop.replay.latent
