"""Runs from Python: train one into a folder, load it again, evaluate it, act with it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

import wmjax
from wmjax import checks, estimate, figures, presets
from wmjax.agents import AGENTS
from wmjax.cache import enable_compilation_cache
from wmjax.envs import own
from wmjax.envs.handed import check_args, check_trust
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, memory, wandb_log
from wmjax.loops.display import Display
from wmjax.loops.driver import Driver, Interrupted, Plan, evaluation_key, make_evaluator
from wmjax.loops.host import loop as host
from wmjax.loops.parallel import BACKENDS, Programs, programs, tree_of_seed
from wmjax.loops.schedule import Schedule
from wmjax.loops.signals import catch_signals
from wmjax.names import nearest
from wmjax.run_folder import (
    BEST,
    CHECKPOINTS,
    EVAL,
    member_description,
    members,
    open_folder,
    read_description,
    say_edits,
    warn,
)
from wmjax.scores import Scores, keep, record, summarize_seeds
from wmjax.settings import Setup, check_idle, describe, make, other_env, setup
from wmjax.types import Agent, AgentState, Array, Env, HostEnv, PyTree, RunError, TimeStep, UsageError

__all__ = ["Interrupted", "Run", "load", "train"]

FINAL_EPISODES = 100
FINAL_HOST_EPISODES = 16  # where environments run on the host, and take their time
CHECKPOINT_SECONDS = 180.0
MAX_SKIPPED = 100
Callback = Callable[[dict[str, Any], "Run"], bool | None]
ACT_KEY = 0x41435431  # folded into the seed, so that no draw of training is met again


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


@dataclasses.dataclass
class Run:
    """A trained agent in its environment, or the agents of several seeds.

    All is a value except what `act` remembers between calls: one stream of observations is being acted on at a time.
    """

    path: Path
    description: dict[str, Any]  # what `config.json` says
    config: Any  # the agent's configuration
    agent: Agent
    env: Env | HostEnv  # takes what the agent emits
    state: AgentState  # of several seeds: every leaf has a leading axis of them
    members: tuple[Run, ...] = ()  # of several seeds: each as a run of its own
    step: int = 0  # env steps that the agent was trained for; of several seeds, the one trained longest
    which: str = "latest"  # the checkpoint, as in `load`
    _acting: Any = dataclasses.field(default=None, repr=False)

    def __repr__(self) -> str:
        about = self.description
        seeds = [run.description.get("seed") for run in self.members or (self,)]
        seeds = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        what = f"{about.get('agent')} on {about.get('env') or 'an Env value'}, preset {about.get('preset')}"
        return f"Run({what}, {seeds}, step {self.step:,} ({self.which}), {str(self.path)!r})"

    def evaluate(
        self,
        episodes: int = FINAL_EPISODES,
        seed: int = 0,
        *,
        env: Any = None,
        action: str | None = None,
        max_steps: int | None = None,
        eval_envs: int | None = None,
    ) -> Scores:
        """Scores over the first episodes of fresh environments; of several seeds, over the episodes of all.

        Nothing is written; `wmjax eval` keeps what it finds in the run's folder.

        Args:
          episodes: of each seed, at least 1.
          seed: of the evaluation; the same seed gives the same episodes.
          env: another environment, as for `train`, with the same observations and actions.
          action: "sample" or "mode"; by default what the agent's configuration says (`eval_action`).
          max_steps: agent steps after which an episode is cut; by default the environment's own limit, or 10,000 where
            it has none. `Scores.cut` says how many were.
          eval_envs: environments on the host to play in at once, never more than episodes; by default as many as in
            training, at most 16. The scores do not depend on it.

        Raises:
          UsageError: one of these is not valid.
          RunError: too many environments on the host were lost.
        """
        max_steps = None if max_steps is None else checks.number("max_steps", max_steps)
        some = checks.BOUNDS["eval_envs"]._replace(low=1)
        eval_envs = None if eval_envs is None else checks.number("eval_envs", eval_envs, some)
        episodes, seed = checks.number("episodes", episodes), checks.number("seed", seed)
        agent, where = self._playing(seed, env, action)
        options = {"options": host.Options(eval_envs=eval_envs)} if isinstance(where, HostEnv) else {}
        evaluator, key = make_evaluator(agent, where, max_steps=max_steps, **options), evaluation_key(seed)
        return summarize_seeds(
            {run.seed: evaluator(run.state.variables, key, episodes) for run in self.members or (self,)}
        )

    def records(
        self,
        scores: Scores,
        seed: int | None = None,
        *,
        env: str | None = None,
        env_args: Mapping[str, Any] | None = None,
        action: str | None = None,
        max_steps: int | None = None,
    ) -> dict[Path, dict[str, Any]]:
        """An evaluation as it is kept in the run's folder, and of several seeds in that of each; by folder.

        Args:
          scores: what it came to.
          seed, env, action, max_steps: as given to `evaluate`. Seed None: each seed of the run, under its own.
          env_args: of another environment.
        """
        one = lambda run, scores: record(
            scores, env=env or self.description["env"], env_args=env_args if env else self.description.get("env_args"),
            action=action or self.config.eval_action, seed=run.seed if seed is None else seed, step=run.step,
            which=run.which, max_steps=max_steps, version=wmjax.__version__,
        )  # fmt: skip
        return {self.path: one(self, scores)} | {run.path: one(run, scores.seeds[run.seed]) for run in self.members}

    def write_episode(self, seed: int = 0, *, env: Any = None, action: str | None = None) -> list[Path]:
        """Plays an episode and writes what is seen in it to the run's folder (`figures.write_episode`).

        Of several seeds, the first one plays. Arguments and errors are those of `evaluate`; it returns the files.
        """
        agent, where = self._playing(seed, env, action)
        run = self.members[0] if self.members else self
        return figures.write_episode(self.path, agent, where, run.state.variables, evaluation_key(seed))

    def _playing(self, seed: int, env: Any, action: str | None) -> tuple[Agent, Env | HostEnv]:
        checks.number("seed", seed)
        agent, where = self.agent, self.env if env is None else self.env_like(env)
        if action is not None:
            checks.choice("action", action, typing.get_args(typing.get_type_hints(type(self.config))["eval_action"]))
            config = dataclasses.replace(self.config, eval_action=action)
            agent = AGENTS[self.description["agent"]][1](self.env.spec, config)
        return agent, where

    @property
    def seed(self) -> int:
        """Of the run; of several, the first."""
        return self.description["seed"]

    def env_like(self, env: Any) -> Env | HostEnv:
        """Another environment, as for `train`, that takes what the agent emits.

        Raises `UsageError` where its observations and actions are not those that the agent was trained on.
        """
        env = other_env(self.description, env)
        for name in ("obs", "action"):
            mine, other = getattr(self.env.spec, name), getattr(env.spec, name)
            if mine != other:
                raise UsageError(f"env: its {name} {other} is not what the agent was trained on, {mine}")
        return agent_actions(env)

    def act(self, obs: Any, *, is_first: bool = False, reward: float = 0.0, seed: int = 0) -> Any:
        """Chooses an action for one environment, which may be any program that gives such observations.

        This is the one method with a memory: the agent's belief, its last action and a key are kept in the run from
        call to call, and set back by `is_first=True` (or by the first call).

        Args:
          obs: an observation of the environment's own, which is read as in training (a picture is resized, a `Dict`
            flattened); or what `env.spec.obs` says, without batch axes, as a dictionary or, where there is one entry,
            a bare array. Of an environment on the device pictures may have any size.
          is_first: whether an episode begins here.
          reward: that arrived with `obs`.
          seed: of the action's draws; read when the memory is set back.

        Returns:
          The action in the environment's own form, which its action space contains: of one on the device an int32, or
          floats within the bounds; of Gymnasium's what `step` takes.

        Raises:
          UsageError: an observation that cannot be read; the message names the entry, what was found and what is valid.
            Or `reward` is not one finite number, or `is_first` not True or False.
        """
        if self.members:
            raise UsageError(f"act: this run has {len(self.members)} seeds; choose one, as in run.members[0].act(...)")
        seed = checks.number("seed", seed)
        is_first, reward = _scalar("is_first", is_first, bool), _scalar("reward", reward, float)
        obs = {name: value[None] for name, value in own.read(self.env, obs).items()}
        if self._acting is None:
            self._acting = {"step": _act_program(self.agent, self.env), "carry": None}
        memory = self._acting
        is_first = is_first or memory["carry"] is None
        if is_first:
            key = jax.random.fold_in(jax.random.key(seed), ACT_KEY)
            memory |= {"carry": self.agent.act_carry(self.state.variables, 1), "key": key}
        memory["key"], key = jax.random.split(memory["key"])
        flag = np.zeros(1, bool)
        step = TimeStep(obs, np.full(1, reward, np.float32), np.full(1, is_first), flag, flag)
        memory["carry"], action = memory["step"](self.state.variables, key, memory["carry"], step)
        return own.write(self.env, np.asarray(action))


def _scalar(field: str, value: Any, kind: type) -> Any:
    """A truth value or a finite number of float32, also out of an array without axes. Raises `UsageError`."""
    with contextlib.suppress(ValueError, TypeError), np.errstate(over="ignore"):
        array = np.asarray(value)
        valid = array.dtype.kind == "b" if kind is bool else array.dtype.kind not in "OSUMmc"
        if valid and array.shape == () and np.isfinite(array.astype(np.float32)):
            return kind(array)
    raise checks.invalid(field, value, "True or False" if kind is bool else "a finite number")


def _act_program(agent: Agent, env: Env | HostEnv) -> Any:
    """`act` of one environment, compiled, with the action in the environment's own form."""
    native = agent_actions(HostEnv(env.spec, None)).native

    def act(params: PyTree, key: Array, carry: PyTree, step: TimeStep) -> tuple[PyTree, Array]:
        carry, action, _ = agent.act(params, key, carry, step, explore=False)
        return carry, native(action[0])

    return jax.jit(act)


