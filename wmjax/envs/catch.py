"""Catch: a ball falls through a small grid and a paddle on the bottom row has to be under it.

The rules are those of bsuite's Catch (Osband et al. 2020, arXiv 1908.03568, appendix A), seen as an RGB picture.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import Outcome, RawEnv
from wmjax.types import Array, Box, Discrete, EnvSpec, UsageError

ROWS, COLUMNS = 10, 5
BALL = (255, 200, 40)
PADDLE = (60, 140, 255)


class CatchState(NamedTuple):
    """Where things are; int32 []."""

    row: Array  # of the ball, in [0, ROWS)
    column: Array  # of the ball, in [0, COLUMNS)
    paddle: Array  # column of the paddle


def catch(image_size: int = 64) -> RawEnv:
    """Makes the rules of Catch, with pictures `{"image": uint8 [image_size, image_size, 3]}`.

    The ball starts in the top row in a random column, the paddle in the middle. Actions, `Discrete(3)`: left, stay,
    right. An episode takes 9 steps; the last gives +1 if the ball lands on the paddle and -1 if not. The best mean
    return is 1; random actions get about -0.6. A caught ball has a color of its own.

    Raises `UsageError` where `image_size` is below 10: a row of the grid would have no pixel.
    """
    if image_size < ROWS:
        raise UsageError(f"image_size: {image_size} is too small for catch; at least {ROWS} is valid")
    spec = EnvSpec(
        obs={"image": Box(0, 255, (image_size, image_size, 3), "uint8")},
        action=Discrete(3),
        max_episode_steps=ROWS - 1,
        survival=False,
    )
    rows, columns = np.arange(image_size) * ROWS // image_size, np.arange(image_size) * COLUMNS // image_size
    return RawEnv(spec, _reset, _step, lambda state: {"image": _draw(state, rows, columns)})


def _reset(key: Array) -> CatchState:
    return CatchState(jnp.int32(0), jax.random.randint(key, (), 0, COLUMNS), jnp.int32(COLUMNS // 2))


def _step(key: Array, state: CatchState, action: Array) -> tuple[CatchState, Outcome]:
    del key  # after the reset nothing is random
    row = state.row + 1
    paddle = jnp.clip(state.paddle + action - 1, 0, COLUMNS - 1)
    landed = row >= ROWS - 1
    reward = jnp.where(landed, jnp.where(state.column == paddle, 1.0, -1.0), 0.0)
    return CatchState(row, state.column, paddle), Outcome(reward, landed, landed)


def _draw(state: CatchState, rows: np.ndarray, columns: np.ndarray) -> Array:
    """The picture, uint8 `[H, W, 3]`; `rows` and `columns` say which cell of the grid a pixel shows."""
    ball = (rows == state.row)[:, None] & (columns == state.column)
    paddle = (rows == ROWS - 1)[:, None] & (columns == state.paddle)
    ball, paddle = (mask[..., None] * np.array(color, np.uint8) for mask, color in ((ball, BALL), (paddle, PADDLE)))
    return jnp.maximum(ball, paddle)
