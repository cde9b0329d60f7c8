"""A folder of episodes: one `.npz` for each, as the authors of DreamerV2 and V3 keep them, and `episodes.json`.

An episode is arrays by name, `[T, ...]` each: the entries of the observation, `action`, `reward`, `is_first`, `is_last`
and `is_terminal`. Record t holds an observation, the reward and flags that arrived with it, and the action that was
chosen on seeing it, as agents emit it: one-hots side by side, or floats in [-1, 1]. Names end in the number of records,
as in `000012-64.npz`. Nothing in it is pickled, and nothing that is pickled is read.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import secrets
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wmjax import files
from wmjax.run_folder import write_json
from wmjax.types import Box, Discrete, EnvSpec, MultiDiscrete, RunError, Space, UsageError

INDEX = "episodes.json"
FORMAT = 1  # of `episodes.json`
INDEX_BYTES = 2**28
EPISODE_BYTES = 2**34  # of the arrays of one file
FLAGS = ("is_first", "is_last", "is_terminal")
KINDS = {"Discrete": Discrete, "MultiDiscrete": MultiDiscrete, "Box": Box}


# ---------------------------------------------------------------------------------------------------------------------
# What an environment is, as JSON


def _bound_json(bound: float | tuple[float, ...]) -> Any:
    if isinstance(bound, tuple):
        return [_bound_json(one) for one in bound]
    return float(bound) if math.isfinite(bound) else None  # JSON has no infinity


def space_json(space: Space) -> dict[str, Any]:
    """A space as JSON; a bound that is not there is null."""
    if isinstance(space, Discrete):
        return {"kind": "Discrete", "n": space.n}
    if isinstance(space, MultiDiscrete):
        return {"kind": "MultiDiscrete", "ns": list(space.ns)}
    bounds = {"low": _bound_json(space.low), "high": _bound_json(space.high)}
    return {"kind": "Box", **bounds, "shape": list(space.shape), "dtype": space.dtype}


def space_of(said: Any) -> Space:
    """What `space_json` was given. Raises `UsageError` where it says no space."""

    def bound(value: Any, none: float) -> Any:
        return tuple(bound(one, none) for one in value) if isinstance(value, list) else none if value is None else value

    try:
        fields = dict(said)
        kind = KINDS[fields.pop("kind")]
        if kind is MultiDiscrete:
            fields["ns"] = tuple(fields["ns"])
        if kind is Box:
            fields |= {"low": bound(fields["low"], -math.inf), "high": bound(fields["high"], math.inf)}
            fields |= {"shape": tuple(fields["shape"]), "dtype": str(fields["dtype"])}
        return kind(**fields)
    except (TypeError, ValueError, KeyError, UsageError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"space: {said!r:.80} is not valid; a Discrete, MultiDiscrete or Box as JSON is") from None


def spec_json(spec: EnvSpec) -> dict[str, Any]:
    """What an agent may know of an environment, as JSON; without `action_map`, which is a function."""
    return {
        "obs": {name: space_json(space) for name, space in spec.obs.items()}, "action": space_json(spec.action),
        "max_episode_steps": spec.max_episode_steps, "action_repeat": spec.action_repeat, "survival": spec.survival,
    }  # fmt: skip


def spec_of(said: Any) -> EnvSpec:
    """What `spec_json` was given. Raises `UsageError` where it is no such thing."""
    try:
        obs, limit, repeat, survival = (
            said[name] for name in ("obs", "max_episode_steps", "action_repeat", "survival")
        )
        spaces = {str(name): space_of(space) for name, space in obs.items()}
        whole = lambda value: type(value) is int and 1 <= value < 2**31
        if (
            not spaces
            or not (limit is None or whole(limit))
            or not whole(repeat)
            or survival not in (None, True, False)
        ):
            raise ValueError
        return EnvSpec(spaces, space_of(said["action"]), limit, None, repeat, survival)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"spec: {said!r:.80} is not valid; what wmjax record writes is") from None


# ---------------------------------------------------------------------------------------------------------------------
# One episode


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """The arrays of an `.npz` file by name, and the SHA-256 of its bytes.

    Raises `ValueError` saying why where it is damaged, is no such file, or holds an array of objects, which would have
    to be unpickled. No more memory is taken than the file says that its arrays have.
    """
    try:
        content = files.read(path, EPISODE_BYTES)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if sum(info.file_size for info in members) > EPISODE_BYTES:
                raise ValueError(f"its arrays have more than {EPISODE_BYTES:,} bytes")
            arrays = {info.filename.removesuffix(".npy"): _read_npy(archive, info) for info in members}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"it is damaged ({error or type(error).__name__})") from None
    return arrays, hashlib.sha256(content).digest()


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """An array of an archive. NumPy's own reader is handed nothing but the header."""
    name, headers = info.filename.removesuffix(".npy"), np.lib.format
    with archive.open(info) as file:
        try:
            version = headers.read_magic(file)
            read = {(1, 0): headers.read_array_header_1_0, (2, 0): headers.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
            shape = tuple(map(int, shape))
            size = dtype.itemsize * math.prod(shape)
        except Exception:  # Python's parser, by which NumPy reads it, fails at odd text in many ways
            raise ValueError(f"its {name!r} has no readable header") from None
        if dtype.hasobject:
            raise ValueError(f"its {name!r} holds Python objects, which are not read: that would run code of the file")
        if size > info.file_size:
            raise ValueError(f"its {name!r} is damaged: it says {size:,} bytes, and has {info.file_size:,} at most")
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise ValueError(f"its {name!r} is damaged: it is not {size:,} bytes long")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


# ---------------------------------------------------------------------------------------------------------------------
# A folder


class Writer:
    """Writes a folder of episodes that appears whole, with `finish`, or not at all.

    Args:
      out: the folder; not there, or empty.

    Raises `UsageError` where something is there already, or it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self._out = out = Path(out)
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise UsageError(f"out: {str(out)!r} exists and is not empty; nothing is overwritten, give another folder")
        self._place = out.absolute().with_name(f".tmp-{secrets.token_hex(4)}-{out.name}")
        self._named: dict[str, int] = {}
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._place.mkdir()
        except OSError as error:
            raise UsageError(f"out: {str(out)!r} cannot be written: {error.strerror}") from None

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        """Writes an episode of arrays `[T, ...]` by name. Raises `RunError`, as where the disk is full."""
        length = len(episode["reward"])
        name = f"{len(self._named):06d}-{length}.npz"
        try:
            np.savez_compressed(self._place / name, allow_pickle=False, **episode)
        except OSError as error:
            raise self._failed(error) from None
        self._named[name] = length

    def finish(self, about: Mapping[str, Any]) -> None:
        """Writes `episodes.json`, which says what they are of, and gives the folder its name."""
        try:
            records = sum(self._named.values())
            write_json(self._place / INDEX, {"format": FORMAT, **about, "records": records, "episodes": self._named})
            if self._out.exists():
                self._out.rmdir()  # it was empty
            self._place.rename(self._out.absolute())
        except OSError as error:
            raise self._failed(error) from None

    @property
    def episodes(self) -> int:
        """Written so far."""
        return len(self._named)

    def close(self) -> None:
        """Removes what was not finished."""
        files.remove(self._place)

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"out: {str(self._out)!r} cannot be written ({error.strerror}); what was written of it is removed"
        )
