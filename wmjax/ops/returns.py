"""Returns: what the rewards that follow are worth now. Time leads, `[T, ...]`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


def lambda_returns(reward: Array, discount: Array, value: Array, lambda_: float | Array) -> Array:
    """Mixes n-step returns by λ, backwards through time.

        Rₜ = rₜ + γₜ [(1 - λₜ) vₜ + λₜ Rₜ₊₁],   R_T = v_{T-1}

    Entry t of every argument belongs to the *arrival* at step t + 1, so `value[t]` is the value of the state that
    `reward[t]` came with. The last value is the bootstrap.

    Args:
      reward: `[T, ...]`, received on arriving at step t + 1.
      discount: `[T, ...]` in [0, 1], discount times probability to continue at step t + 1. 0 stops the sum.
      value: `[T, ...]`, value at step t + 1 (already without gradient where the paper says so).
      lambda_: in [0, 1]; 0 gives TD(0), 1 gives the discounted sum with a bootstrap. An array `[T, ...]` sets it for
        each step: λ (1 - lastₜ₊₁) bootstraps from the value at a time limit instead of summing into the next episode.

    Returns:
      float32 `[T, ...]`, the target for each step t in [0, T).

    Source: Hafner et al. 2025 (DreamerV3), equation for R^λ, and the replay variant of the official code, where
    λ is cut at the end of an episode; Hafner et al. 2020 (DreamerV1), equation 6.

    >>> lambda_returns(jnp.ones(2), jnp.full(2, 0.5), jnp.array([0.0, 2.0]), 1.0).tolist()
    [2.0, 2.0]
    """
    contracts.floating(reward=reward, discount=discount, value=value)
    reward, discount, value = (jnp.asarray(x, jnp.float32) for x in (reward, discount, value))
    contracts.alike(reward=reward, discount=discount, value=value)
    contracts.leading(1, reward=reward)
    contracts.broadcasts(reward=reward, lambda_=jnp.asarray(lambda_))
    lambda_ = jnp.broadcast_to(jnp.asarray(lambda_, jnp.float32), reward.shape)
    # What does not depend on the recursion is computed for all steps at once.
    now = reward + discount * (1 - lambda_) * value

    def step(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        now_t, decay_t = inputs
        total = now_t + decay_t * later
        return total, total

    # Unrolled, because on a GPU each turn of a loop launches its kernels anew.
    _, returns = jax.lax.scan(step, value[-1], (now, discount * lambda_), reverse=True, unroll=min(len(now), 16))
    return returns


def state_returns(reward: Array, discount: Array, value: Array, lambda_: float, bootstrap: bool = True) -> Array:
    """`lambda_returns` where reward and discount are those of the same state, and the value is the next state's.

        Vₜ = rₜ + γₜ [(1 - λ) vₜ₊₁ + λ Vₜ₊₁],   V_{T-1} = v_{T-1}

    Args:
      reward, discount, value: `[T, ...]`, of each state; with their gradients.
      lambda_: in [0, 1].
      bootstrap: False ends returns with the reward of the last state instead of its value.

    Returns:
      float32 `[T - 1, ...]`, what each state but the last is worth.

    Source: Hafner et al. 2020 (DreamerV1), equation 6; Hafner et al. 2021 (DreamerV2), equation 4.

    >>> state_returns(jnp.ones(3), jnp.full(3, 0.5), jnp.full(3, 4.0), 1.0).tolist()
    [2.5, 3.0]
    """
    contracts.alike(reward=reward, discount=discount, value=value)
    if not bootstrap:
        value = value.at[-1].set(reward[-1])
    return lambda_returns(reward[:-1], discount[:-1], value[1:], lambda_)


def discount_weights(cont: Array) -> Array:
    """Weighs imagined steps by the probability that the episode is still going: wₜ = Πⱼ≤ₜ cⱼ.

    The product includes step t itself, so w₀ = c₀, not 1.

    Args:
      cont: `[T, ...]` in [0, 1], discount times probability to continue at step t.

    Returns:
      float32 `[T, ...]`.

    Source: official DreamerV3 code (the paper does not spell it out).

    >>> discount_weights(jnp.array([0.5, 0.5, 0.0])).tolist()
    [0.5, 0.25, 0.0]
    """
    contracts.leading(1, cont=cont)
    contracts.floating(cont=cont)
    return jnp.cumprod(jnp.asarray(cont, jnp.float32), 0)


def discount_weights_before(cont: Array) -> Array:
    """As `discount_weights`, without the step itself: wₜ = Πⱼ<ₜ cⱼ, so w₀ = 1.

    Args:
      cont: `[T, ...]` in [0, 1], discount times probability to continue at step t; the last one is not used.

    Returns:
      float32 `[T, ...]`.

    Source: DreamerV1 and DreamerV2 code.

    >>> discount_weights_before(jnp.array([0.5, 0.5, 0.0])).tolist()
    [1.0, 0.5, 0.25]
    """
    contracts.leading(1, cont=cont)
    contracts.floating(cont=cont)
    return discount_weights(jnp.concatenate([jnp.ones_like(cont[:1]), cont[:-1]]))
