"""Racing: drive a car that skids around a closed track, seen from above.

The interface, the rewards and the measures are those of Gymnasium's CarRacing-v3; track and car are closed formulas, so
that thousands of cars drive at once. The middle of the road is a curve r(θ) around the origin,

    r(θ) = R (1 + Re Σₖ aₖ e^{ikθ}),   k = 2 ... 5,

and with e^{iθ} = (x + iy) / ρ the distance of any point to it, (ρ - r) / √(1 + (r' / ρ)²) to first order, takes
multiplications and two roots. That is how pixels are colored and how the car knows what it drives on. Lengths are in
CarRacing's units ("meters"), of which the road is 13.3 wide and a lap about 1000 long.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import Outcome, RawEnv, time_limit
from wmjax.types import Array, Box, EnvSpec

EPISODE_STEPS = 1000
TILES = 300
DT = 1 / 50  # seconds per step

# The track, in meters.
RADIUS = 150.0
HALF_WIDTH = 40 / 6
FIELD = 2000 / 6  # leaving the square |x|, |y| <= FIELD ends an episode
HARMONICS = (2, 3, 4, 5)
BENDS = np.array([0.18, 0.14, 0.1, 0.07], np.float32)  # largest |aₖ|: the tightest curve of a track has a radius of
LEAST_BEND = 0.3  # about 50, one in a hundred of 20; and the smallest, as a share of the largest

# The car, in meters, seconds, and radians, per unit of mass.
AXLE = 1.8  # from the middle of the car to either axle; also its radius of gyration
GRIP_ROAD, GRIP_GRASS = 100.0, 50.0  # largest acceleration that both axles together give
ENGINE, BRAKE, DRAG = 40.0, 60.0, 0.4  # acceleration at full gas and full brake; slowing per meter per second
MAX_STEER, STEER_SPEED = 0.4, 3.0

# The picture: the car looks up, a quarter of the height above the lower edge.
VIEW = 50.0  # side of what it shows, in meters
GRASS_SQUARE = FIELD / 20
GRASS, GRASS_LIGHT, ROAD = (102, 204, 102), (102, 229, 102), (102, 102, 102)
HULL, WHEEL = (204, 0, 0), (0, 0, 0)
HULL_SIZE, WHEEL_SIZE, TRACK_WIDTH = (1.1, 2.3), (0.4, 0.75), 1.35  # half sizes; from the middle to a wheel


class RacingState(NamedTuple):
    """Where the car is, how it moves, and its track; float32."""

    position: Array  # [2], meters
    heading: Array  # [], radians counterclockwise, 0 along x
    velocity: Array  # [2], m/s along the car and to its left
    yaw_rate: Array  # [], radians/s counterclockwise
    steering: Array  # [], angle of the front wheels, positive to the left, in [-0.4, 0.4]
    bends: Array  # [4, 2], real and imaginary parts of aₖ
    visited: Array  # bool [TILES]


def racing(image_size: int = 96) -> RawEnv:
    """Makes the rules of Racing, with pictures `{"image": uint8 [image_size, image_size, 3]}`.

    Actions, `Box([-1, 0, 0], [1, 1, 1])`: steer (-1 is left), gas, brake. Agents speak [-1, 1]: `action_map` leaves
    steer, makes gas (a + 1) / 2 and brake clip(a, 0, 1), as World Models does. A lap has 300 tiles. Reward: 1000 / 300
    for each tile driven on for the first time, -0.1 for every frame, -100 for leaving the field, which ends the
    episode, as does a whole lap; after 1000 frames it is cut. A lap in 700 frames gives 930, random play about -40.

    What differs from CarRacing-v3: tracks are drawn from a family of smooth closed curves, always 300 tiles, with no
    red and white curbs; the car is one rigid body on two axles with a limit of grip each (half of it on grass), with
    no wheel spin, no locked wheels and an engine that answers at once; no zoom at the start, no skid marks, and no
    dashboard (World Models cuts it off): one picture does not show the speed. Edges are one pixel soft.
    """
    spec = EnvSpec(
        obs={"image": Box(0, 255, (image_size, image_size, 3), "uint8")},
        action=Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,)),
        action_map=steer_gas_brake,
        survival=False,
    )
    picture = _Picture(image_size)
    return time_limit(RawEnv(spec, _reset, _step, lambda state: {"image": picture.draw(state)}), EPISODE_STEPS)


def steer_gas_brake(action: Array) -> Array:
    """CarRacing's controls of actions in [-1, 1], `[..., 3]`; linearly rescaled, 0 would brake by half."""
    return jnp.stack([action[..., 0], (action[..., 1] + 1) / 2, jnp.clip(action[..., 2], 0, 1)], -1)


