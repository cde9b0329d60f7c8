"""Many seeds and many devices: the one place that knows how a run is mapped over seeds and spread over devices.

Devices may be those of several processes, each of which runs the same programs on its own.

A run on several devices has the shapes of the same run on one device. What is learned (agent state, counters, keys) is
replicated; environments, replay and what belongs to them are spread over the axis of environments. One body is right
under all backends: the gradient is averaged over the axis `AXIS` by the agent's optimizer, so replicas stay equal bit
for bit; every device steps its own environments and samples its own replay. Where parameters are sharded, a second axis
says over how many devices (`loops.fsdp`): environments are spread over both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wmjax import checks, distributed
from wmjax.loops import compiler, device, fsdp, shards
from wmjax.loops.device import RunState
from wmjax.replay import device as replays
from wmjax.types import Agent, Array, Axes, Env, Metrics, PyTree, Recipe, RunError, Stage, UsageError

AXIS = fsdp.AXES.copies
BACKENDS = ("shard_map", "pmap")
BRIEF = 256  # steps of each environment: a stage that only takes so many runs shorter than it would compile
_REPLICATED = -1


class ReplicasDifferError(RunError):
    """Devices hold different copies of what should be one; the message names the first such leaf."""


class Programs:
    """How a run is initialized and advanced: a class for each place that it can be computed in.

    Besides what is here each has these, of one layout of the state:

        init(key, or keys [seeds]) -> RunState
        compile_stage(Stage) -> (RunState, iterations) -> (RunState, Metrics), which donates the state
        place(RunState of any arrays, as `gather` gives it) -> RunState
        template: RunState, shapes and dtypes of what `gather` gives
    """

    failure: RunError | None = None  # why a stage ended early; of the host loop
    ahead = False  # whether the shapes of `taken` are enough to compile a stage

    @property
    def taken(self) -> RunState:
        """Shapes and dtypes of what a stage takes, where `ahead` says that they are enough to compile it."""
        return self.template

    def gather(self, run: RunState) -> RunState:
        """The state as it is of a run on one device."""
        return run

    def replica(self, tree: PyTree) -> PyTree:
        """A part of the state that is the same on all devices, or parameters that are spread, on one of them, whole.

        For what is spread over the devices of several processes all of them have to ask.
        """
        return tree

    def check_replicas(self, run: RunState) -> None:
        """Raises `ReplicasDifferError` where devices hold different copies of what should be one."""

    def make_way(self) -> None:
        """Ends environments on the host until they are needed again."""


def share(recipe: Recipe, devices: int, on_host: bool = False) -> Recipe:
    """The recipe of one of several devices that together follow `recipe`; `on_host`: they share batches alone.

    Raises `UsageError` where environments, a batch or a population cannot be divided evenly.
    """
    numbers = {} if on_host else {"num_envs": recipe.num_envs}
    for stage in recipe.stages:
        numbers |= {f"batch_size of update {update.name!r}": update.batch_size for update in stage.updates}
        if stage.evolve:
            names = [
                *["population", "mean_rollouts"] * (not on_host),
                *["batch_size"] * (stage.evolve.where == "dream"),
            ]
            numbers |= {f"{name} of search {stage.evolve.name!r}": getattr(stage.evolve, name) for name in names}
    for name, number in numbers.items():
        if number % devices:
            raise UsageError(f"devices: {devices} cannot share {name}={number} evenly; valid are its divisors")
    shared = lambda part: part._replace(batch_size=part.batch_size // devices)
    stages = [stage._replace(updates=tuple(map(shared, stage.updates))) for stage in recipe.stages]
    if on_host:
        if recipe.num_envs % distributed.count():
            raise UsageError(
                f"num_processes: {distributed.count()} cannot share num_envs={recipe.num_envs} evenly; valid are its "
                "divisors"
            )
        return recipe._replace(stages=tuple(stages))
    num_envs = recipe.num_envs // devices
    # A search takes its share of the population by itself: all devices ask and tell for the whole of it.
    stages = [stage._replace(evolve=stage.evolve and shared(stage.evolve)) for stage in stages]
    return Recipe(num_envs, recipe.replay_capacity // recipe.num_envs * num_envs, tuple(stages))


def default_devices() -> int:
    """How many devices a run takes where nobody says: one, but of several processes all."""
    return 1 if distributed.count() == 1 else len(jax.devices())


def axis_name(devices: int, shard_params: int = 1) -> str | Axes | None:
    """The named axis, or axes, that an agent is made for."""
    return None if devices == 1 else AXIS if shard_params == 1 else fsdp.AXES


def check_devices(devices: int, backend: str, shard_params: int = 1) -> None:
    """Raises `UsageError` unless there are that many devices, the backend is one of `BACKENDS`, and it may shard so.

    Of several processes each has to have as many of them.
    """
    checks.number("devices", devices)
    fsdp.check(checks.number("shard_params", shard_params), devices)
    if shard_params > 1 and backend == "pmap":
        raise UsageError(f"parallel: 'pmap' is not valid with shard_params={shard_params}; 'shard_map' is")
    checks.choice("parallel", backend, BACKENDS)
    there, processes = len(jax.devices()), distributed.count()
    if processes > 1 and backend == "pmap":
        raise UsageError(f"parallel: 'pmap' is not valid with {processes} processes; 'shard_map' is")
    if devices % processes:
        raise UsageError(
            f"devices: {devices} cannot be shared by {processes} processes evenly; a multiple of it is valid"
        )
    if devices > there:
        hint = "; XLA_FLAGS=--xla_force_host_platform_device_count=N makes N out of one CPU"
        raise UsageError(
            f"devices: {devices} is more than the {there} {jax.default_backend()} device{'s' * (there > 1)} there "
            f"{'are' if there > 1 else 'is'}{hint if jax.default_backend() == 'cpu' else ''}"
        )


def _devices(devices: int) -> list[jax.Device]:
    """The devices of a run, as many of each process, in the order of the processes."""
    each = devices // distributed.count()
    of = lambda process: [device for device in jax.devices() if device.process_index == process]
    return [device for process in range(distributed.count()) for device in of(process)[:each]]


class OneDevice(Programs):
    """Several seeds are a leading axis of the state, mapped over by `vmap`.

    On a CPU updates and searches of several seeds are computed in turn.
    """

    ahead = True

    def __init__(self, agent: Agent, env: Env, seeds: int) -> None:
        self._agent, self._env, self._several = agent, env, seeds > 1
        self._wrappers: dict[str, Callable] = {}  # of `device.make_stage`
        init = partial(device.init, agent, env)
        self._init = jax.vmap(init) if self._several else init
        key = lambda: jax.random.split(jax.random.key(0), seeds) if self._several else jax.random.key(0)
        self.template = jax.eval_shape(self._init, jax.eval_shape(key))

    def init(self, key: Array) -> RunState:
        return jax.jit(self._init, compiler_options=compiler.options(moments=True))(key)

    def _body(self, stage: Stage, axis_name: str | Axes | None = None) -> Callable[[RunState, Array], tuple]:
        make = partial(device.make_stage, self._agent, self._env, stage, axis_name)
        if not self._several:
            return make(**self._wrappers)
        # One seed's update fills the cores of a CPU. Mapped over seeds it would be slower than in turn: its weights,
        # which all rows of a batch share, would become operands of batched products. It would compile slower, too.
        each, in_turn = self._wrappers.get("each", lambda fn: fn), jax.custom_batching.sequential_vmap
        wrappers = {"each": lambda fn: in_turn(each(fn))} if jax.default_backend() == "cpu" else {}
        return jax.vmap(make(**self._wrappers | wrappers), (0, None))

    def compile_stage(self, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
        return jax.jit(self._body(stage), donate_argnums=0, compiler_options=_options(stage))

    def place(self, run: RunState) -> RunState:
        return jax.tree.map(jnp.asarray, run)


class ShardMap(OneDevice):
    """Several devices, each with its part of the environments and of what belongs to them, by `shard_map`."""

    ahead = False  # it takes where they are, too

    def __init__(self, agent: Agent, env: Env, seeds: int, devices: int, shard_params: int = 1) -> None:
        super().__init__(agent, env, seeds)
        self._agent = agent._replace(recipe=share(agent.recipe, devices))
        self._axis_name, lead = axis_name(devices, shard_params), int(self._several)
        self._axes = _axes(self.template, lead)
        names, shape = (AXIS,), (devices,)
        if shard_params > 1:
            names, shape = tuple(fsdp.AXES), (devices // shard_params, shard_params)
        self._mesh = Mesh(np.array(_devices(devices)).reshape(shape), names)
        self._specs = jax.tree.map(lambda axis: P() if axis == _REPLICATED else P(*[None] * axis, names), self._axes)
        if shard_params > 1:
            where = fsdp.axes(self.template.agent, shard_params, lead)
            self._wrappers = fsdp.wrappers(where)
            part = lambda axis: P() if axis == fsdp.WHOLE else P(*[None] * (lead + axis), fsdp.AXES.parts)
            self._specs = self._specs._replace(agent=jax.tree.map(part, where))
        self._whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(self._mesh, P()))
        self._shardings = jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), self._specs)
        placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        self.template = jax.tree.map(placed, self.template, self._shardings)

    def init(self, key: Array) -> RunState:
        where = dict(compiler_options=compiler.options(moments=True), out_shardings=self._shardings)
        return _begun_together(jax.jit(self._init, **where))(key)

    def compile_stage(self, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
        specs = dict(in_specs=(self._specs, P()), out_specs=(self._specs, P()))
        # Without `check_vma=False` gradients of replicated parameters would come summed over devices already.
        mapped = jax.shard_map(self._body(stage, self._axis_name), mesh=self._mesh, check_vma=False, **specs)
        return _begun_together(jax.jit(mapped, donate_argnums=0, compiler_options=_options(stage)))

    def gather(self, run: RunState) -> RunState:
        # Each device counts the items of its own environments.
        return run._replace(replay=run.replay._replace(cursor=run.replay.cursor * self._mesh.size))

    def place(self, run: RunState) -> RunState:
        cursor = run.replay.cursor // self._mesh.size
        return jax.device_put(run._replace(replay=run.replay._replace(cursor=cursor)), self._shardings)

    def replica(self, tree: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        # Processes ask for counters by clocks of their own, so nothing is gathered unless it has to be.
        parts = [x for x in leaves if self._wrappers and not x.is_fully_replicated]
        whole = iter(self._whole(parts) if parts else ())
        found = (next(whole) if self._wrappers and not x.is_fully_replicated else x for x in leaves)
        return structure.unflatten([x.addressable_shards[0].data for x in found])

    def check_replicas(self, run: RunState) -> None:
        leaves, axes = jax.tree_util.tree_flatten_with_path(run)[0], jax.tree.leaves(self._axes)
        _check_same([leaf for leaf, axis in zip(leaves, axes, strict=True) if axis == _REPLICATED])


class PMap(ShardMap):
    """As `ShardMap`, by `pmap`: every leaf has a leading axis of devices."""

    def __init__(self, agent: Agent, env: Env, seeds: int, devices: int) -> None:
        super().__init__(agent, env, seeds, devices)
        over = lambda function, **where: jax.jit(lambda run: jax.tree.map(function, run, self._axes), **where)
        self._stack = over(partial(_stack, devices), out_shardings=NamedSharding(self._mesh, P(AXIS)))
        self._unstack = over(_unstack, out_shardings=self._shardings)

    def init(self, key: Array) -> RunState:
        return self._stack(super().init(key))

    def compile_stage(self, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
        where = dict(in_axes=(0, None), out_axes=(0, 0), devices=list(self._mesh.devices))
        step = jax.pmap(self._body(stage, AXIS), AXIS, donate_argnums=0, **where)

        def run_stage(run: RunState, iterations: int) -> tuple[RunState, Metrics]:
            run, metrics = step(run, iterations)
            return run, self.replica(metrics)

        return run_stage

    def place(self, run: RunState) -> RunState:
        return self._stack(super().place(run))

    def gather(self, run: RunState) -> RunState:
        return super().gather(self._unstack(run))

    def replica(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x[0], super().replica(tree))


def programs(
    agent: Agent, env: Env, *, seeds: int = 1, devices: int = 1, backend: str = BACKENDS[0], shard_params: int = 1
) -> Programs:
    """How a run is initialized and advanced on devices.

    Args:
      agent: its recipe says the numbers of the whole run; made for `axis_name` of as many devices.
      env: takes what the agent emits.
      seeds: how many; where there are several, the state has a leading axis of them.
      devices: how many to spread over; 1 for no axis at all.
      backend: one of `BACKENDS`; read where there are several devices.
      shard_params: over how many devices parameters and optimizers' states are spread; divides `devices`.

    Raises:
      UsageError: there are not so many devices, or the recipe cannot be shared evenly.
    """
    check_devices(devices, backend, shard_params)
    if devices == 1:
        return OneDevice(agent, env, seeds)
    if backend == "pmap":
        return PMap(agent, env, seeds, devices)
    return ShardMap(agent, env, seeds, devices, shard_params)


class Copies:
    """What environments on the host learn by: each device has all of the agent's state, and a part of every batch.

    One device computes as if there were none of this.
    """

    def __init__(self, devices: int) -> None:
        """Raises `UsageError` unless there are so many."""
        check_devices(devices, BACKENDS[0])
        self._several, mesh = devices > 1, Mesh(np.array(_devices(devices)), (AXIS,))
        places = [NamedSharding(mesh, spec) for spec in (P(), P(None, AXIS))]  # batches are `[T, B, ...]`
        self.whole, self.rows = places if self._several else [jax.local_devices()[0]] * 2
        self._processes = distributed.count()

    def learn(self, update: Callable) -> Callable:
        """`device.apply_update` of an `Update.fn`."""
        apply = partial(device.apply_update, update, AXIS if self._several else None)
        if not self._several:
            return apply
        specs = (*[self.whole.spec] * 3, self.rows.spec)
        return jax.shard_map(apply, mesh=self.whole.mesh, in_specs=specs, out_specs=specs, check_vma=False)

    def compiled(self, update: Callable) -> Callable:
        """`learn`, compiled; the state and the count of skips are donated."""
        how = dict(donate_argnums=(0, 1), compiler_options=compiler.options())
        return _begun_together(jax.jit(self.learn(update), **how))

    def spread(self, tree: PyTree) -> PyTree:
        """A tree that every device gets all of."""
        if self._processes > 1:
            return jax.tree.map(lambda x: shards.placed(x, self.whole), tree)
        return jax.device_put(tree, self.whole) if self._several else tree

    def share(self, key: Array, batch: PyTree) -> tuple[Array, PyTree]:
        """A key for every device, and a batch `[T, B, ...]` in host memory of which each gets a part.

        Each of several processes brings the part of its own devices.
        """
        if self._processes == 1:
            return jax.device_put((key, batch), (self.whole, self.rows))
        return self.spread(key), self.rows_of(batch)

    def rows_of(self, batch: PyTree) -> PyTree:
        """The batch that several processes have the parts of; that of one process, as it is."""
        if self._processes == 1:
            return batch

        def joined(x: np.ndarray) -> Array:
            here = x.shape[1]
            first = distributed.index() * here
            own = lambda index: x[:, slice(index[1].start - first, index[1].stop - first)]
            return jax.make_array_from_callback((x.shape[0], here * self._processes, *x.shape[2:]), self.rows, own)

        return jax.tree.map(joined, batch)

    def own_rows(self, tree: PyTree) -> PyTree:
        """The part that this process has of what an update gives for each row of a batch; in host memory."""
        if self._processes == 1:
            return tree

        def own(x: Array) -> np.ndarray:
            parts = sorted(x.addressable_shards, key=lambda part: part.index[1].start)
            return np.concatenate([np.asarray(part.data) for part in parts], 1)

        return jax.tree.map(own, tree)

    def replica(self, tree: PyTree) -> PyTree:
        """What `spread` gave, on the first device."""
        first = lambda x: x.addressable_shards[0].data if isinstance(x, jax.Array) else x
        return jax.tree.map(first, tree) if self._several else tree

    def check(self, tree: PyTree) -> None:
        """Raises `ReplicasDifferError` where devices do not have the same of what `spread` gave."""
        if self._several:
            _check_same(jax.tree_util.tree_flatten_with_path(tree)[0])


def _check_same(leaves: list[tuple]) -> None:
    """Raises `ReplicasDifferError` where devices do not have the same of a leaf, which comes with its path."""
    digests: dict[str, str] = {}
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for shard in leaf.addressable_shards:  # of what is sharded, devices with the same part
            found = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
            if digests.setdefault(f"{name} {shard.index}", found) != found:
                raise ReplicasDifferError(f"{name} differs between devices")
    for i, each in enumerate(distributed.exchange(digests)):
        if differing := [part for part in digests if each.get(part, digests[part]) != digests[part]]:
            name = differing[0].partition(" ")[0]
            raise ReplicasDifferError(f"{name} differs between processes {distributed.index()} and {i}")


def _begun_together(program: Any) -> Callable:
    """A compiled program of several processes, which begin it for the first time once all have compiled it.

    Their first collectives wait for one another, but not for as long as compiling may take.
    """
    if distributed.count() == 1:
        return program
    compiled = []

    def call(*args: Any) -> Any:
        if not compiled:
            compiled.append(program.lower(*args).compile())  # JAX keeps it for calls of these shapes
            distributed.wait()
        return program(*args)

    return call


def _options(stage: Stage) -> dict[str, Any] | None:
    """Options of `jax.jit` for a stage."""
    if stage.evolve and not stage.updates:  # the pictures of `racing` take five times as long by level 1 or 2
        return None
    return compiler.options(moments=not stage.updates and stage.collect * (stage.iterations or BRIEF + 1) <= BRIEF)


def _axes(run: RunState, lead: int) -> RunState:
    """The axis of environments of every leaf, after `lead` axes of seeds; `_REPLICATED` where there is none."""
    axis = lambda tree, number: jax.tree.map(lambda _: number, tree)
    axes = axis(run, _REPLICATED)
    per_env = {name: axis(getattr(run, name), lead) for name in ("env_state", "timestep", "carry", "episode")}
    return axes._replace(replay=replays.env_axes(run.replay, lead), **per_env)


def _stack(devices: int, x: Array, axis: int) -> Array:
    """A leaf with a leading axis of devices."""
    if axis == _REPLICATED:
        return jnp.broadcast_to(x, (devices, *x.shape))
    return jnp.stack(jnp.split(x, devices, axis))


def _unstack(x: Array, axis: int) -> Array:
    """What `_stack` was given."""
    return x[0] if axis == _REPLICATED else jnp.concatenate([*x], axis)


def tree_of_seed(tree: PyTree, index: int) -> PyTree:
    """One seed's part of a tree with a leading axis of seeds."""
    return jax.tree.map(lambda x: x[index], tree)
