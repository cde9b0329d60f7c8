"""A process that steps some environments. It is started by `wmjax.envs.from_gymnasium`, as `python -m`.

Through a pipe come, after a first pickled `Setup`, messages in JSON; observations, rewards, flags and actions lie in
memory that is shared with the parent (`layout`). Episodes restart as in Gymnasium's NEXT_STEP mode. An environment
that raises an error, or gives what its spaces do not allow or what is not finite, is made anew; its next record is then
the first of an episode, and the parent is told why. The process ends with its parent.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from wmjax.suites import SuiteError, suite
from wmjax.suites.pictures import RENDERED, rendering
from wmjax.suites.spaces import ActionReader, Fault, ObsReader, obs_reader, plain


class Setup(NamedTuple):
    """What a worker is to do."""

    suite: str
    found: Any  # what the suite's `find` gave
    image_size: int | None
    action_repeat: int
    first: int  # index of its first environment
    count: int  # of its environments
    num_envs: int  # of all workers
    memory: int | None  # descriptor of the shared memory; None: only tell what the environment is
    training: bool = True  # some are played in another way to be learned from than to be evaluated
    rendered: bool = False  # whether what they render is in their observations, too, as `pictures.RENDERED`


def layout(description: dict[str, Any]) -> np.dtype:
    """What one environment shares: its action, and its record."""
    field = lambda name, about: (name, about["dtype"], tuple(about["shape"]))
    flags = [(name, "bool") for name in ("is_first", "is_last", "is_terminal")]
    obs = [field(f"obs/{entry['name']}", entry) for entry in description["obs"]]
    return np.dtype([field("action", description["action"]), ("reward", "float32"), *flags, *obs], align=True)


def arrays(buffer: Any, shared: np.dtype) -> dict[str, np.ndarray]:
    """The parts of a `layout` by name, `[num_envs, ...]`, in memory that is shared."""
    envs = np.frombuffer(buffer, shared)
    return {name: envs[name] for name in shared.names}


class _Served:
    """One environment and its place in the shared memory."""

    def __init__(self, make: Callable[[], Any], repeat: int, index: int, views: dict[str, np.ndarray], image_size):
        self._make, self._repeat, self._index, self._views, self._image_size = make, repeat, index, views, image_size
        self._env = None
        self._seed, self._renewals = [0], 0
        self._over = True
        self._renew()

    def _renew(self) -> None:
        if self._env is not None:
            self.close()  # it is broken already
        self._env = self._make()
        self._obs, self._action = readers(self._env, self._image_size)

    def close(self) -> None:
        """Ends what the environment has started."""
        with contextlib.suppress(Exception):  # the run is over, and this process too
            self._env.close()

    def reset(self, seed: list[int]) -> None:
        """Begins an episode; those that follow are the environment's own."""
        self._seed = seed
        self._begin(gymnasium_seed(seed))

    def _begin(self, seed: int | None = None) -> None:
        obs = self._env.reset(seed=seed)[0]
        self._write(obs, 0.0, True, False, False)
        self._over = False

    def _write(self, obs: Any, reward: float, is_first: bool, is_last: bool, is_terminal: bool) -> None:
        views, i = self._views, self._index
        for name, value in self._obs.read(obs).items():
            views[f"obs/{name}"][i] = value
        if f"obs/{RENDERED}" in views:
            views[f"obs/{RENDERED}"][i] = rendering(self._env)
        views["reward"][i] = reward
        views["is_first"][i], views["is_last"][i], views["is_terminal"][i] = is_first, is_last, is_terminal

    def step(self) -> str | None:
        """Steps, or restarts after the last record of an episode. Returns what went wrong, if anything did."""
        try:
            if self._over:
                self._begin()
                return None
            action, total = self._action.read(self._views["action"][self._index]), 0.0
            for _ in range(self._repeat):
                obs, reward, terminated, truncated, _ = self._env.step(action)
                total += float(reward)
                terminated, truncated = _flag("terminated", terminated), _flag("truncated", truncated)
                if terminated or truncated:
                    break
            if not abs(total) <= np.finfo(np.float32).max:
                raise Fault(f"reward is {total}")
            obs = self._env.observe() if obs is None else obs
            self._write(obs, total, False, terminated or truncated, terminated)
            self._over = terminated or truncated
            return None
        except Exception as error:  # whatever the environment raises
            text = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
            self._renewals += 1
            self._renew()
            self._begin(gymnasium_seed([*self._seed, self._renewals]))
            return text[:300]


def _flag(name: str, value: Any) -> bool:
    """A flag that a step has returned, as a bool or as an array without axes. Raises `Fault` if it is another thing."""
    if np.shape(value) != () or np.asarray(value).dtype != bool:
        raise Fault(f"{name}, which its step returns, must be a bool, not {value!r}")
    return bool(value)


