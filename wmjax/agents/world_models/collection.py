"""How the first records are made. Each policy has a memory, drawn anew where an episode begins."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.controller import as_action, controller
from wmjax.nets.spaces import action_size
from wmjax.ops.action_distributions import random_action
from wmjax.types import Discrete, EnvSpec, UsageError


class Collector(NamedTuple):
    """A policy that looks at nothing, for one environment."""

    start: Callable  # (key) -> memory
    step: Callable  # (key, memory) -> (memory, action [A])


def held(spec: EnvSpec) -> Collector:
    """Random actions, each held: on frames t with t mod n = 0 a new action and a new n in 1 ... 10 are drawn (Doom)."""

    def draw(key):
        key_action, key_repeat = jax.random.split(key)
        return random_action(spec.action, key_action), jax.random.randint(key_repeat, (), 1, 11)

    def start(key):
        return *draw(key), jnp.int32(0)

    def step(key, memory):
        action, repeat, frame = memory
        # A test of the frame's number, not a countdown, as in the authors' code.
        again = (frame % repeat == 0) & (frame > 0)
        action, repeat = (jnp.where(again, a, b) for a, b in zip(draw(key), (action, repeat), strict=True))
        return (action, repeat, frame + 1), action

    return Collector(start, step)


def linear(spec: EnvSpec, latent: int) -> Collector:
    """A random linear controller for each episode (CarRacing): tanh(ε W + b), ε ~ N(0, I) in every step.

    All weights are s times standard Cauchy numbers, s uniform in [0, 0.01]. The authors' V and M have random weights
    then, too, that are practically 0, so that z is noise and h is 0.
    """
    size = action_size(spec)

    def start(key):
        key_scale, key_weights = jax.random.split(key)
        scale = jax.random.uniform(key_scale, maxval=0.01)
        return scale * jax.random.cauchy(key_weights, (size * (latent + 1),))

    def step(key, theta):
        output = controller(theta, jax.random.normal(key, (latent,)), (latent, size))
        return theta, as_action(output, spec)

    return Collector(start, step)


def brown(spec: EnvSpec) -> Collector:
    """Brownian motion of each action, clipped to [-1, 1] (Tallec): aₜ₊₁ = aₜ + √(1/50) ε."""
    if isinstance(spec.action, Discrete):
        raise UsageError("collection: 'brown' needs continuous actions; use random, held or linear")

    def step(key, action):
        return jnp.clip(action + math.sqrt(1 / 50) * jax.random.normal(key, action.shape), -1, 1), action

    return Collector(functools.partial(random_action, spec.action), step)


def collector(spec: EnvSpec, config: WorldModelsConfig) -> Collector:
    """The collection policy of a configuration; `random` remembers nothing."""
    if config.collection == "random":
        return Collector(lambda key: (), lambda key, memory: ((), random_action(spec.action, key)))
    if config.collection == "linear":
        return linear(spec, config.latent)
    return {"held": held, "brown": brown}[config.collection](spec)
