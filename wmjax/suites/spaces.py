"""What Gymnasium's spaces become: named images, vectors and choices, and actions of three kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from wmjax.suites import SuiteError

CHANNELS = (1, 3, 4)
LARGEST = 128  # pixels; larger pictures, and those that are not square, are resized to 64 unless a size is given
DEFAULT_SIZE = 64


class Fault(Exception):
    """What an environment gave is not what its spaces say; the message names the entry."""


def _kind(space: Any) -> str:
    """The name of a space's class, such as "Box"; those that derive from one of Gymnasium's count as that."""
    known = ("Dict", "Tuple", "Box", "Discrete", "MultiDiscrete", "MultiBinary")
    return next((cls.__name__ for cls in type(space).__mro__ if cls.__name__ in known), type(space).__name__)


def _is_empty(space: Any) -> bool:
    """Whether a space holds nothing, such as a box of the shape (0,)."""
    return _kind(space) in ("Box", "MultiDiscrete", "MultiBinary") and math.prod(space.shape) == 0


class ObsReader:
    """Turns observations of one environment into arrays by name.

    Pictures (uint8 `[H, W]`, `[H, W, C]` or `[C, H, W]`) are called "image" and become uint8 `[H, W, C]`. A `Discrete`
    entry is called "choice" and becomes an int32. Other boxes are called "vector", as are `MultiDiscrete` (one-hot) and
    `MultiBinary`, and become float32 `[D]`. Entries of a `Dict` keep their own names, joined with "/" where nested.

    Args:
      space: a `gymnasium.Space`.
      image_size: side of all pictures; None for their own where they are square and at most 128 pixels wide, else 64.

    Raises:
      SuiteError: a space of another kind, or an image size without a picture.
    """

    def __init__(self, space: Any, image_size: int | None) -> None:
        self._entries = [(name, path, *self._leaf(name, leaf, image_size)) for name, path, leaf in _leaves(space)]
        if not self._entries:
            raise SuiteError("env: its observation_space has no entries")
        names = [entry[0] for entry in self._entries]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SuiteError(f"env: two entries of its observation_space are called {twice!r}; names must differ")
        if image_size is not None and not any(len(entry[2]["shape"]) == 3 for entry in self._entries):
            raise SuiteError(f"image_size: {image_size} is not valid for an environment that observes no picture")

    def describe(self) -> list[dict[str, Any]]:
        """Name, dtype, shape, bounds and number of choices of every entry."""
        return [{"name": name, **about} for name, _, about, _ in self._entries]

    def read(self, obs: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Names and arrays of an observation. Raises `Fault` where it is not what the space says, or not finite."""
        for name, path, _, convert in self._entries:
            value = obs
            for key in path:
                try:
                    value = value[key]
                except (KeyError, IndexError, TypeError):
                    raise Fault(f"observation {name!r} is missing") from None
            yield name, convert(value)

    def _leaf(self, name: str, space: Any, image_size: int | None) -> tuple[dict[str, Any], Callable]:
        kind = _kind(space)
        if _is_empty(space):
            raise SuiteError(f"env: observation {name!r} has the shape {space.shape}, which holds nothing")
        if kind == "Box" and space.dtype == np.uint8 and len(space.shape) in (2, 3):
            return _image(name, space, image_size)
        if kind == "Box":
            about = {"dtype": "float32", "shape": [math.prod(space.shape)]}
            bounds = {"low": float(np.min(space.low)), "high": float(np.max(space.high))}
            return about | bounds, lambda value: _checked(name, value, space, np.float32).reshape(-1)
        if kind == "Discrete":
            start, count = int(space.start), int(space.n)
            return {"dtype": "int32", "shape": [], "n": count}, lambda value: _choice(name, value, start, count)
        if kind == "MultiDiscrete":
            starts, counts = np.ravel(space.start), np.ravel(space.nvec)
            about = {"dtype": "float32", "shape": [int(counts.sum())], "low": 0.0, "high": 1.0}
            return about, lambda value: _one_hots(_checked(name, value, space, np.int64).ravel() - starts, counts)
        if kind == "MultiBinary":
            about = {"dtype": "float32", "shape": [math.prod(space.shape)], "low": 0.0, "high": 1.0}
            return about, lambda value: _checked(name, value, space, np.float32).reshape(-1)
        raise SuiteError(
            f"env: observation {name!r} is a {kind} space, which is not supported; valid are Box, Discrete, "
            "MultiDiscrete, MultiBinary, and a Dict or Tuple of these"
        )


