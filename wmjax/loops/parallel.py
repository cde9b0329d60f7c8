"""Many seeds and many devices: the one place that knows how a run is mapped over seeds and spread over devices.

A run on several devices has the shapes of the same run on one device. What is learned (agent state, counters, keys) is
replicated; environments, replay and what belongs to them are spread over the axis of environments. One body is right
under all backends: the gradient is averaged over the axis `AXIS` by the agent's optimizer, so replicas stay equal bit
for bit; every device steps its own environments and samples its own replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wmjax import checks
from wmjax.loops import device
from wmjax.loops.device import RunState
from wmjax.types import Agent, Array, Env, Metrics, PyTree, Recipe, RunError, Stage, UsageError

AXIS = "devices"
BACKENDS = ("shard_map", "pmap")
_REPLICATED = -1


class ReplicasDifferError(RunError):
    """Devices hold different copies of what should be one; the message names the first such leaf."""


class Programs(NamedTuple):
    """A run's compiled programs. `init` and `compile_stage` work on one layout of the state, which `place` makes."""

    init: Callable  # (key, or keys [seeds]) -> RunState
    compile_stage: Callable  # (Stage) -> (RunState, iterations) -> (RunState, Metrics); the state is donated
    place: Callable  # (RunState of any arrays, as `gather` gives it) -> RunState
    gather: Callable  # (RunState) -> RunState with the shapes of a run on one device
    replica: Callable  # (replicated part of a RunState) -> the same on one device
    check_replicas: Callable  # (RunState) -> None; raises `ReplicasDifferError`
    template: RunState  # shapes and dtypes of what `gather` gives
    failure: Callable = lambda: None  # () -> the `RunError` that ended a stage early, or None; of the host loop
    make_way: Callable = lambda: None  # () -> None; ends environments on the host until they are needed again


def share(recipe: Recipe, devices: int) -> Recipe:
    """The recipe of one of several devices that together follow `recipe`.

    Raises `UsageError` where environments, a batch or a population cannot be divided evenly.
    """
    numbers = {"num_envs": recipe.num_envs}
    for stage in recipe.stages:
        numbers |= {f"batch_size of update {update.name!r}": update.batch_size for update in stage.updates}
        if stage.evolve:
            names = ("population", "mean_rollouts", *["batch_size"] * (stage.evolve.where == "dream"))
            numbers |= {f"{name} of search {stage.evolve.name!r}": getattr(stage.evolve, name) for name in names}
    for name, number in numbers.items():
        if number % devices:
            raise UsageError(f"devices: {devices} cannot share {name}={number} evenly; valid are its divisors")
    num_envs = recipe.num_envs // devices
    shared = lambda part: part._replace(batch_size=part.batch_size // devices)
    # A search takes its share of the population by itself: all devices ask and tell for the whole of it.
    stages = [
        stage._replace(updates=tuple(map(shared, stage.updates)), evolve=stage.evolve and shared(stage.evolve))
        for stage in recipe.stages
    ]
    return Recipe(num_envs, recipe.replay_capacity // recipe.num_envs * num_envs, tuple(stages))


def check_devices(devices: int, backend: str) -> None:
    """Raises `UsageError` unless there are that many devices, and the backend is one of `BACKENDS`."""
    checks.number("devices", devices)
    checks.choice("parallel", backend, BACKENDS)
    there = len(jax.devices())
    if devices > there:
        hint = "; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N out of one CPU"
        raise UsageError(
            f"devices: {devices} is more than the {there} {jax.default_backend()} device{'s' * (there > 1)} there "
            f"{'are' if there > 1 else 'is'}{hint if jax.default_backend() == 'cpu' else ''}"
        )


def programs(
    agent: Agent, env: Env, *, seeds: int = 1, devices: int = 1, backend: str = BACKENDS[0], options=None
) -> Programs:
    """How a run is initialized and advanced.

    Args:
      agent: its recipe says the numbers of the whole run; made with `axis_name=AXIS` if there are several devices.
      env: takes what the agent emits.
      seeds: how many; where there are several, the state has a leading axis of them, mapped over by `vmap` (on a CPU
        all but updates and searches, which are computed in turn).
      devices: how many to spread over; 1 for no axis at all.
      backend: "shard_map", or "pmap"; read where there are several devices.
      options: for the compiler, of `init` only.

    Raises:
      UsageError: there are not so many devices, or the recipe cannot be shared evenly.
    """
    check_devices(devices, backend)
    several = seeds > 1
    init = lambda key: device.init(agent, env, key)
    init = jax.vmap(init) if several else init
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds) if several else jax.random.key(0))
    template = jax.eval_shape(init, keys)
    compile_init = lambda key, **where: jax.jit(init, **where).lower(key).compile(compiler_options=options)(key)
    identity = lambda tree: tree
    if devices == 1:
        compile_stage = lambda stage: device.with_count(
            jax.jit(_body(agent, env, stage, several, None), donate_argnums=0)
        )
        place = lambda run: jax.tree.map(jnp.asarray, run)
        return Programs(compile_init, compile_stage, place, identity, identity, lambda run: None, template)

    shared = agent._replace(recipe=share(agent.recipe, devices))
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    axes = _axes(template, lead=int(several))
    specs = jax.tree.map(lambda axis: P() if axis == _REPLICATED else P(*[None] * axis, AXIS), axes)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    body = lambda stage: _body(shared, env, stage, several, AXIS)
    place = lambda run: jax.device_put(run, shardings)
    one_replica = lambda x: x.addressable_shards[0].data
    if backend == "shard_map":

        def compile_stage(stage: Stage) -> Callable:
            # Without `check_vma=False` gradients of replicated parameters would come summed over devices already.
            mapped = jax.shard_map(
                body(stage), mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P()), check_vma=False
            )
            return device.with_count(jax.jit(mapped, donate_argnums=0))

        return Programs(
            lambda key: compile_init(key, out_shardings=shardings),
            compile_stage,
            place,
            identity,
            lambda tree: jax.tree.map(one_replica, tree),
            lambda run: _check_replicas(run, axes),
            template,
        )

    stack = jax.jit(lambda run: _stack(run, axes, devices), out_shardings=NamedSharding(mesh, P(AXIS)))
    unstack = jax.jit(lambda run: _unstack(run, axes), out_shardings=shardings)

    def compile_stage(stage: Stage) -> Callable:
        step = jax.pmap(
            body(stage), AXIS, in_axes=(0, None), devices=list(mesh.devices), donate_argnums=0, out_axes=(0, 0)
        )

        def run_stage(run: RunState, iterations: Array) -> tuple[RunState, Metrics]:
            run, metrics = step(run, iterations)
            return run, jax.tree.map(lambda x: one_replica(x)[0], metrics)

        return device.with_count(run_stage)

    return Programs(
        lambda key: stack(compile_init(key, out_shardings=shardings)),
        compile_stage,
        lambda run: stack(place(run)),
        unstack,
        lambda tree: jax.tree.map(lambda x: one_replica(x)[0], tree),
        lambda run: _check_replicas(run, axes),
        template,
    )


