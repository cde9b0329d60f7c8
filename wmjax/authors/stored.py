"""Arrays that a file of the authors holds: what they are is known before they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from wmjax import checks

RANK = 8  # of an array, at most


class Refused(ValueError):
    """Why a file is not read, in words that follow "cannot be imported:"."""


class Stored(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # raises `Refused` or `OSError` where the file is not as it was

    def changed(self, change: Callable[[Any], Any]) -> Stored:
        """What a function of arrays makes of it, such as a transposition; only its shape is computed at once."""
        found = jax.eval_shape(change, jax.ShapeDtypeStruct(self.shape, np.float32))
        return Stored(found.shape, self.dtype, lambda: change(self.read()))


def in_memory(array: np.ndarray) -> Stored:
    """An array that has been read already."""
    return Stored(array.shape, array.dtype, lambda: array)


class Layer(NamedTuple):
    """One of our parameters, and what the authors call it."""

    name: str  # theirs
    stored: Stored  # in our layout


class Found(NamedTuple):
    """What a checkpoint of the authors holds."""

    layers: dict[str, Stored]  # by their names
    left_out: tuple[str, ...]  # names of what nobody acts by, such as an optimizer's moments
    files: tuple[Path, ...]  # that were read
    steps: int | None = None  # env steps of training, if they say so


def by_our_names(pairs: Iterable[tuple[str, Layer]]) -> dict[str, Layer]:
    """Layers by our names. Raises `Refused` where two have one name."""
    found: dict[str, Layer] = {}
    for name, layer in pairs:
        if name in found:
            raise Refused(f"its layers {checks.show(found[name].name)} and {checks.show(layer.name)} are the same one")
        found[name] = layer
    return found


def check_shape(shape: Any) -> tuple[int, ...]:
    """Raises `Refused` unless these are the sides of an array."""
    is_side = lambda n: type(n) is int and 0 <= n < 2**40
    if not isinstance(shape, tuple) or len(shape) > RANK or not all(map(is_side, shape)):
        raise Refused(f"an array in it has the shape {checks.show(shape)}")
    return shape


def size_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes."""
    return math.prod(shape) * dtype.itemsize
