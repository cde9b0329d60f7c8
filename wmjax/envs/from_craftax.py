"""Craftax, which needs the extra `craftax`. The only file that imports it, and lazily.

Episodes are cut after 10,000 steps (100,000 of the full game); all else that ends one, as death, is terminal.
Source: Matthews et al. 2024, "Craftax: A Lightning-Fast Benchmark for Open-Ended Reinforcement Learning".
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.envs.wrappers import settled, with_arguments
from wmjax.raw_env import Outcome, RawEnv
from wmjax.types import Box, Discrete, EnvSpec, UsageError

IMAGE_SIZE = 64
# name -> (its name in craftax, what to expect)
TASKS = {
    "Classic-Pixels": ("Craftax-Classic-Pixels-v1", "Crafter's rules on device, as pictures"),
    "Classic-Symbolic": ("Craftax-Classic-Symbolic-v1", "Crafter's rules on device, as a map of symbols"),
    "Pixels": ("Craftax-Pixels-v1", "with dungeons and magic, as pictures"),
    "Symbolic": ("Craftax-Symbolic-v1", "with dungeons and magic, as a map of symbols"),
}
SYMBOLS = {"Classic-Symbolic": 1345, "Symbolic": 8268}


def available() -> bool:
    """Whether craftax can be imported."""
    return importlib.util.find_spec("craftax") is not None


def names() -> list[str]:
    """The names of all tasks."""
    return list(TASKS)


def is_image(name: str) -> bool:
    """Whether the task `name` is observed as a picture."""
    return name.endswith("Pixels")


def spec(name: str, image_size: int | None = None) -> EnvSpec:
    """Observations and actions of a task, without making it: its first time draws all textures, for a minute."""
    size = IMAGE_SIZE if image_size is None else image_size
    picture = {"image": Box(0, 255, (size, size, 3), "uint8")}
    obs = picture if is_image(name) else {"vector": Box(0, 1, (SYMBOLS[name],))}
    return EnvSpec(obs, *((Discrete(17), 10_000) if name.startswith("Classic") else (Discrete(43), 100_000)))


def describe(name: str) -> str:
    """What to expect of a task."""
    return f"craftax; {TASKS[name][1]}"


def make(name: str, image_size: int | None = None, args: Mapping[str, Any] = {}) -> RawEnv:
    """Makes the rules of a task.

    Args:
      name: in `TASKS`.
      image_size: side of a picture in pixels, to which craftax's (63x63; full game: 130x110) is resized; None for 64.
      args: parameters of craftax that differ from its defaults, such as `max_timesteps`.

    Returns:
      A `RawEnv`: `{"image": uint8 [image_size, image_size, 3]}`, or `{"vector": float32 [D]}` of symbols.

    Raises:
      UsageError: craftax is not installed, or a parameter is not valid.
    """
    if not available():
        raise UsageError('env: craftax is not installed; pip install "wmjax[craftax]"')
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it draws textures
        env = importlib.import_module("craftax.craftax_env").make_craftax_env_from_name(TASKS[name][0], False)
    params = with_arguments(f"craftax:{name}", env.default_params, args)
    about = spec(name, image_size)._replace(max_episode_steps=int(params.max_timesteps))
    endless = params.replace(max_timesteps=np.iinfo(np.int32).max)

    def step(key, state, action):
        _, state, reward, last, _ = env.step_env(key, state, action, params)
        terminal = jnp.asarray(env.is_terminal(state, endless), bool)
        return state, Outcome(jnp.float32(reward), jnp.asarray(last, bool), terminal)

    def observe(state):
        seen = env.get_obs(state)
        if not is_image(name):
            return {"vector": jnp.asarray(seen, jnp.float32)}
        image = jax.image.resize(255.0 * seen, about.obs["image"].shape, "linear")
        return {"image": jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)}

    return settled(RawEnv(about, lambda key: env.reset_env(key, params)[1], step, observe))
