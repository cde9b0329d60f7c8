"""The device loop: a stage of a recipe as one compiled program, its environments and replay included.

A run is one pytree, `RunState`, from which alone it goes on: the same program does any number of iterations, and the
keys of an iteration depend on the run's key, the stage and the iteration only. So a run does not depend on how it was
cut into chunks, or on having been stopped and restored between them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import evolution
from wmjax.loops.rollout import Position, random_act, rollout
from wmjax.loops.schedule import check, samplings
from wmjax.ops import flat, noise
from wmjax.replay import device as replays
from wmjax.replay.device import Record, Replay
from wmjax.types import (
    Agent,
    AgentState,
    Array,
    Axes,
    Env,
    Evolve,
    Metrics,
    PyTree,
    Stage,
    TimeStep,
    Trajectory,
    Update,
)


class Episode(NamedTuple):
    """The running episode of each environment."""

    returns: Array  # float32 [num_envs], sum of rewards so far
    lengths: Array  # int32 [num_envs], agent steps so far


class Skips(NamedTuple):
    """Updates that were not applied because their loss or gradient was not finite, int32 each."""

    total: Array
    in_a_row: Array  # the newest ones
    longest: Array  # most in a row so far, or since the run went on after too many (`count_anew`)


class RunState(NamedTuple):
    """Everything a run needs to go on. All leaves are arrays; a leading axis of seeds may be mapped over."""

    agent: AgentState
    replay: Replay
    env_state: PyTree  # [num_envs, ...]
    timestep: TimeStep  # [num_envs, ...], not acted on yet
    carry: PyTree  # the agent's act carry, [num_envs, ...]
    episode: Episode
    skips: Skips
    key: Array  # one typed key, the run's; never changes
    stage: Array  # int32, index in the recipe
    iteration: Array  # int32, iterations of this stage that are done
    steps: Array  # int32, agent steps of each environment so far; frames would overflow (see `Schedule.env_steps`)


def init(agent: Agent, env: Env, key: Array) -> RunState:
    """The state of a run before its first iteration. To be compiled by the caller: it is slow op by op.

    Args:
      agent: brings the recipe.
      env: takes what the agent emits.
      key: the run's seed; consumed.

    Raises:
      UsageError: the recipe cannot be run (`check`).
    """
    check(agent)
    recipe, num_envs = agent.recipe, agent.recipe.num_envs
    key_agent, key_env, key_act, key_run = jax.random.split(key, 4)
    state = agent.init(key_agent)
    env_state, timestep = jax.vmap(env.reset)(noise.row_keys(key_env, num_envs))
    carry = agent.act_carry(state.variables, num_envs)
    act = partial(agent.act, explore=True)
    _, action, latent = jax.eval_shape(act, state.variables, noise.row_keys(key_act, num_envs), carry, timestep)
    replay = replays.init(Record(timestep, action, latent), num_envs, recipe.replay_capacity, samplings(recipe))
    episode = Episode(jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))
    zero = jnp.int32(0)
    return RunState(
        state, replay, env_state, timestep, carry, episode, Skips(zero, zero, zero), key_run, zero, zero, zero
    )


def next_stage(run: RunState) -> RunState:
    """The run at the start of the stage after its own; everything else is kept, the act carry too."""
    return run._replace(stage=run.stage + 1, iteration=jnp.zeros_like(run.iteration))


def count_episodes(episode: Episode, step: TimeStep) -> tuple[Episode, Metrics]:
    """Follows the episodes through records `[collect, num_envs]`; sums over those that ended."""

    def body(episode: Episode, step: TimeStep) -> tuple[Episode, Metrics]:
        returns = jnp.where(step.is_first, 0.0, episode.returns) + step.reward
        lengths = jnp.where(step.is_first, 0, episode.lengths + 1)
        ended = step.is_last.astype(jnp.float32)
        sums = {"return": (returns * ended).sum(), "length": (lengths * ended).sum(), "count": ended.sum()}
        return Episode(returns, lengths), sums

    episode, sums = jax.lax.scan(body, episode, step._replace(obs={}))
    return episode, jax.tree.map(jnp.sum, sums)


class _Part(NamedTuple):
    """What the functions of a stage are about."""

    agent: Agent
    env: Env
    stage: Stage
    axis_name: str | Axes | None
    each: Callable  # what updates and searches are wrapped in
    whole: Callable  # makes the agent's state one with whole parameters


def _collect(part: _Part, run: RunState, key: Array) -> tuple[RunState, Metrics]:
    """Steps the environments and adds what they gave to replay."""
    agent, env, stage, axis_name, *_ = part
    act = partial(stage.act or random_act(agent, env.spec), explore=True)
    position = Position(run.env_state, run.timestep, run.carry)
    variables = part.whole(run.agent).variables
    position, records = rollout(act, env, variables, key, position, stage.collect, axis_name)
    episode, sums = count_episodes(run.episode, records.step)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    replay, steps = replays.add(run.replay, records), run.steps + stage.collect
    return run._replace(**position._asdict(), replay=replay, episode=episode, steps=steps), sums


def _sample(part: _Part, replay: Replay, key: Array, what: Update | Evolve) -> tuple[Replay, Trajectory, replays.Index]:
    if part.axis_name is not None:  # each device reads its own replay
        key = jax.random.fold_in(key, jax.lax.axis_index(part.axis_name))
    return replays.sample(replay, key, what.sampling, what.batch_size)


def is_finite(changed: PyTree, metrics: Metrics, axis_name: str | Axes | None = None) -> Array:
    """Whether an update may be kept, bool scalar: its losses, its gradient norms and all that it changed are finite.

    Metrics are losses or gradient norms by their names, which contain `loss` or `grad_norm`. With an axis name the
    answer is the same on every device.
    """
    watched = [value for name, value in metrics.items() if "loss" in name or "grad_norm" in name]
    leaves = [x for x in jax.tree.leaves(changed) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not (watched or leaves):  # such as an update that only writes latents
        return jnp.bool_(True)
    # In rows of one array, which take few kernels. A matrix product sums them up, because XLA on a CPU fuses any other
    # reduction into the choice of every leaf, where it is made anew from all of them and takes minutes to compile.
    broken = flat.flatten([~jnp.isfinite(x) for x in [jnp.array(watched), *leaves]]).any(1).astype(jnp.float32)
    finite = jnp.dot(broken, jnp.ones_like(broken), precision="highest") == 0
    return finite if axis_name is None else jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1


def _count_skips(skips: Skips, finite: Array) -> Skips:
    in_a_row = jnp.where(finite, 0, skips.in_a_row + 1)
    return Skips(skips.total + ~finite, in_a_row, jnp.maximum(skips.longest, in_a_row))


def count_anew(skips: Skips, most: int) -> Skips:
    """The skips that a restored run begins with: counts anew where there were more than `most` in a row.

    A run stops there, in every seed; resumed it may have settings that mend it. Otherwise all stays as it is, so that a
    run in parts is the same run.
    """
    if np.min(skips.longest) <= most:
        return skips
    return Skips(skips.total, jnp.zeros_like(skips.in_a_row), jnp.zeros_like(skips.longest))


def apply_update(
    fn: Callable, axis_name: str | Axes | None, state: AgentState, skips: Skips, key: Array, batch: Trajectory
) -> tuple[AgentState, Skips, Metrics, PyTree | None]:
    """Learns from one batch by `Update.fn`; state and latents stay as they were where that is not finite.

    Returns:
      The state and the count of skips; metrics, all 0 but "skipped" if nothing was kept; and the latents to write back.
    """
    new_state, metrics, latent = fn(state, key, batch)
    # What an update leaves alone is the same value, and costs nothing.
    pairs = zip(jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True)
    finite = is_finite([new for new, old in pairs if new is not old], metrics, axis_name)
    keep = lambda new, old: new if new is old else jnp.where(finite, new, old)
    if latent is not None:
        latent = jax.tree.map(lambda new, old: keep(new, old[-len(new) :].astype(new.dtype)), latent, batch.latent)
    metrics = {name: keep(jnp.float32(value), 0.0) for name, value in metrics.items()}
    metrics |= {"skipped": jnp.float32(~finite)}
    return jax.tree.map(keep, new_state, state), _count_skips(skips, finite), metrics, latent


def _learn(part: _Part, update: Update, run: RunState, key: Array) -> tuple[RunState, Metrics]:
    """Does the repeats of one update; sums of the metrics of those that were kept, and how many were not.

    Of an update that is not finite nothing is kept: neither the new agent state nor its latents.
    """
    fn = part.each(update.fn)
    # What does not change here stays out of the scan's carry.
    slim = lambda replay: replay._replace(data=Record((), (), replay.data.latent), episodes=())
    whole = lambda replay: run.replay._replace(
        data=run.replay.data._replace(latent=replay.data.latent), added=replay.added, cursor=replay.cursor
    )

    def body(carry: tuple, key: Array) -> tuple[tuple, Metrics]:
        state, replay, skips = carry
        key_sample, key_learn = jax.random.split(key)
        replay, batch, index = _sample(part, whole(replay), key_sample, update)
        state, skips, metrics, latent = apply_update(fn, part.axis_name, state, skips, key_learn, batch)
        if latent is not None:
            replay = replays.write(replay, index, latent)
        return (state, slim(replay), skips), metrics

    keys = jax.random.split(key, update.repeats)
    (state, replay, skips), metrics = jax.lax.scan(body, (run.agent, slim(run.replay), run.skips), keys)
    return run._replace(agent=state, replay=whole(replay), skips=skips), jax.tree.map(lambda x: x.sum(0), metrics)


def _evolve(part: _Part, run: RunState, key: Array) -> tuple[RunState, Metrics]:
    """Some generations of a search, in the run's environment or in dreams that start from its replay."""
    evolve, batch = part.stage.evolve, None
    key_sample, key_search = jax.random.split(key)
    if evolve.where == "dream":
        replay, batch, _ = _sample(part, run.replay, key_sample, evolve)
        run = run._replace(replay=run.replay._replace(cursor=replay.cursor))
    # The key of the search is the same on all devices, and so is what comes of it.
    search = part.each(partial(evolution.iteration, part.agent, part.env, evolve, axis_name=part.axis_name))
    state, metrics = search(run.agent, key_search, batch)
    return run._replace(agent=state), {name: jnp.float32(value) for name, value in metrics.items()}


