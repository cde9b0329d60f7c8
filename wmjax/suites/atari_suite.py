"""Atari 2600 games by the protocols of the field, which need the extra `atari`; the one module that imports ale-py.

Every action is taken for four frames, of which the last two are merged by their maximum; an episode is cut after
108,000 frames (30 minutes of play). Rewards are the game's own. Differences are those of `Protocol`; which paper plays
by which is in `docs/protocols.md`.

A departure: IRIS evaluates after exactly one frame without action. Here up to 30 begin episodes of evaluation too, for
without them a policy that draws nothing would play one episode again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from wmjax.suites import FRACTION, SWITCH, SuiteError, check_arguments, choice, library, unknown, whole
from wmjax.suites.gym_suite import gymnasium
from wmjax.suites.pictures import resize

TITLE = "Atari"
FRAMES, FRAME_LIMIT = 4, 108_000
GRAY = np.array([0.299, 0.587, 1 - (0.299 + 0.587)])  # weights of red, green and blue


class Protocol(NamedTuple):
    """How a game is played and shown; arguments of the environment, but for the size of pictures."""

    sticky: float  # probability that the emulator repeats the last action instead
    min_noops: int  # so many frames without action begin an episode at least,
    max_noops: int  # and at most
    limit: int  # frames after which an episode is cut in training
    life_loss: bool  # whether a lost life ends an episode, in training only; the next begins with one such frame
    all_actions: bool  # whether all 18 actions are offered, or those that the game uses
    resize: str  # "area": by means; "bilinear"
    resize_first: bool  # whether frames are resized before two of them are merged
    gray: bool
    gray_last: bool  # whether pictures become gray after all else, by weights of RGB, or are the emulator's gray ones
    image_size: int


ARGUMENTS = {
    "sticky": FRACTION, "min_noops": whole(0), "max_noops": whole(0), "limit": whole(1), "life_loss": SWITCH,
    "all_actions": SWITCH, "resize": choice("area", "bilinear"), "resize_first": SWITCH, "gray": SWITCH,
    "gray_last": SWITCH,
}  # fmt: skip
PROTOCOLS = {
    # Kaiser et al. 2019 (SimPLe) and those who compare with it, 400 thousand frames; details as in IRIS.
    "atari": Protocol(
        sticky=0.0, min_noops=1, max_noops=30, limit=20_000, life_loss=True, all_actions=False, resize="bilinear",
        resize_first=True, gray=False, gray_last=False, image_size=64,
    ),
    # Machado et al. 2018, 200 million frames.
    "atari200m": Protocol(
        sticky=0.25, min_noops=1, max_noops=30, limit=FRAME_LIMIT, life_loss=False, all_actions=True, resize="area",
        resize_first=False, gray=True, gray_last=False, image_size=96,
    ),
}  # fmt: skip


_ale = functools.partial(library, "ale_py", "atari", "ale-py")


def names() -> list[str]:
    """The games; [] where ale-py is not installed."""
    try:
        roms = _ale().roms.get_all_rom_ids()
    except SuiteError:
        return []
    return sorted("".join(word.capitalize() for word in rom.split("_")) for rom in roms if rom != "combat")


def find(task: str, suite_name: str = "atari", args: Mapping[str, Any] = {}) -> tuple[str, Protocol]:
    """The game's rom and the protocol."""
    roms = _ale().roms
    if task not in names():
        raise unknown(suite_name, task, names())
    rom = next(r for r in roms.get_all_rom_ids() if r.replace("_", "") == task.lower())
    return rom, protocol(f"{suite_name}:{task}", args)


def protocol(name: str, args: Mapping[str, Any] = {}) -> Protocol:
    """How a game is played, such as "atari:Pong", where some of it is said by arguments."""
    check_arguments(name, ARGUMENTS, args)
    found = PROTOCOLS[name.partition(":")[0]]._replace(**args)
    if found.min_noops > found.max_noops:
        raise SuiteError(f"env_args: min_noops {found.min_noops} of {name!r} is above max_noops {found.max_noops}")
    if found.gray_last and not found.gray:
        raise SuiteError(f"env_args: gray_last of {name!r} is valid with gray alone")
    return found


