"""What a run is and will take, from shapes alone: effective sizes, parameters, memory, updates."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jaxlib

import wmjax
from wmjax.loops import device, host
from wmjax.replay.host import sizes
from wmjax.types import HostEnv, PyTree

if TYPE_CHECKING:
    from wmjax.settings import Setup


def bytes_of(tree: PyTree) -> int:
    """Of arrays, or of what has their shapes and dtypes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def count(tree: PyTree) -> int:
    """Entries of all arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def effective_config(config: Any) -> dict[str, Any]:
    """Fields by name, those of a part with a dot; what another field decides (`size`) in place of None."""
    dimensions = getattr(config, "dimensions", None)
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and dimensions is not None:
            value = getattr(dimensions, field.name, None)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": inner for name, inner in effective_config(value).items()}
        else:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def command_line() -> str:
    """Of this process."""
    name = Path(sys.argv[0]).name
    return shlex.join(["wmjax" if name == "__main__.py" else name, *sys.argv[1:]])


def about(made: Setup) -> dict[str, Any]:
    """What `config.json` says besides the settings: none of it has to be the same where a run goes on."""
    params = jax.eval_shape(made.agent.init, jax.random.key(0)).params
    devices = jax.devices()[: made.description["devices"]]
    return {
        "parameters": count(params),
        "parameters_of": {name: count(part) for name, part in params.items()},
        "config": effective_config(made.config),
        "devices": [f"{x.platform} {x.device_kind}" if x.device_kind != x.platform else x.platform for x in devices],
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "wmjax": wmjax.__version__,
        },
        "command": command_line(),
    }


def _memory(made: Setup, memory_map: bool) -> tuple[int, str]:
    """Bytes of the state without replay, of all seeds; and what replay takes, in words."""
    agent, env, recipe = made.agent, made.env, made.agent.recipe
    seeds = made.description["seeds"]
    records = f"{recipe.replay_capacity // recipe.num_envs * recipe.num_envs:,} records"
    if isinstance(env, HostEnv):
        state, example = host.shapes(agent, env)
        needs = sizes(example, recipe.num_envs, recipe.replay_capacity, memory_map=memory_map)
        return bytes_of(state), (
            f"{records}, at most {_gb(needs.memory_bytes)} of memory, {_gb(needs.disk_bytes)} of disk"
        )
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    replay = bytes_of(run.replay)
    spread = f" over {made.description['devices']} devices" if made.description["devices"] > 1 else ""
    each = f" for each of {seeds} seeds" if seeds > 1 else ""
    return seeds * (bytes_of(run) - replay), f"{records}{each}, {_gb(seeds * replay)} of device memory{spread}"


def _gb(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"


def outlook(made: Setup, memory_map: bool = False) -> str:
    """What a run would take, in some lines of text. Nothing is computed, compiled or written."""
    recipe, steps = made.agent.recipe, made.steps
    state, replay = _memory(made, memory_map)
    stages, updates = [], 0
    for index, stage in enumerate(recipe.stages):
        iterations = device.stage_iterations(made.agent, made.env, steps, index)
        updates += iterations * sum(update.repeats for update in stage.updates)
        searched = f" of {stage.evolve.generations} generations each" if stage.evolve else ""
        stages.append(f"{stage.name} {iterations:,} iterations{searched}")
    return "\n".join(
        [
            f"state {_gb(state)}, without what an update needs",
            f"replay of {replay}",
            f"stages {', '.join(stages)}",
            f"{steps:,} env steps, {updates:,} updates",
        ]
    )


def header(described: dict[str, Any]) -> list[str]:
    """Of `about`: how large, on what, by which versions."""
    parts = ", ".join(f"{name} {number:,}" for name, number in described["parameters_of"].items())
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    kinds = described["devices"]
    on = kinds[0] if len(kinds) == 1 else f"{len(kinds)} devices ({', '.join(dict.fromkeys(kinds))})"
    return [f"{described['parameters']:,} parameters ({parts})", f"on {on}; {versions}"]