def _body(agent: Agent, env: Env, stage: Stage, several: bool, axis_name: str | None) -> Callable:
    if not several:
        return device.make_stage(agent, env, stage, axis_name)
    # One seed's update fills the cores of a CPU, and mapped over seeds it would be slower than in turn: its weights,
    # which all rows of a batch share, would become operands of batched products. It also compiles faster.
    in_turn = {"each": jax.custom_batching.sequential_vmap} if jax.default_backend() == "cpu" else {}
    return jax.vmap(device.make_stage(agent, env, stage, axis_name, **in_turn), (0, None))


def _axes(run: RunState, lead: int) -> RunState:
    """The axis of environments of every leaf, after `lead` axes of seeds; `_REPLICATED` where there is none."""
    axis = lambda tree, number: jax.tree.map(lambda _: number, tree)
    axes = axis(run, _REPLICATED)
    per_env = {name: axis(getattr(run, name), lead) for name in ("env_state", "timestep", "carry", "episode")}
    return axes._replace(replay=axes.replay._replace(data=axis(run.replay.data, lead + 1)), **per_env)


def _stack(run: RunState, axes: RunState, devices: int) -> RunState:
    """The run with a leading axis of devices on every leaf."""

    def one(x: Array, axis: int) -> Array:
        if axis == _REPLICATED:
            return jnp.broadcast_to(x, (devices, *x.shape))
        x = x.reshape(*x.shape[:axis], devices, -1, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(one, run, axes)


def _unstack(run: RunState, axes: RunState) -> RunState:
    """What `_stack` was given."""

    def one(x: Array, axis: int) -> Array:
        if axis == _REPLICATED:
            return x[0]
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(one, run, axes)


def _check_replicas(run: RunState, axes: RunState) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(run)[0]
    for (path, leaf), axis in zip(leaves, jax.tree.leaves(axes), strict=True):
        if axis != _REPLICATED:
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        first, *others = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        if any(other != first for other in others):
            raise ReplicasDifferError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} differs between devices"
            )


def tree_of_seed(tree: PyTree, index: int) -> PyTree:
    """One seed's part of a tree with a leading axis of seeds."""
    return jax.tree.map(lambda x: x[index], tree)
