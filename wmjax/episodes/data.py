"""What is demanded of records before they are trained on, and how they fill the streams of a replay.

Stretches of consecutive records lie one after the other, in the order of their names, and this line is cut into as many
streams of one length as replay has. Where a stretch begins, an episode does, so that the one before it is cut.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from wmjax.episodes.format import FLAGS
from wmjax.episodes.sources import Source
from wmjax.loops.memory import SPARE, amount, available_bytes
from wmjax.replay.device import Record
from wmjax.types import Box, Discrete, EnvSpec, MultiDiscrete, Space, TimeStep, UsageError

NAMED = 5  # of the stretches that cannot be used
OURS = ("action", "reward", "discount", *FLAGS)  # what is no entry of an observation
CHOICES = 2**16  # that integers are taken for where nobody says of how many they are
ROUNDING = 1e-6  # that an action in [-1, 1] may be beyond it by
MAPPED = 4  # stretches of each stream that are kept where all are not


@dataclass(frozen=True)
class Data:
    """Records that are as demanded.

    `take` gives some rows of the streams that they are cut into.
    """

    path: str
    spec: EnvSpec  # that they are of
    lengths: tuple[int, ...]  # of the stretches
    fingerprint: str  # SHA-256 over the names and contents of the stretches, in hex
    skipped: int  # stretches that could not be used
    read: Callable[[int], Record]  # a stretch, from memory or where it lies
    forget: Callable[[], None]  # what is in memory

    @property
    def records(self) -> int:
        """In all."""
        return sum(self.lengths)

    def rows(self, streams: int) -> int:
        """Of so many streams; fewer than `streams` records at the end are left out."""
        return self.records // streams

    def take(self, streams: int, begin: int, end: int) -> Record:
        """The rows `begin`, ..., `end - 1` of all streams, `[rows, streams, ...]`, as NumPy arrays."""
        ends, rows, found = list(itertools.accumulate(self.lengths)), self.rows(streams), None
        for stream in range(streams):
            place, last = stream * rows + begin, stream * rows + end
            while place < last:
                number = bisect.bisect_right(ends, place)
                offset = place - (ends[number] - self.lengths[number])
                size = min(last - place, self.lengths[number] - offset)
                record, row = self.read(number), place - stream * rows - begin
                if found is None:
                    found = [np.empty((end - begin, streams, *x.shape[1:]), x.dtype) for x in _leaves(record)]
                for whole, part in zip(found, _leaves(record), strict=True):
                    whole[row : row + size, stream] = part[offset : offset + size]
                place += size
        *step, action = found
        return Record(TimeStep(dict(zip(sorted(self.spec.obs), step, strict=False)), *step[-4:]), action, ())


def _leaves(record: Record) -> list[np.ndarray]:
    """The arrays of records: those of the observation by name, reward, flags, action."""
    obs = record.step.obs
    return [*(obs[name] for name in sorted(obs)), *record.step[1:], record.action]


def stretches(
    source: Source, spec: EnvSpec | None, *, skip_damaged: bool = False, keep: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Data:  # fmt: skip
    """Reads all records of a source and checks them against a spec.

    Args:
      source: where from.
      spec: of the environment; None for what the source says itself, or what its arrays look like.
      skip_damaged: leave out what cannot be used, instead of refusing all.
      keep: in memory; else they are read again when they are needed.
      say: is told what is left out.

    Raises:
      UsageError: some cannot be used; the first are named, with why. Or nothing is there to use, or memory is short.
    """
    spec = spec or source.spec or _infer(source, say)
    bad, kept, used, lengths, hasher, size, free = [], [], [], [], hashlib.sha256(), 0, available_bytes()
    led = 0
    for name in source.names:
        try:
            arrays, digest = source.read(name)
            record = canonical(arrays, spec, source)
        except ValueError as error:
            bad.append(f"{name}: {error}")
            continue
        used.append(name)
        led += _led(arrays["action"], spec.action, source)
        lengths.append(len(record.action))
        hasher.update(len(name.encode()).to_bytes(4, "little") + name.encode() + digest)
        if keep:
            kept.append(record)
            size += record.action.nbytes + sum(x.nbytes for x in record.step.obs.values())
            if free is not None and 2 * size > SPARE * free:  # once more as replay
                raise UsageError(
                    f"data: {source.path!r} does not fit in memory, of which {amount(free)} are free; memory_map "
                    "(--memory-map) reads it from files instead"
                )
    if bad:
        listed = "; ".join(bad[:NAMED]) + ("; and others" if len(bad) > NAMED else "")
        told = f"{len(bad)} of {len(source.names)} episodes cannot be used: {listed}"
        if not skip_damaged or not used:
            rest = "; the others are used with skip_damaged (--skip-damaged)" if used else ""
            raise UsageError(f"data: in {source.path!r} {told}{rest}")
        say(f"warning: data: in {source.path!r} {told}; they are left out")
    elif not used:
        raise UsageError(f"data: {source.path!r} holds no episode")
    if led:
        say(f"data: {led} of {len(used)} episodes begin with an action of zeros, as those of DreamerV1 and V2 do: "
            "each of their actions is taken for the one that led to its record")  # fmt: skip
    again = lru_cache(MAPPED)(lambda number: canonical(source.read(used[number])[0], spec, source))
    read = lambda number: kept[number] if kept else again(number)
    return Data(source.path, spec, tuple(lengths), hasher.hexdigest(), len(bad), read, kept.clear)


# ---------------------------------------------------------------------------------------------------------------------
# One stretch


def canonical(arrays: Mapping[str, np.ndarray], spec: EnvSpec, source: Source) -> Record:
    """A stretch as replay keeps it, `[T, ...]`. Raises `ValueError` saying what is not as it should be."""
    _check_names(arrays, spec, source)
    if not arrays["reward"].size:
        raise ValueError("it holds no record")
    length = len(np.atleast_1d(arrays["reward"]))
    for name in (*spec.obs, *(name for name in OURS if name in arrays)):
        if arrays[name].ndim == 0 or len(arrays[name]) != length:
            raise ValueError(f"{name} has the shape {arrays[name].shape}, where reward has {length} records")
    obs = {name: _entry(name, arrays[name], space) for name, space in spec.obs.items()}
    reward = _numbers("reward", arrays["reward"])
    if reward.size != length:
        raise ValueError(f"reward has the shape {reward.shape}; one number for each record is valid")
    is_first, is_last, is_terminal = _flags(arrays, length, source)
    action = _action(arrays["action"], is_last, spec.action, source)
    return Record(TimeStep(obs, reward.reshape(length), is_first, is_last, is_terminal), action, ())


def _check_names(arrays: Mapping[str, np.ndarray], spec: EnvSpec, source: Source) -> None:
    wanted = [*spec.obs, "action", "reward", *(FLAGS if source.strict else ())]
    missing = [repr(name) for name in wanted if name not in arrays]
    if not source.strict and "is_terminal" not in arrays and "discount" not in arrays:
        missing.append("'is_terminal' (or 'discount')")
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}")


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} is {array.dtype}; numbers are valid")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} is not finite in {int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())} records"
        )
    return array


def _entry(name: str, array: np.ndarray, space: Space) -> np.ndarray:
    """An entry of observations. Raises `ValueError` where it is not of its space."""
    if array.shape[1:] != space.shape:
        side = (
            array.shape[1:2] if space.dtype == "uint8" and array.ndim == 4 and array.shape[1] == array.shape[2] else ()
        )
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape[1:])}, where {space.dtype} {list(space.shape)} is valid"
            + "".join(f"; the environment is seen so with --image-size {n}" for n in side)
        )
    if space.dtype == "float32":
        return _numbers(name, array)
    if array.dtype.kind not in "iu" or (space.dtype == "uint8" and array.dtype != np.uint8):
        raise ValueError(f"{name} is {array.dtype}, where {space.dtype} is valid")
    if isinstance(space, Discrete) and not ((array >= 0) & (array < space.n)).all():
        raise ValueError(f"{name} is in [{array.min()}, {array.max()}], where an integer in [0, {space.n}) is valid")
    return array.astype(space.dtype)


def _flags(arrays: Mapping[str, np.ndarray], length: int, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which records begin and end episodes, and how; what is not there follows from the rest."""
    found = {}
    for name in (*FLAGS, "discount"):
        if name in arrays:
            array = _numbers(name, arrays[name])
            if array.size != length or (name != "discount" and not np.isin(array, (0, 1)).all()):
                raise ValueError(
                    f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}; a truth value for each record is valid"
                )
            found[name] = array.reshape(length) != 0
    is_first = found.get("is_first", np.zeros(length, bool))
    # A stream of a run may lie within one long episode.
    begins = is_first[0] if source.strict else is_first.any() or source.chosen
    if "is_first" in found and not begins:
        where = "its first record" if source.strict else "every record"
        raise ValueError(f"is_first is False in {where}: no episode begins")
    is_first[0] = True
    is_terminal = found["is_terminal"] if "is_terminal" in found else ~found["discount"]
    is_last = found.get("is_last", np.zeros(length, bool)) | is_terminal
    return is_first, is_last | np.append(is_first[1:], True), is_terminal


