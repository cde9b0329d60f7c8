"""What a run is and will take, from shapes alone: effective sizes, parameters, memory, updates."""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jaxlib

import wmjax
from wmjax import determinism
from wmjax.loops import device, memory
from wmjax.loops.host.loop import check_room, shapes
from wmjax.loops.memory import amount
from wmjax.loops.schedule import Schedule, samplings
from wmjax.replay.host import sizes
from wmjax.types import PyTree, UsageError

if TYPE_CHECKING:
    from wmjax.settings import Setup


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


def about(made: Setup) -> dict[str, Any]:
    """What `config.json` says besides the settings: none of it has to be the same where a run goes on."""
    params = jax.eval_shape(made.agent.init, jax.random.key(0)).variables
    devices = jax.devices()[: made.description["devices"]]
    program = Path(sys.argv[0]).name
    return {
        "parameters": count(params),
        "parameters_of": {name: count(part) for name, part in sorted(params.items())},
        "config": effective_config(made.config),
        "devices": [f"{x.platform} {x.device_kind}" if x.device_kind != x.platform else x.platform for x in devices],
        "deterministic": determinism.is_on(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "wmjax": wmjax.__version__,
        },
        "command": shlex.join(["wmjax" if program == "__main__.py" else program, *sys.argv[1:]]),
    }


def _memory(made: Setup, memory_map: bool, out: Path | None) -> tuple[int, str, Callable[[], None]]:
    """Bytes of the state without replay, of all seeds; what replay takes, in words; and the check that it fits here."""
    agent, env, recipe = made.agent, made.world, made.agent.recipe
    seeds, devices = made.description["seeds"], made.description["devices"]
    shard_params = made.description["shard_params"]
    records = f"{recipe.replay_capacity // recipe.num_envs * recipe.num_envs:,} records"
    if made.on_host:
        (state, carry), example = shapes(agent, env)
        kept = example, recipe.num_envs, recipe.replay_capacity, samplings(recipe)
        needs = sizes(*kept, memory_map=memory_map)
        place = (out or Path()).absolute()
        place = next(folder for folder in (place, *place.parents) if folder.is_dir())
        words = f"{records}, at most {amount(needs.memory_bytes)} of memory, {amount(needs.disk_bytes)} of disk"
        check = lambda: check_room(recipe, state, needs, made.records, place)
        return memory.tree_bytes((state, carry)), words, check
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.random.key(0))
    replay, state = memory.tree_bytes(run.replay), memory.tree_bytes(run)
    spread = f" over {devices} devices" if devices > 1 else ""
    each = f" for each of {seeds} seeds" if seeds > 1 else ""
    words = f"{records}{each}, {amount(seeds * replay)} of device memory{spread}"
    return (
        seeds * (state - replay),
        words,
        lambda: memory.check_run(agent, env, seeds, devices, shard_params=shard_params),
    )


def outlook(made: Setup, memory_map: bool = False, out: Path | None = None) -> str:
    """What a run would take, in some lines of text; the last says what is missing for it here, if anything is.

    Nothing is computed, compiled or written. `memory_map` and `out` are as in `train`.
    """
    recipe, steps = made.agent.recipe, made.steps
    state, replay, check = _memory(made, memory_map, out)
    stages, updates, missing = [], 0, []
    try:
        check()
    except UsageError as error:
        missing = [f"it would not begin here: {error}"]
    for stage, iterations in zip(recipe.stages, Schedule(made.agent, made.env, steps).lengths, strict=True):
        updates += iterations * sum(update.repeats for update in stage.updates)
        searched = f" of {stage.evolve.generations} generations each" if stage.evolve else ""
        stages.append(f"{stage.name} {iterations:,} iterations{searched}")
    return "\n".join(
        [
            f"state {amount(state)}, without what an update needs",
            f"replay of {replay}",
            f"stages {', '.join(stages)}",
            f"{steps:,} env steps, {updates:,} updates",
            *missing,
        ]
    )


def header(described: dict[str, Any]) -> list[str]:
    """Of `about`: how large, on what, by which versions."""
    parts = ", ".join(f"{name} {number:,}" for name, number in described["parameters_of"].items())
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    kinds = described["devices"]
    on = kinds[0] if len(kinds) == 1 else f"{len(kinds)} devices ({', '.join(dict.fromkeys(kinds))})"
    on += ", deterministic operations" if described.get("deterministic") is True else ""
    return [f"{described['parameters']:,} parameters ({parts})", f"on {on}; {versions}"]
