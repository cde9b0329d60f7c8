"""What a person can do: the buttons, sliders and keys for a space of actions, and the action that they ask for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from wmjax import checks
from wmjax.types import Box, Discrete, MultiDiscrete, Space, UsageError

MOST = 512  # buttons, or sliders, that one page shows


class Named(NamedTuple):
    """What the actions of an environment are called, and which of them stands for doing nothing."""

    labels: tuple[str, ...]  # of the choices, or of the numbers
    rest: tuple[float, ...]  # the index of one choice, or a value in [-1, 1] for each number
    keys: dict[str, tuple[int, float]]  # of choices (0, index); of numbers (which, value while the key is held)


SIDES = {"ArrowLeft": (0, 0), "ArrowRight": (0, 1)}
PLANE = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (1, 1), "ArrowDown": (1, -1)}
DRIVING = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (1, 1), "ArrowDown": (2, 1)}
CAR = Named(("steer", "gas", "brake"), (0, -1, -1), DRIVING)
NAMED = {
    "catch": Named(("left", "stay", "right"), (1,), {"ArrowLeft": (0, 0), "ArrowDown": (0, 1), "ArrowRight": (0, 2)}),
    "recall": Named(("left", "right"), (0,), SIDES),
    "pendulum": Named(("torque",), (0,), {"ArrowLeft": (0, -1), "ArrowRight": (0, 1)}),
    "racing": CAR,
    "racing:flicker": CAR,
    "gym:CarRacing-v3": CAR,
}


def controls(space: Space, env: str | None) -> dict[str, Any]:
    """What the page shows for a space of actions, as JSON.

    Args:
      space: of the environment's own actions.
      env: its name, by which some actions have names and keys of their own.

    Returns:
      `choices`, for each choice the `labels` of its buttons, or `numbers`, the label of each number in [-1, 1]; `rest`,
      an index for each choice, or a value for each number, of doing nothing; and `keys`, for the name of a key the
      choice and the index, or the number and its value.

    Raises:
      UsageError: the space has more buttons or sliders than a page can show.
    """
    named = NAMED.get(env or "")
    if isinstance(space, Box):
        size = math.prod(space.shape)
        _check_size(size, "numbers")
        fits = named if named is not None and len(named.labels) == size else None
        labels = fits.labels if fits else [f"number {i + 1}" for i in range(size)]
        keys = fits.keys if fits else {key: at for key, at in PLANE.items() if at[0] < size}
        return {"numbers": list(labels), "rest": list(fits.rest if fits else [0.0] * size), "keys": keys}
    counts = (space.n,) if isinstance(space, Discrete) else space.ns
    _check_size(sum(counts), "choices")
    fits = named if named is not None and counts == (len(named.labels),) else None
    labels = [list(fits.labels)] if fits else [[f"action {i}" for i in range(n)] for n in counts]
    keys = fits.keys if fits else SIDES if counts == (2,) else {}
    return {"choices": labels, "rest": list(fits.rest if fits else [0] * len(counts)), "keys": keys}


def _check_size(size: int, what: str) -> None:
    if size > MOST:
        raise UsageError(f"run: its actions are {size:,} {what}, more than a page shows; at most {MOST} are valid")


def action_of(space: Space, asked: Any) -> np.ndarray:
    """What an agent would emit for an action that a page asks for, float32 `[A]`: one-hots, or numbers in [-1, 1].

    Raises `UsageError` unless `asked` is a list of an index for each choice, or of a finite number for each number.
    """
    if isinstance(space, Box):
        size = math.prod(space.shape)
        fine = isinstance(asked, list) and len(asked) == size and all(_is_number(x) for x in asked)
        if not fine:
            raise checks.invalid("action", asked, f"a list of {size} numbers in [-1, 1]")
        return np.clip(np.array(asked, np.float32), -1, 1)
    counts = space.ns if isinstance(space, MultiDiscrete) else (space.n,)
    fine = isinstance(asked, list) and len(asked) == len(counts)
    if not fine or not all(type(i) is int and 0 <= i < n for i, n in zip(asked, counts, strict=True)):
        raise checks.invalid("action", asked, f"a list of an index below each of {list(counts)}")
    return np.concatenate([np.eye(n, dtype=np.float32)[i] for i, n in zip(asked, counts, strict=True)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < checks.LARGEST
