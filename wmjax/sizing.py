"""What a run will take before it is one: memory, arithmetic, and how fast that could go on a card. Nothing is run.

Updates are traced from shapes alone and compiled where this is called, for their memory. Where a card is named that is
not there, nothing is compiled, and their memory is estimated from the traced program (`buffers`).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core

from wmjax import arithmetic, cards, checks, estimate, evolution
from wmjax.arithmetic import Product
from wmjax.buffers import peak_bytes
from wmjax.cache import enable_compilation_cache
from wmjax.cards import SHARE, Card
from wmjax.loops import compiler, device, fsdp, memory
from wmjax.loops.device import Skips
from wmjax.loops.host.loop import check_room, shapes
from wmjax.loops.memory import Room, amount
from wmjax.loops.parallel import share as share_recipe
from wmjax.loops.schedule import Schedule, check, samplings
from wmjax.ops import noise
from wmjax.replay import device as replays
from wmjax.replay.device import Replay
from wmjax.replay.host import Sizes, sizes, tree_bytes
from wmjax.settings import ASKED, Setup, check_on_host, setup
from wmjax.types import Agent, AgentState, Env, Evolve, HostEnv, PyTree, TimeStep, Update, UsageError

# What JAX takes of the memory of a GPU where neither variable says anything else; the second is what it was called.
PREALLOCATED, FRACTIONS = 0.75, ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class Job(NamedTuple):
    """What training computes again and again: an update, a search, or a step of acting in all environments."""

    name: str
    multiply_adds: int  # of products, once, of one seed on one device
    by_kind: dict[str, int]  # the same by `arithmetic.Product.kind`
    temporary_bytes: int  # that it needs besides arguments and results, of one seed on one device; 0 for acting
    batch_bytes: int  # of what it learns from, as one seed on one device samples it; 0 for acting
    seconds: float | None = None  # once, of all seeds, on the card


class Pace(NamedTuple):
    """How fast a stage could go on the card, of all seeds and devices; environments take no time here."""

    name: str
    iterations: int
    updates_per_second: float | None  # generations of a search count as updates; None where nothing is computed
    env_steps_per_second: float | None  # frames, as `loops.schedule` counts them
    seconds: float  # the whole stage


class Memory(NamedTuple):
    """Bytes on each device, of all seeds."""

    parameters: int
    optimizer: int  # and statistics
    replay: int  # 0 where it is in the host's memory
    environments: int  # with what the agent carries from step to step
    batch: int  # of the update that needs most
    temporaries: int  # of the update that needs most
    host_replay: int  # in the host's memory, at most

    @property
    def total(self) -> int:
        """On each device."""
        return sum(self) - self.host_replay


class Plan(NamedTuple):
    """What a run will take."""

    agent: str
    env: str | None
    preset: str
    seeds: int
    devices: int
    parameters: dict[str, int]  # by module, of one seed
    memory: Memory
    jobs: tuple[Job, ...]  # updates and searches
    acting: Job
    multiply_adds_per_env_step: float  # of acting, of one agent step of one environment
    compiled_for: str | None  # the platform by whose compiler temporaries are known; None where they are estimated
    card: Card | None
    share: float  # of the card's peak
    stages: tuple[Pace, ...]  # empty without a card
    fits: bool
    advice: str  # what does not fit, and what would; "" where it fits


def plan(
    agent: str = "dreamer_v3",
    env: Any = None,
    *,
    card: str | None = None,
    peak_tflops: float | None = None,
    memory_gb: float | None = None,
    bandwidth: float | None = None,
    share: float = SHARE,
    devices: int | None = None,
    shard_params: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    **asked: Any,
) -> Plan:
    """What a run will take, without running or allocating anything of it. Compiling its updates takes a while,
    tracing them for a card that is not there some seconds.

    Args:
      agent, env: as for `train`.
      card: one of `cards.CARDS`, that the run is meant for.
      peak_tflops, memory_gb, bandwidth: of a card that has no name here, or has other numbers, as in `cards.card`.
      share: of the card's peak that is reached, in (0, 1].
      devices, shard_params: as for `train`, but devices need not be there.
      say: is told what is compiled.
      asked: other arguments of `train` that a run's shapes depend on, and fields of the agent's configuration.

    Raises:
      UsageError: as `train` for names and settings; an unknown card.
    """
    enable_compilation_cache()
    numbers = {"peak_tflops": peak_tflops, "memory_gb": memory_gb, "bandwidth": bandwidth}
    found = cards.card(card, **{name: checks.optional(name, value) for name, value in numbers.items()})
    share, devices = checks.number("share", share), checks.number("devices", 1 if devices is None else devices)
    shard_params = checks.number("shard_params", 1 if shard_params is None else shard_params)
    fsdp.check(shard_params, devices)
    named = {name: asked.pop(name) for name in ASKED if name in asked}
    made = setup(agent, env, overrides=asked, **named)
    on_host = isinstance(made.env, HostEnv)
    if on_host:
        check_on_host(made.description["seeds"], None, shard_params)
    part = made.agent._replace(recipe=share_recipe(made.agent.recipe, devices, on_host))
    check(part)
    return _plan(made, part, (devices, shard_params), found, share, say)


class _Shapes(NamedTuple):
    """Of what one device holds of one seed."""

    state: AgentState
    timestep: TimeStep
    carry: PyTree
    environments: PyTree
    replay: Replay  # also where records are kept on the host: what is sampled there is alike
    key: jax.ShapeDtypeStruct
    host_replay: Sizes | None  # what replay takes of the host where it is there


def _shapes(agent: Agent, env: Env | HostEnv) -> _Shapes:
    recipe, key = agent.recipe, jax.eval_shape(lambda: jax.random.key(0))
    if isinstance(env, HostEnv):
        (state, carry), example = shapes(agent, env)
        kept = recipe.num_envs, recipe.replay_capacity, samplings(recipe)
        replay = jax.eval_shape(lambda example: replays.init(example, *kept), example)
        return _Shapes(state, example.step, carry, (), replay, key, sizes(example, *kept))
    run = jax.eval_shape(lambda key: device.init(agent, env, key), key)
    environments = run.env_state, run.timestep, run.episode
    return _Shapes(run.agent, run.timestep, run.carry, environments, run.replay, key, None)


def _plan(made: Setup, agent: Agent, spread: tuple[int, int], card: Card | None, share: float, say: Callable) -> Plan:
    devices, shard_params = spread
    d, held, on_host = made.description, _shapes(agent, made.env), isinstance(made.env, HostEnv)
    # Seeds are mapped over, but on a CPU they learn in turn.
    together = 1 if card is None and jax.default_backend() == "cpu" else d["seeds"]
    timed = lambda counted: None if card is None else cards.seconds(counted, card, share, together)
    compiled_for = jax.default_backend() if card is None or is_here(card) else None
    jobs: dict[str, Job] = {}
    for stage in agent.recipe.stages:
        for what in (*stage.updates, *([stage.evolve] if stage.evolve else [])):
            if what.name not in jobs and not (on_host and what is stage.evolve and what.where == "env"):
                say(f"{what.name!r} of stage {stage.name!r} is {'traced' if compiled_for is None else 'compiled'}")
                jobs[what.name] = _job(agent, made.env, held, what, card, timed)
    acting = _acting(agent, held, card, timed)
    most = max(jobs.values(), key=lambda job: job.temporary_bytes + job.batch_bytes)
    bytes_of = lambda tree: d["seeds"] * tree_bytes(tree)
    # Sharded parameters are whole besides, of a seed that learns, while they are used.
    whole = together * tree_bytes(held.state.variables) if shard_params > 1 else 0
    parts_of = lambda **without: d["seeds"] * fsdp.part_bytes(held.state._replace(**without), shard_params)
    taken = Memory(
        parameters=parts_of(opt_state={}, stats=(), step=()),
        optimizer=parts_of(params={}, non_trainable={}),
        replay=0 if on_host else bytes_of(held.replay),
        environments=bytes_of((held.environments, held.carry)),
        batch=together * most.batch_bytes,
        temporaries=together * most.temporary_bytes + whole,
        host_replay=held.host_replay.memory_bytes if held.host_replay else 0,
    )
    parameters = {name: estimate.count(tree) for name, tree in sorted(held.state.variables.items())}
    stages = () if card is None else tuple(_paces(made, agent, jobs, acting, devices))
    advice = _advice(made, held, taken, most, spread, card)
    return Plan(
        d["agent"], d["env"], d["preset"], d["seeds"], devices, parameters, taken, tuple(jobs.values()), acting,
        acting.multiply_adds / agent.recipe.num_envs, compiled_for, card, share, stages, not advice, advice,
    )  # fmt: skip


def _job(
    agent: Agent, env: Env | HostEnv, held: _Shapes, what: Update | Evolve, card: Card | None, timed: Callable
) -> Job:
    """An update as the loops apply it, or an iteration of a search: its products, and what compiling it says."""
    batch = None
    if what.sampling is not None:
        draw = lambda replay, key: replays.sample(replay, key, what.sampling, what.batch_size)[1]
        batch = jax.eval_shape(draw, held.replay, held.key)
    if isinstance(what, Update):
        zero = jax.ShapeDtypeStruct((), "int32")
        function = partial(device.apply_update, what.fn, None)
        arguments = (held.state, Skips(zero, zero, zero), held.key, batch)
    else:
        function, arguments = partial(evolution.iteration, agent, env, what), (held.state, held.key, batch)
    traced = jax.make_jaxpr(function)(*arguments)
    counted = arithmetic.products(traced, card and card.platform)
    if card is not None and not is_here(card):
        temporary_bytes = peak_bytes(traced, card.platform)
    else:
        temporary_bytes = _compile(traced, arguments).memory_analysis().temp_size_in_bytes
    return _counted(what.name, counted, temporary_bytes, tree_bytes(batch), timed)


def is_here(card: Card) -> bool:
    """Whether programs compiled here are those that the card would run."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) == card.platform