def make(found: tuple[str, Protocol], training: bool) -> Game:
    """Makes what `find` gave."""
    return Game(found[0], Protocol(*found[1]), training)


class Game:
    """One game as a Gymnasium environment."""

    frames = FRAMES  # per step

    def __init__(self, rom: str, protocol: Protocol, training: bool) -> None:
        spaces, ale_py = gymnasium().spaces, _ale()
        self._protocol, self._life_loss = protocol, protocol.life_loss and training
        self._rom = ale_py.roms.get_rom_path(rom)
        self.image_size = protocol.image_size
        self._limit = protocol.limit if training else FRAME_LIMIT
        self.max_episode_steps = FRAME_LIMIT // FRAMES
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", protocol.sticky)
        self._seed(0)
        self._actions = self._ale.getLegalActionSet() if protocol.all_actions else self._ale.getMinimalActionSet()
        self._size: int | None = None  # of pictures, where they are resized here
        self.observation_space = spaces.Box(0, 255, self._screen().shape, np.uint8)
        self.action_space = spaces.Discrete(len(self._actions))
        self._over, self._frame = True, 0

    def _seed(self, seed: int) -> None:
        """The emulator takes a seed when it loads a game."""
        self._ale.setInt("random_seed", seed % 2**31)
        self._ale.loadROM(self._rom)
        self._rng = np.random.default_rng(seed)

    def resize_to(self, size: int) -> None:
        """Sets the side of pictures."""
        self._size = size
        self.observation_space = gymnasium().spaces.Box(0, 255, self._picture(self._screen()).shape, np.uint8)

    def _screen(self) -> np.ndarray:
        """What the emulator shows, uint8 `[H, W]` or `[H, W, 3]`."""
        protocol = self._protocol
        gray = protocol.gray and not protocol.gray_last
        screen = self._ale.getScreenGrayscale() if gray else self._ale.getScreenRGB()
        return self._resized(screen) if protocol.resize_first else screen

    def _resized(self, screen: np.ndarray) -> np.ndarray:
        if self._size is None:
            return screen
        planes = screen.reshape(*screen.shape[:2], -1)
        resized = resize(planes, self._size, {"area": "BOX", "bilinear": "BILINEAR"}[self._protocol.resize])
        return resized.reshape(self._size, self._size, *screen.shape[2:])

    def _picture(self, screen: np.ndarray) -> np.ndarray:
        """What is observed, of screens that are merged."""
        picture = screen if self._protocol.resize_first else self._resized(screen)
        return (picture @ GRAY).astype(np.uint8) if self._protocol.gray_last else picture

    def _wait(self) -> None:
        """One frame without action."""
        self._ale.act(0)
        self._frame += 1
        if self._ale.game_over():
            self._ale.reset_game()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """After a lost life the game goes on; after its end, or with a seed, a new one begins."""
        if seed is not None:
            self._seed(seed)
        if seed is not None or self._over:
            self._ale.reset_game()
            self._frame = 0
            for _ in range(int(self._rng.integers(self._protocol.min_noops, self._protocol.max_noops + 1))):
                self._wait()
        else:
            self._wait()
        self._over = False
        return self._picture(self._screen()), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Four frames."""
        lives, reward, screens = self._ale.lives(), 0.0, []
        for frame in range(FRAMES):
            reward += self._ale.act(self._actions[action])
            self._frame += 1
            self._over = self._ale.game_over()
            if frame >= FRAMES - 2 or self._over:
                screens.append(self._screen())
            if self._over:
                break
        lost = self._life_loss and self._ale.lives() < lives
        truncated = self._frame >= self._limit and not self._over
        terminated = bool(self._over or lost)
        self._over = self._over or truncated
        return self._picture(np.maximum(screens[0], screens[-1])), reward, terminated, truncated and not terminated, {}

    def close(self) -> None:
        """Nothing to do: the emulator goes with its object."""
