"""Replay in host memory or on disk, for environments that run there; samples as `replay.device` does, bit for bit.

Where a batch comes from is decided by the device replay itself, which keeps the flags of every record, and nothing
else, on the CPU. The records lie in blocks of consecutive rows. A block that is complete is written once to an
immutable file (`replay.chunks`); a checkpoint names these files and holds what may still change (`Saved`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

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


class Saved(NamedTuple):
    """What a checkpoint holds of a replay. Leaves are NumPy arrays, or JAX arrays on the CPU."""

    ring: Replay  # flags and cursors
    latent: PyTree  # [rows, num_envs, ...]
    head: dict[str, np.ndarray]  # [block, num_envs, ...], the block that is being written; zeros if none is
    digests: np.ndarray  # uint8 [blocks, 32], of the files of complete blocks; zeros where a block is not complete


def cpu() -> jax.Device:
    """The device that decides where batches come from."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.local_devices()[0]


def _flags(step: TimeStep, lead: tuple[int, ...]) -> Record:
    """The part of records that the device replay keeps."""
    return Record(step._replace(obs={}, reward=()), np.zeros((*lead, 0), np.float32), ())


def _data(records: Record) -> dict[str, Any]:
    """The part of records that never changes, by name."""
    obs = {f"obs/{name}": value for name, value in records.step.obs.items()}
    return obs | {"reward": records.step.reward, "action": records.action}


class Sizes(NamedTuple):
    """What a replay takes when it is full."""

    block: int  # rows of a block
    memory_bytes: int  # with flags, and the copy of latents and of one block that is made to save them
    flags_bytes: int
    disk_bytes: int  # of its files, and of the latents in two checkpoints and a third that is being written


