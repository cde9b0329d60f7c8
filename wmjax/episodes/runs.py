"""The replay of a run as data: what its newest whole checkpoint holds, and on the host the files that it names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from wmjax.episodes.format import FLAGS
from wmjax.episodes.sources import SETTINGS, Source
from wmjax.loops import checkpoint
from wmjax.replay import chunks
from wmjax.run_folder import CHECKPOINTS, REPLAY, read_description
from wmjax.types import UsageError

MAPPED = 64  # files of replay that are open at once


def open_run(place: Path) -> Source:
    """The replay of the run in a folder. Raises `UsageError` where it holds none."""
    try:
        description, folder = read_description(place), place / CHECKPOINTS
    except UsageError as error:
        raise UsageError(f"data: {error}") from None
    if description.get("data"):
        own = description["data"].get("path", "its folder")
        raise UsageError(f"data: the run {str(place)!r} was trained on data itself; give that, {own!r}")
    if checkpoint.latest(folder) is None:
        raise UsageError(f"data: {str(place)!r} has no checkpoint in {folder.name}/, and so no replay")
    failure = None
    for step in reversed(checkpoint.steps(folder)):
        try:
            shapes = checkpoint.shapes(folder, step)
            wanted = {path: x for path, x in shapes.items() if _wanted(path)}
            if "replay/added" not in wanted and "replay/ring/added" not in wanted:
                raise UsageError(f"data: the checkpoints of {str(place)!r} hold no replay; the run it is part of may")
            leaves = {path: np.asarray(x) for path, x in checkpoint.restore(folder, wanted, step).items()}
            break
        except checkpoint.CheckpointCorruptError as error:
            failure = failure or error
    else:
        raise UsageError(f"data: no checkpoint of {str(place)!r} is whole: {failure}")
    settings = {name: value for name in SETTINGS if (value := description.get(name)) is not None}
    on_host = "replay/ring/added" in leaves
    flags, others = ("ring/data/step", ("digests", "head/action", "head/reward")) if on_host else (
        "data/step", ("data/action", "data/step/reward")
    )  # fmt: skip
    for path in (*(f"{flags}/{name}" for name in FLAGS), *others):
        if f"replay/{path}" not in leaves:
            raise UsageError(f"data: the replay in the checkpoint of {str(place)!r} is not whole: {path} is missing")
    names, read = _on_host(place, leaves) if on_host else _on_device(leaves, description["seeds"])
    return Source(str(place), tuple(names), read, settings)


def _wanted(path: str) -> bool:
    """Whether a leaf is of the records themselves."""
    parts = ("data/step/", "data/action", "added", "ring/data/step/is_", "ring/added", "head/", "digests")
    return path.startswith(tuple(f"replay/{part}" for part in parts))


def _as_taken(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bytes]:
    """Records with the actions that the environment took, which are clipped where an agent's noise goes beyond."""
    return arrays | {"action": np.clip(arrays["action"], -1, 1)}, _digest(arrays)


def _digest(arrays: dict[str, np.ndarray]) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        hasher.update(name.encode() + str((arrays[name].dtype, arrays[name].shape)).encode())
        hasher.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return hasher.digest()


def _rows(added: int, rows: int) -> np.ndarray:
    """Where the records of a ring lie, from the oldest to the newest."""
    return np.arange(added - min(added, rows), added) % rows


def _on_device(leaves: dict[str, np.ndarray], seeds: int) -> tuple[list[str], Callable]:
    """The streams of the device's replay, of each seed and environment."""
    several = seeds > 1
    prefix, step = "replay/data/", "replay/data/step/"
    arrays = {path.removeprefix(step).removeprefix(prefix).removeprefix("obs/"): x for path, x in leaves.items()}
    added = np.ravel(arrays.pop("replay/added"))
    if not several:
        arrays = {name: x[None] for name, x in arrays.items()}
    _, rows, num_envs = arrays["reward"].shape
    each = [(s, e) for s in range(seeds) for e in range(num_envs)]
    streams = {f"{f'seed {s}, ' if several else ''}environment {e}": (s, e) for s, e in each}

    def read(name: str) -> tuple[dict[str, np.ndarray], bytes]:
        seed, env = streams[name]
        found = {key: x[seed, _rows(int(added[seed]), rows), env] for key, x in arrays.items()}
        return _as_taken(found)

    return list(streams), read


def _files(folder: Path, digest: bytes, num_envs: int) -> list[bytes]:
    """The files that hold the columns of a block; none where one of them is torn or missing."""
    try:
        found = chunks.parts(folder, digest)
        whole = found == [digest] or all(chunks.parts(folder, part) == [part] for part in found)
    except (OSError, ValueError):
        return []
    return found if whole and num_envs % len(found) == 0 else []


def _on_host(place: Path, leaves: dict[str, np.ndarray]) -> tuple[list[str], Callable]:
    """The streams of replay on the host, cut where a file is torn or missing, which counts as a stretch by itself."""
    flags = {name: leaves[f"replay/ring/data/step/{name}"] for name in FLAGS}
    head = {path.removeprefix("replay/head/"): x for path, x in leaves.items() if path.startswith("replay/head/")}
    digests, folder = leaves["replay/digests"], place / REPLAY
    (rows, num_envs), length = flags["is_first"].shape, len(next(iter(head.values())))
    rows_in_order = _rows(int(leaves["replay/ring/added"]), rows)
    mapped = lru_cache(MAPPED)(partial(chunks.mapped, folder))
    files = {n: _files(folder, row.tobytes(), num_envs) for n, row in enumerate(digests) if row.any()}
    lost = [f"{REPLAY}/{digests[n].tobytes().hex()}{chunks.SUFFIX}" for n, found in files.items() if not found]
    good = np.array([bool(files.get(row // length, True)) for row in rows_in_order], bool)
    split = np.split(np.arange(len(good)), np.flatnonzero(np.diff(good)) + 1)
    each = [(piece, e) for piece in split if len(piece) and good[piece[0]] for e in range(num_envs)]
    streams = {f"records {p[0]} to {p[-1]} of environment {e}": (rows_in_order[p], e) for p, e in each}

    def block(number: int, env: int) -> tuple[dict[str, np.ndarray], int]:
        """The arrays that have an environment, and its column of them."""
        if number not in files:
            return head, env
        each = num_envs // len(files[number])
        return mapped(files[number][env // each]), env % each

    def read(name: str) -> tuple[dict[str, np.ndarray], bytes]:
        if name in lost:
            raise ValueError("it is torn or missing")
        row, env = streams[name]
        numbers = row // length
        found = {key.removeprefix("obs/"): np.empty((len(row), *x.shape[2:]), x.dtype) for key, x in head.items()}
        for number in np.unique(numbers):
            here, (stored, column) = numbers == number, block(number, env)
            for key in head:
                found[key.removeprefix("obs/")][here] = stored[key][row[here] % length, column]
        found |= {key: value[row, env] for key, value in flags.items()}
        return _as_taken(found)

    return [*streams, *lost], read
