"""World models in JAX: five papers, each one file of pure functions, over one set of types.

`train` and `load` give a `Run`, `plan` says what one would take. Below them an algorithm (`Agent`), an environment
(`Env`), a world model (`WorldModel`) and a training run (`Recipe`) are values, described in `wmjax.types`; a dream is
an `Env` too (`dream_env`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wmjax.cache import enable_compilation_cache
    from wmjax.cli.configs import read_config
    from wmjax.comparison import ablate, compare
    from wmjax.dream_step.writing import export_step
    from wmjax.dreaming import dream_env, imagine, observe, open_loop
    from wmjax.envs import EnvInfo, env_names, make_env
    from wmjax.exporting import export, load_params
    from wmjax.importing import import_weights
    from wmjax.loops.checkpoint import CheckpointCorruptError
    from wmjax.loops.driver import Interrupted
    from wmjax.raw_env import Outcome, RawEnv, action_repeat, auto_reset, time_limit
    from wmjax.recording import record
    from wmjax.run import Run, load
    from wmjax.scores import Scores
    from wmjax.sizing import Plan, plan
    from wmjax.training import train
    from wmjax.types import (  # isort: skip
        Agent, AgentState, Box, Discrete, Env, EnvSpec, HostEnv, MultiDiscrete, Recipe, RunError, Sampling, Stage,
        TimeStep, Trajectory, Update, UsageError, WorldModel,
    )  # fmt: skip

# Imported when first used: `import wmjax.ops` should not wait for an agent's imports.
_HOME = {
    "enable_compilation_cache": "cache",
    "read_config": "cli.configs",
    **dict.fromkeys("ablate compare".split(), "comparison"),
    **dict.fromkeys("dream_env imagine observe open_loop".split(), "dreaming"),
    "export_step": "dream_step.writing",
    **dict.fromkeys("EnvInfo env_names make_env".split(), "envs"),
    **dict.fromkeys("export load_params".split(), "exporting"),
    "import_weights": "importing",
    **dict.fromkeys("Outcome RawEnv action_repeat auto_reset time_limit".split(), "raw_env"),
    "CheckpointCorruptError": "loops.checkpoint",
    "Interrupted": "loops.driver",
    **dict.fromkeys("Plan plan".split(), "sizing"),
    "record": "recording",
    **dict.fromkeys("Run load".split(), "run"),
    "Scores": "scores",
    "train": "training",
    **dict.fromkeys(
        "Agent AgentState Box Discrete Env EnvSpec HostEnv MultiDiscrete Recipe RunError Sampling Stage TimeStep "
        "Trajectory Update UsageError WorldModel".split(),
        "types",
    ),
}

__all__ = [
    "Agent", "AgentState", "Box", "CheckpointCorruptError", "Discrete", "Env", "EnvInfo", "EnvSpec", "HostEnv",
    "Interrupted", "MultiDiscrete", "Outcome", "Plan", "RawEnv", "Recipe", "Run", "RunError", "Sampling", "Scores",
    "Stage", "TimeStep", "Trajectory", "Update", "UsageError", "WorldModel", "ablate", "action_repeat", "auto_reset",
    "compare", "dream_env", "enable_compilation_cache", "env_names", "export", "export_step", "imagine",
    "import_weights", "load", "load_params", "make_env", "observe", "open_loop", "plan", "read_config", "record",
    "time_limit", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
