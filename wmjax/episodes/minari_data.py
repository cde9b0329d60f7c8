"""Data sets of Minari, from its store on this machine. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from wmjax.envs import own
from wmjax.episodes.sources import Source
from wmjax.suites import SuiteError
from wmjax.suites.spaces import ActionReader, Fault, obs_reader, plain
from wmjax.types import Box, Discrete, EnvSpec, UsageError


def open_minari(path: str) -> Source:
    """The data set that "minari:NAME" names. Observations are read as those of `gym:` environments are.

    Raises `UsageError` where Minari is not installed, the data set is not in its store, or its spaces cannot be read.
    """
    name = path.removeprefix("minari:")
    try:
        import minari
    except ImportError:
        raise UsageError(f"data: {path!r} needs Minari: pip install 'wmjax[minari]'") from None
    try:
        data = minari.load_dataset(name, download=False)
    except Exception as error:  # whatever its storage raises
        reason = str(error).partition("\n")[0].partition(". Use")[0][:200]
        raise UsageError(
            f"data: {path!r} cannot be read ({reason}); `minari list local` names those that can, nothing is downloaded"
        ) from None
    try:
        reader = obs_reader(plain(data.observation_space), None)
        actions = ActionReader(space := plain(data.action_space))
    except SuiteError as error:
        raise UsageError(f"data: in {path!r} {str(error).removeprefix('env: ')}") from None
    obs = {entry["name"]: own.obs_space(entry) for entry in reader.describe()}
    spec = EnvSpec(obs, own.action_space(actions.describe()))
    low, high = _bounds(space) if isinstance(spec.action, Box) else (None, None)
    if low is not None and not np.isfinite([low, high]).all():
        raise UsageError(f"data: the actions of {path!r} have no bounds to rescale them to [-1, 1] from")
    episodes = {f"episode {number}": int(number) for number in data.episode_indices}

    def chosen(action: np.ndarray) -> np.ndarray:
        """As agents emit them, or as integers from 0, with one more for the last record."""
        action = np.concatenate([action, action[-1:]])
        if low is not None:
            action = action.reshape(len(action), -1).astype(np.float64)
            return ((2 * action - low - high) / np.maximum(high - low, np.finfo(np.float64).tiny)).astype(np.float32)
        start = space.get("start", 0)
        action = action.astype(np.int64).reshape(len(action), *([] if isinstance(spec.action, Discrete) else [-1]))
        return action - np.asarray(start)

    def read(name: str) -> tuple[dict[str, np.ndarray], bytes]:
        try:
            episode = next(iter(data.iterate_episodes([episodes[name]])))
            length = len(episode.rewards) + 1
            seen = [reader.accept(_at(episode.observations, t)) for t in range(length)]
            arrays = {key: np.stack([one[key] for one in seen]) for key in obs}
            arrays["action"] = chosen(np.asarray(episode.actions))
        except Fault as fault:
            raise ValueError(str(fault)) from None
        except Exception as error:  # whatever its storage raises
            raise ValueError(f"it cannot be read ({str(error).partition(chr(10))[0][:200]})") from None
        flags = np.zeros((2, length), bool)
        flags[0, 0], flags[1, -1] = True, episode.terminations[-1]
        arrays["reward"] = np.concatenate([[0], np.asarray(episode.rewards)])
        arrays |= {"is_first": flags[0], "is_terminal": flags[1], "is_last": flags[0][::-1]}
        hasher = hashlib.sha256()
        for key in sorted(arrays):
            hasher.update(key.encode() + np.ascontiguousarray(arrays[key]).tobytes())
        return arrays, hasher.digest()

    return Source(path, tuple(episodes), read, spec=spec, strict=True)


def _at(obs: Any, t: int) -> Any:
    """An observation at a time, of arrays in dictionaries and tuples."""
    if isinstance(obs, Mapping):
        return {key: _at(value, t) for key, value in obs.items()}
    return tuple(_at(value, t) for value in obs) if isinstance(obs, tuple | list) else obs[t]


def _bounds(space: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.broadcast_to(np.asarray(space[x], np.float64), space["shape"]).ravel() for x in ("low", "high"))
    return low, high
