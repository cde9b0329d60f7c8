"""Recall: a light is seen on one side, and long after that its side has to be named.

The task of a T-maze (Bakker 2002, "Reinforcement Learning with Long Short-Term Memory") without the way through it: one
picture never says what to do, so that only what is remembered decides.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import Outcome, RawEnv
from wmjax.types import Array, Box, Discrete, EnvSpec

DELAY = 4  # dark pictures between the light and the question
LIGHT, QUESTION = (255, 200, 40), (60, 140, 255)


class RecallState(NamedTuple):
    """What there was and when; int32 []."""

    side: Array  # of the light: 0 left, 1 right
    time: Array  # steps since the reset


def recall(image_size: int = 64) -> RawEnv:
    """Makes the rules of Recall, with pictures `{"image": uint8 [image_size, image_size, 3]}`.

    The first picture has its left or its right half lit. Then all is dark for 4 steps, whatever is done. Then the whole
    picture asks, in another color, and the action taken there, `Discrete(2)`: left, right, gives +1 if the light was on
    that side and -1 if not. The last picture shows the light again. An episode takes 6 steps. The best mean return is
    1; without memory it is 0.
    """
    spec = EnvSpec(
        obs={"image": Box(0, 255, (image_size, image_size, 3), "uint8")},
        action=Discrete(2),
        max_episode_steps=DELAY + 2,
        survival=False,
    )
    right = np.arange(image_size) >= image_size // 2
    return RawEnv(spec, _reset, _step, lambda state: {"image": _draw(state, right, image_size)})


def _reset(key: Array) -> RecallState:
    return RecallState(jax.random.randint(key, (), 0, 2), jnp.int32(0))


def _step(key: Array, state: RecallState, action: Array) -> tuple[RecallState, Outcome]:
    del key  # after the reset nothing is random
    time = state.time + 1
    over = time >= DELAY + 2
    reward = jnp.where(over, jnp.where(action == state.side, 1.0, -1.0), 0.0)
    return state._replace(time=time), Outcome(reward, over, over)


def _draw(state: RecallState, right: np.ndarray, size: int) -> Array:
    """The picture, uint8 `[size, size, 3]`; `right` bool `[size]` says which columns are on that side."""
    lit = ((state.time == 0) | (state.time >= DELAY + 2)) & (right == (state.side == 1))
    asked = jnp.broadcast_to(state.time == DELAY + 1, right.shape)
    row = lit[:, None] * np.array(LIGHT, np.uint8) + asked[:, None] * np.array(QUESTION, np.uint8)
    return jnp.broadcast_to(row, (size, size, 3))
