"""Training a run into its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks, determinism, distributed, estimate
from wmjax.agents import AGENTS
from wmjax.cache import enable_compilation_cache
from wmjax.loops import checkpoint, device, memory, wandb_log
from wmjax.loops.display import Display
from wmjax.loops.driver import Driver, Interrupted, Plan, evaluation_key
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import DEFAULTS, Options
from wmjax.loops.on_data import OnData, is_playable, spec_alone
from wmjax.loops.parallel import BACKENDS, Programs, programs
from wmjax.loops.signals import catch_signals
from wmjax.loops.usage import noting_usage
from wmjax.names import nearest
from wmjax.run import FINAL_EPISODES, Run, run_of
from wmjax.run_folder import CHECKPOINTS, EVAL, open_folder, read_description, say_edits, warn
from wmjax.scores import keep, summarize_seeds
from wmjax.settings import ASKED, Setup, describe, setup
from wmjax.types import HostEnv, RunError, UsageError

FINAL_HOST_EPISODES = 16  # where environments run on the host, and take their time
CHECKPOINT_SECONDS = 180.0
BLOCK = 64  # rows of data that are read at once where it does not stay in memory
MAX_SKIPPED = 100
Callback = Callable[[dict[str, Any], Run], bool | None]


def train(
    agent: str = "dreamer_v3",
    env: Any = None,
    *,
    preset: str | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    devices: int | None = None,
    parallel: str | None = None,
    shard_params: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    image_size: int | None = None,
    action_repeat: int | None = None,
    env_args: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    eval_envs: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    max_skipped: int = MAX_SKIPPED,
    workers: int | None = None,
    worker_timeout: float = DEFAULTS.timeout,
    max_restarts: int = DEFAULTS.max_restarts,
    start_timeout: float | None = None,
    trust_env: bool = False,
    equations: Any = None,
    data: str | Path | None = None,
    skip_damaged: bool = False,
    memory_map: bool = False,
    no_lock: bool = False,
    deterministic: bool = False,
    wandb: str | None = None,
    progress: bool | TextIO = True,
    callback: Callback | None = None,
    **overrides: Any,
) -> Run:
    """Trains an agent into a run folder, and evaluates it over 100 episodes (16 where environments are on the host).

    Args:
      agent, preset: names, see `wmjax list`; the preset is "small" by default.
      env: a name, see `wmjax list envs`; a class or function that makes a `gymnasium.Env`; an `Env`, `RawEnv` or
        `HostEnv` with its own kind of actions; by default the agent's own example.
      seed, seeds: of everything that training draws, 0 by default; how many to train at once, in one program, from
        `seed` upwards, 1 by default. More than one are for environments on the device.
      steps: env steps (frames over all environments; the record that begins an episode counts as a step), rounded up to
        whole iterations; the preset's by default. A run may be resumed with more. Not for World Models.
      seconds: of wall time, also of earlier attempts, after which it ends, saved and evaluated; None: no limit.
      devices, parallel: to spread over, 1 by default (of several processes all); "shard_map" (default) or "pmap".
      shard_params: of them, how many to spread parameters and optimizers' states over; 1 by default: each has them all.
      out: the run folder; by default a new one under `runs/`.
      resume: go on with the run in `out`; the result is as if it had never stopped, byte for byte (on a GPU where
        `deterministic`), but environments on the host begin new episodes. What is not given stays as `config.json` has
        it; the rest may change, which is said, if shapes stay; not environment, seed, image size or action repeat.
      image_size, action_repeat, env_args: of the environment; by default, and as far as not given, the preset's own.
      eval_every: env steps between evaluations of 16 episodes; a tenth of `steps` by default, 0 for none on the way.
      eval_envs: environments on the host that evaluations play in at once; by default as many as in training, at most
        16. 0: in the place of those of training, which then begin new episodes: where no more simulators may run.
      checkpoint_seconds: least time between two checkpoints, which are written in the background.
      max_skipped: updates in a row whose loss or gradient may be other than finite; each is skipped and counted.
      workers, worker_timeout, start_timeout, max_restarts: of processes that step environments on the host: how many,
        one per processor by default; seconds for a step, and for one that begins an episode if more (120 by default),
        after which one is replaced; environments lost within an hour before the run stops, with everything saved.
      trust_env: resume a run whose `config.json` names code of its own as its environment; not where `env` is given.
      equations: the agent's `Equations`, with functions in the place of the paper's (`docs/equations.md`).
      data, skip_damaged: records to train on, for as many updates as `steps` says; leave out those that are damaged.
      memory_map, no_lock: replay is read from files, so may be larger than memory; no lock, for file systems without.
      deterministic: the same bytes every time on a GPU, too, but slower; before JAX starts. A resumed run keeps it.
      wandb: a project of Weights & Biases that metrics are sent to, too.
      progress: where its lines go: True for standard output, False for nowhere, or a text stream, which may fail.
      callback: `callback(metrics, run)` is called with every line of progress, as in `metrics.jsonl`, and a `Run` whose
        arrays are valid until it returns. False, and an error, stop the run, which is saved first.
      overrides: fields of the agent's configuration.

    Raises:
      UsageError: something asked for cannot be done; found before training starts.
      Interrupted: Ctrl-C, SIGTERM or SIGHUP came; the run was saved. A second signal stops at once.
      RunError: the run cannot go on: its updates are not finite, its checkpoints are damaged, its end cannot be saved.
    """
    return _train(**locals())


def _train(*, overrides: dict[str, Any], **asked: Any) -> Run:
    """`train`, with its arguments by name."""
    callback = asked["callback"]
    _check_names(asked["agent"], overrides)
    out = None if asked["out"] is None else checks.path("out", asked["out"])
    switches = ("resume", "memory_map", "no_lock", "deterministic", "skip_damaged")
    resume, memory_map, no_lock, deterministic, _ = (checks.flag(field, asked[field]) for field in switches)
    if deterministic:
        determinism.turn_on()
    cache = enable_compilation_cache()
    before = read_description(out, warn) if resume and out is not None else None
    if before is not None and before.get("origin"):
        raise UsageError(f"resume: {str(out)!r} was imported; it has no replay and no optimizer's state to go on with")
    if before is not None:
        _say_edits(out, before)
        determinism.turn_on_again(before, warn)
    named = {name: asked[name] for name in ("agent", "env", *ASKED)}
    made = setup(**named, overrides=overrides, before=before)
    asked |= {"memory_map": memory_map if made.data is None else made.on_host}
    driving = _driving(made.steps, asked if is_playable(made.env) else asked | {"eval_every": 0})
    if not made.on_host:
        devices, shard_params = made.description["devices"], made.description["shard_params"]
        memory.check_run(made.agent, made.world, len(made.seeds), devices, shard_params=shard_params)
    made = made._replace(description=made.description | {"about": estimate.about(made)})
    seconds = checks.optional("seconds", asked["seconds"])
    if callback is not None and not callable(callback):
        raise checks.invalid("callback", callback, "a function (metrics, run)")
    if made.description.get("equations"):
        _trace(made)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.watching(warn))
        _check_same(made, out, resume, driving)
        stack.enter_context(memory.running_out())
        display = stack.enter_context(_display(asked["progress"]))
        display.say(f"compilation cache {cache}" if cache else "compilation cache off")
        fits = partial(_check_state, made)
        opened = open_folder(out, resume, made.description, fits, display.say, no_lock=no_lock)
        path = _shared_folder(stack, opened)
        display.say(describe(made, path))
        told = callback and (lambda metrics, state: callback(metrics, run_of(made, path, metrics["step"], state)))
        told = told if seconds is None else _stops_after(seconds, told)
        plan = Plan(
            made.agent, made.env, path, made.seeds, made.steps, display=display, callback=told,
            description=made.description, **driving,
        )  # fmt: skip
        if distributed.leads():
            stack.enter_context(noting_usage(path))
        driver, run, digest = _run_plan(made, plan, resume)
        _evaluate_end(made, run, driver, display)
        display.say(f"state sha256 {digest}")
    return run


def _check_same(made: Setup, out: Path | None, resume: bool, driving: Mapping[str, Any]) -> None:
    """Raises `UsageError` where processes were not given the same, or are not of the same versions."""
    d = {name: value for name, value in made.description.items() if name not in ("about", "config")}
    versions = {"version of jax": jax.__version__, "version of python": ".".join(map(str, sys.version_info[:2]))}
    asked = {"out": None if out is None else str(out), "resume": resume, "eval_every": driving["eval_every"]}
    fields = {f"agent.{name}": value for name, value in made.description["config"].items()}
    distributed.agree(d | versions | asked | fields)
    if distributed.count() > 1 and made.data is not None:
        raise UsageError(f"num_processes: {distributed.count()} is not valid with data; 1 is")


def _shared_folder(stack: contextlib.ExitStack, opened: contextlib.AbstractContextManager[Path]) -> Path:
    """The run folder, which the first process has opened. Raises `UsageError` where another one does not see it."""
    path = distributed.in_turn(lambda: stack.enter_context(opened) if distributed.leads() else None)
    if distributed.count() == 1:
        return path
    path = Path(distributed.exchange(path and str(path.absolute()))[0])
    distributed.check_shared(path)
    return path


def _trace(made: Setup) -> None:
    """Traces every update, so that an error in an equation of the user's comes before there is a run folder."""
    env = spec_alone(made.env.spec)
    agent = AGENTS[made.description["agent"]][1](env.spec, made.config, None, made.equations)
    state = jax.eval_shape(partial(device.init, agent, env), jax.random.key(0))
    for stage in agent.recipe.stages:
        if stage.updates:
            jax.eval_shape(device.make_stage(agent, env, stage._replace(collect=0)), state, jnp.int32(1))