def _acting(agent: Agent, held: _Shapes, card: Card | None, timed: Callable) -> Job:
    keys = jax.eval_shape(lambda key: noise.row_keys(key, agent.recipe.num_envs), held.key)
    traced = jax.make_jaxpr(partial(agent.act, explore=True))(held.state.variables, keys, held.carry, held.timestep)
    return _counted("act", arithmetic.products(traced, card and card.platform), 0, 0, timed)


def _counted(name: str, counted: Counter[Product], temporary_bytes: int, batch_bytes: int, timed: Callable) -> Job:
    by_kind: Counter[str] = Counter()
    for product, count in counted.items():
        by_kind[product.kind] += count * product.multiply_adds
    return Job(name, by_kind.total(), dict(by_kind), temporary_bytes, batch_bytes, timed(counted))


def _compile(traced: Any, arguments: tuple) -> jax.stages.Compiled:
    """A traced program whose first argument is donated, compiled here for its memory and not for speed."""
    donated = tuple(range(len(jax.tree.leaves(arguments[0]))))
    # The plan of its buffers is the same at any level of optimization of the machine code.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        lowered = jax.jit(core.jaxpr_as_fun(traced), donate_argnums=donated).lower(*jax.tree.leaves(arguments))
        return lowered.compile(compiler_options=compiler.options(moments=True))


