"""The host loop: the stages of a recipe against environments in other processes, with replay in host memory.

It computes what the device loop computes, from the same keys: `act` on all environments, batches drawn by the same
code, updates and their metrics. Only the order differs, so that the device learns while the environments step: from its
second iteration on, the updates of a stage sample what was in replay before the steps of their iteration were added.

Each of several processes has environments and replay of its own, of which its devices get their parts of every batch.
They learn in step: what one of them cannot do, such as to go on without its environments, none does.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import distributed
from wmjax.loops import checkpoint, compiler, device
from wmjax.loops.device import Episode, RunState, Skips
from wmjax.loops.host import columns
from wmjax.loops.host.columns import Columns
from wmjax.loops.host.evolution import Search
from wmjax.loops.host.learning import Clock, Latents, Learner, accumulate
from wmjax.loops.host.rollout import DEFAULTS, Options, act_program, seed_words, start
from wmjax.loops.memory import SPARE, available_bytes, check_agent, resident_bytes
from wmjax.loops.on_data import begun, is_playable
from wmjax.loops.parallel import Copies, Programs
from wmjax.loops.rollout import random_act
from wmjax.loops.schedule import Schedule, check, first, readers, samplings
from wmjax.ops import noise
from wmjax.replay import chunks
from wmjax.replay.device import Record
from wmjax.replay.host import HostReplay, Saved, Shares, Sizes, cpu, sizes
from wmjax.run_folder import CHECKPOINTS, REPLAY
from wmjax.types import Agent, Array, HostEnv, HostEnvs, Metrics, PyTree, Recipe, RunError, Stage, TimeStep, UsageError


def shapes(agent: Agent, env: HostEnv) -> tuple[tuple[PyTree, PyTree], Record]:
    """Shapes and dtypes of the agent's state and carry, and of one time step of all environments."""
    num_envs = agent.recipe.num_envs
    obs = {name: jax.ShapeDtypeStruct((num_envs, *x.shape), x.dtype) for name, x in env.spec.obs.items()}
    reward, flag = (jax.ShapeDtypeStruct((num_envs,), dtype) for dtype in ("float32", bool))
    timestep = TimeStep(obs, reward, flag, flag, flag)

    def act(key: Array, timestep: TimeStep) -> tuple[PyTree, ...]:
        state = agent.init(key)
        carry = agent.act_carry(state.variables, num_envs)
        return state, *agent.act(state.variables, noise.row_keys(key, num_envs), carry, timestep, explore=True)

    state, carry, action, latent = jax.eval_shape(act, jax.random.key(0), timestep)
    return (state, carry), Record(timestep, action, latent)


