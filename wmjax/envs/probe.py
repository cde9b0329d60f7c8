"""Probe environments: each can be learned only if one particular part of an agent works, and in seconds.

The first five are Andy Jones's (andyljones.com/posts/rl-debugging.html), as rejax uses them: the first that an agent
cannot learn says where its fault is. Observations are `{"vector": float32 [D]}`. Values below are of the first record,
with discount g per step: what is expected of the rewards that arrive after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.raw_env import Outcome, RawEnv
from wmjax.types import Array, Box, Discrete, EnvSpec, MultiDiscrete, Space


class ProbeState(NamedTuple):
    """What the observation is made of."""

    vector: Array  # float32 [D]
    time: Array  # int32 [], steps since the reset


class Probe(NamedTuple):
    """A probe and the mean returns to expect of it."""

    make: Callable[[], RawEnv]
    optimal_return: float
    random_return: float
    description: str


def _probe(
    action: Space,
    reward: Callable,
    move: Callable = lambda vector, action, time: vector,
    *,
    size: int = 1,
    sign: bool = False,
    steps: int = 1,
    cut: bool = False,
) -> RawEnv:
    """A probe whose observation is at first zeros `[size]`, or random signs, and that ends after `steps` steps.

    `reward(number, action, time)` is that of the observation acted on, of which it sees the first number; `move(vector,
    action, time)` gives the next observation. The end is terminal unless the episode is `cut`.
    """
    spec = EnvSpec({"vector": Box(-1, 1, (size,))}, action, max_episode_steps=steps)

    def reset(key):
        start = jax.random.rademacher(key, (size,), jnp.float32) if sign else jnp.zeros(size)
        return ProbeState(start, jnp.int32(0))

    def step(key, state, action):
        del key
        time = state.time + 1
        gain = jnp.asarray(reward(state.vector[0], action, time), jnp.float32)
        done = time >= steps
        vector = jnp.asarray(move(state.vector, action, time), jnp.float32)
        return ProbeState(vector, time), Outcome(gain, done, jnp.bool_(False) if cut else done)

    return RawEnv(spec, reset, step, lambda state: {"vector": state.vector})


def value() -> RawEnv:
    """One action, observation 0, one step, reward 1. Return 1, value 1: does the critic learn a constant?"""
    return _probe(Discrete(1), lambda number, action, time: 1.0)


def predict() -> RawEnv:
    """One action, observation +1 or -1, one step, reward = observation. Mean return 0, value = observation."""
    return _probe(Discrete(1), lambda number, action, time: number, sign=True)


def discount() -> RawEnv:
    """One action, observations 0, 0.5, 1, two steps, reward 1 at the end. Return 1, values g and then 1."""
    half = lambda vector, action, time: time[None] / 2
    return _probe(Discrete(1), lambda number, action, time: time == 2, half, steps=2)


def act() -> RawEnv:
    """Two actions, observation 0, one step, reward = action. Best return and value 1, random 0.5."""
    return _probe(Discrete(2), lambda number, action, time: action)


def act_obs() -> RawEnv:
    """Two actions, observation +1 or -1, one step. Reward 1 for action 1 at +1 and 0 at -1, else -1.

    Best return and value 1, random 0; one fixed action gets 0 too, so the policy has to look.
    """
    return _probe(Discrete(2), lambda number, action, time: number * (2 * action - 1), sign=True)


def act_both() -> RawEnv:
    """Two choices at once, of 2 and of 3; observation +1 or -1, one step. The first pays as in `act_obs`; of the second
    only 2 pays, 1. Best return and value 2, random 1/3.
    """
    pay = lambda number, action, time: number * (2 * action[0] - 1) + (action[1] == 2)
    return _probe(MultiDiscrete((2, 3)), pay, sign=True)


def act_continuous() -> RawEnv:
    """Action `Box(-1, 1, (1,))`, observation 0, one step, reward -|action - 0.5|. Best 0, uniformly random -0.625."""
    return _probe(Box(-1, 1, (1,)), lambda number, action, time: -jnp.abs(action[0] - 0.5))


def obs_is_action() -> RawEnv:
    """Action `Box(-1, 1, (2,))`; each observation is the action that led to it, at first zeros; 8 steps, then cut.

    A model can predict it only if actions stand where they belong in time. The reward is the action's first entry: best
    return 8 and value 1 + g + ... + g^7, random 0.
    """
    first, echo = lambda number, action, time: action[0], lambda vector, action, time: action
    return _probe(Box(-1, 1, (2,)), first, echo, size=2, steps=8, cut=True)


PROBES = {
    "probe:value": Probe(value, 1.0, 1.0, "constant reward: does the critic learn?"),
    "probe:predict": Probe(predict, 0.0, 0.0, "the observation is the reward: does the critic see?"),
    "probe:discount": Probe(discount, 1.0, 1.0, "reward after two steps: is it discounted?"),
    "probe:act": Probe(act, 1.0, 0.5, "the action is the reward: does the actor learn?"),
    "probe:act_obs": Probe(act_obs, 1.0, 0.0, "the right action depends on the observation"),
    "probe:act_both": Probe(act_both, 2.0, 1 / 3, "two choices at once, of which one depends on the observation"),
    "probe:act_continuous": Probe(act_continuous, 0.0, -0.625, "a continuous action has to hit 0.5"),
    "probe:obs_is_action": Probe(obs_is_action, 8.0, 0.0, "the observation is the last action: is time aligned?"),
}