def _paces(made: Setup, agent: Agent, jobs: dict[str, Job], acting: Job, devices: int) -> Iterator[Pace]:
    seeds, num_envs = made.description["seeds"], agent.recipe.num_envs
    lengths = Schedule(made.agent, made.env, made.steps).lengths
    for stage, iterations in zip(agent.recipe.stages, lengths, strict=True):
        updates = sum(update.repeats for update in stage.updates)
        each = sum(update.repeats * jobs[update.name].seconds for update in stage.updates)
        each += 0.0 if stage.act is None else stage.collect * acting.seconds
        if stage.evolve:
            updates += stage.evolve.generations
            job = jobs.get(stage.evolve.name)
            each += job.seconds if job else _played(stage.evolve, num_envs) * acting.seconds
        steps = stage.collect * num_envs * devices * made.env.spec.action_repeat
        rate = lambda number, each=each: seeds * number / each if each else None
        yield Pace(stage.name, iterations, rate(updates), rate(steps), iterations * each)


def _played(evolve: Evolve, num_envs: int) -> int:
    """Steps of all environments in an iteration of a search that plays on the host, where episodes have full length."""
    episodes = evolve.generations * evolve.population * evolve.rollouts + evolve.mean_rollouts
    return -(-episodes // num_envs) * evolve.max_steps


def _advice(made: Setup, held: _Shapes, taken: Memory, most: Job, spread: tuple[int, int], card: Card | None) -> str:
    """What does not fit and what would, in the words of a run that is refused; "" where all fits."""
    (devices, shard_params), seeds = spread, made.description["seeds"]
    room = None if card is None else room_of(card)
    words = f"agent: what update {most.name!r} computes at once needs"
    try:
        if isinstance(made.env, HostEnv):
            if card is None:  # of another machine no more than the card is known
                records = Schedule(made.agent, made.env, made.steps).records
                check_room(made.agent.recipe, held.state, held.host_replay, records)
            memory.check_bytes("agent: state and what an update computes at once need", taken.total, room)
        else:
            whole = devices * (most.temporary_bytes + most.batch_bytes)
            memory.check_run(made.agent, made.env, seeds, devices, room, [(whole, words)], shard_params)
    except UsageError as error:
        return str(error)
    return ""


def room_of(card: Card) -> Room:
    """Of a card's memory what JAX takes."""
    fraction = _preallocated() if card.platform == "cuda" else 1.0
    taken = f", of which JAX takes {fraction:.0%}" if fraction < 1 else ""
    return Room(fraction * card.memory, f"{card.name} has {amount(card.memory)}{taken}")


def _preallocated() -> float:
    """The share of a GPU's memory that JAX takes."""
    name, said = next(((name, os.environ[name]) for name in FRACTIONS if os.environ.get(name)), ("", PREALLOCATED))
    with contextlib.suppress(ValueError):
        if 0 < float(said) < math.inf:
            return float(said)
    raise UsageError(f"{name}: {said!r:.80} is not valid; a number above 0 is")