def _counts(space: Space) -> tuple[int, ...] | None:
    """How many choices there are, of each; None where actions are numbers."""
    return (space.n,) if isinstance(space, Discrete) else space.ns if isinstance(space, MultiDiscrete) else None


def action_size(space: Space) -> int:
    """Entries of an action as agents emit it."""
    counts = _counts(space)
    return space.shape[0] if counts is None else sum(counts)


def _are_integers(array: np.ndarray, space: Space) -> bool:
    """Whether actions are choices by number, which a space has."""
    counts = _counts(space)
    return counts is not None and array.dtype.kind in "iu" and array.size == len(array) * len(counts)


def _led(array: np.ndarray, space: Space, source: Source) -> bool:
    """Whether each action led to its record, as DreamerV1 and V2 write them; before the first there was none."""
    return not (source.chosen or _are_integers(array, space)) and len(array) > 1 and not array[0].any()


def _action(array: np.ndarray, is_last: np.ndarray, space: Space, source: Source) -> np.ndarray:
    """Actions as agents emit them, float32 `[T, A]`, each beside the observation that it was chosen on."""
    size, counts = action_size(space), _counts(space)
    if _are_integers(array, space):
        return _one_hot(array.reshape(len(array), -1), counts)
    if array.shape[1:] != (size,):
        raise ValueError(f"action is {array.dtype} {list(array.shape[1:])}, where {size} entries are valid, of {space}")
    action = _numbers("action", array)
    if _led(array, space, source):
        action = np.concatenate([action[1:], np.zeros_like(action[:1])])
    if counts is None:
        if (np.abs(action) > 1 + ROUNDING).any():
            raise ValueError(f"action is in [{action.min():g}, {action.max():g}], where [-1, 1] is valid")
        return np.clip(action, -1, 1)
    for part in np.split(action, np.cumsum(counts)[:-1], 1):
        good = np.isin(part, (0, 1)).all(1) & ((part.sum(1) == 1) | (is_last & (part.sum(1) == 0)))
        if not good.all():
            raise ValueError(
                f"action is not one-hot in record {int(np.argmin(good))}: {part[np.argmin(good)].tolist()}"
            )
    return action


