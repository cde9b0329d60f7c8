"""Running statistics that put returns on a common scale, as state in and state out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


class ReturnRange(NamedTuple):
    """Where most returns have been lately."""

    low: Array  # float32 scalar
    high: Array  # float32 scalar


def init() -> ReturnRange:
    """An empty range, from 0 to 0."""
    return ReturnRange(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update(
    state: ReturnRange,
    x: Array,
    rate: float = 0.01,
    low: float = 5.0,
    high: float = 95.0,
    axis_name: str | None = None,
) -> ReturnRange:
    """Moves the range towards two percentiles of `x`: low ← (1 - rate) low + rate percentile(x, 5), high likewise.

    The start at 0 is not corrected for (no debiasing), so a small early range never inflates advantages.

    Args:
      state: the range so far.
      x: returns, any shape; carries no gradient.
      rate: in [0, 1], how far to move.
      low, high: percentiles in [0, 100], interpolated linearly.
      axis_name: the named axis that `x` is spread over, or None. The percentiles are those of all shards together;
        the mean of the shards' percentiles would be another number.

    Returns:
      The new range, the same on every device.

    Source: Hafner et al. 2025 (DreamerV3), equation for S.

    >>> [round(x.item(), 3) for x in update(init(), jnp.arange(101.0), rate=0.5)]
    [2.5, 47.5]
    """
    contracts.floating(x=x, low=state.low, high=state.high)
    contracts.exactly(low=state.low, high=state.high)
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    if axis_name is not None:
        x = jax.lax.all_gather(x, axis_name)
    percentiles = jnp.percentile(x, jnp.array([low, high], jnp.float32))
    return ReturnRange(
        (1 - rate) * state.low + rate * percentiles[0],
        (1 - rate) * state.high + rate * percentiles[1],
    )


def scale(state: ReturnRange, limit: float = 1.0) -> Array:
    """What to divide advantages by: max(limit, high - low), a float32 scalar.

    The limit keeps small returns small, so that noise around 0 is not blown up when rewards are rare.

    >>> scale(ReturnRange(jnp.array(-1.0), jnp.array(3.0))).item(), scale(init()).item()
    (4.0, 1.0)
    """
    contracts.exactly(low=state.low, high=state.high)
    contracts.floating(low=state.low, high=state.high)
    return jnp.maximum(limit, state.high - state.low)
