"""IRIS as an agent: how it acts, and when each module learns (table 7)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.agents.iris import behavior, dynamics, tokenizer
from wmjax.agents.iris.config import IRISConfig
from wmjax.agents.iris.modules import image_name, init_params, networks, optimizers
from wmjax.nets.actor_critic import zero_memory
from wmjax.nets.mlp import call
from wmjax.ops import distributions, vq
from wmjax.types import Agent, AgentState, EnvSpec, Recipe, Stage, Update


class Equations(NamedTuple):
    """What research changes, each a function that another may stand in for, as in `Equations(returns=mine)`.

    What each takes and gives is said where it is defined; examples are in `docs/equations.md`.
    """

    networks: Callable = networks  # (spec, config) -> Networks
    reconstruction: Callable = tokenizer.reconstruction_loss  # (image, reconstruction, config) -> [B]
    tokenizer: Callable = tokenizer.tokenizer_losses  # all terms of the tokenizer; of names that are new, weighed 1
    world_model: Callable = dynamics.world_model_losses  # all terms of the transformer
    returns: Callable = behavior.lambda_returns  # (reward, end, value, discount, lambda_) -> [H, B]
    behavior: Callable = behavior.actor_critic_losses  # the actor's, the critic's, and the entropy's


def recipe(config: IRISConfig, act: Callable, updates: tuple[Update, ...]) -> Recipe:
    """Epochs that collect alone, then train one module more at a time, then the rest."""
    waits = (config.tokenizer_after, config.world_model_after, config.actor_critic_after)
    stages, begin = [], 0
    for count, (name, until) in enumerate(zip(("collect", "tokenizer", "world_model"), waits, strict=True)):
        if until > begin:
            stages.append(Stage(name, until - begin, config.collect, act, updates[:count]))
        begin = until
    epochs = None if config.collect_epochs is None else config.collect_epochs - begin
    stages.append(Stage("train", epochs, config.collect, act, updates))
    if config.final_epochs:
        stages.append(Stage("final", config.final_epochs, 0, act, updates))
    return Recipe(config.num_envs, config.replay_capacity, tuple(stages))


def iris(spec: EnvSpec, config: IRISConfig, axis_name: str | None = None, equations: Equations | None = None) -> Agent:
    """The agent for one environment, of one square uint8 image and Discrete actions; see `wmjax.agents`."""
    config.validate()
    if config.perceptual == "random_features":
        warnings.warn(
            "perceptual='random_features' replaces LPIPS, whose weights are not shipped: results are not the paper's",
            stacklevel=2,
        )
    name = image_name(spec, config)
    equations = equations or Equations()
    nets = equations.networks(spec, config)
    model = dynamics.world_model(nets, spec, config)

    def init(key):
        params = init_params(nets, spec, config, key)
        opt_state = {name: adam.init(params[name]) for name, adam in optimizers(config).items()}
        stats = {"codebook": vq.init_state(params["tokenizer"]["codebook"])}
        return AgentState(params, opt_state, stats, jnp.int32(0))

    policy_carry = lambda params, batch_size: zero_memory(batch_size, config.lstm_units)

    def choose(params, key, memory, tokens, explore):
        frame = tokenizer.decode(nets, params, tokens)
        memory, logits, _ = call(nets.actor_critic, params["actor_critic"], memory, frame)
        if not explore:
            dist = distributions.OneHotCategorical(logits / config.eval_temperature)
            return memory, dist.mode() if config.eval_action == "mode" else dist.sample(seed=key)
        logits = jax.nn.log_softmax(logits / config.temperature)
        mixed = distributions.OneHotCategorical(logits, config.epsilon)
        return memory, mixed.sample(seed=key)

    def policy(params, key, carry, state, *, explore):
        return choose(params, key, carry, state.tokens, explore)

    def value(params, carry, state):
        frame = tokenizer.decode(nets, params, state.tokens)
        return call(nets.actor_critic, params["actor_critic"], carry, frame)[2]

    def act(params, key, carry, timestep, *, explore):
        tokens = tokenizer.encode(nets, config, params, timestep.obs[name])
        memory = jax.tree.map(lambda x: jnp.where(timestep.is_first[:, None], 0.0, x), carry)
        memory, action = choose(params, key, memory, tokens, explore)
        return memory, action, ()

    updates = (
        tokenizer.make_update(nets, spec, config, axis_name, equations),
        dynamics.make_update(nets, spec, config, axis_name, equations),
        behavior.make_update(nets, model, spec, config, axis_name, equations),
    )
    return Agent(init, policy_carry, policy, policy_carry, act, model, recipe(config, act, updates), value)
