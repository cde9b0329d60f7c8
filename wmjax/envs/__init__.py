"""Environments as they are handed over: by name, by what makes them, or as values.

Some run on the device, those of other libraries in worker processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from wmjax import checks, raw_env
from wmjax.envs import catch, from_craftax, from_gymnax, hints, pendulum, racing, recall
from wmjax.envs.check import checked
from wmjax.envs.from_gymnasium import START_SECONDS, from_gymnasium
from wmjax.envs.handed import GYM, handed, is_host
from wmjax.envs.probe import PROBES
from wmjax.suites import FRACTION, SUITES, SuiteError, check_arguments, gym_suite, suite
from wmjax.types import Box, Discrete, Env, EnvSpec, HostEnv, Space, UsageError

__all__ = ["EnvInfo", "env_names", "is_host", "make_env"]

# What each of these begins with has `available`, `names`, `is_image`, `spec`, `describe` and `make`.
LIBRARIES = {"gymnax:": from_gymnax, "craftax:": from_craftax}


class Picture(NamedTuple):
    """An environment of ours that is seen as a picture."""

    rules: Callable[[int], raw_env.RawEnv]  # (side in pixels) -> rules
    side: int  # as registered
    flicker: float  # share of the pictures that are hidden, as registered
    description: str


PICTURES = {
    "catch": Picture(catch.catch, 64, 0, "a ball falls, a paddle catches it; best return 1, random about -0.6"),
    "pendulum": Picture(
        pendulum.pendulum, 64, 0, "Pendulum-v1 from pixels, 200 steps; good return about -150, random about -1200"
    ),
    "racing": Picture(
        racing.racing, 96, 0, "a car that skids on a new track each time; a lap about 900, random about -40"
    ),
    "recall": Picture(
        recall.recall, 64, 0, "a side is lit and has to be named 5 steps later; best return 1, without memory 0"
    ),
    "racing:flicker": Picture(racing.racing, 96, 0.8, "racing with four pictures of five hidden; random about -50"),
}
ARGUMENTS = {"flicker": FRACTION}  # of these


class EnvInfo(NamedTuple):
    """One line of the list of environments."""

    name: str
    obs: str  # such as "image uint8 [64, 64, 3]"
    action: str  # such as "Discrete(3)"
    description: str


ACTION_MAPS = {"gym:CarRacing-v3": racing.steer_gas_brake}


def make_env(
    env: Any,
    *,
    image_size: int | None = None,
    action_repeat: int | None = None,
    env_args: Mapping[str, Any] | None = None,
    start_timeout: float | None = None,
) -> Env | HostEnv:
    """Makes an environment: auto-resetting, with its own kind of actions (`wrappers.agent_actions` changes that).

    Args:
      env: "catch", "pendulum", "racing", "racing:flicker", "recall", "probe:NAME", or, with the extras of these
        names, "gymnax:NAME" and "craftax:NAME" (`env_names`); a name that begins with one of `suites.SUITES`, such as
        "gym:CartPole-v1", "gym:MODULE:NAME" or "gym:FILE.py:NAME", gives a `HostEnv`, and so does a class or function
        that makes a `gymnasium.Env`. An `Env`, `RawEnv` or `HostEnv` is checked against its spec (`check.checked`).
      image_size: side of the picture in pixels, at least 8; None for the registered size (64; racing: 96; MinAtar:
        80, and any multiple of 10).
      action_repeat: frames that each action is taken for; None for 1.
      env_args: arguments of the environment by name; JSON.
      start_timeout: seconds for what runs in worker processes to be made, and to begin an episode; None for 120.

    Raises:
      UsageError: unknown name (with the nearest valid one), a missing extra, an environment that was made already, an
        image size that the environment cannot be drawn at or that observes no image, an action repeat below 1, an
        argument that it does not have, a value that is not what its spec says.
    """
    value, name, args = handed(env, env_args)
    repeat = checks.number("action_repeat", 1 if action_repeat is None else action_repeat)
    seconds = START_SECONDS if start_timeout is None else checks.number("start_timeout", start_timeout)
    if name is None:
        if (image_size, action_repeat) != (None, None):
            raise UsageError("image_size, action_repeat: not valid with an Env value, which has its own")
        return checked(value)
    if not isinstance(value, str) or is_host(value):
        return _make_host(value, name, args, image_size, repeat, seconds)
    return raw_env.auto_reset(raw_env.action_repeat(_make_raw(value, image_size, args), repeat))


def _make_host(
    value: Any, name: str, args: dict[str, Any], image_size: int | None, repeat: int, seconds: float
) -> HostEnv:
    image_size = None if image_size is None else checks.number("image_size", image_size)
    try:
        if isinstance(value, str):
            suite_name, _, task = value.partition(":")
            _check_known(value)
            found = suite(suite_name).find(task, suite_name, args)
        else:
            found = gym_suite.found(name.removeprefix(GYM), value, args)
    except SuiteError as error:
        raise UsageError(str(error)) from None
    action_map = ACTION_MAPS.get(name)
    how = dict(image_size=image_size, action_repeat=repeat, action_map=action_map, start_timeout=seconds)
    return from_gymnasium(value if isinstance(value, str) else name, found, **how)


def _check_known(name: str) -> None:
    """Raises `UsageError` where an id that Gymnasium does not have has another name here."""
    task = name.removeprefix(GYM)
    if task == name or ":" in task or task in gym_suite.gymnasium().registry:
        return
    meant = hints.meant(task, _device_names())
    if meant is not None and meant.removeprefix(GYM) != task:
        raise UsageError(f"env: unknown name {name!r}; did you mean {meant!r}? (see wmjax list envs)")


def _make_raw(name: str, image_size: int | None, args: Mapping[str, Any] = {}) -> raw_env.RawEnv:
    prefix = name[: name.find(":") + 1]
    if prefix in LIBRARIES:
        library, task = LIBRARIES[prefix], name.removeprefix(prefix)
        if task not in library.names():
            raise _unknown(name)
        _check_image_size(name, image_size, pictures=library.is_image(task))
        return library.make(task, image_size, args)
    if name not in PICTURES and name not in PROBES:
        raise _unknown(name)
    try:
        check_arguments(name, ARGUMENTS if name in PICTURES else {}, args)
    except SuiteError as error:
        raise UsageError(str(error)) from None
    _check_image_size(name, image_size, pictures=name in PICTURES)
    if name in PROBES:
        return PROBES[name].make()
    picture = PICTURES[name]
    raw, hidden = picture.rules(image_size or picture.side), args.get("flicker", picture.flicker)
    return raw_env.flicker(raw, hidden) if hidden else raw


def _check_image_size(name: str, image_size: int | None, *, pictures: bool) -> None:
    if image_size is None:
        return
    if not pictures:
        raise UsageError(f"image_size: {image_size!r} is not valid for {name}, which observes a vector; leave it out")
    checks.number("image_size", image_size)


def _device_names() -> list[str]:
    names = [*PICTURES, *PROBES]
    for prefix, library in LIBRARIES.items():
        with contextlib.suppress(UsageError):  # gymnax is not there to say
            names += [prefix + task for task in library.names()]
    return names


def _unknown(name: str) -> UsageError:
    meant = hints.meant(name, _device_names())
    hint = f" did you mean {meant!r}?" if meant else ""
    return UsageError(
        f"env: unknown name {name!r:.80};{hint} valid are {', '.join([*PICTURES, *PROBES])}, "
        f"{', '.join(prefix + 'NAME' for prefix in LIBRARIES)}, {', '.join(f'{one}:NAME' for one in SUITES)} "
        "(see wmjax list envs)"
    )


def env_names() -> list[EnvInfo]:
    """All environments that can be made here, those of a library only where it is installed."""
    infos = [_info(name, _make_raw(name, None).spec, picture.description) for name, picture in PICTURES.items()]
    infos += [_info(name, probe.make().spec, probe.description) for name, probe in PROBES.items()]
    for prefix, library in LIBRARIES.items():
        if library.available():
            infos += [_info(prefix + task, library.spec(task), library.describe(task)) for task in library.names()]
    for suite_name in SUITES:
        what = f"{suite(suite_name).TITLE}, in worker processes"
        infos += [EnvInfo(f"{suite_name}:{task}".rstrip(":"), "", "", what) for task in suite(suite_name).names()]
    return infos


def _info(name: str, spec: EnvSpec, description: str) -> EnvInfo:
    obs = ", ".join(f"{key} {space.dtype} {list(space.shape)}" for key, space in spec.obs.items())
    return EnvInfo(name, obs, _show(spec.action), description)


def _show(space: Space) -> str:
    if isinstance(space, Discrete):
        return f"Discrete({space.n})"
    if isinstance(space, Box) and isinstance(space.low, int | float) and isinstance(space.high, int | float):
        return f"Box({space.low:g}, {space.high:g}, {list(space.shape)})"
    return str(space)
