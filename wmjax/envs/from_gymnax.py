"""The environments of gymnax (1.0 or later), which need the extra `gymnax`. The only file that imports it, and lazily.

MinAtar's planes become RGB pictures; all other observations are vectors.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.envs.wrappers import settled, with_arguments
from wmjax.raw_env import Outcome, RawEnv
from wmjax.types import Array, Box, Discrete, EnvSpec, PyTree, Space, UsageError

MNIST = "MNISTBandit-bsuite"
GRID = 10  # MinAtar's side, in cells
IMAGE_SIZE = 80  # of MinAtar, as registered: a multiple of 10, and of 16 as convolution stages like it

# One color for each plane, in general position: the mean of any two differs from all others, and from black, by at
# least 30 of 255 in some channel. Planes overlap by design (an alien and its direction), so no plane may hide another.
PALETTE = (
    (40, 115, 246), (255, 254, 64), (237, 40, 116), (114, 255, 130), (234, 40, 206),
    (40, 255, 199), (210, 111, 40), (228, 255, 238), (255, 113, 217), (138, 112, 40),
)  # fmt: skip


class GymnaxState(NamedTuple):
    """gymnax's state and the observation that came with it, planes as bool and vectors as float32."""

    inner: PyTree
    obs: Array


def available() -> bool:
    """Whether gymnax can be imported."""
    try:
        return bool(_gymnax())
    except UsageError:
        return False


def names() -> list[str]:
    """The names of all gymnax environments, without the prefix. Raises `UsageError` where gymnax is not installed."""
    return list(_gymnax().registered_envs)


def is_image(name: str) -> bool:
    """Whether the gymnax environment `name` is observed as a picture."""
    return name.endswith("-MinAtar")


def spec(name: str) -> EnvSpec:
    """Observations and actions of the gymnax environment `name`, which is made, unless it would fetch its data then."""
    return EnvSpec({"vector": Box(0, 1, (784,))}, Discrete(10)) if name == MNIST else make(name).spec


def describe(name: str) -> str:
    """What to expect of the gymnax environment `name`."""
    return "gymnax" + ("; downloads MNIST when made" if name == MNIST else "; MinAtar in colors" * is_image(name))


def make(name: str, image_size: int | None = None, args: Mapping[str, Any] = {}) -> RawEnv:
    """Makes the rules of the gymnax environment `name`.

    Args:
      name: a registered name, such as "Breakout-MinAtar".
      image_size: side of a MinAtar picture, a multiple of 10; None for 80. Not for other environments.
      args: parameters of gymnax that differ from its defaults, such as `max_steps_in_episode`.

    Returns:
      A `RawEnv`: `{"image": uint8 [image_size, image_size, 3]}` for MinAtar, else `{"vector": float32 [D]}` (arrays are
      flattened, a Discrete observation becomes one-hot). What gymnax calls terminated is `is_terminal`; terminated or
      truncated is `is_last`.

    Raises:
      UsageError: gymnax is missing, the environment cannot be made, its spaces are not supported, or the image size or
        a parameter is not valid.
    """
    if is_image(name):
        image_size = IMAGE_SIZE if image_size is None else image_size
        if image_size % GRID or image_size < GRID:
            raise UsageError(
                f"image_size: {image_size} is not valid for gymnax:{name}; a multiple of {GRID} is, such as 80"
            )
    try:
        env, params = _gymnax().make(name)
    except OSError as error:  # MNIST fetches its data
        raise UsageError(f"env: 'gymnax:{name}' cannot be made: {error}") from error
    params = with_arguments(f"gymnax:{name}", params, args)
    see, obs_space, observe = _observation(name, env.observation_space(params), image_size)
    limit = getattr(params, "max_steps_in_episode", None)
    spec = EnvSpec(obs_space, _action_space(name, env.action_space(params)), None if limit is None else int(limit))

    def raw_step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state.inner, action, params)
        terminated = jnp.asarray(terminated, bool)
        last = terminated | jnp.asarray(env.is_truncated(state, params), bool)
        return GymnaxState(state, see(obs)), Outcome(jnp.asarray(reward, jnp.float32), last, terminated)

    def raw_reset(key):
        obs, state = env.reset_env(key, params)
        return GymnaxState(state, see(obs))

    return settled(RawEnv(spec, raw_reset, raw_step, observe))


def _gymnax() -> Any:
    try:
        return importlib.import_module("gymnax")
    except ImportError as error:
        raise UsageError('env: gymnax is not installed; pip install "wmjax[gymnax]"') from error


def _observation(name: str, space: Any, image_size: int | None):
    """How an observation is kept in the state, its entry in the spec, and how it is shown."""
    if is_image(name):
        entry = {"image": Box(0, 255, (image_size, image_size, 3), "uint8")}
        return lambda obs: obs.astype(bool), entry, lambda state: {"image": paint(state.obs, image_size)}
    if hasattr(space, "n"):
        entry = {"vector": Box(0, 1, (space.n,))}
        return lambda obs: jax.nn.one_hot(obs, space.n), entry, lambda state: {"vector": state.obs}
    if not hasattr(space, "low"):
        raise UsageError(f"env: the observations of gymnax:{name}, {space}, are not supported; one Box or Discrete is")
    size = int(np.prod(space.shape))
    entry = {"vector": Box(_bound(space.low, space.shape), _bound(space.high, space.shape), (size,))}
    return lambda obs: jnp.ravel(obs).astype(jnp.float32), entry, lambda state: {"vector": state.obs}


def _action_space(name: str, space: Any) -> Space:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if not hasattr(space, "low"):
        raise UsageError(f"env: the actions of gymnax:{name}, {space}, are not supported; Discrete and Box are")
    return Box(_bound(space.low, space.shape), _bound(space.high, space.shape), tuple(space.shape))


def _bound(bound: Any, shape: tuple[int, ...]) -> float | tuple[float, ...]:
    """One number where all entries agree, else one per entry of the flattened array."""
    entries = np.broadcast_to(np.asarray(bound, np.float32), shape).ravel()
    return float(entries[0]) if (entries == entries[0]).all() else tuple(entries.tolist())


def paint(planes: Array, image_size: int) -> Array:
    """Paints MinAtar's planes, bool `[10, 10, C]` with C <= 10, as uint8 `[image_size, image_size, 3]`.

    A cell has the mean color of its active planes, and is black where there are none.
    """
    colors = np.array(PALETTE[: planes.shape[-1]], np.float32)
    active = planes.astype(jnp.float32)
    cells = jnp.matmul(active, colors, precision="highest") / jnp.maximum(active.sum(-1, keepdims=True), 1)
    scale = image_size // GRID
    cells = jnp.round(cells).astype(jnp.uint8)[:, None, :, None]
    return jnp.broadcast_to(cells, (GRID, scale, GRID, scale, 3)).reshape(image_size, image_size, 3)
