"""An environment's own observations and actions, for programs that act by themselves: read and written as in training.

Environments of Gymnasium bring the functions that their workers use (`HostEnv.read`, `HostEnv.write`). Those on the
device have their spec for a space of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wmjax.suites.spaces import Fault, ObsReader, reader_of
from wmjax.types import Box, Discrete, Env, HostEnv, MultiDiscrete, Space, UsageError


def obs_space(entry: dict[str, Any]) -> Space:
    """The space of an entry as `suites.spaces.Entry.describe` gives it."""
    if "n" in entry:
        return Discrete(entry["n"])
    return Box(entry["low"], entry["high"], tuple(entry["shape"]), entry["dtype"])


def entry_of(name: str, space: Space) -> dict[str, Any]:
    """An entry of `EnvSpec.obs`, as `suites.spaces.Entry.describe` would give it."""
    values = {"n": space.n} if isinstance(space, Discrete) else {"low": space.low, "high": space.high}
    return {"name": name, "dtype": space.dtype, "shape": space.shape} | values


def action_space(about: dict[str, Any]) -> Space:
    """The space of actions as `suites.spaces.ActionReader.describe` gives it."""
    if about["kind"] == "discrete":
        return Discrete(about["n"])
    if about["kind"] == "multi_discrete":
        return MultiDiscrete(tuple(about["ns"]))
    low, high = about["low"], about["high"]
    alike = len(set(low)) == len(set(high)) == 1
    return Box(*((low[0], high[0]) if alike else (tuple(low), tuple(high))), tuple(about["shape"]))


def accept(reader: ObsReader, obs: Any) -> dict[str, np.ndarray]:
    """`ObsReader.accept` for users: what cannot be read is a `UsageError`."""
    try:
        return reader.accept(obs)
    except Fault as fault:
        raise UsageError(f"obs: {fault}") from None


def read(env: Env | HostEnv, obs: Any) -> dict[str, np.ndarray]:
    """The arrays of `env.spec.obs`, without batch axes, from an observation of the environment's own.

    Also taken is what `env.spec.obs` says, as a dictionary or, where there is one entry, alone; and of environments
    on the device pictures of any size, which are resized. Raises `UsageError`, which names the entry, what was found
    and what is valid.
    """
    given = getattr(env, "read", None)
    return accept(reader_of([entry_of(*item) for item in env.spec.obs.items()]), obs) if given is None else given(obs)


def write(env: Env | HostEnv, action: np.ndarray) -> Any:
    """What the environment's `step` takes, from an action of `env.spec.action`."""
    given = getattr(env, "write", None)
    return action if given is None else given(action)
