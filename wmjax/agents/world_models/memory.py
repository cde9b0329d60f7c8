"""M: a recurrent mixture network predicts what V will see. With V it is the world model; its losses and its update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wmjax import optim
from wmjax.agents.world_models.config import WorldModelsConfig
from wmjax.agents.world_models.modules import Networks, check_spec
from wmjax.agents.world_models.vision import sample_latent, unpack_latent
from wmjax.nets.mlp import call
from wmjax.ops import distributions, noise
from wmjax.ops.masks import masked_mean
from wmjax.ops.scan import scan
from wmjax.types import Array, EnvSpec, Metrics, TimeStep, WorldModel

if TYPE_CHECKING:
    from wmjax.agents.world_models.agent import Equations


class State(NamedTuple):
    """What V sees of the present and M remembers of the past."""

    z: Array  # float32 [..., Z]
    h: Array  # float32 [..., H], output of the cell before the present action was fed to it
    c: Array  # float32 [..., H], its memory
    is_first: Array  # bool [...], the episode begins here: an input of M where it has that
    reward: Array  # float32 [...], expected on the way here, 0 where an episode began
    cont: Array  # float32 [...], P(not terminal) on the way here, 1 where an episode began
    started: Array  # bool [...], False before anything was seen: no transition leads from there


def world_model(nets: Networks, spec: EnvSpec, config: WorldModelsConfig) -> WorldModel:
    """The learned environment; `embed` is {"mu", "logvar"}, `State` as above."""
    image = check_spec(spec)

    def init_state(params, batch_size):
        del params
        zeros = lambda size: jnp.zeros((batch_size, size))
        false, zero = jnp.zeros(batch_size, bool), jnp.zeros(batch_size)
        return State(zeros(config.latent), zeros(config.hidden), zeros(config.hidden), false, zero, zero + 1, false)

    def encode(params, obs):
        mu, logvar = call(nets.encoder, params["encoder"], obs[image])
        return {"mu": mu, "logvar": logvar}

    def advance(params, state, action):  # h, c, and what is expected on the way: reward, P(not terminal)
        memory = params["memory"]
        gates = call(nets.memory, memory, state.z, action, state.is_first, method="inputs")
        h, c = call(nets.memory, memory, state.h, state.c, gates, method="advance")
        outputs, reward = call(nets.memory, memory, h, method="predict_outcome"), jnp.zeros(h.shape[:-1])
        if config.dream_reward == "survival":
            reward = reward + 1
        elif "reward" in outputs:
            reward = outputs["reward"][..., 0]
        # A dream ends where the end's logit is above 0, which `dream_env` reads as P(not terminal) < ½.
        cont = jax.nn.sigmoid(-outputs["done"][..., 0]) if "done" in outputs else jnp.ones(h.shape[:-1])
        return h, c, reward, cont

    def observe(params, key, state, prev_action, embed, is_first):
        h, c, reward, cont = advance(params, state, prev_action)
        # Where an episode begins the memory is empty: zero before the cell sees the first frame.
        keep = state.started & ~is_first
        h, c = (jnp.where(keep[..., None], x, 0.0) for x in (h, c))
        z = embed["mu"]
        if config.controller_z == "sample":
            z = sample_latent(key, embed["mu"], embed["logvar"])
        reward, cont = jnp.where(keep, reward, 0.0), jnp.where(keep, cont, 1.0)
        return State(z, h, c, is_first, reward, cont, jnp.ones_like(is_first))

    def imagine(params, key, state, action, temperature=config.temperature):
        h, c, reward, cont = advance(params, state, action)
        mixture = call(nets.memory, params["memory"], h, method="predict_latent")
        z = mixture.sample(key, temperature)
        false = jnp.zeros_like(state.is_first)
        return State(z, h, c, false, reward, cont, ~false)

    predict = lambda params, state: (state.reward, state.cont)
    decode = lambda params, state: {image: call(nets.decoder, params["decoder"], state.z) * 255}
    unrewarded = config.reward_head == "none" and config.dream_reward == "predicted"
    no_rewards = (
        "reward_head: 'none' predicts no rewards; mse or gaussian is valid here, or dream_reward survival if the task "
        "pays 1 for each step"
    )
    return WorldModel(
        init_state, encode, observe, imagine, predict, decode, no_rewards=no_rewards if unrewarded else None,
        temperature=config.temperature,
    )  # fmt: skip


def unroll(
    nets: Networks, params: dict, h: Array, c: Array, z: Array, action: Array, is_first: Array, remat: bool = False
) -> tuple[Array, tuple[Array, Array]]:
    """M over a sequence: outputs of the cell after each step, `[T, B, H]`, and its last (h, c).

    Before the first step h and c are `[B, H]`; they are zeroed where an episode begins, before the cell sees the step.
    Of the steps are z `[T, B, Z]`, the action `[T, B, A]` that follows it, and bool is_first `[T, B]`. `remat`:
    recompute the step in the backward pass instead of storing its insides.
    """
    gates = call(nets.memory, params, z, action, is_first, method="inputs")

    def step(carry, inputs):
        gates, first = inputs
        h, c = (jnp.where(first[:, None], 0.0, x) for x in carry)
        h, c = call(nets.memory, params, h, c, gates, method="advance")
        return (h, c), h

    last, outputs = scan(step, (h, c), (gates, is_first), remat=remat)
    return outputs, last


def done_loss(logits: Array, target: Array, pos_weight: float) -> Array:
    """Cross-entropy of the end, in which ends weigh `pos_weight`: float32, shape of `logits`."""
    return -(1 + target * (pos_weight - 1)) * distributions.bernoulli_log_prob(logits, target)


def reward_loss(outputs: Array, target: Array, kind: str) -> Array:
    """Squared error of a mean `[..., 1]`, or -ln N of a mean and a log standard deviation `[..., 2]`."""
    error = outputs[..., 0] - target
    if kind == "mse":
        return error**2
    log_std = outputs[..., 1]
    return 0.5 * (error * jnp.exp(-log_std)) ** 2 + log_std + 0.5 * math.log(2 * math.pi)


def memory_loss(
    nets: Networks, config: WorldModelsConfig, params: dict, start: tuple[Array, Array], z: Array, action: Array,
    step: TimeStep, axis_name: str | None = None, share: Array | None = None,
) -> tuple[Array, tuple[Metrics, tuple[Array, Array]]]:  # fmt: skip
    """M's loss on a sequence of T + 1 records: step t sees zₜ and aₜ and predicts what arrives with record t + 1.

    Args:
      start: (h, c) before the first record, `[B, H]`.
      z, action, step: `[T + 1, B, ...]`. No loss where record t + 1 begins another episode.
      axis_name: axis that the batch is spread over.
      share: of the records that count in the whole batch, where this is a part of it; see `masked_mean`.

    Returns:
      The scalar to minimize; metrics, and (h, c) after T records.
    """
    hidden, last = unroll(nets, params, *start, z[:-1], action[:-1], step.is_first[:-1], config.remat)
    mask = ~step.is_first[1:]
    mean = lambda x: masked_mean(x, mask, axis_name, share)
    mixture = call(nets.memory, params, hidden, method="predict_latent")
    # A mean over dimensions where each has its own mixture, the joint likelihood of all where they share one.
    losses = {"nll": mean(-jnp.mean(mixture.log_prob(z[1:]), -1))}
    outputs = call(nets.memory, params, hidden, method="predict_outcome")
    if "reward" in outputs:
        losses["reward"] = mean(reward_loss(outputs["reward"], step.reward[1:], config.reward_head))
    if "done" in outputs:
        target = step.is_terminal[1:].astype(jnp.float32)
        losses["done"] = mean(done_loss(outputs["done"][..., 0], target, config.done_pos_weight))
    if config.prediction_penalty:
        losses["penalty"] = config.prediction_penalty * mean(jnp.mean(mixture.mean**2, (-2, -1)))
    total = sum(losses.values())
    return total, (losses | {"loss": total}, last)


def optimizer(config: WorldModelsConfig) -> optax.GradientTransformation:
    """Clipping, entry by entry or by the norm of all, and Adam: lr = (first - final) decayᵗ + final."""
    clip = {"value": optax.clip, "norm": optim.clip_by_global_norm, "none": lambda limit: optax.identity()}
    spread = config.memory_learning_rate - config.memory_final_learning_rate
    schedule = lambda step: spread * config.memory_decay**step + config.memory_final_learning_rate
    return optim.flat(optax.chain(clip[config.clip](config.clip_limit), optax.adam(schedule)))


def make_update(nets: Networks, config: WorldModelsConfig, axis_name: str | None, equations: Equations) -> Callable:
    """`Update.fn`: one step of M on `[T + 1, B]` records that were encoded before."""

    def update(state, key, trajectory):
        rows = trajectory.action.shape[1]
        embed = unpack_latent(trajectory.latent)
        z, stats = embed["mu"], state.stats
        if config.z_source == "sample":  # fresh noise for every batch, the same z as target and as input
            mu, logvar = (embed[name].swapaxes(0, 1) for name in ("mu", "logvar"))
            z = sample_latent(noise.row_keys(key, rows, axis_name), mu, logvar).swapaxes(0, 1)
        start = (jnp.zeros((rows, config.hidden)),) * 2
        if config.memory_stateful:
            first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
            start = tuple(jax.lax.dynamic_slice_in_dim(x, first, rows) for x in stats["memory_carry"])
        step = trajectory.step._replace(obs={})
        batch = optim.Microbatches((start, z, trajectory.action, step), (0, 1, 1, 1), config.grad_accum)
        share = jnp.mean(~step.is_first[1:], dtype=jnp.float32)
        objective = lambda modules, *part: equations.memory(nets, config, modules["memory"], *part, axis_name, share)
        params = {"memory": state.params["memory"]}
        done = optim.descend(objective, {"memory": optimizer(config)}, state.opt_state, params, axis_name, batch)
        if config.memory_stateful:
            gather = (lambda x: x) if axis_name is None else (lambda x: jax.lax.all_gather(x, axis_name, tiled=True))
            stats = stats | {"memory_carry": tuple(gather(jax.lax.stop_gradient(x)) for x in done.aux)}
        params, opt_state = state.params | done.params, state.opt_state | done.opt_state
        new = state._replace(params=params, opt_state=opt_state, stats=stats, step=state.step + 1)
        return new, done.metrics | {"grad_norm": done.grad_norm["memory"]}, None

    return update
