"""A small World Models agent and what it is tried on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.agents.batches import perturbed, random_action, random_step
from wmjax import presets
from wmjax.agents import world_models as wm
from wmjax.types import Box, Discrete, EnvSpec, Trajectory

IMAGE = Box(0, 255, (64, 64, 3), "uint8")
CAR = EnvSpec({"image": IMAGE}, Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,)), 1000)
CATCH = EnvSpec({"image": IMAGE}, Discrete(3), 9)
DOOM = EnvSpec({"image": IMAGE}, Box(-1.0, 1.0, (1,)))
TINY = wm.WorldModelsConfig(
    latent=5, depth=2, hidden=6, mixtures=3, reward_head="gaussian", done_head=True, vision_batch_size=4,
    vision_learning_rate=1e-3, vision_updates=4, memory_batch_size=4, memory_length=5, memory_updates=4, num_envs=2,
    replay_capacity=64, collect_steps=64, collection="held", kl_tolerance=0.1,
    evolve=wm.EvolveConfig(
        population=4, rollouts=2, generations=4, mean_every=2, mean_rollouts=4, horizon=6, starts=8, where="dream"
    ),
)  # fmt: skip


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def shapes(preset, spec, **overrides):
    config, _ = presets.resolve("world_models", preset, None, overrides)
    agent = wm.world_models(spec, config)
    return jax.eval_shape(agent.init, jax.random.key(0)).params


MADE: dict = {}  # agents by specification and changes: compiling takes longer than the tests


def tiny(spec=CATCH, **changes):
    """Agent, config, modules and a state with perturbed parameters."""
    name = (str(spec), *sorted(changes.items()))
    if name not in MADE:
        config = dataclasses.replace(TINY, **changes)
        agent = wm.world_models(spec, config)
        state = jax.jit(agent.init)(jax.random.key(0))
        MADE[name] = agent, config, wm.networks(spec, config), perturbed(state, 0.3)
    return MADE[name]


def trajectory(config, spec, length, batch, seed=0):
    """Random records with random latents."""
    rng = np.random.default_rng(seed)
    draw = lambda scale: jnp.asarray(scale * rng.normal(size=(length, batch, config.latent)), config.latent_dtype)
    step, action = random_step(spec, (length, batch), seed), random_action(spec, (length, batch), seed)
    return Trajectory(step, action, jnp.ones((length, batch), bool), {"mu": draw(1.0), "logvar": draw(0.3) - 3})


def memory_params(spec, config, seed=0):
    """Parameters of the memory alone: initializing vision takes longer than most tests."""
    net = wm.networks(spec, config).memory
    z, h = jnp.zeros((1, config.latent)), jnp.zeros((1, config.hidden))
    args = (h, h, z, jnp.zeros((1, net.action)), jnp.zeros(1, bool))
    return jax.jit(lambda key: net.init(key, *args, method="everything"))(jax.random.key(seed))["params"]


def updates(agent):
    return {update.name: update for stage in agent.recipe.stages for update in stage.updates}


def gradient_flow():
    """Which modules each update trains."""
    agent, config, _, state = tiny()
    flow = {}
    for name in ("vision", "memory"):
        update = updates(agent)[name]
        batch = trajectory(config, CATCH, update.sampling.context + update.sampling.length, update.batch_size)
        after = jax.jit(update.fn)(state, jax.random.key(0), batch)[0].params
        moved = lambda module, after=after: any(
            (a != b).any() for a, b in zip(*map(jax.tree.leaves, (after[module], state.params[module])), strict=True)
        )
        flow[name] = set(filter(moved, after))
    return flow
