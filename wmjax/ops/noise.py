"""Random numbers for a batch, drawn so that the number of devices does not matter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from wmjax.ops import contracts
from wmjax.types import Array


@dataclasses.dataclass(frozen=True)
class Given:
    """Random numbers in the place of one key: what draws from it is handed them, and computes on as with a key's own.

    Splitting and folding name places, and each place is drawn from once, as a key is used once.
    """

    hand: Callable  # (place, kind, shape) -> float32 `shape`; the kind is "gumbel", "normal" or "uniform"
    # What led here: a number of each split; of what was folded in, (data, of), where data is traced and below `of`.
    place: tuple[int | tuple[Array, int], ...] = ()

    dtype = jax.dtypes.prng_key
    ndim = 0
    shape = ()


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


def fold_in(key: Array, data: Array | int, of: int | None = None) -> Array:
    """`jax.random.fold_in` for one key or an array of keys `[...]`; `data` is an int32 scalar.

    `of`: how many there are of `data`, 0 to of - 1, which has to be said where numbers may be `Given` for all of them.
    """
    contracts.keys(*key.shape, key=key)
    if isinstance(key, Given):
        assert of is not None, "of: missing, without which given numbers have no size"
        return dataclasses.replace(key, place=(*key.place, (data, of)))
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(fold_in, (0, None))(key, data)


def split(key: Array, num: int) -> Array:
    """Splits one key, or each of an array of keys `[...]`, in `num`: `[num, ...]`, to be unpacked."""
    contracts.keys(*key.shape, key=key)
    if isinstance(key, Given):
        return [dataclasses.replace(key, place=(*key.place, i)) for i in range(num)]
    if key.ndim == 0:
        return jax.random.split(key, num)
    return jax.vmap(split, (0, None), 1)(key, num)


def _draw(kind: str, key: Array, shape: tuple[int, ...]) -> Array:
    contracts.keys(*shape, key=key)
    if isinstance(key, Given):
        return key.hand(key.place, kind, shape)
    sampler = getattr(jax.random, kind)
    if key.ndim == 0:
        return sampler(key, shape)
    rows = jax.vmap(lambda k: sampler(k, shape[key.ndim :]))(key.reshape(math.prod(key.shape)))
    return rows.reshape(shape)


def gumbel(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard Gumbel noise, float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw("gumbel", key, shape)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw("normal", key, shape)


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform noise in [0, 1), float32 `shape`, from one key or from keys with the leading axes of `shape`."""
    return _draw("uniform", key, shape)
