"""Means over the steps that count, where some are padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.types import Array


def masked_mean(x: Array, mask: Array, axis_name: str | None = None) -> Array:
    """Mean over the entries that count, so written that the mean of gradients over devices is that of one device.

        L = Σ mᵢ xᵢ / (Σ m / D),   Σ m over all D devices

    Args:
      x: any shape; where it does not count it may be anything but NaN.
      mask: bool or float, broadcast against `x`: what counts.
      axis_name: axis that the batch is spread over. The result is then this device's share: its mean over devices is
        the mean over the whole batch.

    Returns:
      float32 scalar; 0 where nothing counts.

    >>> masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])).item()
    1.5
    """
    x = jnp.asarray(x, jnp.float32)
    mask = jnp.broadcast_to(mask, x.shape).astype(jnp.float32)
    count = jnp.sum(mask)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return jnp.sum(x * mask) / jnp.maximum(count, 1e-9)