def _one_hot(choices: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    if (choices < 0).any() or (choices >= np.array(counts)).any():
        raise ValueError(
            f"action is in [{choices.min()}, {choices.max()}], where integers below {max(counts)} are valid"
        )
    return np.concatenate([choices[:, i : i + 1] == np.arange(n) for i, n in enumerate(counts)], 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# What arrays look like, where nobody says what they are


def _infer(source: Source, say: Callable[[str], None]) -> EnvSpec:
    """The spec of an environment that would have given such records."""
    arrays, reasons = None, []
    for name in source.names:
        try:
            found = source.read(name)[0]
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        if "action" not in found or "reward" not in found:
            reasons.append(f"{name}: it has no 'action' and 'reward'; it has {', '.join(sorted(found)) or 'nothing'}")
        elif not found["action"].size or found["action"].ndim == 0:
            reasons.append(f"{name}: its action has the shape {found['action'].shape}")
        else:
            arrays = arrays or found
            if len(found["action"]) > 2:  # shorter ones may have but actions of zeros
                arrays = found
                break
    if arrays is None:
        raise UsageError(
            f"data: in {source.path!r} no episode can be used: {'; '.join(reasons[:NAMED]) or 'there is none'}"
        )
    obs, left = {}, []
    for name, array in sorted(arrays.items()):
        if 0 in array.shape[1:]:
            left.append(f"{name} {array.dtype} {list(array.shape[1:])}")
        elif array.dtype == np.uint8 and array.ndim == 4:
            obs[name] = Box(0, 255, array.shape[1:], "uint8")
        elif name not in OURS and "/" not in name and array.dtype.kind == "f" and array.ndim == 2:
            obs[name] = Box(-np.inf, np.inf, array.shape[1:])
        elif name not in OURS:
            left.append(f"{name} {array.dtype} {list(array.shape[1:])}")
    if not obs:
        raise UsageError(
            f"data: {source.path!r} has no observation: neither images, uint8 [T, H, W, C], nor vectors, float [T, D]; "
            f"it has {', '.join(sorted(arrays))}"
        )
    if left:
        say(f"data: not used are {', '.join(left)}")
    return EnvSpec(obs, _infer_action(arrays["action"], source))


def _infer_action(array: np.ndarray, source: Source) -> Space:
    if array.dtype.kind in "iu" and array.size == len(array):
        found = [(int(x.min()), int(x.max())) for x in map(_actions(source), source.names) if x is not None and x.size]
        good = [most for least, most in found if least >= 0 and most < CHOICES]
        if not good:
            raise UsageError(
                f"data: action in {source.path!r} is in [{min(x for x, _ in found)}, {max(x for _, x in found)}]; "
                f"integers in [0, {CHOICES}) are valid; of what space they are can be said by --env (env=)"
            )
        return Discrete(max(good) + 1)
    if array.ndim != 2 or array.dtype.kind not in "fiub" or not array.shape[1]:
        raise UsageError(
            f"data: action in {source.path!r} is {array.dtype} {list(array.shape[1:])}; valid are one-hots or numbers "
            "in [-1, 1], [T, A], and integers [T]; of what space they are can be said by --env (env=)"
        )
    ones = array[1:-1] if len(array) > 2 else array  # the first, or the last, may be of zeros
    if array.shape[1] > 1 and np.isin(ones, (0, 1)).all() and (ones.sum(1) == 1).all():
        return Discrete(array.shape[1])
    return Box(-1.0, 1.0, (array.shape[1],))


def _actions(source: Source) -> Callable[[str], Any]:
    def read(name: str) -> np.ndarray | None:
        try:
            return source.read(name)[0].get("action")
        except ValueError:
            return None

    return read
