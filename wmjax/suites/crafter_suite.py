"""Crafter, which needs the extra `crafter`; the one module that imports it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from wmjax.suites import SuiteError
from wmjax.suites.gym_suite import gymnasium

TITLE = "Crafter"
STEPS = 10_000


def _crafter() -> Any:
    try:
        return importlib.import_module("crafter")
    except ImportError:
        raise SuiteError('env: crafter is not installed; pip install "wmjax[crafter]"') from None


def names() -> list[str]:
    """The one task, and that without rewards; [] where crafter is not installed."""
    return ["", "noreward"] if importlib.util.find_spec("crafter") else []


def find(task: str, suite_name: str = "crafter") -> bool:
    """Whether achievements are rewarded."""
    _crafter()
    if task not in names():
        raise SuiteError(f"env: unknown name {f'{suite_name}:{task}'!r}; valid are crafter and crafter:noreward")
    return task == ""


def make(found: bool, training: bool) -> Crafter:
    """Makes what `find` gave."""
    return Crafter(found)


class Crafter:
    """Crafter as a Gymnasium environment: 64x64 RGB, 17 actions, 10,000 steps at most."""

    max_episode_steps = STEPS

    def __init__(self, reward: bool) -> None:
        spaces = gymnasium().spaces
        self._reward, self._env = reward, None
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self._begin(0)
        self.action_space = spaces.Discrete(int(self._env.action_space.n))

    def _begin(self, seed: int) -> None:
        self._env = _crafter().Env(reward=self._reward, length=STEPS, seed=seed)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """A new world."""
        if seed is not None:
            self._begin(seed)
        return self._env.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One step; death terminates, the step limit truncates."""
        obs, reward, done, info = self._env.step(action)
        dead = bool(done and info["discount"] == 0)
        return obs, float(reward), dead, bool(done and not dead), info

    def close(self) -> None:
        """Nothing to do."""
