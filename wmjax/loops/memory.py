"""How much memory there is, and whether a run, or records to look at, could lie in it; from shapes alone.

What is counted is certainly held at once: parameters, optimizers, replay, environments, and the largest of what is
collected, sampled or played at a time. So nothing is refused that could be computed. What activations and gradients
need besides is known once a stage is compiled (`check_program`); where memory runs out in spite of all, the run ends
with a `RunError` (`running_out`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from wmjax.loops import device, fsdp
from wmjax.loops.device import RunState
from wmjax.replay.host import tree_bytes
from wmjax.types import Agent, AgentState, Env, EnvSpec, Evolve, Recipe, RunError, Stage, UsageError

SPARE = 0.9  # of the host's free memory, or of a disk, that may be filled
# Of a control group, as containers and schedulers make them: its folder, limit, use, and the cache in that.
GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def resident_bytes() -> int:
    """Of this process now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()


def available_bytes() -> int | None:
    """Of the host's memory that could be used now; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return min([free, *_group_bytes()])


def _group_bytes() -> list[int]:
    """What the control groups of this process leave to it, of those that say."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, place = line.split(":", 2)
            for name in GROUPS.keys() & {*names.split(",")}:
                root, most, used, cache = GROUPS[name]
                for folder in {Path(root + place), Path(root)}:  # within a container the second is the group's
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                        taken = int((folder / used).read_text()) - int(stat[cache])
                        found.append(max(0, int((folder / most).read_text()) - taken))
    return found


class Room(NamedTuple):
    """Memory that programs may fill."""

    bytes: float
    where: str  # in words


def room() -> Room | None:
    """Where compiled programs run: on each accelerator, or the host; None where nobody says."""
    if jax.default_backend() == "cpu":
        free = available_bytes()
        return None if free is None else Room(SPARE * free, f"{amount(free)} of memory are free")
    stats = [found for each in jax.local_devices() if (found := each.memory_stats()) and "bytes_limit" in found]
    if not stats:
        return None
    free = min(found["bytes_limit"] - found.get("bytes_in_use", 0) for found in stats)
    where = f"{amount(free)} are free on each {jax.default_backend().upper()}, less what other processes have there"
    return Room(free, where)


# ---------------------------------------------------------------------------------------------------------------------
# What is needed


def amount(size: float) -> str:
    """Bytes in words, such as "12.3 kB", "100 MB" or "1,234 GB"."""
    unit, name = next((found for found in ((1e9, "GB"), (1e6, "MB")) if size >= found[0] / 10), (1e3, "kB"))
    return f"{size / unit:{',.0f' if size >= 1000 * unit else '.3g'}} {name}"


def check_run(
    agent: Agent,
    env: Env,
    seeds: int = 1,
    devices: int = 1,
    card: Room | None = None,
    programs: Iterable[tuple[float, str]] = (),
    shard_params: int = 1,
) -> None:
    """Raises `UsageError`, naming the field and the numbers, where a run on the device cannot fit in memory.

    Args:
      agent: brings the recipe, of the whole run.
      env: takes what the agent emits.
      seeds: of the run, each of which has all of it.
      devices: that environments, replay and batches are spread over. On a CPU they share the host's memory.
      card: the memory of each accelerator that the run is meant for; None: what there is here.
      programs: bytes of what programs are known to need besides the state, of all devices, and words for each.
      shard_params: over how many devices parameters and optimizers' states are spread.
    """
    free, recipe = card or room(), agent.recipe
    if free is None:
        return
    run = jax.eval_shape(lambda key: device.init(agent, env, key), jax.eval_shape(lambda: jax.random.key(0)))
    rows = recipe.replay_capacity // recipe.num_envs * recipe.num_envs
    record = tree_bytes(run.replay) / rows
    acting = tree_bytes((run.env_state, run.timestep, run.carry)) / recipe.num_envs
    parts = {  # what of a run, and there may be less of, takes how much
        f"replay_capacity: {recipe.replay_capacity} records of {amount(record)} need": rows * record,
        f"num_envs: {recipe.num_envs} environments need": recipe.num_envs * acting,
    }
    learned = fsdp.part_bytes(run.agent, shard_params)
    learned += tree_bytes(run.agent.variables) if shard_params > 1 else 0  # whole while they are used
    work, doing = max([*_at_once(agent, run.agent, record, acting), *programs])
    on_host = card is None and jax.default_backend() == "cpu"
    learned, spread = (learned * devices, 1) if on_host else (learned, devices)
    each = learned + sum(parts.values()) / spread
    # On a CPU seeds learn in turn, else at once.
    own, once = (each, work) if on_host else (each + work / spread, 0.0)
    total = seeds * own + once
    if total <= free.bytes:
        return
    if own + once <= free.bytes:
        most = int((free.bytes - once) / own)
        raise UsageError(
            f"seeds: {seeds} need {amount(total)}, {amount(own)} each, and {free.where}; at most {most} is valid"
        )
    parts |= {"agent: parameters and optimizers of these sizes need": learned * spread, doing: work}
    words, size = max(parts.items(), key=lambda part: part[1])
    most = math.floor((free.bytes - total) * spread / (seeds * record)) + rows
    most = most if words.startswith("replay") else 0
    advice = f"at most {most} is valid" if most >= recipe.num_envs else "less is valid"
    latents = tree_bytes([x for x in jax.tree.leaves(run.replay.data.latent) if x.dtype == "float32"])
    if words.startswith("replay") and latents > rows * record / 5:  # else it is hardly less
        advice += f"; latents of 16 bits (latent_dtype) take {amount(latents / 2)} less"
    held = f"{amount(size)}, of {amount(each + work / spread)} that the run holds at once"
    held += f" for each of {seeds} seeds" if seeds > 1 else ""
    held += f" on each of {spread} devices" if spread > 1 else ""
    raise UsageError(f"{words} {held}, and {free.where}; {advice}")


