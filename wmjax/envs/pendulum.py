"""Pendulum: swing a rod up with too weak a motor, seen as an RGB picture.

Dynamics and reward are those of Gymnasium's Pendulum-v1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import Outcome, RawEnv, time_limit
from wmjax.types import Array, Box, EnvSpec

GRAVITY, MASS, LENGTH, DT = 10.0, 1.0, 1.0, 0.05
MAX_SPEED, MAX_TORQUE = 8.0, 2.0
EPISODE_STEPS = 200

# The picture, in rod lengths; Gymnasium's colors and widths in a tighter frame, so that few pixels go far.
HALF_WIDTH = 1.25
ROD_RADIUS, AXLE_RADIUS = 0.1, 0.05
WHITE, RED = 255.0, (204.0, 77.0, 77.0)


class PendulumState(NamedTuple):
    """Angle and speed; float32 []."""

    theta: Array  # radians, 0 is up, counterclockwise; not wrapped
    theta_dot: Array  # radians per second, in [-8, 8]


def pendulum(image_size: int = 64) -> RawEnv:
    """Makes the rules of Pendulum-v1, with pictures `{"image": uint8 [image_size, image_size, 3]}`.

    The action, `Box(-2, 2, (1,))`, is the torque; what is outside is clipped. The reward of a step is that of the state
    it is taken in: -(angle^2 + 0.1 speed^2 + 0.001 torque^2), angle in [-pi, pi). The angle starts uniform in
    [-pi, pi], the speed in [-1, 1]. Episodes are cut after 200 steps and never end by themselves. Good return is about
    -150, random about -1200. One picture does not show the speed.
    """
    spec = EnvSpec(
        obs={"image": Box(0, 255, (image_size, image_size, 3), "uint8")},
        action=Box(-MAX_TORQUE, MAX_TORQUE, (1,)),
        survival=False,
    )
    axis = (2 * (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 1) * HALF_WIDTH
    return time_limit(RawEnv(spec, _reset, _step, lambda state: {"image": _draw(state, axis)}), EPISODE_STEPS)


def _reset(key: Array) -> PendulumState:
    theta, theta_dot = jax.random.uniform(key, (2,), minval=-1.0) * np.array([np.pi, 1.0], np.float32)
    return PendulumState(theta, theta_dot)


def _step(key: Array, state: PendulumState, action: Array) -> tuple[PendulumState, Outcome]:
    del key  # after the reset nothing is random
    theta, theta_dot = state
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    angle = jnp.mod(theta + jnp.pi, 2 * jnp.pi) - jnp.pi
    reward = -(angle**2 + 0.1 * theta_dot**2 + 0.001 * torque**2)
    acceleration = 3 * GRAVITY / (2 * LENGTH) * jnp.sin(theta) + 3 / (MASS * LENGTH**2) * torque
    theta_dot = jnp.clip(theta_dot + acceleration * DT, -MAX_SPEED, MAX_SPEED)
    no = jnp.bool_(False)
    return PendulumState(theta + theta_dot * DT, theta_dot), Outcome(reward, no, no)


def _draw(state: PendulumState, axis: np.ndarray) -> Array:
    """The picture, uint8 `[H, W, 3]`: a red rod with round ends on white, its axle black; edges are one pixel soft."""
    x, y = axis[None, :], -axis[:, None]
    rod_x, rod_y = -jnp.sin(state.theta), jnp.cos(state.theta)
    # The point of the rod's middle line that is nearest to the pixel.
    along = jnp.clip(x * rod_x + y * rod_y, 0, 1)
    rod = jnp.hypot(x - along * rod_x, y - along * rod_y) - ROD_RADIUS
    axle = np.hypot(x, y) - AXLE_RADIUS
    pixel = 2 * HALF_WIDTH / len(axis)
    rod = jnp.clip(0.5 - rod / pixel, 0, 1)[..., None]
    axle = np.clip(0.5 - axle / pixel, 0, 1)[..., None]
    image = (WHITE + rod * (np.array(RED, np.float32) - WHITE)) * (1 - axle)
    return (image + 0.5).astype(jnp.uint8)