def _stops_after(seconds: float, told: Callable[[dict[str, Any], Any], Any] | None) -> Callable[..., Any]:
    """A callback of the driver that ends the run once it has taken so long, and asks another one before."""

    def call(metrics: dict[str, Any], state: Any) -> Any:
        answer = None if told is None else told(metrics, state)
        return answer if metrics["time"] < seconds else False

    return call


def _check_names(agent: Any, overrides: Mapping[str, Any]) -> None:
    """Raises `UsageError` for the first argument of `train` that is neither its own nor a field of the agent."""
    if not isinstance(agent, str) or agent not in AGENTS:
        return  # which is said elsewhere
    fields = [field.name for field in dataclasses.fields(AGENTS[agent][0])]
    for name in overrides:
        if name == "config":
            raise UsageError(
                "config: is not an argument, but its fields are (learning_rate=1e-4); those of a file are "
                "wmjax.read_config(FILE): wmjax.train(**wmjax.read_config(FILE))"
            )
        if name not in fields:
            own = [parameter for parameter in inspect.signature(train).parameters if parameter != "overrides"]
            raise nearest("field", name, [*fields, *own])


def _say_edits(path: Path, description: dict[str, Any]) -> None:
    """`say_edits`, of the newest checkpoint that says anything."""
    for step in reversed(checkpoint.steps(path / CHECKPOINTS)):
        with contextlib.suppress(RunError, UsageError):  # who reads it will say so
            return say_edits(path, description, checkpoint.info(path / CHECKPOINTS, step), warn)


