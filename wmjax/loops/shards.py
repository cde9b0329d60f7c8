"""Arrays that several processes hold together: the blocks that this one saves, and what is made of blocks again."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from wmjax import files

PART = "part.json"
PART_BYTES = 2**26
SLICE_BYTES = 2**26  # that processes put together at once to hash what none of them has the whole of
POLL_SECONDS, PART_SECONDS = 0.05, 1800.0  # for the parts of other processes


class Block(NamedTuple):
    """A part of an array, apart from all others."""

    start: tuple[int, ...]  # of each axis
    array: np.ndarray

    def entry(self, part: int, name: str, sha256: str) -> dict[str, Any]:
        """What a manifest says of it: which process has saved it, under which name, and what it is."""
        return {
            "part": part, "name": name, "start": list(self.start), "shape": list(self.array.shape), "sha256": sha256
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """A leaf: the part that this process has of an array in host memory, beside those, as large, of other processes.

    In a template it says which part is wanted.
    """

    array: np.ndarray | jax.ShapeDtypeStruct
    axis: int
    index: int  # of this process
    count: int  # processes

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        size = self.array.shape
        return (*size[: self.axis], size[self.axis] * self.count, *size[self.axis + 1 :])

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it lies in all of it."""
        size = self.array.shape[self.axis]
        return (*[slice(None)] * self.axis, slice(self.index * size, (self.index + 1) * size))


class Team(NamedTuple):
    """Processes that save together, as one of them sees it."""

    index: int
    count: int
    token: str  # of this attempt at the run, in hex: what an earlier one left behind has another
    number: int = 0  # of the save in this attempt


ALONE = Team(0, 1, "")
PART_FOLDER = re.compile(r"part-([0-9]+)-([0-9a-f]*)-([0-9]+)")  # the process, and of its team the token and the number


def sha256(array: np.ndarray) -> str:
    """SHA-256, in hex, of the bytes of an array that is contiguous."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def is_sha256(value: Any) -> bool:
    """Whether a manifest's value is one."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_shared(leaf: Any) -> bool:
    """Whether no process has the whole of it."""
    if isinstance(leaf, Part):
        return True
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def whole(leaf: jax.Array | Part) -> np.ndarray:
    """What no process has the whole of, in host memory. All of them have to ask."""
    if isinstance(leaf, Part):
        return np.concatenate([*multihost_utils.process_allgather(leaf.array)], leaf.axis)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True), order="C")


