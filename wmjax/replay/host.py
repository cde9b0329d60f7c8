"""Replay in host memory or on disk, for environments that run there; samples as `replay.device` does, bit for bit.

Where a batch comes from is decided by the device replay itself, which keeps the flags of every record and counts of
windows, and nothing else, on the CPU. The records lie in blocks of consecutive rows. A block that is complete is
written once to an immutable file (`replay.chunks`); a checkpoint names these files and holds what may still change
(`Saved`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from wmjax.replay import chunks
from wmjax.replay import device as replays
from wmjax.replay.device import Index, Record, Replay
from wmjax.types import Array, PyTree, RunError, Sampling, TimeStep, Trajectory, UsageError

CHUNK_BYTES = 16 * 2**20  # of a block, about
MAPPED = 64  # files that are mapped at once; each keeps a descriptor, of which systems give 256 or more
UNWRITTEN = 8  # blocks that may wait for their files where replay is read from these

_add = jax.jit(replays.add, donate_argnums=0)
_sample = jax.jit(replays.sample, static_argnums=(2, 3), donate_argnums=0)


class Shares(NamedTuple):
    """Parts of the environments, as many in each, that as many parts of every batch come from: one for each device.

    As in the device loop, in which every device has a replay of its own.
    """

    here: int = 1  # in this replay
    of: int = 1  # in all; where it is one, nothing is shared
    first: int = 0  # the number of the first that is here


ALONE = Shares()


class Saved(NamedTuple):
    """What a checkpoint holds of a replay. Leaves are NumPy arrays, or JAX arrays on the CPU."""

    ring: Replay  # flags, cursors and counts
    latent: PyTree  # [rows, num_envs, ...]
    head: dict[str, np.ndarray]  # [block, num_envs, ...], the block that is being written; zeros if none is
    digests: np.ndarray  # uint8 [blocks, 32], of the files of complete blocks; zeros where a block is not complete


def cpu() -> jax.Device:
    """The device that decides where batches come from."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.local_devices()[0]