# ---------------------------------------------------------------------------------------------------------------------
# The track


def _curve(bends: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """r(θ) and r'(θ) in meters, where cos θ and sin θ are given, of any shape."""
    re, im = cos, sin
    r, slope = 1.0, 0.0
    for number, k in enumerate(HARMONICS):
        re, im = re * cos - im * sin, re * sin + im * cos
        a, b = bends[number, 0], bends[number, 1]
        r = r + (a * re - b * im)
        slope = slope - k * (a * im + b * re)
    return RADIUS * r, RADIUS * slope


def _distance(bends: Array, x: Array, y: Array) -> Array:
    """Meters from the middle of the road, positive outside of the lap, exact to first order."""
    inverse = jax.lax.rsqrt(jnp.maximum(x * x + y * y, 1.0))
    r, slope = _curve(bends, x * inverse, y * inverse)
    slope = slope * inverse
    return ((x * x + y * y) * inverse - r) * jax.lax.rsqrt(1 + slope * slope)


def _tile(position: Array) -> Array:
    """Index of the tile whose sector of the circle a point lies in, int32."""
    turn = jnp.arctan2(position[1], position[0]) / (2 * jnp.pi)
    return jnp.floor(jnp.mod(turn, 1.0) * TILES).astype(jnp.int32) % TILES


def _direction(angle: Array) -> Array:
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _reset(key: Array) -> RacingState:
    size, phase = jax.random.uniform(key, (2, len(HARMONICS)))
    bends = (BENDS * (LEAST_BEND + (1 - LEAST_BEND) * size))[:, None] * _direction(2 * jnp.pi * phase).T
    # Phases are uniform, so every track may as well start at θ = 0.
    r, slope = _curve(bends, jnp.float32(1), jnp.float32(0))
    zero = jnp.float32(0)
    return RacingState(
        jnp.stack([r, zero]), jnp.arctan2(r, slope), jnp.zeros(2), zero, zero, bends, jnp.zeros(TILES, bool)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The car


def _axle_force(along: Array, push: Array, brake: Array, side: Array, grip: Array) -> Array:
    """Force on one axle, `[2]` in its wheels' frame: engine, brakes, and what holds it back from sliding.

    `along` and `side` are its velocity along its wheels and to their left; beyond the force `grip` it slides.
    """
    hold = 0.25 / DT  # of the effective mass ½: half of a sliding velocity is gone after one step, if grip allows
    force = jnp.stack([push - jnp.clip(hold * along, -brake, brake), -hold * side])
    return force * jnp.minimum(1.0, grip / jnp.maximum(jnp.linalg.norm(force), 1e-6))


def _drive(state: RacingState, action: Array) -> RacingState:
    """The car after one step."""
    steer, gas, brake = jnp.clip(action, jnp.array([-1.0, 0.0, 0.0]), 1.0)
    turn = jnp.clip(-MAX_STEER * steer - state.steering, -STEER_SPEED * DT, STEER_SPEED * DT)
    steering = state.steering + turn
    grass = jnp.abs(_distance(state.bends, *state.position)) > HALF_WIDTH
    grip = jnp.where(grass, GRIP_GRASS, GRIP_ROAD) / 2
    ahead, left = state.velocity
    swing = AXLE * state.yaw_rate
    cos, sin = _direction(steering)
    front = left + swing
    f = _axle_force(cos * ahead + sin * front, 0.0, brake * BRAKE / 2, cos * front - sin * ahead, grip)
    front = jnp.stack([cos * f[0] - sin * f[1], sin * f[0] + cos * f[1]])
    rear = _axle_force(ahead, gas * ENGINE, brake * BRAKE / 2, left - swing, grip)
    # The frame turns with the car, so velocities in it turn the other way.
    turning = state.yaw_rate * jnp.stack([left, -ahead])
    velocity = state.velocity + DT * (front + rear - DRAG * state.velocity + turning)
    yaw_rate = state.yaw_rate + DT * (front[1] - rear[1]) / AXLE
    heading = state.heading + DT * yaw_rate
    cos, sin = _direction(heading)
    move = jnp.stack([cos * velocity[0] - sin * velocity[1], sin * velocity[0] + cos * velocity[1]])
    heading = jnp.mod(heading + jnp.pi, 2 * jnp.pi) - jnp.pi
    return state._replace(
        position=state.position + DT * move, heading=heading, velocity=velocity, yaw_rate=yaw_rate, steering=steering
    )


def _step(key: Array, state: RacingState, action: Array) -> tuple[RacingState, Outcome]:
    del key  # after the reset nothing is random
    state = _drive(state, action)
    # Tiles from under the rear axle to under the front axle.
    axle = AXLE * _direction(state.heading)
    rear, front = _tile(state.position - axle), _tile(state.position + axle)
    span = (front - rear + TILES // 2) % TILES - TILES // 2  # negative where the car drives the wrong way
    under = (jnp.arange(TILES) - jnp.minimum(rear, rear + span)) % TILES <= jnp.abs(span)
    on_road = jnp.abs(_distance(state.bends, *state.position)) <= HALF_WIDTH
    visited = state.visited | (under & on_road)
    new = jnp.sum(visited, dtype=jnp.int32) - jnp.sum(state.visited, dtype=jnp.int32)
    gone = jnp.any(jnp.abs(state.position) > FIELD)
    reward = jnp.where(gone, -100.0, new * (1000 / TILES) - 0.1)
    over = gone | jnp.all(visited)
    return state._replace(visited=visited), Outcome(reward, over, over)


# ---------------------------------------------------------------------------------------------------------------------
# The picture


class _Picture:
    """Draws pictures of one size; what does not move is computed once."""

    def __init__(self, size: int) -> None:
        self.pixel = VIEW / size
        middle = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel
        self.right, self.ahead = (middle - VIEW / 2)[None, :], (VIEW * 0.75 - middle)[:, None]
        rear = self._wheels(-AXLE, np.float32(1), np.float32(0))
        hull = self._cover(self.right, self.ahead, HULL_SIZE)
        self.car = np.maximum(hull, rear)
        # The color under the mask: the hull lies over the wheels.
        self.color = hull[..., None] * np.array(HULL, np.float32) / np.maximum(self.car, 1e-6)[..., None]

    def _cover(self, right, ahead, half):
        """How much of each pixel a box at the origin covers, in [0, 1]."""
        outside = np.maximum if isinstance(right, np.ndarray) else jnp.maximum
        distance = outside(abs(right) - half[0], abs(ahead) - half[1])
        return (0.5 - distance / self.pixel).clip(0, 1)

    def _wheels(self, ahead, cos, sin):
        """The two wheels of the axle at `ahead`, turned to the left by an angle."""
        cover = 0.0
        for side in (-TRACK_WIDTH, TRACK_WIDTH):
            x, y = self.right - side, self.ahead - ahead
            cover = cover + self._cover(cos * x + sin * y, cos * y - sin * x, WHEEL_SIZE)
        return cover

    def draw(self, state: RacingState) -> Array:
        """uint8 `[H, W, 3]`."""
        cos, sin = _direction(state.heading)
        x = state.position[0] + cos * self.ahead + sin * self.right
        y = state.position[1] + sin * self.ahead - cos * self.right
        squares = jnp.floor(x / GRASS_SQUARE) + jnp.floor(y / GRASS_SQUARE)
        light = squares - 2 * jnp.floor(squares / 2)
        road = jnp.clip(0.5 - (jnp.abs(_distance(state.bends, x, y)) - HALF_WIDTH) / self.pixel, 0, 1)
        front = self._wheels(AXLE, *_direction(state.steering)) * (1 - self.car)
        ground = (1 - road) * (1 - front) * (1 - self.car)
        paved = road * (1 - front) * (1 - self.car)

        def channel(c: int) -> Array:
            grass = GRASS[c] + light * float(GRASS_LIGHT[c] - GRASS[c])
            return ground * grass + paved * float(ROAD[c]) + front * float(WHEEL[c]) + self.car * self.color[..., c]

        return (jnp.stack([channel(c) for c in range(3)], -1) + 0.5).astype(jnp.uint8)
