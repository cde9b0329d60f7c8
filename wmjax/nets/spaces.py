"""What an environment's spaces mean to an agent's networks."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from wmjax.nets.codec import is_image
from wmjax.types import Array, Box, Discrete, EnvSpec, MultiDiscrete, UsageError


def action_size(spec: EnvSpec) -> int:
    """A: the number of choices, of all choices where several are made at once, or of action dimensions."""
    counts = choice_counts(spec)
    return spec.action.shape[0] if counts is None else sum(counts)


def choice_counts(spec: EnvSpec) -> tuple[int, ...] | None:
    """What there is to choose from in each of the choices that make an action; None where actions are continuous."""
    if isinstance(spec.action, Discrete):
        return (spec.action.n,)
    return tuple(spec.action.ns) if isinstance(spec.action, MultiDiscrete) else None


def choice_outputs(spec: EnvSpec) -> dict[str, int]:
    """Outputs of a policy's head for choices, by name, as `ops.distributions.choices` reads them; {} without any."""
    counts = choice_counts(spec) or ()
    return {"logits": counts[0]} if len(counts) == 1 else {f"logits{i}": count for i, count in enumerate(counts)}


def zero_obs(spec: EnvSpec, lead: tuple[int, ...]) -> dict[str, Array]:
    """All-zero observations `[*lead, ...]`."""
    return {name: jnp.zeros((*lead, *space.shape), space.dtype) for name, space in spec.obs.items()}


def check_spec(spec: EnvSpec, fits: Callable[[int], bool] | None) -> None:
    """Raises `UsageError` where an observation or action space is not one that a Dreamer can take.

    Args:
      spec: uint8 images of one size, float32 vectors and Discrete entries are valid; Discrete, MultiDiscrete or float32
        Box actions.
      fits: whether the convolutions take a square image of so many pixels; None if they take any image.
    """
    if choice_counts(spec) is None and not (
        isinstance(spec.action, Box) and len(spec.action.shape) == 1 and spec.action.dtype == "float32"
    ):
        raise UsageError(
            f"action space {spec.action} is not supported; valid: Discrete(n), MultiDiscrete(ns), float32 Box of shape "
            "(A,)"
        )
    if not spec.obs:
        raise UsageError("the environment has no observations; valid: at least one entry in EnvSpec.obs")
    sides = set()
    for name, space in spec.obs.items():
        vector = isinstance(space, Box) and len(space.shape) <= 1 and space.dtype == "float32"
        if is_image(space):
            sides.add(space.shape[:2])
            if fits is not None:
                _check_side(name, space.shape[:2], fits)
        elif not vector and not isinstance(space, Discrete):
            raise UsageError(
                f"observation {name!r}: {space} is not supported; valid: uint8 images (H, W, C), float32 vectors (D,), "
                "Discrete(n)"
            )
    if len(sides) > 1:
        raise UsageError(f"all images must have one size, got {sorted(sides)}")


def _check_side(name: str, size: tuple[int, int], fits: Callable[[int], bool]) -> None:
    height, width = size
    if height == width and fits(height):
        return
    near = sorted(sorted(filter(fits, range(8, 257)), key=lambda side: abs(side - height))[:6])
    raise UsageError(
        f"observation {name!r}: image size {height}x{width} is not supported; valid: square, with sides such as "
        f"{', '.join(map(str, near))}"
    )