def load(
    path: str | Path,
    *,
    env: Any = None,
    which: str = "latest",
    env_args: Mapping[str, Any] | None = None,
    start_timeout: float | None = None,
    trust_env: bool = False,
) -> Run:
    """Reads a run. Where its newest checkpoint is damaged it warns, on standard error, and reads the one before.

    Args:
      path: its folder.
      env: what it was trained on, as for `train`; needed only if no name in `config.json` finds it again, as of a value
        or of what a session without a file defined.
      which: "latest", or "best": the agent at the highest of the periodic evaluations.
      env_args: arguments of the environment that differ from those of the run.
      start_timeout: as for `train`.
      trust_env: whether the code that `config.json` names as the environment's may be imported and run.

    Raises:
      UsageError: `path` is not a run folder, or has no checkpoint yet.
      UntrustedError: the environment is of a module or file that is not installed with the package, and neither `env`
        nor `trust_env` is given. Nothing has been imported then.
      CheckpointCorruptError: its files are not as they were written.
    """
    enable_compilation_cache()
    path, trust_env = checks.path("run", path), checks.flag("trust_env", trust_env)
    checks.choice("which", which, ("latest", "best"))
    env_args = check_args(env_args)
    description = read_description(path, warn)
    if description["env"] is None and env is None:
        raise UsageError(f"run: {str(path)!r} was trained on an Env value; load it from Python with env=...")
    check_idle()
    own_args = description.get("env_args") or {}
    check_trust(description["env"] if env is None else None, own_args, trust_env, env_args)
    saved, description = description, description | {"env_args": own_args | env_args}
    config = presets.saved_config(description)
    env = description["env"] if env is None else env
    made = make(description | {"devices": 1}, config, env, 1, start_timeout)
    if description["seeds"] == 1:
        step, state = _read_agent(path, made.agent, which, saved)
        return Run(path, description, config, made.agent, made.env, state, step=step, which=which)
    inner = members(path, description).items()
    found = [_read_agent(folder, made.agent, which, member_description(saved, seed)) for seed, folder in inner]
    if which == "latest" and len({step for step, _ in found}) > 1:
        each = ", ".join(f"seed {seed} at {step:,}" for (seed, _), (step, _) in zip(inner, found, strict=True))
        warn(f"warning: {path}: the seeds' newest checkpoints are not of one step: {each}")
    return _with_members(Run(path, description, config, made.agent, made.env, found[0][1], which=which), found)