def sizes(
    example: Record, num_envs: int, capacity: int, *, memory_map: bool = False, chunk_bytes: int | None = None
) -> Sizes:
    """From what `HostReplay` takes; nothing is allocated."""
    bytes_of = lambda tree: sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    shapes = jax.eval_shape(lambda tree: tree, Record(*example))
    rows, row_bytes = capacity // num_envs, bytes_of(_data(shapes))
    block = max(1, min(rows, (chunk_bytes or CHUNK_BYTES) // row_bytes))
    resident = -(-rows // block) * block
    resident = min(resident, (UNWRITTEN + 1) * block) if memory_map else resident
    latent = rows * bytes_of(shapes.latent)
    flags = rows * bytes_of(shapes.step._replace(obs={}, reward=()))
    memory = (resident + block) * row_bytes + 2 * latent + flags
    return Sizes(block, memory, flags, rows * row_bytes + 3 * latent)


class HostReplay:
    """A ring buffer of records `[rows, num_envs, ...]`, with the semantics of `replay.device`.

    Args:
      example: one time step of all environments, arrays or `jax.ShapeDtypeStruct`s `[num_envs, ...]`.
      num_envs: environments that write to it.
      capacity: records in all; `capacity // num_envs` rows are kept.
      folder: where complete blocks are written; None for nowhere, and then nothing can be saved.
      memory_map: read complete blocks from their files instead of keeping them in memory.
      warn: is told what goes wrong with a file.
      chunk_bytes: of a block, about; `CHUNK_BYTES` by default.
    """

    def __init__(
        self,
        example: Record,
        num_envs: int,
        capacity: int,
        *,
        folder: Path | None = None,
        memory_map: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        chunk_bytes: int | None = None,
    ) -> None:
        if memory_map and folder is None:
            raise UsageError("memory_map: needs a folder to write to")
        self.num_envs, self._folder, self._memory_map, self._warn = num_envs, folder, memory_map, warn
        found = sizes(example, num_envs, capacity, memory_map=memory_map, chunk_bytes=chunk_bytes)
        self.memory_bytes, self._length = found.memory_bytes, found.block
        shapes = jax.eval_shape(lambda tree: tree, Record(*example))
        self._shapes = {name: (x.shape, np.dtype(x.dtype)) for name, x in _data(shapes).items()}
        self.rows = capacity // num_envs
        self.latent = jax.tree.map(lambda x: np.zeros((self.rows, *x.shape), x.dtype), shapes.latent)
        with jax.default_device(cpu()):
            flags = shapes.step._replace(obs={}, reward=())
            ring = replays.init(Record(flags, jax.ShapeDtypeStruct((num_envs, 0), "float32"), ()), num_envs, capacity)
            self.ring = jax.device_put(ring, cpu())
        count = -(-self.rows // self._length)
        self._blocks: list[dict[str, np.ndarray] | None] = [None] * count  # those in memory
        self._mapped = lru_cache(MAPPED)(lambda digest: chunks.mapped(folder, digest))
        self._digests = np.zeros((count, 32), np.uint8)
        self._added = 0
        self._pool = ThreadPoolExecutor(1, "replay")
        self._writing: dict[int, Future] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # Adding

    def add(self, records: Record) -> None:
        """Appends rows `[steps, num_envs, ...]` and overwrites the oldest, as `replay.device.add`.

        Raises `RunError` where replay is read from files and too many of these could not be written.
        """
        records = Record(*records)
        steps = records.action.shape[0]
        flags = jax.device_put(_flags(records.step, records.action.shape[:2]), cpu())
        self.ring = _add(self.ring, flags)
        row = self.next_rows(steps)
        for stored, new in zip(jax.tree.leaves(self.latent), jax.tree.leaves(records.latent), strict=True):
            stored[row] = new
        data, done = _data(records), 0
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

    def _block(self, number: int) -> dict[str, np.ndarray] | None:
        """A block to read from, in memory or in its file; None if nothing was written to it."""
        if self._blocks[number] is not None or not self._digests[number].any():
            return self._blocks[number]
        return self._mapped(self._digests[number].tobytes())

    def _unwritten(self) -> list[int]:
        """Complete blocks that have no file, and none on its way."""
        head = self._added % self.rows // self._length
        there = (n for n, block in enumerate(self._blocks) if block is not None and not self._digests[n].any())
        return [number for number in there if number != head and number not in self._writing]

    def _open(self, number: int) -> dict[str, np.ndarray]:
        """A block that may be written to."""
        if number in self._writing:
            self._settle(wait=True)
        block = self._block(number)
        if block is None:
            block = {name: np.zeros((self._length, *shape), dtype) for name, (shape, dtype) in self._shapes.items()}
        elif block is not self._blocks[number]:
            block = {name: np.array(value) for name, value in block.items()}
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
        self.ring, flags, index = _sample(self.ring, jax.device_put(key, cpu()), sampling, batch_size)
        return jax.tree.map(np.asarray, (flags, index))

    def gather(self, flags: Trajectory, index: Index) -> Trajectory:
        """The batch that `draw` decided on, without latents."""
        (row, env), found = index, {}
        number, offset = np.divmod(row, self._length)
        for name, (shape, dtype) in self._shapes.items():
            found[name] = np.empty((*row.shape, *shape[1:]), dtype)
        for one in np.unique(number):
            here, block = number == one, self._block(one)
            for name, values in found.items():
                values[here] = 0 if block is None else block[name][offset[here], env[here]]
        obs = {name.removeprefix("obs/"): value for name, value in found.items() if name.startswith("obs/")}
        step = flags.step._replace(obs=obs, reward=found["reward"])
        return flags._replace(step=step, action=found["action"])

    def latents(self, index: Index) -> PyTree:
        """The stored latents of a batch, `[T, B, ...]`."""
        return jax.tree.map(lambda x: x[index], self.latent)

    def sample(self, key: Array, sampling: Sampling, batch_size: int) -> tuple[Trajectory, Index]:
        """As `replay.device.sample`; the cursor moves in place."""
        flags, index = self.draw(key, sampling, batch_size)
        return self.gather(flags, index)._replace(latent=self.latents(index)), index

    def write(self, index: Index, latent: PyTree) -> None:
        """As `replay.device.write`, in place."""
        for stored, new in zip(jax.tree.leaves(self.latent), jax.tree.leaves(latent), strict=True):
            new = np.asarray(new)
            row, env = (x[x.shape[0] - new.shape[0] :] for x in index)
            stored[row, env] = new.astype(stored.dtype)  # NumPy keeps the last of two writes to one place

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def template(self) -> Saved:
        """Shapes and dtypes of what `saved` gives, and that it is to stay on the CPU."""
        head = {name: (self._length, *shape) for name, (shape, _) in self._shapes.items()}
        head = {name: jax.ShapeDtypeStruct(shape, self._shapes[name][1]) for name, shape in head.items()}
        digests = jax.ShapeDtypeStruct(self._digests.shape, "uint8")
        saved = Saved(*jax.eval_shape(lambda tree: tree, (self.ring, self.latent)), head, digests)
        place = jax.sharding.SingleDeviceSharding(cpu())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved)

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
        if block is None:
            block = {name: np.zeros((self._length, *shape), dtype) for name, (shape, dtype) in self._shapes.items()}
        return Saved(self.ring, self.latent, block, self._digests.copy())

    def load(self, saved: Saved) -> None:
        """Goes on from what `saved` gave. Files that are torn or missing are left out, and that is said."""
        latent = jax.tree.map(lambda x: np.array(x), saved.latent)
        ring = jax.device_put(saved.ring, cpu())
        digests, added = np.array(saved.digests), int(ring.added)
        head = added % self.rows // self._length
        blocks: list[dict[str, np.ndarray] | None] = [None] * len(self._blocks)
        lost = []
        if self._folder is not None:
            chunks.tidy(self._folder)
        for number, row in enumerate(digests):
            if not row.any():
                if number == head:
                    blocks[number] = {name: np.array(value) for name, value in saved.head.items()}
            elif (found := self._read(row.tobytes())) is None:
                lost.append(number)
            elif not self._memory_map:
                blocks[number] = {name: np.array(value) for name, value in found.items()}
        self.ring, self.latent, self._blocks, self._digests, self._added = ring, latent, blocks, digests, added
        if lost:
            self._leave_out(lost)

    def _read(self, digest: bytes) -> dict[str, np.ndarray] | None:
        """A block in its file; None where that is torn or missing, or holds other arrays."""
        if not chunks.is_whole(self._folder, digest):
            return None
        try:
            found = chunks.mapped(self._folder, digest)
        except (OSError, ValueError):
            return None
        wanted = {name: ((self._length, *shape), dtype) for name, (shape, dtype) in self._shapes.items()}
        return found if {name: (x.shape, x.dtype) for name, x in found.items()} == wanted else None

    def _leave_out(self, lost: list[int]) -> None:
        """Closes the gaps of lost blocks; the record after a gap begins an episode, so that the one before is cut."""
        oldest = self._added - min(self._added, self.rows)
        numbers = np.arange(oldest, self._added)
        numbers = numbers[~np.isin(numbers % self.rows // self._length, lost)]
        dropped = min(self._added, self.rows) - len(numbers)
        self._warn(
            f"warning: replay in {self._folder}: {len(lost)} of {len(self._digests)} chunks are torn or missing; the "
            f"{dropped * self.num_envs} records in them are left out"
        )
        before, flags, latent = self.ring, jax.tree.map(np.asarray, self.ring.data.step), self.latent
        blocks = [None if number in lost else self._block(number) for number in range(len(self._blocks))]
        self.ring = jax.device_put(jax.tree.map(np.zeros_like, before), cpu())
        self.latent = jax.tree.map(np.zeros_like, latent)
        self._blocks, self._digests, self._added = [None] * len(blocks), np.zeros_like(self._digests), 0
        ends = np.flatnonzero((np.diff(numbers) > 1) | (np.diff(numbers // self._length) > 0)) + 1
        for piece in np.split(numbers, ends):
            if not len(piece):
                continue
            row = piece % self.rows
            number, offset = np.divmod(row, self._length)
            step = jax.tree.map(lambda x, row=row: x[row].copy(), flags)
            if piece[0] > oldest and piece[0] - 1 not in numbers:
                step.is_first[0] = True
            data = {name: np.empty((len(row), *shape), dtype) for name, (shape, dtype) in self._shapes.items()}
            for one in np.unique(number):
                for name, value in data.items():
                    value[number == one] = blocks[one][name][offset[number == one]]
            obs = {name.removeprefix("obs/"): value for name, value in data.items() if name.startswith("obs/")}
            stored = jax.tree.map(lambda x, row=row: x[row], latent)
            self.add(Record(step._replace(obs=obs, reward=data["reward"]), data["action"], stored))

    def close(self) -> None:
        """Waits for files that are being written."""
        self._settle(wait=True)
        self._pool.shutdown()
