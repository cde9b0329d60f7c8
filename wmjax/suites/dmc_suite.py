"""The DeepMind Control Suite, from pixels or from its own vectors, which needs the extra `dmc`; only here imported."""

from __future__ import annotations

import ctypes.util
import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmjax.suites import SuiteError, absent, check_arguments, installed, unknown, whole
from wmjax.suites.gym_suite import gymnasium

TITLE = "DeepMind Control Suite"
IMAGE_SIZE = 64
RENDERED_SIZE = 320  # for people
ARGUMENTS = {"camera": whole(0)}  # number of the camera that sees it
CAMERAS = {"quadruped": 2}  # from behind; the others are seen by their first camera
# How MuJoCo draws without a screen, by the system library that each way needs, and Debian's package of that.
BACKENDS = {"egl": ("EGL", "libegl1"), "osmesa": ("OSMesa", "libosmesa6")}


def _backend() -> str:
    """How to draw: as the user says, or by the first library there is."""
    found = (name for name, (library, _) in BACKENDS.items() if ctypes.util.find_library(library))
    return os.environ.get("MUJOCO_GL") or next(found, "disable")


def _suite(draws: bool) -> Any:
    """The library, which starts what draws when it is imported. Raises `SuiteError` where that cannot be."""
    before, backend = os.environ.get("MUJOCO_GL"), _backend() if draws else "disable"
    os.environ["MUJOCO_GL"] = backend
    try:
        return importlib.import_module("dm_control.suite")
    except Exception as error:  # whatever the driver raises
        raise _cannot_draw(backend, error) from None
    finally:
        os.environ.pop("MUJOCO_GL")
        os.environ |= {} if before is None else {"MUJOCO_GL": before}


def _cannot_draw(backend: str, error: Exception) -> SuiteError:
    ways = " or ".join(f"MUJOCO_GL={name} with {package}" for name, (_, package) in BACKENDS.items())
    return SuiteError(
        f"env: pictures cannot be drawn with MUJOCO_GL={backend} ({type(error).__name__}: {error}); valid are {ways} "
        "(apt-get install)"
    )


def names() -> list[str]:
    """Tasks as "DOMAIN_TASK"; [] where dm_control is not installed."""
    if not installed("dm_control"):
        return []
    try:
        tasks = _suite(draws=True).ALL_TASKS  # whoever imports it without cannot draw later
    except SuiteError:
        tasks = _suite(draws=False).ALL_TASKS
    return sorted(f"{domain}_{task}" for domain, task in tasks)


def find(task: str, suite_name: str = "dmc", args: Mapping[str, Any] = {}) -> tuple[str, str, dict[str, Any]]:
    """The task, the name of the suite, which says how it is observed, and arguments; the library is for workers."""
    if not installed("dm_control"):
        raise absent("dm_control", "dmc")
    check_arguments(f"{suite_name}:{task}", ARGUMENTS if suite_name == "dmc" else {}, args)
    return task, suite_name, dict(args)


def make(found: tuple[str, str, dict[str, Any]], training: bool) -> Control:
    """Makes what `find` gave."""
    task, suite_name, args = found
    vision = suite_name == "dmc"
    draws = vision or args.get("draws", False)
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in _suite(draws=draws).ALL_TASKS}
    if task not in tasks:
        raise unknown(suite_name, task, tasks)
    return Control(*tasks[task], vision=vision, **args)


def drawn(found: tuple[str, str, dict[str, Any]]) -> tuple[str, str, dict[str, Any]]:
    """The same, for tasks whose `render` draws though they are not seen."""
    task, suite_name, args = found
    return task, suite_name, args | {"draws": True}


class Control:
    """One task as a Gymnasium environment. Pictures are 64x64 RGB; vectors keep the names of the suite."""

    def __init__(self, domain: str, task: str, vision: bool, camera: int | None = None, draws: bool = False) -> None:
        spaces = gymnasium().spaces
        self._env = _suite(draws=vision or draws).load(domain, task, task_kwargs={"random": np.random.RandomState(0)})
        self._vision, self._timestep = vision, None
        self._camera = CAMERAS.get(domain, 0) if camera is None else camera
        if vision and self._camera >= self._env.physics.model.ncam:
            count = self._env.physics.model.ncam
            raise SuiteError(f"env_args: camera {self._camera} is not valid for {domain!r}, which has {count}")
        limit = self._env._step_limit
        self.max_episode_steps = int(limit) if np.isfinite(limit) else None
        action = self._env.action_spec()
        self.action_space = spaces.Box(action.minimum.astype(np.float32), action.maximum.astype(np.float32))
        if vision:
            self._env.reset()
            try:
                self.observe()
            except Exception as error:  # whatever the driver raises
                raise _cannot_draw(_backend(), error) from None
            self.observation_space = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        else:
            entry = lambda spec: spaces.Box(-np.inf, np.inf, spec.shape, np.float64)
            entries = {name: entry(spec) for name, spec in self._env.observation_spec().items()}
            self.observation_space = spaces.Dict(entries)

    def observe(self) -> Any:
        """What is seen now; `step` leaves it to be asked for, because drawing is slow."""
        if self._vision:
            return self._env.physics.render(IMAGE_SIZE, IMAGE_SIZE, camera_id=self._camera)
        return {name: np.asarray(value, np.float64) for name, value in self._timestep.observation.items()}

    def render(self) -> np.ndarray:
        """A larger picture, for people."""
        try:
            return self._env.physics.render(RENDERED_SIZE, RENDERED_SIZE, camera_id=self._camera)
        except Exception as error:  # whatever the driver raises
            raise _cannot_draw(_backend(), error) from None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        """A new episode."""
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed)
        self._timestep = self._env.reset()
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[None, float, bool, bool, dict]:
        """One step of the task; its time limit truncates."""
        self._timestep = self._env.step(action)
        over = self._timestep.last()
        terminated = bool(over and self._timestep.discount == 0)
        return None, float(self._timestep.reward), terminated, bool(over and not terminated), {}

    def close(self) -> None:
        """Frees what draws."""
        self._env.close()
