"""World models in JAX: five papers, each one file of pure functions, over one set of types.

`train` and `load` give a `Run`. Below them an algorithm (`Agent`), an environment (`Env`), a world model (`WorldModel`)
and a training run (`Recipe`) are values, described in `wmjax.types`; a dream is an `Env` too (`dream_env`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wmjax.cache import enable_compilation_cache
    from wmjax.dreaming import dream_env, imagine, observe, open_loop
    from wmjax.envs import env_names, make_env
    from wmjax.envs.wrappers import RawEnv, auto_reset
    from wmjax.loops.checkpoint import CheckpointCorruptError
    from wmjax.run import Run, load, train
    from wmjax.types import (
        Agent,
        Box,
        Discrete,
        Env,
        EnvSpec,
        HostEnv,
        RunError,
        TimeStep,
        UsageError,
        WorldModel,
    )

# Imported when first used: `import wmjax.ops` should not wait for an agent's imports.
_HOME = {
    "dream_env": "dreaming",
    "imagine": "dreaming",
    "observe": "dreaming",
    "open_loop": "dreaming",
    "env_names": "envs",
    "make_env": "envs",
    "RawEnv": "envs.wrappers",
    "auto_reset": "envs.wrappers",
    "CheckpointCorruptError": "loops.checkpoint",
    "Run": "run",
    "enable_compilation_cache": "cache",
    "load": "run",
    "train": "run",
    "Agent": "types",
    "Box": "types",
    "Discrete": "types",
    "Env": "types",
    "EnvSpec": "types",
    "HostEnv": "types",
    "RunError": "types",
    "TimeStep": "types",
    "UsageError": "types",
    "WorldModel": "types",
}

__all__ = [
    "Agent",
    "Box",
    "CheckpointCorruptError",
    "Discrete",
    "Env",
    "EnvSpec",
    "HostEnv",
    "RawEnv",
    "Run",
    "RunError",
    "TimeStep",
    "UsageError",
    "WorldModel",
    "auto_reset",
    "dream_env",
    "enable_compilation_cache",
    "env_names",
    "imagine",
    "load",
    "make_env",
    "observe",
    "open_loop",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
