"""Gymnasium environments in worker processes, as a `HostEnv`: dead, hanging and faulty ones are replaced.

Gymnasium's own vector environment ends with its first lost worker, so the processes are supervised here. They share
observations, rewards and actions through memory, and each steps several environments (`wmjax/suites/worker.py`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mmap
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, BinaryIO, NamedTuple

from wmjax import processes
from wmjax.envs import own
from wmjax.suites.spaces import ActionReader, obs_reader
from wmjax.suites.worker import Setup, arrays, layout
from wmjax.types import Array, EnvSpec, HostEnv, RunError, TimeStep, UsageError

START_SECONDS = 120.0  # for a worker to import its library and begin, unless told otherwise
MOST_SECONDS = 1_000_000.0  # that a system can wait for at once, and more than anybody does
STEP_SECONDS = 60.0  # until a worker counts as hanging, unless told otherwise
MAX_RESTARTS = 10  # within `RESTART_SECONDS`, unless told otherwise
RESTART_SECONDS = 3600.0
POLL_SECONDS = 0.5  # between two looks at whether to stop
CLOSE_SECONDS = 2.0
LAST_SECONDS = 10.0  # for an environment that was described to end by itself


class EnvironmentsLostError(RunError):
    """Environments were lost too often; the message says which, and how the last one was."""


def from_gymnasium(
    name: str,
    found: Any,
    *,
    image_size: int | None = None,
    action_repeat: int = 1,
    action_map: Callable[[Array], Array] | None = None,
    start_timeout: float = START_SECONDS,
) -> HostEnv:
    """Describes environments, after one was made and checked in a process of its own, which has ended.

    Args:
      name: as messages have it; it begins with one of `suites.SUITES`.
      found: what `find` of that suite gave.
      image_size: side of its pictures; None for its own, see `suites.spaces.obs_reader`.
      action_repeat: steps that each action is taken for; their rewards are summed.
      action_map: as in `EnvSpec`.
      start_timeout: seconds for a process to import its library, make environments and begin episodes.

    Raises:
      UsageError: an environment that cannot be made or sent to a process, or that breaks Gymnasium's rules (the message
        says how).
    """
    setup = Setup(name.partition(":")[0], found, image_size, action_repeat, 0, 1, 1, None)
    made = lambda setup: host_env(setup, _describe(name, setup, start_timeout), action_map, start_timeout)
    return made(setup)._replace(rendered=lambda: made(setup._replace(rendered=True)))


def host_env(
    setup: Setup,
    about: dict[str, Any],
    action_map: Callable[[Array], Array] | None,
    start_timeout: float = START_SECONDS,
) -> HostEnv:
    """The environment that a worker has described; its own spaces are read here as they are there."""
    reader = obs_reader(about["native_obs"], about["image_size"])

    def resized(size: int) -> HostEnv:
        seen = about | {"obs": obs_reader(about["native_obs"], size).describe(), "image_size": size}
        return host_env(setup._replace(image_size=size), seen, action_map, start_timeout)

    obs = {entry["name"]: own.obs_space(entry) for entry in about["obs"]}
    return HostEnv(
        EnvSpec(obs, own.action_space(about["action"]), about["max_episode_steps"], action_map, about["frames"]),
        functools.partial(Workers, setup, about, start_timeout=start_timeout),
        read=functools.partial(own.accept, reader),
        write=ActionReader(about["native_action"]).read,
        resized=resized if reader.pictures() else None,
        notes=tuple(reader.notes()),
    )


class _Process(NamedTuple):
    """A worker and the pipe to it."""

    popen: subprocess.Popen
    connection: Connection

    def end(self, seconds: float = 0.0) -> None:
        """Closes the pipe, upon which a worker ends by itself; kills it where that takes longer than `seconds`."""
        self.connection.close()
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        with contextlib.suppress(ProcessLookupError):  # what its environments started, such as ViZDoom's game
            os.killpg(self.popen.pid, signal.SIGKILL)


def _launch(setup: Setup) -> _Process:
    # Started as a program, not forked: JAX has threads. Nor as `multiprocessing` would: that imports the user's script.
    mine, theirs = Pipe()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    descriptors = [theirs.fileno()] + ([setup.memory] if setup.memory is not None else [])
    popen = subprocess.Popen(
        processes.python("-m", "wmjax.suites.worker", str(theirs.fileno())),
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env=threads | processes.environment(),
    )
    theirs.close()
    process = _Process(popen, mine)
    try:
        mine.send(tuple(setup))
    except BrokenPipeError:  # it died at once; whoever reads from it will see
        pass
    except Exception:  # it cannot be pickled
        process.end()
        raise
    return process


def _describe(name: str, setup: Setup, seconds: float) -> dict[str, Any]:
    try:
        process = _launch(setup)
    except OSError as error:
        raise UsageError(f"env: no process could be started for {name!r} ({error.strerror})") from None
    except Exception as error:  # whatever pickling raises
        raise UsageError(f"env: {name!r} cannot be sent to a process of its own: {error}") from error
    try:
        if not process.connection.poll(min(seconds, MOST_SECONDS)):
            raise UsageError(
                f"env: {name!r} could not be made within {seconds:g} seconds; a larger start_timeout gives it longer"
            )
        about = json.loads(process.connection.recv_bytes())
    except EOFError:
        code = process.popen.wait()
        raise UsageError(f"env: {name!r} ended the process that made it ({_ending(code)})") from None
    finally:
        process.end(LAST_SECONDS)  # of some simulators only one may exist: training begins without it
    if "usage" in about or "failed" in about:
        raise UsageError(about.get("usage") or f"env: {name!r} cannot be made: {about['failed']}")
    return about


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _shared_file(size: int) -> BinaryIO:
    """A file without a name, of memory that processes share.

    All its room is taken now, for what is missing later ends the process that writes there. Raises `RunError` where
    there is none, in memory or on the disk.
    """
    failures = []
    for folder, name in (("/dev/shm", "/dev/shm"), (None, "the folder for temporary files")):
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                stack.pop_all()
                return file
        except OSError as error:
            failures.append(f"{name} ({error.strerror})")
    raise RunError(
        f"environments share {size / 1e6:.3g} MB of memory with their processes, for which there is no room in "
        f"{' or '.join(failures)}; fewer environments (num_envs) or smaller pictures need less"
    )


class Workers:
    """Worker processes with `num_envs` environments, as `types.HostEnvs`.

    A process that dies or hangs is killed and started again, and its environments begin new episodes; an environment
    that fails by itself is begun again by its process. Either is said, and counted.

    Args:
      setup, about: of an environment, as `from_gymnasium` found them.
      num_envs: environments in all.
      workers: processes; None for one per processor, at most `num_envs`.
      timeout: seconds for a step, after which a process counts as hanging.
      start_timeout: the same for its start, for a reset, and, where it is more, for a step in which an episode begins.
      max_restarts: environments that may be lost within an hour.
      training: whether to play for the sake of learning, where a suite makes a difference.
      say: is told what was lost and why.
      stop: whether to give up waiting.
    """

    def __init__(
        self,
        setup: Setup,
        about: dict[str, Any],
        num_envs: int,
        *,
        workers: int | None = None,
        timeout: float = STEP_SECONDS,
        start_timeout: float = START_SECONDS,
        max_restarts: int = MAX_RESTARTS,
        training: bool = True,
        say: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._about, self._timeout, self._start_timeout = about, timeout, start_timeout
        self._max_restarts, self._say, self._stop = max_restarts, say, stop
        shared = layout(about)
        self._file = _shared_file(num_envs * shared.itemsize)
        self._views = arrays(mmap.mmap(self._file.fileno(), num_envs * shared.itemsize), shared)
        count = min(num_envs, workers or os.cpu_count() or 1)
        bounds = [num_envs * i // count for i in range(count + 1)]
        setup = setup._replace(num_envs=num_envs, memory=self._file.fileno(), training=training)
        self._setups = [setup._replace(first=a, count=b - a) for a, b in itertools.pairwise(bounds)]
        self._processes = [self._begin(setup) for setup in self._setups]
        self._seeds: list[list[int]] = []
        self._lost: deque[float] = deque()
        self._begins = self._views["is_last"].copy()  # who begins an episode in the step that is under way
        self.restarts = 0

    def _begin(self, setup: Setup) -> _Process:
        try:
            process = _launch(setup)
        except OSError as error:
            raise EnvironmentsLostError(f"no process could be started for environments ({error.strerror})") from None
        self._tell(process, json.dumps(self._about).encode())
        return process

    @staticmethod
    def _tell(process: _Process, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it is dead, as whoever waits for its answer will see
            process.connection.send_bytes(message)

    def reset(self, seeds: list[list[int]]) -> TimeStep | None:
        """As `HostEnvs.reset`."""
        self._seeds = [list(seed) for seed in seeds]
        for setup, process in zip(self._setups, self._processes, strict=True):
            self._tell(process, self._seeds_of(setup))
        return self._read() if self._wait([self._start_timeout] * len(self._processes)) else None

    def _seeds_of(self, setup: Setup, *more: int) -> bytes:
        return json.dumps([[*seed, *more] for seed in self._seeds[setup.first : setup.first + setup.count]]).encode()

    def send(self, action: Any) -> None:
        """As `HostEnvs.send`."""
        self._views["action"][:] = action
        self._begins = self._views["is_last"].copy()
        for process in self._processes:
            self._tell(process, b"step")

    def receive(self) -> TimeStep | None:
        """As `HostEnvs.receive`."""
        most = max(self._timeout, self._start_timeout)
        patience = [most if self._begins[s.first : s.first + s.count].any() else self._timeout for s in self._setups]
        return self._read() if self._wait(patience) else None

    def _read(self) -> TimeStep:
        views = {name: view.copy() for name, view in self._views.items() if name != "action"}
        obs = {name.removeprefix("obs/"): view for name, view in views.items() if name.startswith("obs/")}
        return TimeStep(obs, *(views[name] for name in ("reward", "is_first", "is_last", "is_terminal")))

    def _wait(self, patience: list[float]) -> bool:
        """Waits so many seconds for each process and replaces those that do not answer; False if told to stop."""
        waiting, spent, patience = set(range(len(self._processes))), 0.0, list(patience)
        since = [0.0] * len(patience)

        def replace(index: int, reason: str) -> None:
            self._replace(index, reason)
            since[index], patience[index] = spent, self._start_timeout

        while waiting:
            if self._stop():
                return False
            by_connection, begin = {self._processes[i].connection: i for i in waiting}, time.monotonic()
            left = min(since[i] + patience[i] for i in waiting) - spent
            ready = wait(list(by_connection), max(0.0, min(POLL_SECONDS, left)))
            spent += min(time.monotonic() - begin, 2 * POLL_SECONDS)  # the machine may have slept meanwhile
            for connection in ready:
                index = by_connection[connection]
                reason = self._answer(index)
                if reason is None:
                    waiting.remove(index)
                else:
                    replace(index, reason)
            # What an environment has started may hold the pipe of a process that is dead, so its end is looked for too.
            dead = [index for index in waiting if not ready and self._processes[index].popen.poll() is not None]
            for index in dead:
                replace(index, f"died ({_ending(self._processes[index].popen.returncode)})")
            if not ready and not dead:
                for index in [i for i in waiting if spent - since[i] >= patience[i]]:
                    replace(index, f"gave no answer for {patience[index]:g} s")
        return True

    def _answer(self, index: int) -> str | None:
        """Reads what a process says; why it is lost, if it is."""
        try:
            message = self._processes[index].connection.recv_bytes()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return f"died ({_ending(self._processes[index].popen.wait(CLOSE_SECONDS))})"
            return "closed its pipe"
        answer = json.loads(message) if message else []
        if isinstance(answer, dict):
            return f"failed ({answer.get('usage') or answer.get('failed')})"
        for env, text in answer:
            self._count(f"environment {env}: {text}", 1)
        return None

    def _replace(self, index: int, reason: str) -> None:
        setup = self._setups[index]
        last = setup.first + setup.count - 1
        which = f"environment {last}" if setup.count == 1 else f"environments {setup.first} to {last}"
        self._processes[index].end()
        self._count(f"worker {index} ({which}) {reason}", 1)
        self._processes[index] = self._begin(setup)
        self._tell(self._processes[index], self._seeds_of(setup, self.restarts))

    def _count(self, text: str, lost: int) -> None:
        now = time.monotonic()
        self.restarts += lost
        self._lost.extend([now] * lost)
        while now - self._lost[0] > RESTART_SECONDS:
            self._lost.popleft()
        if len(self._lost) > self._max_restarts:
            raise EnvironmentsLostError(
                f"{len(self._lost)} environments were lost within an hour (max_restarts {self._max_restarts}); the "
                f"last: {text}"
            )
        self._say(f"warning: {text}; it begins a new episode, and the one before is cut")

    def close(self) -> None:
        """As `HostEnvs.close`."""
        for process in self._processes:
            process.connection.close()
        for process in self._processes:
            process.end(CLOSE_SECONDS)
        self._file.close()