def _iterate(part: _Part, run: RunState) -> tuple[RunState, Metrics, dict[str, Metrics]]:
    """One iteration of a stage: collect, learn, evolve. Sums over episodes, and over the repeats of each update."""
    stage, key = part.stage, jax.random.fold_in(jax.random.fold_in(run.key, run.stage), run.iteration)
    episodes: Metrics = {}
    if stage.collect and part.env.step is None:  # what it would collect is in replay already
        run = run._replace(steps=run.steps + stage.collect)
    elif stage.collect:
        run, episodes = _collect(part, run, jax.random.fold_in(key, 0))
    learned: dict[str, Metrics] = {}
    for number, update in enumerate(stage.updates, 1):
        run, learned[update.name] = _learn(part, update, run, jax.random.fold_in(key, number))
    if stage.evolve:
        key = jax.random.fold_in(key, 1 + len(stage.updates))
        run, learned[stage.evolve.name] = _evolve(part, run, key)
    return run._replace(iteration=run.iteration + 1), episodes, learned


def means(stage: Stage, episodes: Metrics, learned: dict[str, Metrics], iterations: Array) -> Metrics:
    """Metrics of a chunk from its sums, in which "made" counts updates where an iteration may make fewer than all."""
    metrics: Metrics = {}
    for update in stage.updates:
        sums = dict(learned[update.name])
        skipped = sums.pop("skipped")
        applied = sums.pop("made", iterations * update.repeats) - skipped
        metrics |= {f"{update.name}/{name}": value / applied for name, value in sums.items()}
        metrics[f"{update.name}/skipped"] = skipped
    if stage.evolve:
        name = stage.evolve.name
        metrics |= {f"{name}/{metric}": value / iterations for metric, value in learned[name].items()}
    if episodes:
        count = episodes["count"]
        metrics |= {f"episode/{name}": episodes[name] / count for name in ("return", "length")}
        metrics["episode/count"] = count
    return metrics