def tree_bytes(tree: PyTree) -> int:
    """Of all leaves, arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


Block = dict[str, np.ndarray]  # the part of records that never changes, by name, `[rows, num_envs, ...]`


def _flags(step: TimeStep) -> Record:
    """The part of records that the device replay keeps."""
    return Record(step._replace(obs={}, reward=()), (), ())


def _data(records: Record) -> Block:
    """The part of records that lies in blocks."""
    obs = {f"obs/{name}": value for name, value in records.step.obs.items()}
    return obs | {"reward": records.step.reward, "action": records.action}


def _record(flags: TimeStep, data: Block, latent: PyTree) -> Record:
    """What `_flags` and `_data` are parts of."""
    obs = {name.removeprefix("obs/"): value for name, value in data.items() if name.startswith("obs/")}
    return Record(flags._replace(obs=obs, reward=data["reward"]), data["action"], latent)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(np.array, tree)


def _ring(example: Record, num_envs: int, capacity: int, samplings: tuple[Sampling, ...]) -> Replay:
    """The device replay that decides where batches come from."""
    return replays.init(_flags(example.step), num_envs, capacity, samplings)


def env_axes(saved: Saved) -> Saved:
    """The axis of environments of every leaf, an int; -1 where there is none."""
    axis = lambda tree, number: jax.tree.map(lambda _: number, tree)
    return Saved(replays.env_axes(saved.ring), axis(saved.latent, 1), axis(saved.head, 1), -1)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sample_shares(
    ring: Replay, key: Array, shares: Shares, sampling: Sampling, batch_size: int
) -> tuple[Array, Trajectory, Index]:
    """As `replay.device.sample` of each share, side by side: the cursor, `[T, batch_size]` flags and where they lie."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, shares.first + np.arange(shares.here))
    axes = replays.env_axes(ring)
    split = lambda x, axis: x if axis < 0 else x.reshape(*x.shape[:axis], shares.here, -1, *x.shape[axis + 1 :])
    of_shares = jax.tree.map(lambda axis: None if axis < 0 else axis, axes)

    def draw(ring: Replay, key: Array) -> tuple:
        ring, flags, index = replays.sample(ring, key, sampling, batch_size // shares.here)
        return ring.cursor, flags, index

    found = jax.vmap(draw, (of_shares, 0), (0, 1, 1))(jax.tree.map(split, ring, axes), keys)
    cursor, flags, (row, env) = found  # cursors move alike
    env = env + (ring.data.step.is_first.shape[1] // shares.here * np.arange(shares.here))[:, None]
    joined = lambda x: x.reshape(len(x), batch_size)
    return cursor[0], jax.tree.map(joined, flags), (joined(row), joined(env))


class Sizes(NamedTuple):
    """What a replay takes when it is full."""

    block: int  # rows of a block
    memory_bytes: int  # with flags, and the copy of latents and of one block that is made to save them
    flags_bytes: int  # and counts of windows
    disk_bytes: int  # of its files, and of the latents in two checkpoints and a third that is being written


def sizes(
    example: Record,
    num_envs: int,
    capacity: int,
    samplings: tuple[Sampling, ...] = (),
    *,
    memory_map: bool = False,
    replays_saved: int = 1,
) -> Sizes:
    """From what `HostReplay` takes; nothing is allocated."""
    rows, row_bytes = capacity // num_envs, tree_bytes(_data(example))
    block = max(1, min(rows, CHUNK_BYTES // (row_bytes * replays_saved)))
    resident = -(-rows // block) * block
    resident = min(resident, (UNWRITTEN + 1) * block) if memory_map else resident
    flags = tree_bytes(jax.eval_shape(lambda: _ring(example, num_envs, capacity, samplings)))
    latent = rows * tree_bytes(example.latent)
    memory = (resident + block) * row_bytes + 2 * latent + flags
    return Sizes(block, memory, flags, rows * row_bytes + 3 * latent)


class HostReplay:
    """A ring buffer of records `[rows, num_envs, ...]`, with the semantics of `replay.device`.

    Args:
      example: one time step of all environments, arrays or `jax.ShapeDtypeStruct`s `[num_envs, ...]`.
      num_envs: environments that write to it.
      capacity: records in all; `capacity // num_envs` rows are kept.
      samplings: all that it will be sampled by; those that episodes do not matter to may be left out.
      folder: where complete blocks are written; None for nowhere, and then nothing can be saved.
      memory_map: read complete blocks from their files instead of keeping them in memory.
      warn: is told what goes wrong with a file.
      shares: parts of the environments that parts of batches come from.
      replays_saved: how many of as many environments are saved side by side; their blocks have as many rows.
    """

    def __init__(
        self,
        example: Record,
        num_envs: int,
        capacity: int,
        samplings: tuple[Sampling, ...] = (),
        *,
        folder: Path | None = None,
        memory_map: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        shares: Shares = ALONE,
        replays_saved: int = 1,
    ) -> None:
        if memory_map and folder is None:
            raise UsageError("memory_map: needs a folder to write to")
        self.num_envs, self._folder, self._memory_map, self._warn = num_envs, folder, memory_map, warn
        self.rows, self._shares = capacity // num_envs, shares
        self._length = sizes(example, num_envs, capacity, samplings, replays_saved=replays_saved).block
        self._row = _data(example)  # of a block, as shapes
        self.latent = self._zeros(example.latent, self.rows)
        with jax.default_device(cpu()):
            self.ring = jax.device_put(_ring(example, num_envs, capacity, samplings), cpu())
        count = -(-self.rows // self._length)
        self._blocks: list[Block | None] = [None] * count  # those in memory
        self._mapped = lru_cache(MAPPED)(lambda digest: chunks.mapped(folder, digest))
        self._digests = np.zeros((count, 32), np.uint8)
        self._added = 0
        self._pool = ThreadPoolExecutor(1, "replay")
        self._writing: dict[int, Future] = {}

    @staticmethod
    def _zeros(tree: PyTree, *lead: int) -> PyTree:
        return jax.tree.map(lambda x: np.zeros((*lead, *x.shape), x.dtype), tree)

    # -----------------------------------------------------------------------------------------------------------------
    # Adding

    def add(self, records: Record) -> None:
        """Appends rows `[steps, num_envs, ...]` and overwrites the oldest, as `replay.device.add`.

        Raises `RunError` where replay is read from files and too many of these could not be written.
        """
        steps, data, done = records.action.shape[0], _data(records), 0
        for name, x in self._row.items():  # plain comparisons, for they are made at every step
            if (data[name].shape, data[name].dtype) != ((steps, *x.shape), x.dtype):
                given = f"{data[name].dtype} {list(data[name].shape)}"
                raise AssertionError(f"{name}: {given} where {x.dtype} {[steps, *x.shape]} is kept")
        self.ring = _add(self.ring, jax.device_put(_flags(records.step), cpu()))
        row = self.next_rows(steps)
        for stored, new in zip(jax.tree.leaves(self.latent), jax.tree.leaves(records.latent), strict=True):
            stored[row] = new
        while done < steps:
            number, offset = divmod((self._added + done) % self.rows, self._length)
            size = min(steps - done, self._size_of(number) - offset)
            block = self._open(number)
            for name, value in data.items():
                block[name][offset : offset + size] = value[done : done + size]
            done += size
            if offset + size == self._size_of(number):
                self._close(number)
        self._added += steps
        self._settle(wait=self._memory_map and len(self._writing) >= UNWRITTEN // 2)
        if self._memory_map and len(self._unwritten()) > UNWRITTEN // 2:
            raise RunError(
                f"replay in {self._folder}: {len(self._unwritten())} chunks could not be written, and with memory_map "
                "there is no more memory to keep them in; the run may be resumed when there is room on the disk"
            )

    def next_rows(self, steps: int) -> np.ndarray:
        """Where the next rows go, as in the first part of an `Index`."""
        return (self._added + np.arange(steps)) % self.rows

    def _size_of(self, number: int) -> int:
        """Rows of a block; the last may be shorter."""
        return min(self._length, self.rows - number * self._length)

    def _block(self, number: int) -> Block | None:
        """A block to read from, in memory or in its file; None if nothing was written to it."""
        if self._blocks[number] is not None or not self._digests[number].any():
            return self._blocks[number]
        return self._mapped(self._digests[number].tobytes())

    def _unwritten(self) -> list[int]:
        """Complete blocks that have no file, and none on its way."""
        head = self._added % self.rows // self._length
        there = (n for n, block in enumerate(self._blocks) if block is not None and not self._digests[n].any())
        return [number for number in there if number != head and number not in self._writing]

    def _open(self, number: int) -> Block:
        """A block that may be written to."""
        if number in self._writing:
            self._settle(wait=True)
        block = self._block(number)
        if block is None:
            block = self._zeros(self._row, self._length)
        elif block is not self._blocks[number]:
            block = _copy(block)
            self._mapped.cache_clear()  # a file that is mapped takes room even when it is removed
        self._blocks[number] = block
        self._digests[number] = 0
        return block

    def _close(self, number: int) -> None:
        """Has a complete block written, and one that could not be before."""
        if self._folder is not None:
            for one in {number, *self._unwritten()[:1]}:
                self._writing[one] = self._pool.submit(chunks.write, self._folder, self._blocks[one])

    def _settle(self, wait: bool) -> OSError | None:
        """Takes note of the files that are written by now, or waits for all; what went wrong last, if anything."""
        failure = None
        for number in [number for number, future in self._writing.items() if wait or future.done()]:
            try:
                digest = self._writing.pop(number).result()
            except OSError as error:
                failure = error
                self._warn(f"warning: replay in {self._folder}: a chunk could not be written ({error.strerror})")
                continue
            self._digests[number] = np.frombuffer(digest, np.uint8)
            if self._memory_map:
                self._blocks[number] = None
        return failure

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def can_sample(self, sampling: Sampling) -> bool:
        """As `replay.device.can_sample`."""
        return bool(replays.can_sample(self.ring, sampling))

    def draw(self, key: Array, sampling: Sampling, batch_size: int) -> tuple[Trajectory, Index]:
        """Decides where a batch comes from. The trajectory has flags and mask, but neither data nor latents."""
        key = jax.device_put(key, cpu())
        if self._shares.of == 1:
            self.ring, flags, index = _sample(self.ring, key, sampling, batch_size)
        else:
            cursor, flags, index = _sample_shares(self.ring, key, self._shares, sampling, batch_size)
            self.ring = self.ring._replace(cursor=cursor)
        return jax.tree.map(np.asarray, (flags, index))

    def gather(self, flags: Trajectory, index: Index) -> Trajectory:
        """The batch that `draw` decided on, without latents."""
        step, action, _ = _record(flags.step, self._gather(index, self._block), ())
        return flags._replace(step=step, action=action)

    def _gather(self, index: Index, block_of: Callable[[int], Block | None]) -> Block:
        """What lies in blocks at an index, by name."""
        row, env = index
        number, offset = np.divmod(row, self._length)
        found = {name: np.empty((*row.shape, *x.shape[1:]), x.dtype) for name, x in self._row.items()}
        for one in np.unique(number):
            here, block = number == one, block_of(one)
            for name, values in found.items():
                values[here] = 0 if block is None else block[name][offset[here], env[here]]
        return found

    def latents(self, index: Index) -> PyTree:
        """The stored latents of a batch, `[T, B, ...]`."""
        return jax.tree.map(lambda x: x[index], self.latent)

    def sample(self, key: Array, sampling: Sampling, batch_size: int) -> tuple[Trajectory, Index]:
        """As `replay.device.sample`; the cursor moves in place."""
        flags, index = self.draw(key, sampling, batch_size)
        return self.gather(flags, index)._replace(latent=self.latents(index)), index

    def write(self, index: Index, latent: PyTree) -> None:
        """As `replay.device.write`, in place."""
        replays.check_latent(self.latent, index, latent)
        for stored, new in zip(jax.tree.leaves(self.latent), jax.tree.leaves(latent), strict=True):
            new = np.asarray(new)
            row, env = (x[x.shape[0] - new.shape[0] :] for x in index)
            stored[row, env] = new.astype(stored.dtype)  # NumPy keeps the last of two writes to one place

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def template(self) -> Saved:
        """Shapes and dtypes of what `saved` gives, and that it is to stay on the CPU."""
        place = jax.sharding.SingleDeviceSharding(cpu())
        shaped = lambda x, *lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=place)
        head = {name: shaped(x, self._length) for name, x in self._row.items()}
        return jax.tree.map(shaped, Saved(self.ring, self.latent, (), self._digests))._replace(head=head)

    def digests(self) -> set[bytes]:
        """Of the files that hold what is in replay now."""
        return {digest.tobytes() for digest in self._digests if digest.any()}

    def saved(self) -> Saved:
        """What a checkpoint is to hold, once the files that it names are written. Raises `OSError` if one cannot be."""
        self._settle(wait=True)
        for number in self._unwritten():  # it could not be written when it was complete: once more
            if number not in self._writing:
                self._close(number)
        failure = self._settle(wait=True)
        head = self._added % self.rows // self._length
        if failure is not None:
            raise failure
        block = self._blocks[head] if not self._digests[head].any() else None
        block = self._zeros(self._row, self._length) if block is None else block
        ring = self.ring._replace(cursor=self.ring.cursor * self._shares.of)  # of all shares, as if it was one
        return Saved(ring, self.latent, block, self._digests.copy())

    def skip_online(self, samplings: tuple[Sampling, ...]) -> None:
        """Has an online queue give nothing of what is in replay now."""
        cursor = replays.read_all(samplings, self.rows, self.num_envs // self._shares.here)
        self.ring = self.ring._replace(cursor=jax.device_put(np.int32(cursor), cpu()))

    def read(self, saved: Saved, first: int = 0, of: int | None = None) -> list[int]:
        """Goes on from what `saved` gave once the blocks that are returned are left out: their files are lost.

        Args:
          saved: of as many environments as this replay has; but files are of all environments of the run.
          first, of: which is the first of them, and how many there are in the run; by default these are all.

        Raises `RunError` where a file of its own cannot be written, which it is read from.
        """
        ring = saved.ring._replace(cursor=np.int32(saved.ring.cursor) // np.int32(self._shares.of))
        self.ring, self.latent = jax.device_put(ring, cpu()), _copy(saved.latent)
        self._digests, self._added = np.zeros_like(saved.digests), int(saved.ring.added)
        self._blocks = [None] * len(self._digests)
        head, lost = self._added % self.rows // self._length, []
        kept = {name: ((self._length, *x.shape), x.dtype) for name, x in self._row.items()}
        wanted = chunks.Range(first, first + self.num_envs, of or self.num_envs)
        for number, row in enumerate(np.asarray(saved.digests)):
            if not row.any():
                if number == head:
                    self._blocks[number] = _copy(saved.head)
                continue
            try:
                found, digest = chunks.columns(self._folder, row.tobytes(), wanted)
            except (OSError, ValueError):
                found = {}
            if {name: (x.shape, x.dtype) for name, x in found.items()} != kept:
                lost.append(number)
                continue
            if digest is None and self._memory_map:
                try:
                    digest = chunks.write(self._folder, found)
                except OSError as error:
                    words = f"a chunk could not be written ({error.strerror}), and with memory_map it is needed"
                    raise RunError(f"replay in {self._folder}: {words}") from None
            if digest is not None:
                self._digests[number] = np.frombuffer(digest, np.uint8)
            if not self._memory_map:
                self._blocks[number] = _copy(found)
        return lost

    def leave_out(self, lost: list[int], of: int | None = None) -> None:
        """Closes the gaps of lost blocks; the record after a gap begins an episode, so that the one before is cut.

        Of so many environments records are lost, by default of those that are here; that is said.
        """
        oldest = self._added - min(self._added, self.rows)
        numbers = np.arange(oldest, self._added)
        numbers = numbers[~np.isin(numbers % self.rows // self._length, lost)]
        dropped = min(self._added, self.rows) - len(numbers)
        self._warn(
            f"warning: replay in {self._folder}: {len(lost)} of {len(self._digests)} chunks are torn or missing; the "
            f"{dropped * (of or self.num_envs)} records in them are left out"
        )
        flags, latent = jax.tree.map(np.asarray, self.ring.data.step), self.latent
        blocks = [None if number in lost else self._block(number) for number in range(len(self._blocks))]
        self.ring = jax.device_put(self._zeros(self.ring), cpu())
        self.latent, self._digests = self._zeros((latent, self._digests))
        self._blocks, self._added = [None] * len(blocks), 0
        ends = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // self._length) > 0)) + 1
        for piece in np.split(numbers, ends):
            if len(piece):
                index = tuple(np.broadcast_arrays(piece[:, None] % self.rows, np.arange(self.num_envs)))
                step, stored = jax.tree.map(lambda x, index=index: x[index], (flags, latent))
                step.is_first[0] |= piece[0] > oldest and piece[0] - 1 not in numbers
                self.add(_record(step, self._gather(index, blocks.__getitem__), stored))

    def close(self) -> None:
        """Waits for files that are being written."""
        self._settle(wait=True)
        self._pool.shutdown()
