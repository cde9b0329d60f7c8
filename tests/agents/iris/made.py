"""A small IRIS and what it is tried on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.agents.batches import PIXELS, TINY_IRIS, perturbed, random_action, random_step
from wmjax.agents import iris
from wmjax.nets.mlp import call
from wmjax.types import Box, Discrete, EnvSpec, Trajectory

ATARI = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Discrete(4))
PAPER = iris.IRISConfig()
BATCH = 4


@functools.cache
def made(**changes):
    """Agent, config, modules and a state with perturbed parameters: compiling takes longer than the tests."""
    config = dataclasses.replace(TINY_IRIS, **changes)
    agent = iris.iris(PIXELS, config)
    state = jax.jit(agent.init)(jax.random.key(0))
    return agent, config, iris.networks(PIXELS, config), perturbed(state)


def update_named(agent, name):
    return next(u for u in agent.recipe.stages[-1].updates if u.name == name)


jit = functools.cache(lambda function, *static: jax.jit(functools.partial(function, *static)))


def sequence(nets, weights, tokens, action):
    """Logits of frames, rewards and ends."""
    return call(nets.world_model, weights, tokens, action, jnp.zeros(action.shape[:2]))


def look(nets, params, memory, frame):
    """The policy's memory after one more frame, and action logits."""
    return call(nets.actor_critic, params["actor_critic"], memory, frame)[:2]


@functools.cache
def update_of(agent, name):
    return jax.jit(update_named(agent, name).fn)


def batch_for(agent, name, seed=0):
    """Random records of the length that an update samples, nothing masked."""
    sampling = update_named(agent, name).sampling
    lead = sampling.context + sampling.length, BATCH
    return Trajectory(random_step(PIXELS, lead, seed), random_action(PIXELS, lead, seed), jnp.ones(lead, bool), ())


def images(*lead, seed=0):
    return random_step(PIXELS, lead, seed).obs["image"]


def gradient_flow():
    """Which modules each update changes."""
    agent, _, _, state = made()
    flow = {}
    for name in ("tokenizer", "world_model", "actor_critic"):
        new, _, _ = update_of(agent, name)(state, jax.random.key(0), batch_for(agent, name))
        same = lambda module, new=new: all(
            map(np.array_equal, jax.tree.leaves(state.params[module]), jax.tree.leaves(new.params[module]))
        )
        flow[name] = {module for module in state.params if not same(module)}
    return flow
