"""World Models as an agent: how it acts, and its stages one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax import evolution
from wmjax.agents.world_models import controller, memory, vision
from wmjax.agents.world_models.collection import collector
from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.modules import Networks, check_spec, networks
from wmjax.nets.mlp import init_modules
from wmjax.nets.spaces import action_size
from wmjax.ops import noise
from wmjax.types import Agent, AgentState, Array, EnvSpec, Evolve, Recipe, Sampling, Stage, Update, UsageError

ENCODE_LENGTH = 16  # steps of a window that is encoded at once, of every environment


class Equations(NamedTuple):
    """What research changes, each a function that another may stand in for, as in `Equations(kl=mine)`.

    What each takes and gives is said where it is defined; examples are in `docs/equations.md`.
    """

    networks: Callable = networks  # (spec, config) -> Networks
    reconstruction: Callable = vision.reconstruction_loss  # (output, target, config) -> [B]
    kl: Callable = vision.kl_floor  # (mu, logvar, tolerance) -> the KL to watch and the loss, [B] each
    vision: Callable = vision.vision_loss  # the whole loss of V
    memory: Callable = memory.memory_loss  # the whole loss of M


def init_params(nets: Networks, spec: EnvSpec, config: WorldModelsConfig, key: Array) -> dict:
    """Parameters of V and M, and a controller of zeros: x0 of the search."""
    (space,) = spec.obs.values()
    z, h = jnp.zeros((1, config.latent)), jnp.zeros((1, config.hidden))
    inputs = {
        "encoder": (jnp.zeros((1, *space.shape), space.dtype),),
        "decoder": (z,),
        "memory": (h, h, z, jnp.zeros((1, action_size(spec))), jnp.zeros(1, bool)),
    }
    return init_modules(nets._asdict(), key, inputs) | {
        "controller": jnp.zeros(controller.controller_size(spec, config))
    }


class ActCarry(NamedTuple):
    """What acting remembers; the collection policy's memory keeps its place while the controller acts."""

    state: memory.State
    action: Array  # [B, A], the one before
    collector: tuple  # the memory of the collection policy, [B, ...]


def world_models(
    spec: EnvSpec, config: WorldModelsConfig, axis_name: str | None = None, equations: Equations | None = None
) -> Agent:
    """The agent for one environment, of one square uint8 image of 64, 80, 96, ... pixels; see `wmjax.agents`.

    Actions are Discrete or float32 Box actions of rank 1. Populations, too, are spread over `axis_name`.
    """
    config.validate()
    check_spec(spec)
    if config.evolve.where == "dream" and config.dream_reward == "survival" and spec.survival is False:
        raise UsageError(
            "dream_reward: 'survival' pays 1 for each step of a dream, which is not what this task pays; "
            "'predicted' is valid, with reward_head mse or gaussian"
        )
    equations = equations or Equations()
    nets = equations.networks(spec, config)
    model = memory.world_model(nets, spec, config)
    layers, collecting = controller.controller_layers(spec, config), collector(spec, config)
    evolve = controller.evolve(spec, config, model)

    def init(key):
        key_params, key_search = jax.random.split(key)
        params = init_params(nets, spec, config, key_params)
        opt_state = {
            "vision": vision.optimizer(config).init({name: params[name] for name in ("encoder", "decoder")}),
            "memory": memory.optimizer(config).init(params["memory"]),
            evolve.name: evolution.init_evolving(evolve, key_search, params),
        }
        zeros = jnp.zeros((config.memory_batch_size, config.hidden))
        stats = {"memory_carry": (zeros, zeros)} if config.memory_stateful else {}
        return AgentState(params, opt_state, stats, jnp.int32(0))

    policy_carry = lambda params, batch_size: ()

    def policy(params, key, carry, state, *, explore):
        del key, explore
        parts = {"z": state.z, "h": state.h, "c": state.c}
        inputs = jnp.concatenate([parts[name] for name in config.inputs], -1)
        output = controller.controller(params["controller"], inputs, layers, config.controller_bias)
        return carry, controller.as_action(output, spec)

    def act_carry(params, batch_size):
        drawn = jax.eval_shape(collecting.start, jax.random.key(0))
        drawn = jax.tree.map(lambda x: jnp.zeros((batch_size, *x.shape), x.dtype), drawn)
        return ActCarry(model.init_state(params, batch_size), jnp.zeros((batch_size, action_size(spec))), drawn)

    def act(params, key, carry, timestep, *, explore):
        key_observe, key_policy = noise.split(key, 2)
        embed = model.encode(params, timestep.obs)
        state = model.observe(params, key_observe, carry.state, carry.action, embed, timestep.is_first)
        _, action = policy(params, key_policy, (), state, explore=explore)
        return ActCarry(state, action, carry.collector), action, vision.pack_latent(embed, config)

    def collect(params, key, carry, timestep, *, explore):
        del explore
        keys = key if key.ndim else noise.row_keys(key, timestep.reward.shape[0])
        key_start, key_step = noise.split(keys, 2)
        fresh = jax.vmap(collecting.start)(key_start)
        new = timestep.is_first
        start = jax.tree.map(lambda a, b: jnp.where(new.reshape(-1, *[1] * (a.ndim - 1)), a, b), fresh, carry.collector)
        going, action = jax.vmap(collecting.step)(key_step, start)
        latent = jnp.zeros((*new.shape, config.latent), config.latent_dtype)
        return carry._replace(collector=going), action, {"mu": latent, "logvar": latent}

    updates = {
        "vision": vision.make_update(nets, spec, config, axis_name, equations),
        "encode": vision.make_encoding(model, config, axis_name),
        "memory": memory.make_update(nets, config, axis_name, equations),
    }
    return Agent(init, policy_carry, policy, act_carry, act, model, recipe(config, collect, act, updates, evolve))


def recipe(
    config: WorldModelsConfig, collect: Callable, act: Callable, updates: dict[str, Callable], evolve: Evolve
) -> Recipe:
    """collect | vision | encode | memory | controller; stages with nothing to do are left out."""
    per_env = -(-config.collect_steps // config.num_envs)
    rows = min(per_env, config.replay_capacity // config.num_envs)
    chunk = min(ENCODE_LENGTH, rows)
    stages = [Stage("collect", -(-per_env // chunk), chunk, collect)]

    def learn(name, count, batch_size, sampling, grad_accum=config.grad_accum):
        repeats = math.gcd(count, 10)
        update = Update(name, updates[name], repeats, batch_size, sampling, grad_accum)
        stages.append(Stage(name, count // repeats, 0, act, (update,)))

    if config.vision_updates:
        learn("vision", config.vision_updates, config.vision_batch_size, Sampling(1))
    if config.memory_updates or config.evolve.where == "dream":
        learn("encode", -(-rows // chunk), config.num_envs, Sampling(chunk, over="in_order"), 1)
    if config.memory_updates:
        follow = dict(over="in_order") if config.memory_stateful else dict(within_episode=config.memory_within_episode)
        sampling = Sampling(config.memory_length, context=1, **follow)
        learn("memory", config.memory_updates, config.memory_batch_size, sampling)
    iterations = -(-config.evolve.generations // evolve.generations)
    stages.append(Stage("controller", iterations, 0, act, evolve=evolve))
    return Recipe(config.num_envs, config.replay_capacity, tuple(stages))
