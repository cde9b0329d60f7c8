"""Crafter, which needs the extra `crafter`; the one module that imports it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmjax.suites import SuiteError, check_arguments, installed, library, whole
from wmjax.suites.gym_suite import gymnasium

TITLE = "Crafter"
STEPS = 10_000
ARGUMENTS = {"length": whole(1)}  # steps after which an episode is cut


_crafter = functools.partial(library, "crafter", "crafter")


def names() -> list[str]:
    """The one task, and that without rewards; [] where crafter is not installed."""
    return ["", "noreward"] if installed("crafter") else []


def find(task: str, suite_name: str = "crafter", args: Mapping[str, Any] = {}) -> tuple[bool, int]:
    """Whether achievements are rewarded, and the steps of an episode at most."""
    _crafter()
    if task not in names():
        raise SuiteError(f"env: unknown name {f'{suite_name}:{task}'!r}; valid are crafter and crafter:noreward")
    check_arguments("crafter", ARGUMENTS, args)
    return task == "", args.get("length", STEPS)


def make(found: tuple[bool, int], training: bool) -> Crafter:
    """Makes what `find` gave."""
    return Crafter(*found)


class Crafter:
    """Crafter as a Gymnasium environment: 64x64 RGB, 17 actions."""

    def __init__(self, reward: bool, length: int = STEPS) -> None:
        spaces = gymnasium().spaces
        self._reward, self._env, self.max_episode_steps = reward, None, length
        self.observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self._begin(0)
        self.action_space = spaces.Discrete(int(self._env.action_space.n))

    def _begin(self, seed: int) -> None:
        self._env = _crafter().Env(reward=self._reward, length=self.max_episode_steps, seed=seed)

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