def _read_agent(path: Path, agent: Agent, which: str, description: dict[str, Any]) -> tuple[int, AgentState]:
    folder = path / (CHECKPOINTS if which == "latest" else BEST)
    if checkpoint.latest(folder) is None:
        raise UsageError(f"run: {str(path)!r} has no checkpoint in {folder.name}/ yet")
    template = {"agent": jax.eval_shape(agent.init, jax.random.key(0))}
    step, saved = checkpoint.restore_newest(folder, template, warn)
    say_edits(path, description, checkpoint.info(folder, step), warn)
    return step, saved["agent"]


def _say_edits(path: Path, description: dict[str, Any]) -> None:
    """`say_edits`, of the newest checkpoint that says anything."""
    for step in reversed(checkpoint.steps(path / CHECKPOINTS)):
        with contextlib.suppress(RunError, UsageError):  # who reads it will say so
            return say_edits(path, description, checkpoint.info(path / CHECKPOINTS, step), warn)


def _with_members(run: Run, found: list[tuple[int, AgentState]]) -> Run:
    """The run of several seeds, from the env steps and the state of each."""
    folders = members(run.path, run.description)
    each = tuple(
        dataclasses.replace(
            run, path=path, description=member_description(run.description, seed), state=state, step=step
        )
        for (seed, path), (step, state) in zip(folders.items(), found, strict=True)
    )
    steps, states = zip(*found, strict=True)
    return dataclasses.replace(run, state=jax.tree.map(lambda *x: jnp.stack(x), *states), members=each, step=max(steps))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    agent: str = "dreamer_v3",
    env: Any = None,
    *,
    preset: str | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    devices: int | None = None,
    parallel: str | None = None,
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
    worker_timeout: float = host.DEFAULTS.timeout,
    max_restarts: int = host.DEFAULTS.max_restarts,
    start_timeout: float | None = None,
    trust_env: bool = False,
    memory_map: bool = False,
    no_lock: bool = False,
    wandb: str | None = None,
    progress: bool | TextIO = True,
    callback: Callback | None = None,
    **overrides: Any,
) -> Run:
    """Trains an agent into a run folder, and evaluates it over 100 episodes (16 where environments are on the host).

    Args:
      agent: a name, see `wmjax list agents`.
      env: a name, see `wmjax list envs`; a class or function that makes a `gymnasium.Env`; an `Env`, `RawEnv` or
        `HostEnv` with its own kind of actions; by default the agent's own example.
      preset: a name, see `wmjax list presets`; "small" by default.
      seed: of everything that training draws; 0 by default.
      seeds: how many to train at once, in one program, from `seed` upwards; 1 by default. More than one, and more than
        one device, are for environments on the device.
      steps: env steps (frames over all environments; the record that begins an episode counts as a step) to train
        for, rounded up to whole iterations; the preset's by default. No schedule depends on it, so a run may be resumed
        with more. Not for agents all of whose stages have a length, such as World Models.
      devices: how many to spread environments, replay and batches over; 1 by default.
      parallel: how, "shard_map" (by default) or "pmap".
      out: the run folder; by default a new one under `runs/`.
      resume: go on with the run in `out`; the result is the same, byte for byte, as if it had never stopped, except
        that environments on the host begin new episodes. Of the settings above and of `overrides`, those that are not
        given stay as they are. Others may be changed, and the run then says so, as long as it is not environment, seed,
        image size or action repeat, and its state keeps its shapes.
      image_size, action_repeat: of the environment; the preset's by default.
      env_args: arguments of the environment, by name; `config.json` keeps them, with those of the preset that are not
        given (`docs/protocols.md`).
      eval_every: env steps between evaluations of 16 episodes; a tenth of `steps` by default, 0 for none while it
        trains. Iterations that take no env steps count like those before them.
      eval_envs: environments on the host that evaluations play in at once, never more than episodes; by default as many
        as in training, at most 16. 0: in the place of those of training, which are closed for an evaluation and begin
        new episodes after it, for simulators of which so many may run at once and no more. Results of an evaluation do
        not depend on it.
      checkpoint_seconds: least time between two checkpoints, which are written in the background.
      max_skipped: updates in a row whose loss or gradient may be other than finite; each is skipped and counted.
      workers: processes that step environments on the host, which these four are for; one per processor by default.
      worker_timeout: seconds for a step, after which a worker counts as hanging and is replaced.
      start_timeout: seconds for a worker to make its environments and begin episodes; 120 by default.
      trust_env: to resume a run whose `config.json` names code that is not installed with the package, as its
        environment; not needed where `env` is given.
      max_restarts: environments that may be lost within an hour before the run stops, with everything saved.
      memory_map: read replay from its files instead of keeping it in memory; it may then be larger than memory.
      no_lock: train without a lock on the run folder, for file systems that have none.
      wandb: a project of Weights & Biases to send metrics to as well.
      progress: where lines of progress go: True for standard output, False for nowhere, or a text stream, which may
        fail without ending the run.
      callback: `callback(metrics, run)` is called with every line of progress: the line of `metrics.jsonl` as a dict,
        and a `Run` of the agent at this moment, whose arrays are valid until the callback returns. Returning False
        stops the run, which is saved, evaluated and may be resumed; None or True go on. Its errors stop the run too,
        and are raised when it is saved. Time spent in it counts for no speed.
      overrides: fields of the agent's configuration.

    Raises:
      UsageError: something asked for cannot be done; found before training starts.
      Interrupted: Ctrl-C, SIGTERM or SIGHUP came; the run was saved. A second signal stops at once.
      RunError: the run cannot go on: its updates are not finite, its checkpoints are damaged, its end cannot be saved.
    """
    _check_names(agent, overrides)
    out = None if out is None else checks.path("out", out)
    resume, memory_map = checks.flag("resume", resume), checks.flag("memory_map", memory_map)
    no_lock = checks.flag("no_lock", no_lock)
    cache = enable_compilation_cache()
    before = read_description(out, warn) if resume and out is not None else None
    if before is not None:
        _say_edits(out, before)
    made = setup(
        agent, env, preset=preset, seed=seed, seeds=seeds, steps=steps, devices=devices, parallel=parallel,
        image_size=image_size, action_repeat=action_repeat, env_args=env_args, start_timeout=start_timeout,
        trust_env=trust_env, overrides=overrides,
        before=before,
    )  # fmt: skip
    eval_every = checks.number("eval_every", max(1, made.steps // 10) if eval_every is None else eval_every)
    eval_envs = None if eval_envs is None else checks.number("eval_envs", eval_envs)
    max_skipped = checks.number("max_skipped", max_skipped)
    checkpoint_seconds = checks.number("checkpoint_seconds", checkpoint_seconds)
    workers = None if workers is None else checks.number("workers", workers)
    max_restarts = checks.number("max_restarts", max_restarts)
    worker_timeout = checks.number("worker_timeout", worker_timeout)
    if wandb is not None:
        checks.text("wandb", wandb)
        wandb_log.check()
    if not isinstance(made.env, HostEnv):
        memory.check_run(made.agent, made.env, len(made.seeds), made.description["devices"])
    made = made._replace(description=made.description | {"about": estimate.about(made)})
    options = host.Options(workers, worker_timeout, max_restarts, memory_map, eval_envs=eval_envs)
    if callback is not None and not callable(callback):
        raise checks.invalid("callback", callback, "a function (metrics, run)")
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.running_out())
        display = stack.enter_context(_display(progress))
        display.say(f"compilation cache {cache}" if cache else "compilation cache off")
        fits = lambda folder: _check_state(made, folder)
        path = stack.enter_context(open_folder(out, resume, made.description, fits, display.say, no_lock=no_lock))
        display.say(describe(made, path))
        run_of = lambda step, state: _run_of(made, path, step, state)
        told = None if callback is None else lambda metrics, state: callback(metrics, run_of(metrics["step"], state))
        plan = Plan(
            made.agent, made.env, path, made.seeds, made.steps, eval_every, checkpoint_seconds, max_skipped, display,
            options, wandb, told, made.description,
        )  # fmt: skip
        driver, run, digest = _run_plan(made, plan, resume)
        _evaluate_end(made, run, driver, display)
        display.say(f"state sha256 {digest}")
    return run


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


def _display(progress: bool | TextIO) -> Display:
    if not isinstance(progress, bool) and not callable(getattr(progress, "write", None)):
        raise checks.invalid("progress", progress, "True, False or a text stream")
    return Display(progress if not isinstance(progress, bool) else sys.stdout if progress else None)


def _run_of(made: Setup, path: Path, step: int, state: AgentState) -> Run:
    run, count = Run(path, made.description, made.config, made.agent, made.env, state, step=step), len(made.seeds)
    return run if count == 1 else _with_members(run, [(step, tree_of_seed(state, i)) for i in range(count)])


def _run_plan(made: Setup, plan: Plan, resume: bool) -> tuple[Driver, Run, str]:
    """Trains to the end of the plan, or until the callback stops it: the run, and the digest of its state."""
    say = plan.display.say
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(catch_signals(say))
        with plan.display.working("preparing environments and replay", say=False):
            run_programs = stack.enter_context(_programs(made, plan.path, plan.host, resume, say, caught))
        driver = Driver(plan, run_programs, caught)
        state = driver.run(driver.start(resume, say))
        if caught:
            raise Interrupted(caught[0], plan.path)
        step = driver.schedule.env_steps(state)
        if driver.stopped:
            say(f"stopped by the callback at {step:,} env steps; saved, and may be resumed")
        run = _run_of(made, plan.path, step, driver.local(state))
        return driver, run, checkpoint.digest(driver.gather(state))


def _evaluate_end(made: Setup, run: Run, driver: Driver, display: Display) -> None:
    """Fresh episodes of the trained agent: their scores, said and kept."""
    episodes = FINAL_HOST_EPISODES if isinstance(made.env, HostEnv) else FINAL_EPISODES
    with display.working(f"evaluating over {episodes} episodes", say=False):
        played = driver.evaluator(run.state.variables, driver.per_seed(evaluation_key), episodes)
    by_seed = zip(*map(np.atleast_2d, played), strict=True)
    _tell_scores(run, summarize_seeds(dict(zip(made.seeds, by_seed, strict=True))), display.say)
    display.say(f"run folder {run.path}")


@contextlib.contextmanager
def _programs(
    made: Setup,
    path: Path,
    options: host.Options,
    resume: bool,
    say: Callable[[str], None],
    caught: Sequence[int],
) -> Iterator[Programs]:
    """What a run is computed by; its environments on the host, if it has any, end with the context."""
    if isinstance(made.env, HostEnv):
        loop = host.HostLoop(
            made.agent, made.env, path, path / CHECKPOINTS, options, say=say, stop=lambda: bool(caught),
            records=Schedule(made.agent, made.env, made.steps).records, resume=resume,
        )  # fmt: skip
        with contextlib.closing(loop):
            yield loop
    else:
        yield _device_programs(made)


def _check_state(made: Setup, path: Path) -> None:
    """Raises `UsageError` where the newest checkpoint in a folder, if there is one, is not of a state of this run."""
    if checkpoint.latest(path / CHECKPOINTS) is None:
        return
    on_host = isinstance(made.env, HostEnv)
    template = host.HostLoop(made.agent, made.env).template if on_host else _device_programs(made).template
    checkpoint.check(path / CHECKPOINTS, template)


def _device_programs(made: Setup) -> Programs:
    description = made.description
    return programs(
        made.agent,
        made.env,
        seeds=description["seeds"],
        devices=description["devices"],
        backend=description["parallel"] or BACKENDS[0],
    )


def _tell_scores(run: Run, scores: Scores, say: Callable[[str], None]) -> None:
    """Says and keeps what the evaluation at the end came to; a full disk costs the files, not what is said."""
    if not math.isfinite(scores.mean):
        say(f"warning: not evaluated; `wmjax eval {run.path}` plays these episodes again")
        return
    say(f"mean return {scores.mean:.3f} over {scores.episodes} episodes, IQM {scores.iqm:.3f}")
    if line := scores.cut_line():
        say(line)
    try:
        keep(run.records(scores))
    except OSError as error:
        say(f"warning: {EVAL} in {str(run.path)!r} cannot be written ({error.strerror})")