def gymnasium_seed(entropy: list[int]) -> int:
    """A seed in [0, 2**31), such as every library takes."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# What an environment is


def readers(env: Any, image_size: int | None) -> tuple[ObsReader, ActionReader]:
    """Of an environment; `image_size` None is its own choice."""
    size = getattr(env, "image_size", None) if image_size is None else image_size
    if size is not None and hasattr(env, "resize_to"):
        env.resize_to(size)
    return obs_reader(plain(env.observation_space), size), ActionReader(plain(env.action_space))


def describe(env: Any, image_size: int | None, action_repeat: int) -> dict[str, Any]:
    """Spaces of an environment as JSON. Raises `SuiteError` where it does not do what Gymnasium asks of it.

    `obs` and `action` are what is read from the environment's own, `native_obs` and `native_action`.
    """
    for name in ("observation_space", "action_space"):
        if getattr(env, name, None) is None:
            raise SuiteError(f"env: the environment has no {name}")
    reader, action_reader = readers(env, image_size)
    _check_rules(env, reader, action_reader)
    limit = getattr(getattr(env, "spec", None), "max_episode_steps", getattr(env, "max_episode_steps", None))
    return {
        "obs": reader.describe(),
        "action": action_reader.describe(),
        "native_obs": reader.space,
        "native_action": action_reader.space,
        "image_size": reader.image_size,
        "max_episode_steps": None if limit is None else -(-limit // action_repeat),
        "frames": getattr(env, "frames", 1) * action_repeat,
    }


def _describe_rendering(env: Any) -> dict[str, Any]:
    """As `Entry.describe`. Raises `SuiteError` where the environment renders no picture."""
    try:
        shape = list(rendering(env).shape)
    except SuiteError:
        raise
    except Exception as error:  # whatever the environment, or what draws, raises
        raise SuiteError(f"video: the environment cannot be rendered: {type(error).__name__}: {error}"[:500]) from None
    return {"name": RENDERED, "dtype": "uint8", "shape": shape, "low": 0, "high": 255}


def _check_rules(env: Any, reader: ObsReader, action_reader: ActionReader) -> None:
    def ask(what: str, length: int, call: Callable[[], Any]) -> tuple:
        try:
            given = call()
        except Exception as error:
            raise SuiteError(f"env: its {what} raised {type(error).__name__}: {error}") from None
        if not isinstance(given, tuple) or len(given) != length:
            shown = f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
            raise SuiteError(f"env: its {what} must return a tuple of {length}, not {shown}")
        try:
            reader.read(env.observe() if given[0] is None and hasattr(env, "observe") else given[0])
        except Fault as fault:
            raise SuiteError(f"env: its {what} breaks its observation_space: {fault}") from None
        return given

    ask("reset(seed=0)", 2, lambda: env.reset(seed=0))
    action = action_reader.read(action_reader.sample(np.random.default_rng(0)))  # of the type that steps of a run take
    _, reward, terminated, truncated, _ = ask("step", 5, lambda: env.step(action))
    try:
        if not np.isfinite(float(reward)):
            raise ValueError
    except (TypeError, ValueError):
        raise SuiteError(f"env: the reward that its step returns must be a finite number, not {reward!r}") from None
    try:
        _flag("terminated", terminated), _flag("truncated", truncated)
    except Fault as fault:
        raise SuiteError(f"env: {fault}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The process


def _serve(connection: Connection, setup: Setup) -> None:
    module = suite(setup.suite)
    if setup.rendered and not hasattr(module, "drawn"):
        raise SuiteError(f"video: the environments of {module.TITLE} render no pictures")
    found = module.drawn(setup.found) if setup.rendered else setup.found
    make = lambda: module.make(found, setup.training)
    if setup.memory is None:
        env = make()
        try:
            about = describe(env, setup.image_size, setup.action_repeat)
            if setup.rendered:
                about["obs"].append(_describe_rendering(env))
        finally:
            with contextlib.suppress(Exception):  # it is over
                env.close()
        connection.send_bytes(json.dumps(about).encode())
        return
    shared = layout(json.loads(connection.recv_bytes()))
    views = arrays(mmap.mmap(setup.memory, setup.num_envs * shared.itemsize), shared)
    indices = range(setup.first, setup.first + setup.count)
    served = [_Served(make, setup.action_repeat, i, views, setup.image_size) for i in indices]
    with contextlib.suppress(EOFError, ConnectionError):  # closed, or closed before the last answer was read
        while True:
            message, faults = connection.recv_bytes(), []
            if message == b"step":
                steps = ((i, one.step()) for i, one in zip(indices, served, strict=True))
                faults = [(i, text) for i, text in steps if text is not None]
            else:
                for one, seed in zip(served, json.loads(message), strict=True):
                    one.reset(seed)
            connection.send_bytes(json.dumps(faults).encode() if faults else b"")
    for one in served:
        one.close()


def _end_with(parent: int) -> None:
    """An environment that hangs would not see that the pipe is closed."""
    while os.getppid() == parent:
        time.sleep(2)
    os.killpg(0, signal.SIGKILL)  # with the processes that its environments started, such as ViZDoom's


def main() -> None:
    """Serves the pipe whose descriptor is the first argument, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent saves first, and then closes the pipe
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.set_inheritable(int(sys.argv[1]), False)  # the parent sees the end of this process by it
    connection = Connection(int(sys.argv[1]))
    try:
        _serve(connection, Setup(*connection.recv()))
    except (EOFError, ConnectionError):
        pass
    except SuiteError as error:
        connection.send_bytes(json.dumps({"usage": str(error)}).encode())
    except Exception as error:
        connection.send_bytes(json.dumps({"failed": f"{type(error).__name__}: {error}"[:500]}).encode())


if __name__ == "__main__":
    main()
