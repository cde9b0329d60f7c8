"""Doom's scenarios by ViZDoom, which needs the extra `vizdoom`; the one module that imports it.

Seen is the screen alone, without health or ammunition, as in World Models and Dreamer. One button is pressed at a time,
or none; where a scenario has two of them, they may be an axis instead, as in World Models. A step is one tic of the
game (35 a second), so that an action repeat of 4 is usual. Where a scenario has no time limit, as Take Cover, an
episode is cut after 2,100 tics: a minute.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmjax.suites import SuiteError, check_arguments, choice, installed, library, unknown, whole
from wmjax.suites.gym_suite import gymnasium

TITLE = "ViZDoom"
TICS = 2100  # of an episode, where the scenario does not say
ARGUMENTS = {
    "limit": whole(1),  # tics after which an episode is cut
    # One button or none is chosen; or a number in [-1, 1] presses the first of two below -1/3, the second above 1/3.
    "actions": choice("buttons", "axis"),
}
# Parts of ids: variants of what is not seen or pressed here, and a scenario that is also moved by numbers.
HIDDEN = ("MultiBinary", "Audio", "Notifications", "Deathmatch")


def _vizdoom() -> Any:
    library("vizdoom.gymnasium_wrapper", "vizdoom", "vizdoom")  # registers the scenarios
    return library("vizdoom", "vizdoom")


def _scenarios() -> dict[str, str]:
    """The newest id of each scenario by its name, such as "TakeCover"; without the maps of whole games."""
    _vizdoom()
    ids = [spec for spec in gymnasium().registry.values() if str(spec.entry_point).startswith("vizdoom.")]
    ids = [spec for spec in ids if not any(word in spec.id for word in (*HIDDEN, "-S"))]
    return {spec.name.removeprefix("Vizdoom"): spec.id for spec in sorted(ids, key=lambda spec: spec.version or 0)}


def names() -> list[str]:
    """The scenarios; [] where vizdoom is not installed."""
    return sorted(_scenarios()) if installed("vizdoom") else []


def find(task: str, suite_name: str = "vizdoom", args: Mapping[str, Any] = {}) -> tuple[str, int | None, bool]:
    """The scenario's id in Gymnasium's registry, its time limit where one is given, and whether buttons are an axis."""
    found = _scenarios()
    if task not in found:
        raise unknown(suite_name, task, found, f"valid are {', '.join(sorted(found))}")
    check_arguments(f"{suite_name}:{task}", ARGUMENTS, args)
    return found[task], args.get("limit"), args.get("actions") == "axis"


def make(found: tuple[str, int | None, bool], training: bool) -> Doom:
    """Makes what `find` gave."""
    return Doom(*found)


class Doom:
    """One scenario as a Gymnasium environment."""

    def __init__(self, name: str, limit: int | None = None, axis: bool = False) -> None:
        resolution = _vizdoom().ScreenResolution.RES_160X120
        how = dict(max_buttons_pressed=1, screen_resolution=resolution, disable_env_checker=True)
        self._env = gymnasium().make(name, **how).unwrapped
        if limit is not None or self._env.game.get_episode_timeout() <= 0:
            self._env.game.set_episode_timeout(TICS if limit is None else limit)
        self.max_episode_steps = self._env.game.get_episode_timeout()
        self.observation_space = self._env.observation_space["screen"]
        self.action_space, self._axis = self._env.action_space, None
        if axis:
            pressed = [tuple(buttons) for buttons in self._env.button_map]
            if sorted(pressed) != [(0, 0), (0, 1), (1, 0)]:
                self._env.close()
                raise SuiteError(f"env_args: actions 'axis' is not valid for {name!r}, which has not two buttons")
            self._axis = [pressed.index(buttons) for buttons in ((1, 0), (0, 0), (0, 1))]
            self.action_space = gymnasium().spaces.Box(-1, 1, (1,), np.float32)
        self._screen = np.zeros(self.observation_space.shape, np.uint8)
        self._folder = tempfile.TemporaryDirectory()  # the game leaves its settings in the current one

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """A new episode."""
        before = os.getcwd()
        os.chdir(self._folder.name)
        try:
            obs, _ = self._env.reset(seed=seed)
        finally:
            os.chdir(before)
        self._screen = obs["screen"]
        return self._screen, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One tic. After the last one the game shows nothing, so the screen stays as it was."""
        if self._axis is not None:
            value = float(np.asarray(action).item())
            action = self._axis[int(value >= -1 / 3) + int(value > 1 / 3)]
        obs, reward, over, truncated, _ = self._env.step(action)
        if not over:
            self._screen = obs["screen"]
        return self._screen, float(reward), bool(over and not truncated), bool(truncated), {}

    def close(self) -> None:
        """Ends the game's own process."""
        self._env.close()
        self._folder.cleanup()
