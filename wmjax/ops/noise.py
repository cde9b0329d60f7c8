"""Random numbers for a batch, drawn so that the number of devices does not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


def row_keys(key: Array, rows: int, axis_name: str | None = None) -> Array:
    """Gives one key for each row of a batch that may be spread over devices.

    Args:
      key: one key, the same on every device; consumed.
      rows: rows of the batch on this device.
      axis_name: the named axis that the batch is spread over, or None.

    Returns:
      Keys `[rows]`. Row i of device d gets the key of global row d * rows + i, so one device and many draw the same.
    """
    contracts.keys(key=key)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(rows))


def fold_in(key: Array, data: Array | int) -> Array:
    """`jax.random.fold_in` for one key or an array of keys `[...]`; `data` is an int32 scalar."""
    contracts.keys(*key.shape, key=key)
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(fold_in, (0, None))(key, data)


def split(key: Array, num: int) -> Array:
    """Splits one key, or each of an array of keys `[...]`, in `num`: `[num, ...]`, to be unpacked."""
    contracts.keys(*key.shape, key=key)
    if key.ndim == 0:
        return jax.random.split(key, num)
    return jax.vmap(split, (0, None), 1)(key, num)


def _draw(sampler: Callable, key: Array, shape: tuple[int, ...]) -> Array:
    contracts.keys(*shape, key=key)
    if key.ndim == 0:
        return sampler(key, shape)
    rows = jax.vmap(lambda k: sampler(k, shape[key.ndim :]))(key.reshape(math.prod(key.shape)))
    return rows.reshape(shape)


def gumbel(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard Gumbel noise, float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw(jax.random.gumbel, key, shape)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw(jax.random.normal, key, shape)


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform noise in [0, 1), float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw(jax.random.uniform, key, shape)
