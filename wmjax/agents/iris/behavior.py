"""The actor-critic: it sees reconstructions alone, and learns in imagination (appendix B)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from wmjax.agents.iris.config import IRISConfig
from wmjax.agents.iris.dynamics import generate
from wmjax.agents.iris.modules import Networks, descend, image_name
from wmjax.agents.iris.tokenizer import decode, encode
from wmjax.nets.actor_critic import Memory, zero_memory
from wmjax.nets.mlp import call
from wmjax.ops import distributions, noise, returns
from wmjax.ops.scan import scan
from wmjax.types import Array, EnvSpec, Sampling, Update, WorldModel

if TYPE_CHECKING:
    from wmjax.agents.iris.agent import Equations

sg = jax.lax.stop_gradient


def burn_in(nets: Networks, config: IRISConfig, params: dict, frames: Array, mask: Array) -> Memory:
    """The memory after some frames `[T, B, H, W, C]` in [0, 1]; it stays as it is where `mask` `[T, B]` is False."""
    weights, memory = params["actor_critic"], zero_memory(mask.shape[1], config.lstm_units)

    def step(memory, inputs):
        features, mask = inputs
        new = call(nets.actor_critic, weights, memory, features, method="remember")
        return jax.tree.map(lambda new, old: jnp.where(mask[:, None], new, old), new, memory), ()

    features = call(nets.actor_critic, weights, frames, method="features")
    return scan(step, memory, (features, mask))[0]


def replay_frames(nets: Networks, weights: dict, memory: Memory, frames: Array) -> tuple[Array, Array]:
    """Action logits `[H, B, A]` and values `[H, B]` on frames `[H, B, ...]`, convolved all at once."""

    def step(memory, features):
        memory = call(nets.actor_critic, weights, memory, features, method="remember")
        return memory, memory.hidden

    features = call(nets.actor_critic, weights, frames, method="features")
    return call(nets.actor_critic, weights, scan(step, memory, features)[1], method="outputs")


def lambda_returns(reward: Array, end: Array, value: Array, discount: float, lambda_: float) -> Array:
    """Targets for each of H imagined frames.

        G_{H-1} = V_{H-1},   Gₜ = rₜ + (1 - dₜ) γ [(1 - λ) Vₜ₊₁ + λ Gₜ₊₁]

    Reward and end are `[H - 1, ...]`, what follows the action at frame t; values, and the result, float32 `[H, ...]`.

    Source: appendix B.
    """
    rest = returns.lambda_returns(reward, discount * (1.0 - end), value[1:], lambda_)
    return jnp.concatenate([rest, value[-1:]])


def actor_critic_losses(
    logits: Array, value: Array, action: Array, reward: Array, end: Array, config: IRISConfig,
    targets: Callable = lambda_returns,
) -> tuple[dict[str, Array], Array]:  # fmt: skip
    """Losses on imagined trajectories, of which the last frame only supplies a value.

        L_actor = -mean log π(aₜ) (Gₜ - Vₜ),   L_critic = mean (Vₜ - Gₜ)²,   L_entropy = -η mean H(πₜ)

    Args:
      logits, value: `[H, B, A]` and `[H, B]`; differentiated.
      action: one-hot `[H - 1, B, A]`.
      reward, end: `[H - 1, B]`. What comes after a drawn end still counts; only the returns are cut there.
      targets: a function as `lambda_returns`.

    Returns:
      Scalars, and the targets `[H, B]`.

    Source: appendix B, equations 7 and 8.
    """
    target = sg(targets(reward, end, value, config.discount, config.lambda_))
    policy = distributions.OneHotCategorical(logits[:-1])
    advantage = sg(target - value)[:-1]
    losses = {
        "actor": -jnp.mean(policy.log_prob(action) * advantage),
        "critic": jnp.mean((value - target)[:-1] ** 2),
        "entropy": -config.entropy_scale * jnp.mean(policy.entropy()),
    }
    return losses, target


def make_update(
    nets: Networks, model: WorldModel, spec: EnvSpec, config: IRISConfig, axis_name: str | None, equations: Equations
) -> Update:
    """Steps on `[burn_in + 1, B]` records, padded at the beginning; imagination starts from the last one.

    Imagination is rolled out without gradients first, then the actor-critic runs over its frames again with them: the
    same numbers as differentiating the rollout, for neither frames nor actions carry a gradient.
    """
    name = image_name(spec, config)

    def update(state, key, trajectory):
        params, mask = state.params, trajectory.mask
        tokens = encode(nets, config, params, trajectory.step.obs[name])
        memory = zero_memory(mask.shape[1], config.lstm_units)
        if config.burn_in:
            memory = burn_in(nets, config, params, decode(nets, params, tokens[:-1]), mask[:-1])
        keys = noise.row_keys(key, mask.shape[1], axis_name)

        def policy(key, memory, frame):
            memory, logits, _ = call(nets.actor_critic, params["actor_critic"], memory, frame)
            return memory, distributions.OneHotCategorical(logits).sample(seed=key)

        dream, frames = sg(generate(nets, model, params, keys, tokens[-1], config.horizon - 1, policy, memory))

        def objective(weights, memory, frames, dream):
            logits, value = replay_frames(nets, weights, memory, frames)
            losses, target = equations.behavior(
                logits, value, dream.action, dream.reward, dream.end, config, equations.returns
            )
            metrics = {
                "return_mean": jnp.mean(target),
                "value_mean": jnp.mean(value),
                "imagined_reward": jnp.mean(dream.reward),
                "imagined_end": jnp.mean(dream.end, dtype=jnp.float32),
                "policy_entropy": jnp.mean(distributions.OneHotCategorical(logits).entropy()),
            }
            scales = {"actor": config.actor_scale, "critic": config.critic_scale, "entropy": 1.0}
            return {name: scales.get(name, 1.0) * loss for name, loss in losses.items()}, (metrics, ())

        args = memory, frames, dream
        new, metrics, _ = descend("actor_critic", objective, state, config, axis_name, args, (0, 1, 1))
        return new, metrics, None

    sampling = Sampling(1, context=config.burn_in, over="episodes", pad="left")
    return Update(
        "actor_critic", update, config.actor_critic_updates, config.actor_critic_batch, sampling, config.grad_accum
    )
