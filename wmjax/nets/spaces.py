"""What an environment's spaces mean to an agent's networks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts
from wmjax.types import Array, Box, Discrete, EnvSpec, MultiDiscrete, Space, UsageError

Spaces = tuple[tuple[str, Space], ...]  # sorted by name: hashable, and the order of all concatenations

# ---------------------------------------------------------------------------------------------------------------------
# Entries of an observation


def is_image(space: Space) -> bool:
    """Whether the entry is an image: uint8, `[height, width, channels]`."""
    return space.dtype == "uint8" and len(space.shape) == 3


def split_spaces(spaces: Spaces) -> tuple[Spaces, Spaces]:
    """Images and the other entries."""
    images = tuple((name, space) for name, space in spaces if is_image(space))
    return images, tuple((name, space) for name, space in spaces if not is_image(space))


def output_shape(space: Space) -> tuple[int, ...]:
    """Shape of what a network says of an entry: logits of a choice, else a mean of each number."""
    return (space.n,) if isinstance(space, Discrete) else space.shape


def read_obs(
    spaces: Spaces, obs: dict[str, Array], dtype: str, squash: Callable[[Array], Array] = lambda x: x
) -> tuple[Array | None, Array | None]:
    """What networks see of an observation.

    Args:
      obs: each entry ends with the shape of its space; all begin with the same axes.
      squash: what is done to vectors, in float32.

    Returns:
      The images with their channels side by side, `[..., H, W, sum C]` in [-0.5, 0.5], and the other entries likewise,
      `[..., sum D]`, one-hot where discrete. None where there are none.
    """
    for name, space in spaces:
        check = contracts.floating if space.dtype == "float32" else contracts.integers
        check(*space.shape, **{name: obs[name]})
    lead = min((obs[name].ndim - len(space.shape) for name, space in spaces), default=0)
    contracts.leading(lead, **{name: obs[name] for name, _ in spaces})
    images, vectors = [], []
    for name, space in spaces:
        if is_image(space):
            images.append(obs[name])
        elif isinstance(space, Discrete):
            vectors.append(jax.nn.one_hot(obs[name], space.n, dtype=dtype))
        else:
            x = obs[name].astype(jnp.float32)
            vectors.append(squash(x if space.shape else x[..., None]).astype(dtype))
    image = jnp.concatenate(images, -1).astype(dtype) / 255 - 0.5 if images else None
    return image, jnp.concatenate(vectors, -1) if vectors else None


def split_images(images: Spaces, x: Array) -> dict[str, Array]:
    """Images with their channels side by side, `[..., H, W, sum C]`, each by itself."""
    ends = np.cumsum([space.shape[-1] for _, space in images]).tolist()
    contracts.floating(None, None, ends[-1], x=x)
    return {name: part for (name, _), part in zip(images, jnp.split(x, ends[:-1], -1), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Of an environment


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
