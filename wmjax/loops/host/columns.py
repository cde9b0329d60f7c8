"""The environments of this process beside those of the other processes of a run: its columns of all that has some.

Each process steps environments of its own and has a replay of its own. A checkpoint holds the columns of all side by
side, so that it is the same however many processes there were. Only the files of replay are as they were written: a
checkpoint names one for every block, which lists the files that hold its columns.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax
import numpy as np

from wmjax import distributed
from wmjax.loops import shards
from wmjax.loops.device import RunState
from wmjax.ops import noise
from wmjax.replay import chunks
from wmjax.replay import host as replays
from wmjax.types import Array, PyTree

LIST_BYTES = 2**16  # of a file that lists others, at most; larger ones are not looked into


def env_axes(run: RunState) -> RunState:
    """The axis of environments of every leaf of a state as it is saved, an int; -1 where there is none."""
    axes = jax.tree.map(lambda _: -1, run)
    per_env = {name: jax.tree.map(lambda _: 0, getattr(run, name)) for name in ("carry", "episode")}
    return axes._replace(replay=replays.env_axes(run.replay), **per_env)


class Columns:
    """Of the environments of a run, as many as every other process has.

    Args:
      num_envs: in all; a multiple of the number of processes.
    """

    def __init__(self, num_envs: int) -> None:
        self._count, self._index, self.of = distributed.count(), distributed.index(), num_envs
        self.num_envs = num_envs // self._count  # here
        self.first = self._index * self.num_envs
        self.mine = slice(self.first, self.first + self.num_envs)

    def part(self, run: RunState) -> RunState:
        """A state, arrays or shapes, as it is saved and restored by all processes together."""
        if self._count == 1:
            return run
        held = lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x)
        part = lambda x, axis: x if axis < 0 else shards.Part(held(x), axis, self._index, self._count)
        return jax.tree.map(part, run, env_axes(run))

    def row_keys(self, key: Array, number: Array | int) -> Array:
        """`noise.row_keys` of `fold_in(key, number)` for the environments of this process."""
        return noise.row_keys(jax.random.fold_in(key, number), self.of)[self.mine]

    def whole_batch(self, batch: PyTree) -> PyTree:
        """The batch `[T, B, ...]` that all processes have the parts of, in each of them."""
        if self._count == 1:
            return batch
        return jax.tree.map(lambda x: shards.whole(shards.Part(x, 1, self._index, self._count)), batch)


def list_files(folder: Path, digests: np.ndarray, known: dict[bytes, bytes]) -> tuple[np.ndarray, set[bytes]]:
    """Has the first process write, for every block, which files hold its columns; all have to call.

    Args:
      folder: of replay.
      digests: uint8 `[blocks, 32]`, of the files of this process; zeros for a block that has none.
      known: by the digests of its files, the list that was written for a block, kept from call to call; of the first
        process.

    Returns:
      uint8 `[blocks, 32]`, of these lists, of one process of its own files; and all files that this stands for.

    Raises:
      OSError: one cannot be written.
    """
    if distributed.count() == 1:
        return digests, _rows(digests)
    told = distributed.exchange(digests.tobytes().hex())
    of_all = np.stack([np.frombuffer(bytes.fromhex(table), np.uint8).reshape(-1, 32) for table in told], 1)
    complete = of_all.any(-1).all(-1)  # [blocks]; of_all [blocks, processes, 32]
    table, lists, error = np.zeros_like(digests), {}, ""
    if distributed.leads():
        try:
            for number in np.flatnonzero(complete):
                files = of_all[number]
                digest = known.pop(files.tobytes(), None)
                if digest is None or not chunks.path_of(folder, digest).exists():
                    digest = chunks.write(folder, {chunks.PARTS: files})
                lists[files.tobytes()] = digest
                table[number] = np.frombuffer(digest, np.uint8)
            known.clear()  # of blocks that are not in replay any more
            known.update(lists)
        except OSError as failure:
            error = str(failure) or "a list of files could not be written"
    said = distributed.exchange([table.tobytes().hex(), error])[0]
    if said[1]:
        raise OSError(said[1])
    table = np.frombuffer(bytes.fromhex(said[0]), np.uint8).reshape(-1, 32).copy()
    return table, _rows(table) | _rows(of_all.reshape(-1, 32))


def _rows(digests: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in np.asarray(digests) if row.any()}


def files_of(folder: Path, digests: np.ndarray) -> set[bytes]:
    """The files of a table in a checkpoint, with those that they list, as far as that can be read."""
    found = _rows(digests)
    for digest in [*found]:
        with contextlib.suppress(OSError, ValueError):
            if chunks.path_of(folder, digest).stat().st_size <= LIST_BYTES:
                found.update(chunks.parts(folder, digest))
    return found


def keep_files(folder: Path, now: set[bytes], saved: set[bytes] | None) -> None:
    """Removes the files of replay that nothing needs; all have to call.

    Args:
      folder: of replay.
      now: those that this process needs.
      saved: those that checkpoints need, as the first process knows; None: it does not, and all are kept.

    Raises:
      OSError: in all processes, where one cannot be removed.
    """
    needed = [bytes.fromhex(x) for each in distributed.exchange([x.hex() for x in now]) for x in each]
    error = ""
    if distributed.leads() and saved is not None:
        try:
            chunks.keep(folder, saved.union(needed))
        except OSError as failure:
            error = str(failure) or "files that nothing needs could not be removed"
    if error := distributed.exchange(error)[0]:  # none of the others writes meanwhile
        raise OSError(error)


def lost_anywhere(lost: list[int]) -> list[int]:
    """Blocks that are lost in one process or another, so that all leave out the same; all have to call."""
    return sorted({number for each in distributed.exchange(lost) for number in each})
