"""Squashing of values whose scale is not known beforehand."""

from __future__ import annotations

import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


def symlog(x: Array) -> Array:
    """Squashes both tails logarithmically and is the identity near 0: sign(x) ln(1 + |x|), any shape.

    Source: Hafner et al. 2025 (DreamerV3), equation for symlog.

    >>> symlog(jnp.array([0.0, 1e3, -1e6])).round(2).tolist() == jnp.array([0.0, 6.91, -13.82]).tolist()
    True
    """
    contracts.floating(x=x)
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Array) -> Array:
    """Undoes `symlog`: sign(x) (exp(|x|) - 1), any shape. Overflows float32 beyond |x| = 88.

    Source: Hafner et al. 2025 (DreamerV3), equation for symexp.

    >>> bool(jnp.allclose(symexp(symlog(jnp.array([-3.0, 0.0, 5.0]))), jnp.array([-3.0, 0.0, 5.0])))
    True
    """
    contracts.floating(x=x)
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


# What a world model may be asked to predict instead of the reward itself, by name.
REWARD_TRANSFORMS = {"identity": lambda reward: reward, "tanh": jnp.tanh, "symlog": symlog}
# And what reward that is. A tanh tells rewards of 4 and more apart no longer.
REWARDS_BACK = {
    "identity": lambda reward: reward,
    "tanh": lambda reward: jnp.arctanh(jnp.clip(reward, -0.999, 0.999)),
    "symlog": symexp,
}
