"""How pictures lie in arrays of bytes, which arrays look like pictures without being such, and how they are resized."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import numpy as np

from wmjax.suites import SuiteError

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA
MOST_CHANNELS = 32
SMALLEST = 8  # pixels of a side, where only the sides can tell a picture from a table
BRIGHT = 128  # what pictures of bytes may hold at least; less is a mask or a board, or would be read as black
LARGEST = 128  # pixels; larger pictures, and those that are not square, are resized unless a size is given
DEFAULT_SIZE = 64
RENDERED = "render/rgb_array"  # the entry beside the observations of an environment whose rendering is asked for
MOST_RENDERED = 400  # pixels of its longer side


def axes(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of pictures in the order height, width, and the others, which are channels; None where that is unclear.

    Valid are `[H, W]`, `[H, W, C]`, `[C, H, W]`, and stacks of K pictures, `[K, H, W, C]` and `[K, C, H, W]`, where C
    and K are at most 32 and half of either side (or 1, 3 or 4 and less than either side). Of `[H, W]` with a side below
    8 none are: it is a board, or a table.
    """
    if len(shape) == 2:
        return (0, 1) if min(shape) >= SMALLEST else None
    if len(shape) == 3:
        last, first = _are_channels(shape[2], shape[:2]), _are_channels(shape[0], shape[1:])
        return None if first == last else (0, 1, 2) if last else (1, 2, 0)
    inner = axes(shape[1:]) if len(shape) == 4 else None
    if inner is None or not _are_channels(shape[0], [shape[1 + axis] for axis in inner[:2]]):
        return None
    height, width, channel = (1 + axis for axis in inner)
    return height, width, 0, channel


def _are_channels(count: int, sides: tuple[int, ...] | list[int]) -> bool:
    return count <= min(MOST_CHANNELS, min(sides) // 2) or (count in CHANNELS and count < min(sides))


def resemble(shape: tuple[int, ...], low: float, high: float) -> bool:
    """Whether an array that does not hold bytes may be meant as pictures.

    So it is where it has three or four axes, two of which are nearly alike and at least 8; and where it has only these
    two, of at least 32, and holds what gray pictures hold.
    """
    gray = low in (-1, 0) and high in (1, 255)
    sides = sorted(size for size in shape if size >= (32 if len(shape) == 2 else SMALLEST))
    alike = any(large <= 2 * small for small, large in itertools.pairwise(sides))
    return alike and (len(shape) in (3, 4) or (len(shape) == 2 and gray))


def default_size(height: int, width: int) -> int:
    """The side that pictures are read at where none is given: their own where they are square and not large."""
    return height if height == width <= LARGEST else DEFAULT_SIZE


def arrange(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Pictures whose axes are ordered as `axes` says, as uint8 `[H, W, C]`; a stack lies in the channels."""
    height, width = (array.shape[axis] for axis in order[:2])
    return np.transpose(array, order).reshape(height, width, -1)


def resize(image: np.ndarray, size: int, how: Literal["BOX", "BILINEAR"] = "BOX") -> np.ndarray:
    """A picture uint8 `[H, W, C]` as `[size, size, C]`, by Pillow.

    "BOX" is the mean over the pixels that fall into each new one; "BILINEAR" weighs them, and some around them.
    """
    from PIL import Image

    of = lambda plane: np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling[how]))
    return of(image) if image.shape[-1] == 3 else np.stack([of(plane) for plane in np.moveaxis(image, -1, 0)], -1)


def rendering(env: Any) -> np.ndarray:
    """What `env.render()` shows, uint8 `[H, W, 3]`, made smaller than `MOST_RENDERED` where it is larger.

    Raises `SuiteError` where it is no picture.
    """
    from PIL import Image

    image = np.asarray(env.render())
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise SuiteError(
            f"video: what the environment renders as 'rgb_array', {image.dtype} {image.shape}, is no picture; uint8 "
            "(height, width, 3) is"
        )
    height, width = image.shape[:2]
    if max(height, width) <= MOST_RENDERED:
        return image
    size = (max(1, side * MOST_RENDERED // max(height, width)) for side in (width, height))
    return np.asarray(Image.fromarray(image).resize(tuple(size), Image.Resampling.BOX))


def remedy(name: str, bare: bool, shape: tuple[int, ...], dtype: str, low: float, high: float) -> str:
    """What to do with an entry that may be meant as pictures, for an error's text; `bare` if there is no other."""
    transform, box = "gymnasium.wrappers.TransformObservation", f"gymnasium.spaces.Box(0, 255, {shape}, 'uint8')"
    one = f"observation {name!r}, {dtype} {shape} in [{low:g}, {high:g}], may be meant as pictures or as numbers"
    vector = (
        f"gymnasium.wrappers.{'FlattenObservation(env)' if bare else 'TransformObservation'} for numbers, of one axis"
    )
    if dtype == "uint8" and axes(shape) is None:
        return (
            f"{one}; valid are {vector}, or {transform} for pictures: (height, width[, channels]), (channels, height, "
            f"width) or a stack of such, with at most {MOST_CHANNELS} channels, and half of either side"
        )
    if 0 <= low and BRIGHT <= high <= 255:
        scaled = "x"
    elif (low, high) == (0, 1):
        scaled = "255.0 * x"
    else:  # as floats, for small integers would wrap
        scaled = f"255 * (x.astype(float) - {low:g}) / {high - low:g}"
        scaled = scaled if math.isfinite(high - low) else "numpy.clip(x, 0, 255)"
    to_bytes = f"({scaled}).astype('uint8')"
    wrapped = f"{transform}(env, lambda x: {to_bytes}, {box})" if bare else f"{transform} with {to_bytes} and {box}"
    return f"{one}; valid are {vector}, or {wrapped} for pictures"