def check_program(recipe: Recipe, stage: Stage, run: RunState, program: jax.stages.Compiled, held: bool) -> None:
    """Raises `UsageError` where a stage's compiled program cannot run: with numbers, and with what would fit.

    Args:
      recipe: of the whole run.
      stage: one of it.
      run: its state, arrays or shapes; with several seeds, of all of them.
      program: takes the state and gives it back in its place. Of several accelerators each has a part.
      held: whether the state is in memory already.
    """
    free, taken = room(), program.memory_analysis()
    if free is None or taken is None:
        return
    state, work = taken.argument_size_in_bytes, taken.temp_size_in_bytes
    work += max(0, taken.output_size_in_bytes - taken.alias_size_in_bytes)
    left = free.bytes - work - (0 if held else state)
    if left >= 0:
        return
    replay = tree_bytes(run.replay)
    spread = max(1.0, tree_bytes(run) / state)  # devices that share the state, about
    capacity = recipe.replay_capacity
    most = capacity + math.floor(left * spread * capacity / replay)
    valid = [f"replay_capacity of at most {most}"] if most >= recipe.num_envs else []
    valid.append("a larger grad_accum, or a smaller batch_size, length, horizon or network")
    raise UsageError(
        f"stage {stage.name!r}: replay_capacity {capacity} needs {amount(replay)} of the state's {amount(state)}, and "
        f"what the stage computes at once needs {amount(work)} besides; {free.where}"
        f"{' beside the state' if held else ''}; valid is {', or '.join(valid)}"
    )


def _at_once(agent: Agent, state: AgentState, record: float, acting: float) -> Iterator[tuple[float, str]]:
    """Bytes of what the stages of a recipe make at a time besides the state, and the words for each."""
    recipe = agent.recipe
    for stage in recipe.stages:
        if stage.collect:
            words = f"stage {stage.name!r}: {stage.collect} steps of {recipe.num_envs} environments at once need"
            yield stage.collect * recipe.num_envs * record, words
        for update in stage.updates:
            window = update.sampling.context + update.sampling.length
            words = f"batch_size: {update.batch_size} windows of {window} steps for {update.name!r} need"
            yield update.batch_size * window * record, words
        if stage.evolve:
            yield _search(agent, state, stage.evolve, acting)


def _search(agent: Agent, state: AgentState, evolve: Evolve, acting: float) -> tuple[float, str]:
    """Of a generation's candidates and the episodes that they play side by side."""
    dims = math.prod(jax.eval_shape(evolve.get, state.params).shape)
    if evolve.where == "dream":
        acting = tree_bytes(jax.eval_shape(lambda params: agent.model.init_state(params, 1), state.variables))
    rows = max(evolve.population * evolve.rollouts, evolve.mean_rollouts)
    words = f"population: {evolve.population} candidates with {evolve.rollouts} episodes each (mean_rollouts: "
    return 4 * evolve.population * dims + rows * acting, f"{words}{evolve.mean_rollouts}) need"


def check_agent(state: AgentState) -> None:
    """Raises `UsageError` where an agent, arrays or shapes, cannot fit where programs run."""
    check_bytes("agent: parameters and optimizers of these sizes need", tree_bytes(state))


def check_bytes(words: str, size: int, card: Room | None = None) -> None:
    """Raises `UsageError`, beginning with these words, where so many cannot fit on a card, or where programs run."""
    free = card or room()
    if free is not None and size > free.bytes:
        raise UsageError(f"{words} {amount(size)}, and {free.where}; less is valid")


def check_records(field: str, spec: EnvSpec, records: int, predicted: int) -> None:
    """Raises `UsageError`, naming a field, where so many records and pictures predicted in float32 cannot fit."""
    bytes_of = lambda space: (records * np.dtype(space.dtype).itemsize + 4 * predicted) * math.prod(space.shape)
    free, size = room(), sum(map(bytes_of, spec.obs.values()))
    if free is not None and size > free.bytes:
        raise UsageError(f"{field}: {records:,} records need {amount(size)}, and {free.where}; less is valid")


@contextlib.contextmanager
def running_out() -> Iterator[None]:
    """Makes a `RunError` of one line of what JAX raises where memory runs out."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        free = room()
        line = (str(error).splitlines() or ["out of memory"])[0][:200]
        raise RunError(
            f"memory ran out ({line}){f'; {free.where}' if free else ''}. Smaller sizes of networks, batches "
            "(batch_size, length, horizon), num_envs or replay_capacity need less, and so does a larger grad_accum; a "
            "planner's chunk bounds what it imagines at once"
        ) from None