def sha256_of(part: Part) -> str:
    """`sha256` of all of it, of which no more than a slice of rows is in memory. All processes have to ask."""
    if part.axis == 0:
        return sha256(whole(part))
    size, hasher = math.prod(part.shape[1:]) * part.dtype.itemsize, hashlib.sha256()
    rows = max(1, SLICE_BYTES // max(1, size))
    for i in range(0, part.shape[0], rows):
        piece = np.ascontiguousarray(whole(replace(part, array=part.array[i : i + rows])))
        hasher.update(piece.reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def placed(value: Any, sharding: Any) -> Any:
    """A key, or an array in host memory, where a sharding puts it; without one, on the default device.

    Of devices of several processes, each process brings what it has, without asking whether the others have the same.
    """
    if sharding is None or (sharding.is_fully_addressable and len(sharding.device_set) == 1):
        with jax.default_device(sharding and next(iter(sharding.device_set))):
            return jnp.array(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = placed(np.asarray(jax.random.key_data(value)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def own_blocks(leaf: jax.Array | Part) -> list[Block]:
    """Copies in host memory of the blocks that this process saves: each block is saved by one process."""
    if isinstance(leaf, Part):
        start = (*[0] * leaf.axis, leaf.place[-1].start, *[0] * (leaf.array.ndim - leaf.axis - 1))
        return [Block(start, np.array(leaf.array))]
    start = lambda index: tuple(axis.start or 0 for axis in index)
    return [Block(start(x.index), np.array(x.data)) for x in leaf.addressable_shards if x.replica_id == 0]


def fault(shape: Sequence[int], blocks: Any) -> str | None:
    """Why blocks, as a manifest says of them, do not make up an array of this shape, each element once; or None."""
    is_size = lambda n: type(n) is int and 0 <= n < 2**63
    sizes = lambda x: isinstance(x, list) and len(x) == len(shape) and all(map(is_size, x))
    for block in blocks if isinstance(blocks, list) else ():
        if not (isinstance(block, dict) and sizes(block.get("start")) and sizes(block.get("shape"))):
            return "blocks with a start and a shape"
        if not (is_size(block.get("part")) and isinstance(block.get("name"), str)):
            return "blocks with a part and a name"
        if not is_sha256(block.get("sha256")):
            return "blocks with 64 hexadecimal digits each"
    if not isinstance(blocks, list) or not blocks:
        return "a list of blocks"
    size = blocks[0]["shape"]
    tiled = 0 not in size and all(n % each == 0 for n, each in zip(shape, size, strict=True))
    starts = {tuple(block["start"]) for block in blocks}
    on_grid = tiled and all(
        block["shape"] == size
        and all(s % each == 0 and s < n for s, each, n in zip(block["start"], size, shape, strict=True))
        for block in blocks
    )
    if 0 in shape:  # there is nothing to make up
        return None
    whole = on_grid and len(starts) == len(blocks) == math.prod(shape) // math.prod(size)
    return None if whole else f"blocks that make up {tuple(shape)}"


def is_needed(block: dict[str, Any], leaf: Any) -> bool:
    """Whether this process needs a part of the block for a leaf of a template, as its sharding says, if it has one."""
    shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
    if sharding is None and not isinstance(leaf, Part):
        return True
    inside = lambda index: all(
        start < (axis.stop if axis.stop is not None else n) and (axis.start or 0) < start + size
        for axis, n, start, size in zip(index, shape, block["start"], block["shape"], strict=True)
    )
    if isinstance(leaf, Part):
        return inside((*leaf.place, *[slice(None)] * (len(shape) - leaf.axis - 1)))
    return any(map(inside, sharding.addressable_devices_indices_map(tuple(shape)).values()))


def file_of(place: Path, part: int) -> Path:
    """Where a step of a checkpoint has the blocks of a process."""
    return place / f"blocks-{part}.safetensors"


def put(array: np.ndarray, block: dict[str, Any], file: Path) -> None:
    """Reads a block into the array that it is of.

    Raises `OSError`, `ValueError` or `SafetensorError` where the file does not have it as it was saved.
    """
    shape, name = tuple(block["shape"]), block["name"]
    files.open_regular(file).close()
    with safetensors.safe_open(file, "np") as stored:
        found = stored.get_slice(name)
        if found.get_dtype() != "U8" or found.get_shape() != [math.prod(shape) * array.dtype.itemsize]:
            raise ValueError(f"{name!r} has not the size of {array.dtype} {shape}")
        values = stored.get_tensor(name)
    if sha256(values) != block["sha256"]:
        raise ValueError(f"{name!r} does not match its SHA-256")
    where = tuple(slice(s, s + n) for s, n in zip(block["start"], shape, strict=True))
    array[where] = values.view(array.dtype).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a checkpoint, each written by a process of its own into a folder that all of them see


def write(folder: Path, leaves: dict[str, Any], team: Team) -> dict[str, list[dict[str, Any]]]:
    """Writes the blocks in a snapshot to the file of this process. Returns what a manifest says of them, by leaf."""
    entries: dict[str, list[dict[str, Any]]] = {}
    arrays: dict[str, np.ndarray] = {}
    for path, (found, _) in leaves.items():
        if isinstance(found, np.ndarray):
            continue
        entries[path] = []
        for i, block in enumerate(found):
            name = f"{path}@{i}"
            arrays[name] = np.ascontiguousarray(block.array).reshape(-1).view(np.uint8)
            entries[path].append(block.entry(team.index, name, sha256(arrays[name])))
    if arrays:
        safetensors.numpy.save_file(arrays, file_of(folder, team.index))
    return entries


def hand_over(final: Path, leaves: dict[str, Any], team: Team) -> None:
    """Writes the blocks that this process has beside what is going to be `final`, for the first process to take."""
    folder = _part_folder(final, team, team.index)
    files.remove(folder)
    say = lambda **said: files.write(folder / PART, json.dumps(said).encode())
    try:
        folder.mkdir(parents=True)
        blocks = write(folder, leaves, team)
    except Exception as error:
        files.remove(file_of(folder, team.index))  # on a full disk, room for the next attempt
        say(error=str(error).partition("\n")[0][:200])
        raise
    say(blocks=blocks)


def take_over(final: Path, place: Path, team: Team, index: int) -> dict[str, list[dict[str, Any]]]:
    """Waits for the part of another process, and takes it to `place`: what a manifest says of its blocks.

    Raises `OSError` where that process could not write it.
    """
    folder, end = _part_folder(final, team, index), time.monotonic() + PART_SECONDS
    while time.monotonic() < end:
        try:
            said = files.parse_json(files.read(folder / PART, PART_BYTES))
        except (OSError, ValueError):
            time.sleep(POLL_SECONDS)
            continue
        if "error" in said:
            raise OSError(f"process {index} could not save its part: {said['error']}")
        file_of(folder, index).rename(file_of(place, index))
        files.remove(folder)
        return said["blocks"]
    raise OSError(f"process {index} has not saved its part in {PART_SECONDS:g} s")


def is_outdated(kind: str, team: Team) -> bool:
    """Whether a part, by what its folder's name ends with, is of an earlier attempt or save than a team's."""
    _, token, number = PART_FOLDER.fullmatch(kind).groups()
    return token != team.token or int(number) < team.number


def _part_folder(final: Path, team: Team, index: int) -> Path:
    """Of a process and a save: the other processes may be a save ahead of the first one."""
    return final.with_name(f".{final.name}.part-{index}-{team.token}-{team.number}")
