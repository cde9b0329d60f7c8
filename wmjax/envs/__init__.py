"""Environments by name: those that run on the device, and those of other libraries in worker processes."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import jax.numpy as jnp

from wmjax import checks
from wmjax.envs import catch, from_craftax, from_gymnax, pendulum, racing, wrappers
from wmjax.envs.from_gymnasium import from_gymnasium
from wmjax.envs.probe import PROBES
from wmjax.suites import SUITES, suite
from wmjax.types import Array, Box, Discrete, Env, EnvSpec, HostEnv, Space, UsageError

__all__ = ["EnvInfo", "env_names", "make_env"]

GYMNAX, CRAFTAX = "gymnax:", "craftax:"
# name -> (rules, side of the picture, what to expect)
PICTURES = {
    "catch": (catch.catch, 64, "a ball falls, a paddle catches it; best return 1, random about -0.6"),
    "pendulum": (
        pendulum.pendulum, 64, "Pendulum-v1 from pixels, 200 steps; good return about -150, random about -1200",
    ),
    "racing": (racing.racing, 96, "a car that skids on a new track each time; a lap about 900, random about -40"),
}  # fmt: skip


class EnvInfo(NamedTuple):
    """One line of the list of environments."""

    name: str
    obs: str  # such as "image uint8 [64, 64, 3]"
    action: str  # such as "Discrete(3)"
    description: str


def is_host(name: str) -> bool:
    """Whether an environment of that name would run in worker processes."""
    return name.partition(":")[0] in SUITES


def _steer_gas_brake(action: Array) -> Array:
    """CarRacing's controls; linearly rescaled, 0 would brake by half."""
    steer, gas, brake = action[..., 0], action[..., 1], action[..., 2]
    return jnp.stack([steer, (gas + 1) / 2, jnp.clip(brake, 0, 1)], -1)


ACTION_MAPS = {"gym:CarRacing-v3": _steer_gas_brake}


def make_env(name: str, *, image_size: int | None = None, action_repeat: int | None = None) -> Env | HostEnv:
    """Makes an environment: auto-resetting, with its own kind of actions (`wrappers.agent_actions` changes that).

    Args:
      name: "catch", "pendulum", "racing", "probe:NAME", or, with the extras of these names, "gymnax:NAME" and
        "craftax:NAME" (`env_names`). A name that begins with one of `suites.SUITES`, such as "gym:CartPole-v1", gives a
        `HostEnv`.
      image_size: side of the picture in pixels, at least 8; None for the registered size (64; racing: 96; MinAtar:
        80, and any multiple of 10).
      action_repeat: frames that each action is taken for; None for 1.

    Raises:
      UsageError: unknown name (with the nearest valid one), a missing extra, an image size that the environment cannot
        be drawn at or that observes no image, an action repeat below 1.
    """
    if is_host(name):
        return _make_host(name, image_size, action_repeat)
    raw = _make_raw(name, image_size)
    return wrappers.auto_reset(wrappers.action_repeat(raw, 1 if action_repeat is None else action_repeat))


def _make_host(name: str, image_size: int | None, action_repeat: int | None) -> HostEnv:
    image_size = None if image_size is None else checks.number("image_size", image_size)
    repeat = checks.number("action_repeat", 1 if action_repeat is None else action_repeat)
    suite_name, _, task = name.partition(":")
    action_map = ACTION_MAPS.get(name)
    return from_gymnasium(suite_name, task, image_size=image_size, action_repeat=repeat, action_map=action_map)


def _make_raw(name: str, image_size: int | None) -> wrappers.RawEnv:
    if name.startswith(GYMNAX):
        task = name.removeprefix(GYMNAX)
        if task not in from_gymnax.names():
            raise _unknown(name)
        _check_image_size(name, image_size, pictures=from_gymnax.is_image(task))
        return from_gymnax.from_gymnax(task, image_size)
    if name.startswith(CRAFTAX):
        task = name.removeprefix(CRAFTAX)
        if task not in from_craftax.TASKS:
            raise _unknown(name)
        _check_image_size(name, image_size, pictures=from_craftax.is_image(task))
        return from_craftax.from_craftax(task, image_size)
    if name in PROBES:
        _check_image_size(name, image_size, pictures=False)
        return PROBES[name].make()
    if name not in PICTURES:
        raise _unknown(name)
    _check_image_size(name, image_size, pictures=True)
    rules, size, _ = PICTURES[name]
    return rules(size if image_size is None else image_size)


def _check_image_size(name: str, image_size: int | None, *, pictures: bool) -> None:
    if image_size is None:
        return
    if not pictures:
        raise UsageError(f"image_size: {image_size!r} is not valid for {name}, which observes a vector; leave it out")
    checks.number("image_size", image_size)


def _unknown(name: str) -> UsageError:
    builtin = [*PICTURES, *PROBES]
    craftax = [CRAFTAX + task for task in from_craftax.TASKS]
    gymnax = [GYMNAX + task for task in from_gymnax.names()] if from_gymnax.available() else []
    spellings = {valid.lower(): valid for valid in builtin + gymnax + craftax}
    # A task's name alone is near to its full name, whatever its suite.
    spellings |= {valid.lower().split(":")[-1]: valid for valid in builtin + gymnax + craftax}
    near = difflib.get_close_matches(name.lower(), spellings, 1, cutoff=0.5)
    hint = f" did you mean {spellings[near[0]]!r}?" if near else ""
    return UsageError(
        f"env: unknown name {name!r};{hint} valid are {', '.join(builtin)}, {GYMNAX}NAME, {CRAFTAX}NAME, "
        f"{', '.join(f'{suite_name}:NAME' for suite_name in SUITES)} (see wmjax list envs)"
    )


def env_names() -> list[EnvInfo]:
    """All environments that can be made here, those of gymnax only where it is installed."""
    infos = [_info(name, description) for name, (*_, description) in PICTURES.items()]
    infos += [_info(name, probe.description) for name, probe in PROBES.items()]
    if from_gymnax.available():
        infos += [_gymnax_info(task) for task in from_gymnax.names()]
    if from_craftax.available():
        infos += [
            _line(CRAFTAX + task, from_craftax.spec(task), f"craftax; {what}")
            for task, (_, what) in from_craftax.TASKS.items()
        ]
    for suite_name in SUITES:
        what = f"{suite(suite_name).TITLE}, in worker processes"
        infos += [EnvInfo(f"{suite_name}:{task}".rstrip(":"), "", "", what) for task in suite(suite_name).names()]
    return infos


def _gymnax_info(task: str) -> EnvInfo:
    if task == "MNISTBandit-bsuite":  # fetches its data when made, which a list should not
        return EnvInfo(GYMNAX + task, "vector float32 [784]", "Discrete(10)", "gymnax; downloads MNIST when made")
    return _info(GYMNAX + task, "gymnax; MinAtar in colors" if from_gymnax.is_image(task) else "gymnax")


def _info(name: str, description: str) -> EnvInfo:
    return _line(name, _make_raw(name, None).spec, description)


def _line(name: str, spec: EnvSpec, description: str) -> EnvInfo:
    obs = ", ".join(f"{key} {space.dtype} {list(space.shape)}" for key, space in spec.obs.items())
    return EnvInfo(name, obs, _show(spec.action), description)


def _show(space: Space) -> str:
    if isinstance(space, Discrete):
        return f"Discrete({space.n})"
    if isinstance(space, Box) and isinstance(space.low, int | float) and isinstance(space.high, int | float):
        return f"Box({space.low:g}, {space.high:g}, {list(space.shape)})"
    return str(space)