def _leaves(space: Any, names: tuple[str, ...] = (), path: tuple = ()) -> Iterator[tuple[str, tuple, Any]]:
    kind = _kind(space)
    if kind in ("Dict", "Tuple"):
        items = space.spaces.items() if kind == "Dict" else enumerate(space.spaces)
        for key, inner in items:
            yield from _leaves(inner, (*names, str(key)), (*path, key))
        return
    picture = kind == "Box" and space.dtype == np.uint8 and len(space.shape) in (2, 3)
    yield "/".join(names) or ("image" if picture else "choice" if kind == "Discrete" else "vector"), path, space


def _checked(name: str, value: Any, space: Any, dtype: Any) -> np.ndarray:
    value = np.asarray(value)
    if value.shape != space.shape:
        raise Fault(f"observation {name!r} has the shape {value.shape}, not {space.shape}")
    if not np.can_cast(value.dtype, space.dtype, "same_kind"):
        raise Fault(f"observation {name!r} is {value.dtype}, not {space.dtype}")
    with np.errstate(over="ignore"):
        converted = value.astype(dtype)
    if value.dtype.kind == "f" and not np.isfinite(converted).all():  # as float64 it may have been
        raise Fault(f"observation {name!r} is not finite")
    return converted


def _choice(name: str, value: Any, start: int, count: int) -> np.int32:
    if np.shape(value) != () or not 0 <= int(value) - start < count:
        raise Fault(f"observation {name!r} is {value!r}, not one of {count} choices from {start} upwards")
    return np.int32(int(value) - start)


def _one_hots(choices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rows = [np.eye(n, dtype=np.float32)[min(max(i, 0), n - 1)] for i, n in zip(choices, counts, strict=True)]
    return np.concatenate(rows)


def _image(name: str, space: Any, image_size: int | None) -> tuple[dict[str, Any], Callable]:
    shape = space.shape
    if len(shape) == 2:
        arrange, (height, width, channels) = (lambda x: x[..., None]), (*shape, 1)
    elif shape[-1] not in CHANNELS and shape[0] in CHANNELS:
        arrange, (channels, height, width) = (lambda x: np.moveaxis(x, 0, -1)), shape
    else:
        arrange, (height, width, channels) = (lambda x: x), shape
    size = image_size
    if size is None:
        size = height if height == width <= LARGEST else DEFAULT_SIZE
    about = {"dtype": "uint8", "shape": [size, size, channels], "low": 0, "high": 255}
    if (height, width) == (size, size):
        return about, lambda value: arrange(_checked(name, value, space, np.uint8))
    return about, lambda value: resize(arrange(_checked(name, value, space, np.uint8)), size)


def resize(image: np.ndarray, size: int, how: Literal["BOX", "BILINEAR"] = "BOX") -> np.ndarray:
    """A picture uint8 `[H, W, C]` as `[size, size, C]`, by Pillow.

    "BOX" is the mean over the pixels that fall into each new one; "BILINEAR" weighs them, and some around them.
    """
    from PIL import Image

    of = lambda plane: np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling[how]))
    return of(image) if image.shape[-1] == 3 else np.stack([of(plane) for plane in np.moveaxis(image, -1, 0)], -1)


class ActionReader:
    """Turns an int32 choice, int32 choices `[k]` or float32 `[A]` into an action of a Gymnasium space.

    Raises `SuiteError` for spaces other than `Discrete`, `MultiDiscrete`, `MultiBinary` and a `Box` of floats.
    """

    def __init__(self, space: Any) -> None:
        kind = _kind(space)
        if _is_empty(space):
            raise SuiteError(f"env: its action space has the shape {space.shape}, which holds nothing")
        if kind == "Discrete":
            start = int(space.start)
            self._about = {"kind": "discrete", "n": int(space.n), "dtype": "int32", "shape": []}
            self.read = lambda action: int(action) + start
        elif kind in ("MultiDiscrete", "MultiBinary"):
            counts = np.ravel(space.nvec) if kind == "MultiDiscrete" else np.full(math.prod(space.shape), 2)
            starts = np.ravel(space.start) if kind == "MultiDiscrete" else 0
            self._about = {"kind": "multi_discrete", "ns": counts.tolist(), "dtype": "int32", "shape": [len(counts)]}
            self.read = lambda action: (action + starts).astype(space.dtype).reshape(space.shape)
        elif kind == "Box" and np.issubdtype(space.dtype, np.floating):
            low, high = (np.ravel(x).astype(float).tolist() for x in (space.low, space.high))
            about = {"kind": "box", "low": low, "high": high, "dtype": "float32", "shape": [len(low)]}
            self._about = about
            self.read = lambda action: action.astype(space.dtype).reshape(space.shape)
        else:
            raise SuiteError(
                f"env: its action space {space} is not supported; valid are Discrete, MultiDiscrete, MultiBinary and a "
                "Box of floats"
            )

    def describe(self) -> dict[str, Any]:
        """Kind, dtype, shape, and choices or bounds."""
        return self._about