def make_stage(
    agent: Agent,
    env: Env,
    stage: Stage,
    axis_name: str | Axes | None = None,
    each: Callable = lambda fn: fn,
    whole: Callable = lambda state: state,
) -> Callable[[RunState, Array], tuple[RunState, Metrics]]:
    """A stage as one function, to be compiled by the caller (`compile_stage`), or mapped over seeds first.

    Args:
      agent: whose recipe has the stage.
      env: takes what the agent emits.
      stage: one of `agent.recipe.stages`.
      axis_name: the named axis that environments, replay and batches are spread over, or None. The recipe then says
        the numbers of one device, and each device has its own environments, replay and keys. Of `Axes`, it also has
        its own part of the agent's state, as `each` and `whole` say.
      each: what `Update.fn` and searches are wrapped in, such as `jax.custom_batching.sequential_vmap`.
      whole: the agent's state with whole parameters, which acting reads (`loops.fsdp`).

    Returns:
      `run(state, iterations) -> (state, metrics)`. `iterations` is an integer and may be traced: any number is the same
      program. Metrics are float32 scalars over these iterations: the mean over the updates that were kept of each
      "update/metric" (NaN if none was), the number that was not as "update/skipped", the mean of each metric of a
      search, and of the episodes that ended "episode/return", "episode/length" (NaN if none) and "episode/count".

    Raises:
      UsageError: the recipe cannot be run (`check`).
    """
    check(agent)

    # Inlined, so the program is the same; but traced only once, though it is needed for shapes first.
    iterate = jax.jit(partial(_iterate, _Part(agent, env, stage, axis_name, each, whole)), inline=True)

    def run_stage(run: RunState, iterations: Array) -> tuple[RunState, Metrics]:
        def body(_: Array, loop: tuple) -> tuple:
            run, sums = loop
            run, *more = iterate(run)
            return run, sums + jnp.array(jax.tree.leaves(more), jnp.float32)

        _, *shapes = jax.eval_shape(iterate, run)
        leaves, structure = jax.tree.flatten(shapes)
        # All sums are one vector, which takes one kernel where each of them would take its own.
        run, sums = jax.lax.fori_loop(0, iterations, body, (run, jnp.zeros(len(leaves), jnp.float32)))
        episodes, learned = structure.unflatten(sums)
        return run, means(stage, episodes, learned, iterations)

    return run_stage


def compile_stage(agent: Agent, env: Env, stage: Stage) -> Callable[[RunState, int], tuple[RunState, Metrics]]:
    """`make_stage`, compiled on its first call. The state it is given is donated: use the one it returns."""
    return jax.jit(make_stage(agent, env, stage), donate_argnums=0)