def _driving(steps: int, asked: dict[str, Any]) -> dict[str, Any]:
    """What a `Plan` says of how to run; none of it changes what is learned. Raises `UsageError`."""
    if asked["eval_every"] is None:
        asked = asked | {"eval_every": max(1, steps // 10)}
    number = lambda field: checks.number(field, asked[field])
    optional = lambda field: checks.optional(field, asked[field])
    found = {"eval_every": number("eval_every")}
    eval_envs = optional("eval_envs")
    found |= {field: number(field) for field in ("max_skipped", "checkpoint_seconds")}
    workers, max_restarts, timeout = optional("workers"), number("max_restarts"), number("worker_timeout")
    if asked["wandb"] is not None:
        checks.text("wandb", asked["wandb"])
        wandb_log.check()
    options = Options(workers, timeout, max_restarts, asked["memory_map"], eval_envs=eval_envs)
    return found | {"host": options, "wandb": asked["wandb"]}


def _display(progress: bool | TextIO) -> Display:
    if not isinstance(progress, bool) and not callable(getattr(progress, "write", None)):
        raise checks.invalid("progress", progress, "True, False or a text stream")
    stream = progress if not isinstance(progress, bool) else sys.stdout if progress else None
    return Display(stream) if distributed.leads() else Display(None, warnings=stream)


def _run_plan(made: Setup, plan: Plan, resume: bool) -> tuple[Driver, Run, str]:
    """Trains to the end of the plan, or until the callback stops it: the run, and the digest of its state."""
    say = plan.display.say
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(catch_signals(say))
        with plan.display.working("preparing environments and replay", say=False):
            found = _programs(
                made, path=plan.path, options=plan.host, say=say,
                stop=lambda: bool(caught), records=made.records, resume=resume,
            )  # fmt: skip
        if isinstance(found, HostLoop):
            stack.enter_context(contextlib.closing(found))
        driver = stack.enter_context(contextlib.closing(Driver(plan, found, caught)))
        state = driver.run(driver.start(resume, say))
        if caught:
            raise Interrupted(caught[0], plan.path)
        step = driver.schedule.env_steps(state)
        if driver.stopped:
            say(f"stopped before its end, at {step:,} env steps; saved, and may be resumed")
        run = run_of(made, plan.path, step, found.replica(state.agent))
        return driver, run, checkpoint.digest(found.gather(state))


def _programs(made: Setup, **how: Any) -> Programs:
    """What a run is computed by. `how` are further arguments of the `HostLoop` of environments on the host."""
    recipe, data = made.agent.recipe, made.data
    rows = recipe.replay_capacity // recipe.num_envs
    if made.on_host:
        parts = (data.take(recipe.num_envs, i, min(i + BLOCK, rows)) for i in range(0, rows, BLOCK)) if data else ()
        return HostLoop(made.agent, made.world, data=parts, devices=made.description["devices"], **how)
    d, seeds = made.description, made.description["seeds"]
    how = dict(devices=d["devices"], backend=d["parallel"] or BACKENDS[0], shard_params=d["shard_params"])
    found = programs(made.agent, made.world, seeds=seeds, **how)
    if data is None:
        return found
    records = data.take(recipe.num_envs, 0, rows)
    data.forget()
    return OnData(found, made.agent, records, seeds)


def _check_state(made: Setup, path: Path) -> None:
    """Raises `UsageError` where the newest checkpoint in a folder, if there is one, is not of a state of this run."""
    if checkpoint.latest(path / CHECKPOINTS) is not None:
        checkpoint.check(path / CHECKPOINTS, _programs(made).template)


def _evaluate_end(made: Setup, run: Run, driver: Driver, display: Display) -> None:
    """Fresh episodes of the trained agent: their scores, said and kept. A full disk costs the files alone."""
    if driver.evaluator is None:
        display.say(f"no environment: not evaluated\nrun folder {run.path}")
        return
    episodes, say = FINAL_HOST_EPISODES if isinstance(made.env, HostEnv) else FINAL_EPISODES, display.say
    with display.working(f"evaluating over {episodes} episodes", say=False):
        played = driver.evaluator(run.state.variables, driver.per_seed(evaluation_key), episodes)
    by_seed = zip(*map(np.atleast_2d, played), strict=True)
    scores = summarize_seeds(dict(zip(made.seeds, by_seed, strict=True)))
    if not math.isfinite(scores.mean):
        say(f"warning: not evaluated; `wmjax eval {run.path}` plays these episodes again")
    else:
        say(f"mean return {scores.mean:.3f} over {scores.episodes} episodes, IQM {scores.iqm:.3f}")
        if line := scores.cut_line():
            say(line)
        try:
            keep(run.records(scores))
        except OSError as error:
            say(f"warning: {EVAL} in {str(run.path)!r} cannot be written ({error.strerror})")
    say(f"run folder {run.path}")