def check_room(
    recipe: Recipe,
    state: PyTree,
    needs: Sizes,
    records: int,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Says how much memory and disk replay takes. Raises `UsageError` where a run needs more than there is.

    Args:
      recipe: of the run.
      state: of the agent, arrays or shapes.
      needs: of replay when it is full.
      records: that the run collects in all.
      folder: on whose disk replay is written; None where it is there already, or nowhere.
      say: is told.
    """
    check_agent(state)
    capacity = recipe.replay_capacity // recipe.num_envs * recipe.num_envs
    share = min(1.0, records / capacity)
    memory, disk = needs.memory_bytes, needs.disk_bytes
    filled = memory * share + needs.flags_bytes * (1 - share)  # flags are there from the start
    say(
        f"replay of {capacity:,} records: at most {memory / 1e9:.3g} GB of memory, "
        f"{disk / 1e9:.3g} GB of disk; this run fills {share:.0%} of it"
    )
    free = available_bytes()
    if free is not None and filled > SPARE * free:
        raise _too_large(recipe, filled)
    if folder is not None:
        free = shutil.disk_usage(folder).free
        if disk * share > SPARE * free:
            raise UsageError(
                f"replay_capacity: {recipe.replay_capacity} needs {disk * share / 1e9:.3g} GB of disk, "
                f"{free / 1e9:.3g} GB are free in {folder}; a smaller one is valid"
            )


def _too_large(recipe: Recipe, needed: float) -> UsageError:
    """The error where replay needs more memory than there is."""
    free = available_bytes()
    free = "" if free is None else f", {free / 1e9:.3g} GB are free"
    return UsageError(
        f"replay_capacity: {recipe.replay_capacity} needs {needed / 1e9:.3g} GB of memory{free}; a smaller one is "
        "valid, or memory_map (--memory-map) to keep on disk what is not a latent"
    )


class HostLoop(Programs):
    """What a run on the host consists of besides its `RunState`: environments, where they stand, and replay.

    Args:
      agent: brings the recipe.
      env: takes what the agent emits.
      path: the run's folder, where replay is written, and files that its checkpoints name are kept; None: nowhere.
      options: how to run.
      say: is told what goes wrong, and how much memory replay takes.
      stop: whether to end the stage as soon as possible.
      records: that the run collects in all; None where it is not going to collect.
      resume: whether replay is on the disk already.
      data: what replay holds from the start, `[rows, num_envs, ...]` one after the other, of an environment that is
        known by its spec alone and not stepped (`loops.on_data`).
      devices: how many learn together, each from its part of every batch, and as far as environments can be shared
        by devices, from environments of its own; the first of each process acts and searches.

    Raises:
      UsageError: the recipe cannot be run (`schedule.check`), or replay of so many records needs more memory or disk
        than there is.
    """

    def __init__(
        self,
        agent: Agent,
        env: HostEnv,
        path: Path | None = None,
        options: Options = DEFAULTS,
        say: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
        records: int | None = None,
        resume: bool = False,
        data: Iterable[Record] = (),
        devices: int = 1,
    ) -> None:
        check(agent)
        self._copies = Copies(devices)
        self._data = data
        self._agent, self._env, self._options, self._say, self._stop = agent, env, options, say, stop
        self._columns, self._schedule = Columns(agent.recipe.num_envs), Schedule(agent, env)
        self._num_envs, processes = self._columns.num_envs, distributed.count()
        self._folder, self._checkpoints = (None, None) if path is None else (path / REPLAY, path / CHECKPOINTS)
        recipe = agent.recipe
        capacity = recipe.replay_capacity // recipe.num_envs * self._num_envs
        (state, carry), example = shapes(agent._replace(recipe=recipe._replace(num_envs=self._num_envs)), env)
        kept = example, self._num_envs, capacity, samplings(recipe)
        needs = sizes(*kept, memory_map=options.memory_map, replays_saved=processes)
        needs = needs._replace(disk_bytes=needs.disk_bytes * processes)
        if records is not None:
            check_room(recipe, state, needs, records, None if resume else path, say)
        shared = math.gcd(recipe.num_envs, devices)
        shares = Shares(shared // processes, shared, shared // processes * distributed.index())
        where = dict(folder=self._folder, memory_map=options.memory_map, shares=shares, replays_saved=processes)
        try:
            self.replay = HostReplay(*kept, warn=say, **where)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise _too_large(agent.recipe, needs.memory_bytes) from None
        run = jax.eval_shape(self._begin, state, carry, jax.eval_shape(lambda: jax.random.key(0)))
        self.template = self._columns.part(run._replace(replay=self.replay.template()))
        self._envs: HostEnvs | None = None
        self._lost = 0  # of environments that are closed
        self._timestep: TimeStep | None = None  # not acted on yet
        self._pool = ThreadPoolExecutor(1, "loader")
        self._latents = Latents(self.replay, self._copies)
        self._named: dict[int, set[bytes]] = {}  # by the step of a checkpoint, the replay files that it names
        self._lists: dict[bytes, bytes] = {}  # of `columns.list_files`
        # Stages that act, or learn, by the same function have its program in common.
        by_chance, rows = random_act(agent, env.spec), self._columns.row_keys
        self._act_by = cache(lambda act: act_program(act or by_chance, env, rows, explore=True))
        self._learn_by = cache(self._copies.compiled)
        self._count = jax.jit(device.count_episodes)
        self._keys = jax.jit(self._iteration_keys, static_argnums=3)

    def _begin(self, state: PyTree, carry: PyTree, key: Array) -> RunState:
        zero, n = np.int32(0), self._num_envs
        episode, skips = Episode(np.zeros(n, np.float32), np.zeros(n, np.int32)), Skips(zero, zero, zero)
        return RunState(state, (), (), (), carry, episode, skips, key, zero, zero, zero)

    def _spread(self, run: RunState) -> RunState:
        """The state of which every device has what it learns."""
        return run._replace(agent=self._copies.spread(run.agent), skips=self._copies.spread(run.skips))

    def replica(self, tree: PyTree) -> PyTree:
        return self._copies.replica(tree)

    def check_replicas(self, run: RunState) -> None:
        self._copies.check((run.agent, run.skips))

    # -----------------------------------------------------------------------------------------------------------------
    # Begin, save, go on, end

    def init(self, key: Array) -> RunState:
        """The state of a run before its first iteration, from keys as in the device loop; starts the environments."""
        key_agent, _, _, key_run = jax.random.split(key, 4)
        state = jax.jit(self._agent.init, compiler_options=compiler.options(moments=True))(key_agent)
        carry = jax.jit(self._agent.act_carry, static_argnums=1)(state.variables, self._num_envs)
        run = self._spread(self._begin(state, carry, key_run))
        if not is_playable(self._env):
            self._fill()
            return begun(self._agent, run)
        self._begin_episodes(run)
        return run

    def _fill(self) -> None:
        """Adds the data that the run is about to replay, where an online queue has nothing of it to give."""
        for records in self._data:
            nothing = jax.tree.map(lambda x: np.zeros_like(x[:1]), self.replay.latent)
            latent = jax.tree.map(partial(np.repeat, repeats=len(records.action), axis=0), nothing)
            self.replay.add(records._replace(latent=latent))
        self.replay.skip_online(samplings(self._agent.recipe))

    def place(self, run: RunState) -> RunState:
        """The state that goes on from what `gather` gave; environments begin new episodes."""
        saved = columns.files_of(self._folder, run.replay.digests) if self._folder else set()
        self._named[self._schedule.env_steps(run)] = saved  # also what is torn now: others may hold it
        self._load(run.replay)
        counters = {name: np.asarray(getattr(run, name)) for name in ("stage", "iteration", "steps")}
        run = self._spread(run._replace(replay=(), **counters))
        if not is_playable(self._env):
            return run
        self._begin_episodes(run)
        self._say(f"the {self._columns.of} environments begin new episodes; those that ran when this was saved are cut")
        return run

    def _load(self, saved: Saved) -> None:
        """Has replay go on from what was saved; all processes leave out what is lost in one of them."""
        if self._folder is not None and distributed.leads():
            chunks.tidy(self._folder)
        distributed.wait()  # until none of what others begin to write could go with it
        lost = distributed.at_once(lambda: self.replay.read(saved, self._columns.first, self._columns.of))
        if lost := columns.lost_anywhere(lost):
            self.replay.leave_out(lost, self._columns.of)

    def _begin_episodes(self, run: RunState) -> None:
        if self._envs is None:
            self._envs = start(self._env, self._num_envs, self._options, training=True, say=self._say, stop=self._stop)
        seed = [*seed_words(run.key), first(run.steps)]
        self._timestep = self._envs.reset([[*seed, self._columns.first + i] for i in range(self._num_envs)])

    def gather(self, run: RunState) -> RunState:
        """The state as it is saved, its replay files written. Raises `OSError` if they cannot be."""
        self._latents.flush()
        saved, error = self._saved_replay()
        if not distributed.every(error is None):
            # Perhaps the disk is full of what was in replay since the last save, and is not any more.
            self._remove_unused_files()
            saved, error = self._saved_replay()
            if not distributed.every(error is None):
                raise error or OSError("another process could not write its replay")
        if self._checkpoints is not None:
            table, names = columns.list_files(self._folder, saved.digests, self._lists)
            saved = saved._replace(digests=table)
            newest = max(self._named, default=0)  # may still be on its way to the disk
            there = {*checkpoint.steps(self._checkpoints), newest}
            self._named = {step: names for step, names in self._named.items() if step in there}
            step = self._schedule.env_steps(run)  # may be saved already, and is until this one is on the disk
            self._named[step] = names | self._named.get(step, set())
            self._remove_unused_files()
        return self._columns.part(run._replace(replay=saved))

    def _saved_replay(self) -> tuple[Saved | None, OSError | None]:
        try:
            return self.replay.saved(), None
        except OSError as error:
            return None, error

    def _remove_unused_files(self) -> None:
        """Keeps the files of replay now, and of the checkpoints there are; none goes while one of them is unknown."""
        if self._checkpoints is None:
            return
        known = set(checkpoint.steps(self._checkpoints)) <= self._named.keys()
        columns.keep_files(self._folder, self.replay.digests(), set().union(*self._named.values()) if known else None)

    def make_way(self) -> None:
        """Ends the environments; where they are needed again, they are started, and begin new episodes."""
        if self._envs is not None:
            self._lost += self._envs.restarts
            self._envs.close()
        self._envs = self._timestep = None

    def close(self) -> None:
        """Ends environments and threads."""
        self.make_way()
        self._pool.shutdown()
        self.replay.close()

    # -----------------------------------------------------------------------------------------------------------------
    # A stage

    def compile_stage(self, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
        """A stage as `(state, iterations) -> (state, metrics)`, as `device.compile_stage`, that may end early.

        It does where it is told to stop, or where it cannot go on (`failure`). The iteration that it is in then counts
        as done if what it collects is in replay, and as not done otherwise; updates that it made are kept, others are
        not made up for. The agent state that it is given is donated.
        """
        act, learn = self._act_by(stage.act), [self._learn_by(update.fn) for update in stage.updates]
        search = Search(self._agent, self._env, stage.evolve) if stage.evolve else None

        def run_stage(run: RunState, iterations: int) -> tuple[RunState, Metrics]:
            clock, sums, done = Clock(), {}, 0
            for _ in range(iterations):
                if self._ends():
                    break
                if not self._collects(stage) and not self._ready(stage):
                    self.failure = RunError(
                        f"replay holds too few records for the stage {stage.name!r}, which collects none: its files in "
                        f"{self._folder} are lost; train into another folder"
                    )
                    break
                if stage.evolve:
                    run, more = self._search(stage, search, run)
                else:
                    run, more = self._iterate(stage, act, learn, clock, run)
                if more is None:
                    break
                sums, done = accumulate(sums, more), done + 1
            clock.wait("device", lambda: jax.block_until_ready(run.agent.step))
            return run, self._metrics(stage, sums, done, clock)

        return run_stage

    def _ends(self) -> bool:
        """Whether a process cannot go on, or was told to stop; then all end, for what went wrong with one of them."""
        told = distributed.exchange(["" if self.failure is None else str(self.failure), bool(self._stop())])
        self._hear([text for text, _ in told])
        return self.failure is not None or any(stop for _, stop in told)

    def _hear(self, told: list[str]) -> None:
        """Fails as another process has, by what each says of itself."""
        failed = [f"process {i}: {text}" for i, text in enumerate(told) if text]
        if failed and self.failure is None:
            self.failure = RunError(failed[0])

    def _all_have(self, collected: Any) -> bool:
        """Whether all processes have collected what the iteration asks for; each says why not."""
        told = distributed.exchange([collected is not None, "" if self.failure is None else str(self.failure)])
        self._hear([text for _, text in told])
        return all(done for done, _ in told)

    def _metrics(self, stage: Stage, sums: dict[str, Metrics], iterations: int, clock: Clock) -> Metrics:
        episodes, lost = sums.get("", {}), self._lost + (self._envs.restarts if self._envs else 0)
        *of_all, lost = distributed.gather([*map(float, episodes.values()), lost]).sum(0)
        episodes = dict(zip(episodes, jnp.float32(of_all), strict=True))
        updates = tuple(update for update in stage.updates if update.name in sums)
        done = stage._replace(updates=updates, evolve=stage.evolve if iterations else None)
        metrics = device.means(done, episodes, sums, jnp.float32(iterations)) | clock.shares()
        return metrics | {
            "envs/restarts": np.float32(lost),
            "memory/resident_gb": np.float32(resident_bytes() / 1e9),
        }

    @staticmethod
    def _iteration_keys(
        key: Array, stage: Array, iteration: Array, repeats: tuple[int, ...]
    ) -> tuple[Array, list[Array], Array]:
        """For acting; for every update `[repeats, 2]`, to sample and to learn; and `[2]` for a search. As on device."""
        key = jax.random.fold_in(jax.random.fold_in(key, stage), iteration)
        one = lambda number, count: jax.random.split(jax.random.fold_in(key, number), count)
        both = [jax.vmap(jax.random.split)(one(number, count)) for number, count in enumerate(repeats, 1)]
        return jax.random.fold_in(key, 0), both, jax.random.split(jax.random.fold_in(key, 1 + len(repeats)))

    def _ready(self, stage: Stage) -> bool:
        """Whether replay holds what the stage samples; files may have been lost."""
        return all(self.replay.can_sample(reader.sampling) for reader in readers(stage))

    def _collects(self, stage: Stage) -> bool:
        """Whether it steps the environments. Where they are but a spec, env steps are counted alone."""
        return bool(stage.collect) and is_playable(self._env)

    def _iterate(
        self, stage: Stage, act: Callable, learn: list[Callable], clock: Clock, run: RunState
    ) -> tuple[RunState, dict[str, Metrics] | None]:
        """One iteration: collect and learn. Sums by the name of an update, of episodes by ""; None if it stopped.

        Several processes make the same updates, whatever happens to their environments.
        """
        repeats = tuple(update.repeats for update in stage.updates)
        key_act, keys, _ = self._keys(jax.device_put(run.key, cpu()), run.stage, run.iteration, repeats)
        learner = Learner(
            stage, learn, keys, run.agent, run.skips, self.replay, self._latents, self._pool, clock,
            self._stop if distributed.count() == 1 else lambda: False, self._copies,
        )  # fmt: skip
        collects = self._collects(stage)
        begun = not collects or self._timestep is not None or self._begin_again(run)
        early = self._options.overlap and first(run.iteration) > 0 and self._ready(stage)
        if early:
            learner.start()
        if begun:
            collected = self._collect(stage.collect if collects else 0, act, key_act, run.carry, learner, clock)
        else:
            collected = self._give_up(learner)
        learner.close()
        if not self._all_have(collected):
            collected = None
        sums: dict[str, Metrics] = {}
        if collected is not None and collects:
            carry, records = collected
            episode, sums[""] = self._count(run.episode, records.step._replace(obs={}))
            self._latents.make_way(stage.collect)
            try:
                self.replay.add(records)
            except RunError as error:
                self.failure = error
            run = run._replace(carry=carry, episode=episode)
        if collected is not None and not early and self._ready(stage):
            learner.start()
            learner.until(learner.total)
            learner.close()
        run = run._replace(agent=learner.agent, skips=learner.skips)
        if collected is None or (learner.interrupted and not collects):
            return run, None
        steps = run.steps + np.int32(stage.collect)
        return run._replace(iteration=run.iteration + np.int32(1), steps=steps), sums | learner.sums

    def _give_up(self, learner: Learner) -> None:
        """Ends an iteration that cannot be collected, after the updates that other processes make with this one."""
        if distributed.count() > 1:
            learner.until(learner.total)

    def _search(self, stage: Stage, search: Search, run: RunState) -> tuple[RunState, dict[str, Metrics] | None]:
        """One iteration of a search; None if it stopped."""
        evolve, batch = stage.evolve, None
        _, _, (key_sample, key_search) = self._keys(run.key, run.stage, run.iteration, ())
        if evolve.where == "dream":
            self._latents.flush()
            batch = self._columns.whole_batch(
                self.replay.sample(key_sample, evolve.sampling, evolve.batch_size // distributed.count())[0]
            )
        begun = evolve.where == "dream" or self._envs is not None or self._begin_again(run)
        if not distributed.every(begun):
            return run, None
        try:
            found = search(self._envs, self.replica(run.agent), key_search, batch)
        except RunError as error:
            self.failure, found = error, None
        self._timestep = None  # the episodes that acting was in are over
        if found is None:
            return run, None
        agent, metrics = found
        return run._replace(agent=self._copies.spread(agent), iteration=run.iteration + np.int32(1)), {
            evolve.name: metrics
        }

    def _begin_again(self, run: RunState) -> bool:
        """Begins new episodes; False where it was told to stop, or too many environments were lost."""
        try:
            self._begin_episodes(run)
        except RunError as error:
            self.failure = error
        return self._timestep is not None

    def _collect(
        self, steps: int, act: Callable, key: Array, carry: PyTree, learner: Learner, clock: Clock
    ) -> tuple[PyTree, Record] | None:
        """Steps the environments, and has the learner, if it was started, learn meanwhile. None if it stopped."""
        key, timestep, rows = jax.device_put(key, jax.local_devices()[0]), self._timestep, []
        try:
            for t in range(steps):
                carry, action, native, latent = act(self.replica(learner.agent.variables), key, t, carry, timestep)
                self._envs.send(clock.wait("device", lambda native=native: np.asarray(native)))
                learner.until(math.ceil(learner.total * (t + 1) / steps))
                following = clock.wait("envs", self._envs.receive)
                if following is None:
                    return self._give_up(learner)
                rows.append(Record(timestep, action, latent))
                timestep = following
        except RunError as error:
            self.failure = error
            return self._give_up(learner)
        learner.until(learner.total)
        self._timestep = timestep
        return carry, jax.tree.map(lambda *x: np.stack(x), *map(jax.device_get, rows)) if rows else Record((), (), ())
