"""The updates of the host loop: batches are made ahead of time, and the device never waits for the next one."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import distributed
from wmjax.loops.device import Skips
from wmjax.loops.parallel import Copies
from wmjax.replay.device import Index
from wmjax.replay.host import HostReplay
from wmjax.types import AgentState, Array, Metrics, PyTree, Stage, Trajectory

AHEAD = 2  # batches that are made before they are needed, and updates that are given to the device before they are due
SLOW_SECONDS = 1.0  # of an update; slower ones are done one at a time, for a run that is told to stop waits for them


class Clock:
    """Seconds that the loop waited, by what for."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = dict.fromkeys(("envs", "device", "replay"), 0.0)
        self.ahead = AHEAD  # updates that the device may be given before they are due

    def wait(self, what: str, call: Callable[[], Any]) -> Any:
        """Calls, and counts the time it takes."""
        begin = time.perf_counter()
        result = call()
        self.waited[what] += time.perf_counter() - begin
        return result

    def shares(self) -> dict[str, float]:
        """Of the time so far, in [0, 1]."""
        whole = max(time.perf_counter() - self.start, 1e-9)
        return {f"time/{what}": seconds / whole for what, seconds in self.waited.items()}


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def accumulate(sums: dict[str, Metrics], more: dict[str, Metrics]) -> dict[str, Metrics]:
    """The sums with more added to each."""
    return sums | {name: _add(sums[name], x) if name in sums else x for name, x in more.items()}


class Latents:
    """Latents in replay: those of an update are written when the device has them, or when a batch needs them."""

    def __init__(self, replay: HostReplay, copies: Copies) -> None:
        self._replay, self._copies = replay, copies
        self._pending: deque[tuple[Index, PyTree]] = deque()

    def read(self, index: Index) -> PyTree:
        """The latents of a batch, as if all that was given to `write` had been written at once."""
        if not jax.tree.leaves(self._replay.latent):
            return self._replay.latent
        width = self._replay.num_envs
        places = lambda index: index[0] * width + index[1]
        if any(np.isin(places(index), places(other)).any() for other, _ in self._pending):
            self.flush()
        return self._replay.latents(index)

    def write(self, index: Index, latent: PyTree) -> None:
        """Takes latents that the device may still be computing."""
        self._pending.append((index, latent))
        if len(self._pending) > AHEAD:
            self._write_one()

    def _write_one(self) -> None:
        index, latent = self._pending.popleft()
        self._replay.write(index, self._copies.own_rows(latent))

    def make_way(self, steps: int) -> None:
        """Before so many rows are added: latents must not be written to records that replace those they are of."""
        row = self._replay.next_rows(steps)
        if any(np.isin(row, other).any() for (other, _), _ in self._pending):
            self.flush()

    def flush(self) -> None:
        """Waits for all of them."""
        while self._pending:
            self._write_one()


class Learner:
    """The updates of one iteration: does as many as it is told, the device some ahead of it.

    Batches are made on a thread of their own, `AHEAD` of them before they are asked for.

    Args:
      stage: brings the updates.
      programs: `device.apply_update` of each, compiled, with state and skips donated.
      keys: of each, `[repeats, 2]`.
      agent, skips: to begin with.
      replay, latents: where batches come from, and where their latents go to.
      pool: of that thread.
      clock, stop: as of the loop.
      copies: where the state is, and batches go.
    """

    def __init__(
        self, stage: Stage, programs, keys, agent: AgentState, skips: Skips, replay: HostReplay, latents: Latents,
        pool: ThreadPoolExecutor, clock: Clock, stop: Callable[[], bool], copies: Copies,
    ) -> None:  # fmt: skip
        self._updates, self._programs, self._replay, self._latents = stage.updates, programs, replay, latents
        self._pool, self._clock, self._stop, self._copies = pool, clock, stop, copies
        self._jobs = ((n, *keys[n][i]) for n, update in enumerate(stage.updates) for i in range(update.repeats))
        self._batches: deque[Future] = deque()
        self._unready: deque[Metrics] = deque()
        self.agent, self.skips = agent, skips
        self.sums: dict[str, Metrics] = {}
        self.total = sum(update.repeats for update in stage.updates)
        self._done = 0
        self.interrupted = False  # told to stop before all was done

    def start(self) -> None:
        """Begins to make batches; nothing may be added to replay from here on until `close`."""
        self._make(AHEAD)

    def _make(self, count: int) -> None:
        self._batches.extend(self._pool.submit(self._batch, *job) for job in itertools.islice(self._jobs, count))

    def _batch(self, number: int, key_sample: Array, key_learn: Array) -> tuple[int, Array, Trajectory, Index]:
        """For an update, its key and its batch without latents, on the device; and where that came from."""
        update = self._updates[number]
        flags, index = self._replay.draw(key_sample, update.sampling, update.batch_size // distributed.count())
        return number, *self._copies.share(key_learn, self._replay.gather(flags, index)), index

    def until(self, count: int) -> None:
        """Goes on until so many updates of this iteration are with the device; does nothing unless started."""
        while self._batches and self._done < count:
            if self._stop():
                self.interrupted = True
                return
            number, key, batch, index = self._clock.wait("replay", self._batches.popleft().result)
            self._make(1)
            latent = self._clock.wait("device", lambda index=index: self._latents.read(index))
            self.agent, self.skips, metrics, latent = self._programs[number](
                self.agent, self.skips, key, batch._replace(latent=self._copies.rows_of(latent))
            )
            metrics = self._copies.replica(metrics)
            if latent is not None:
                self._latents.write(index, latent)
            self.sums = accumulate(self.sums, {self._updates[number].name: metrics | {"made": np.float32(1)}})
            self._unready.append(metrics)
            while len(self._unready) > self._clock.ahead:
                begin = time.perf_counter()
                self._clock.wait("device", lambda: jax.block_until_ready(self._unready.popleft()))
                if time.perf_counter() - begin > SLOW_SECONDS:
                    self._clock.ahead = 0
            self._done += 1

    def close(self) -> None:
        """Waits for the batches that nobody asked for."""
        while self._batches:
            self._batches.popleft().result()
