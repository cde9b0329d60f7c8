"""Averages over what counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


def masked_mean(x: Array, mask: Array, axis_name: str | None = None, share: Array | None = None) -> Array:
    """The mean of `x` over the entries that count, 0 if there are none.

    Args:
      x: `[..., N]`.
      mask: weights in [0, 1] or bool, of a shape that broadcasts to that of `x`.
      axis_name: the named axis that entries are spread over, or None. The sum is this device's, the count the mean over
        devices, so that the *mean over devices* of the result (and of its gradient) is the mean over all entries.
      share: of entries that count in the whole batch, where `x` is a part of it: the *mean over parts* of the result is
        that of the batch then. None: that of `mask`.

    >>> masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])).item()
    2.0
    """
    contracts.floating(x=x)
    contracts.broadcasts(x=x, mask=mask)
    mask = jnp.broadcast_to(mask, x.shape).astype(jnp.float32)
    count = mask.sum() if share is None else share * mask.size
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return (x * mask).sum() / jnp.maximum(count, 1e-8)
