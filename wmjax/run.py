"""Runs from Python: train one into a folder, load it again, evaluate it, act with it.

A run folder holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` (the newest states of the whole
run), `best/` (the agent at its highest periodic evaluation), `eval.json`, and the pictures drawn of it. A run of
several seeds has a folder of this kind for each of them, `seed-0/` and so on, with the agent alone in its checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import filelock
import jax
import jax.numpy as jnp
import numpy as np

import wmjax
from wmjax import figures, presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.atari_scores import human_normalized
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device, host, wandb_log
from wmjax.loops.driver import (
    BEST,
    CHECKPOINTS,
    Driver,
    Interrupted,
    Plan,
    catch_signals,
    evaluation_key,
    make_evaluator,
    member_path,
)
from wmjax.loops.parallel import AXIS, BACKENDS, Programs, check_devices, programs, share, tree_of_seed
from wmjax.types import Agent, AgentState, Array, Env, HostEnv, PyTree, TimeStep, UsageError

__all__ = ["Interrupted", "Run", "Scores", "Setup", "load", "setup", "summarize", "train"]

CONFIG, EVAL, LOCK = "config.json", "eval.json", ".lock"
FINAL_EPISODES = 100
FINAL_HOST_EPISODES = 16  # where environments run on the host, and take their time
CHECKPOINT_SECONDS = 180.0
MAX_SKIPPED = 100
ACT_KEY = 0x41435431  # folded into the seed, so that no draw of training is met again
CACHE_VARIABLE = "WMJAX_CACHE"
# Settings without which a saved state means something else. Others may change where a run is resumed, as long as the
# state keeps its shapes.
IDENTITY = ("agent", "env", "seed", "seeds", "image_size", "action_repeat")


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


class Setup(NamedTuple):
    """A run before its first step, or one that is read back: all that `config.json` says, made into values."""

    description: dict[str, Any]  # what `config.json` holds
    config: Any  # the agent's frozen dataclass
    agent: Agent
    env: Env | HostEnv  # takes what the agent emits
    steps: int  # env steps to train for

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the run, one after the other."""
        return tuple(self.description["seed"] + i for i in range(self.description["seeds"]))


def setup(
    agent: str = "dreamer_v3",
    env: str | Env | HostEnv | None = None,
    *,
    preset: str | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    devices: int | None = None,
    parallel: str | None = None,
    image_size: int | None = None,
    action_repeat: int | None = None,
    overrides: dict[str, Any] | None = None,
    before: dict[str, Any] | None = None,
) -> Setup:
    """Resolves names and settings; see `train` for the arguments. Raises `UsageError` before anything is computed.

    `before` is what `config.json` says of a run that goes on, which holds for what is not given.
    """
    before = before if before and before["agent"] == agent else {}
    given = lambda field, value, default: before.get(field, default) if value is None else value
    env = given("env", env, None if before else presets.default_env(agent))
    if env is None:
        raise UsageError("env: the run was trained on an Env value, which has to be given again")
    name = env if isinstance(env, str) else None
    config = presets.replace(presets.starting_config(agent, preset, before), overrides or {})
    config.validate()
    preset = given("preset", preset, presets.DEFAULT_PRESET)
    _, settings = presets.resolve(agent, preset, name)
    seed, seeds, devices = given("seed", seed, 0), given("seeds", seeds, 1), given("devices", devices, 1)
    parallel = given("parallel", parallel, None) or BACKENDS[0]
    budget = given("steps", steps, settings.steps)
    for field, value, low in (("seed", seed, 0), ("seeds", seeds, 1), ("steps", budget, 1)):
        check_integer(field, value, low)
    check_integer("seed + seeds", seed + seeds, 0)
    check_devices(devices, parallel)
    if name is None and (image_size, action_repeat) != (None, None):
        raise UsageError("image_size, action_repeat: not valid with an Env value, which has its own")
    if name is not None:
        image_size = given("image_size", image_size, settings.image_size)
        action_repeat = given("action_repeat", action_repeat, settings.action_repeat)
    description = {
        "version": wmjax.__version__,
        "agent": agent,
        "env": name,
        "preset": preset,
        "seed": seed,
        "seeds": seeds,
        "devices": devices,
        "parallel": parallel if devices > 1 else None,
        "image_size": image_size,
        "action_repeat": action_repeat,
        "steps": budget,
        "config": dataclasses.asdict(config),
    }
    made = _setup(description, config, env, budget)
    fixed = device.fixed_env_steps(made.agent, made.env)
    if fixed is None:
        return made
    if steps not in (None, fixed):
        raise UsageError(
            f"steps: {steps} is not valid; the stages of {agent} have lengths of their own, which fields of its "
            f"configuration set: {fixed} env steps in all"
        )
    return made._replace(steps=fixed, description=description | {"steps": fixed})


def _setup(description: dict[str, Any], config: Any, env: str | Env | HostEnv, steps: int) -> Setup:
    if isinstance(env, str):
        env = make_env(env, image_size=description["image_size"], action_repeat=description["action_repeat"])
    env = agent_actions(env)
    if isinstance(env, HostEnv):
        for field in ("seeds", "devices"):
            if description[field] > 1:
                raise UsageError(
                    f"{field}: {description[field]} is not valid with environments on the host; 1 is (several runs may "
                    "be started side by side)"
                )
    axis_name = AXIS if description["devices"] > 1 else None
    agent = AGENTS[description["agent"]][1](env.spec, config, axis_name)
    device.check(agent)
    if axis_name is not None:
        device.check(agent._replace(recipe=share(agent.recipe, description["devices"])))
    return Setup(description, config, agent, env, steps)


def check_integer(field: str, value: Any, low: int) -> None:
    """Raises `UsageError` unless `value` is an integer in [low, 2**31)."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
        raise UsageError(f"{field}: {value!r} is not valid; an integer in [{low}, 2**31) is")


def check_number(field: str, value: Any, *, positive: bool = False) -> None:
    """Raises `UsageError` unless `value` is a number of at least 0, or with `positive` above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or (positive and value == 0):
        raise UsageError(f"{field}: {value!r} is not valid; a number {'above' if positive else 'of at least'} 0 is")


def read_description(path: str | Path) -> dict[str, Any]:
    """What `config.json` of a run folder says. Raises `UsageError` if the folder is not one."""
    try:
        description = json.loads((Path(path) / CONFIG).read_text())
        description["agent"], description["config"], description["seed"], description["seeds"], description["devices"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"run: {str(path)!r} is not a run folder; it holds no readable {CONFIG}") from None
    return description


def member_paths(path: str | Path, description: dict[str, Any]) -> list[Path]:
    """The folders with one seed each: those of a run of several seeds, or the run's own."""
    first, count = description["seed"], description["seeds"]
    return [Path(path)] if count == 1 else [member_path(Path(path), first + i) for i in range(count)]


class Scores(NamedTuple):
    """Returns of evaluation episodes and what they come to. Of several seeds: over all of their episodes."""

    mean: float
    std: float
    iqm: float  # mean of the middle half
    ci95: tuple[float, float]  # of the IQM, by bootstrap
    episodes: int
    returns: list[float]
    seeds: dict[int, Scores] | None = None  # of each seed by itself, where there are several

    def to_json(self) -> dict[str, Any]:
        """As `eval.json` has it; without `seeds` where there is one."""
        values = self._asdict()
        seeds = values.pop("seeds")
        return values | ({"seeds": {str(seed): own.to_json() for seed, own in seeds.items()}} if seeds else {})


def summarize(returns: Any, resamples: int = 2000) -> Scores:
    """Scores of returns `[episodes]`.

    The interquartile mean drops a quarter of the episodes, rounded down, at either end; its interval is the percentile
    bootstrap over episodes with a fixed seed. Source: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical
    Precipice".
    """
    returns = np.asarray(returns, np.float64)
    count = len(returns)
    cut = count // 4
    iqm = lambda x: np.sort(x, axis=-1)[..., cut : count - cut].mean(-1)
    draws = returns[np.random.default_rng(0).integers(0, count, (resamples, count))]
    low, high = np.percentile(iqm(draws), [2.5, 97.5])
    return Scores(
        float(returns.mean()), float(returns.std()), float(iqm(returns)), (float(low), float(high)), count,
        [float(x) for x in returns],
    )  # fmt: skip


def summarize_seeds(returns: dict[int, np.ndarray]) -> Scores:
    """Scores of returns `[episodes]` by seed: over all, and of each where there are several."""
    pool = summarize(np.concatenate(list(returns.values())))
    return pool._replace(seeds={seed: summarize(x) for seed, x in returns.items()}) if len(returns) > 1 else pool


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
    _acting: Any = dataclasses.field(default=None, repr=False)

    def evaluate(
        self,
        episodes: int = FINAL_EPISODES,
        seed: int = 0,
        *,
        env: Env | HostEnv | str | None = None,
        action: str | None = None,
    ) -> Scores:
        """Scores over the first episodes of fresh environments; of several seeds, over the episodes of all.

        Args:
          episodes: of each seed, at least 1.
          seed: of the evaluation; the same seed gives the same episodes.
          env: another environment, by name or value, with the same observations and actions.
          action: "sample" or "mode"; by default what the agent's configuration says (`eval_action`).
        """
        agent, where = self._playing(seed, env, action)
        evaluator, key = make_evaluator(agent, where), evaluation_key(seed)
        returns = {run.seed: evaluator(run.state.params, key, episodes) for run in self.members or (self,)}
        return summarize_seeds(returns)

    def write_episode(
        self, seed: int = 0, *, env: Env | HostEnv | str | None = None, action: str | None = None
    ) -> list[Path]:
        """Plays an episode and writes what is seen in it to the run's folder (`figures.write_episode`).

        Of several seeds, the first one plays. Arguments and errors are those of `evaluate`; it returns the files.
        """
        agent, where = self._playing(seed, env, action)
        run = self.members[0] if self.members else self
        return figures.write_episode(self.path, agent, where, run.state.params, evaluation_key(seed))

    def _playing(self, seed: int, env: Env | HostEnv | str | None, action: str | None) -> tuple[Agent, Env | HostEnv]:
        check_integer("seed", seed, 0)
        agent, where = self.agent, self.env if env is None else self._other_env(env)
        if action is not None:
            overrides = presets.check_fields(type(self.config), {"eval_action": action})
            agent = AGENTS[self.description["agent"]][1](self.env.spec, dataclasses.replace(self.config, **overrides))
        return agent, where

    @property
    def seed(self) -> int:
        """Of the run; of several, the first."""
        return self.description["seed"]

    def _other_env(self, env: Env | HostEnv | str) -> Env | HostEnv:
        if isinstance(env, str):
            sizes = {name: self.description[name] for name in ("image_size", "action_repeat")}
            env = make_env(env, **sizes)
        for name in ("obs", "action"):
            mine, other = getattr(self.env.spec, name), getattr(env.spec, name)
            if mine != other:
                raise UsageError(f"env: its {name} {other} is not what the agent was trained on, {mine}")
        return agent_actions(env)

    def act(self, obs: Any, *, is_first: bool = False, reward: float = 0.0, seed: int = 0) -> np.ndarray:
        """Chooses an action for one environment, which may be any program that gives such observations.

        This is the one method with a memory: the agent's belief, its last action and a key are kept in the run from
        call to call, and set back by `is_first=True` (or by the first call).

        Args:
          obs: what `env.spec.obs` says, without batch axes; a bare array where there is one entry.
          is_first: whether an episode begins here.
          reward: that arrived with `obs`.
          seed: of the action's draws; read when the memory is set back.

        Returns:
          The action in the environment's own form: an int32, or floats within the bounds.
        """
        if self.members:
            raise UsageError(f"act: this run has {len(self.members)} seeds; choose one, as in run.members[0].act(...)")
        spaces = self.env.spec.obs
        obs = obs if isinstance(obs, dict) else dict.fromkeys(spaces, obs)
        if set(obs) != set(spaces):
            raise UsageError(f"obs: entries {sorted(obs)} are not valid; {sorted(spaces)} are")
        if self._acting is None:
            self._acting = {"step": _act_program(self.agent, self.env), "carry": None}
        memory = self._acting
        is_first = is_first or memory["carry"] is None
        if is_first:
            key = jax.random.fold_in(jax.random.key(seed), ACT_KEY)
            memory |= {"carry": self.agent.act_carry(self.state.params, 1), "key": key}
        memory["key"], key = jax.random.split(memory["key"])
        obs = {name: np.asarray(value, getattr(spaces[name], "dtype", "int32"))[None] for name, value in obs.items()}
        flag = np.zeros(1, bool)
        step = TimeStep(obs, np.full(1, reward, np.float32), np.full(1, is_first), flag, flag)
        memory["carry"], action = memory["step"](self.state.params, key, memory["carry"], step)
        return np.asarray(action)


def _act_program(agent: Agent, env: Env | HostEnv) -> Any:
    """`act` of one environment, compiled, with the action in the environment's own form."""
    native = agent_actions(HostEnv(env.spec, None)).native

    def act(params: PyTree, key: Array, carry: PyTree, step: TimeStep) -> tuple[PyTree, Array]:
        carry, action, _ = agent.act(params, key, carry, step, explore=False)
        return carry, native(action[0])

    return jax.jit(act)


def load(path: str | Path, *, env: Env | HostEnv | None = None, which: str = "latest") -> Run:
    """Reads a run. Where its newest checkpoint is damaged it warns, on standard error, and reads the one before.

    Args:
      path: its folder.
      env: needed only if it was trained on an `Env` value.
      which: "latest", or "best": the agent at the highest of the periodic evaluations.

    Raises:
      UsageError: `path` is not a run folder, or has no checkpoint yet.
      CheckpointCorruptError: its files are not as they were written.
    """
    path = Path(path)
    description = read_description(path)
    if which not in ("latest", "best"):
        raise presets.nearest("which", which, ("latest", "best"))
    if description["env"] is None and env is None:
        raise UsageError(f"run: {str(path)!r} was trained on an Env value; load it from Python with env=...")
    config = presets.saved_config(description)
    made = _setup(description | {"devices": 1}, config, env or description["env"], 1)
    if description["seeds"] == 1:
        return Run(path, description, config, made.agent, made.env, _read_agent(path, made.agent, which))
    states = [_read_agent(folder, made.agent, which) for folder in member_paths(path, description)]
    return _with_members(Run(path, description, config, made.agent, made.env, states[0]), states)


def _read_agent(path: Path, agent: Agent, which: str) -> AgentState:
    folder = path / (CHECKPOINTS if which == "latest" else BEST)
    if checkpoint.latest(folder) is None:
        raise UsageError(f"run: {str(path)!r} has no checkpoint in {folder.name}/ yet")
    template = {"agent": jax.eval_shape(agent.init, jax.random.key(0))}
    warn = lambda text: print(f"wmjax: {text}", file=sys.stderr)
    return checkpoint.restore_newest(folder, template, warn)[1]["agent"]


def _with_members(run: Run, states: list[AgentState]) -> Run:
    """The run of several seeds, from the state of each."""
    members = tuple(
        dataclasses.replace(
            run,
            path=member_path(run.path, run.seed + i),
            description=_member_description(run.description, run.seed + i),
            state=state,
        )
        for i, state in enumerate(states)
    )
    return dataclasses.replace(run, state=jax.tree.map(lambda *x: jnp.stack(x), *states), members=members)


def _member_description(description: dict[str, Any], seed: int) -> dict[str, Any]:
    return description | {"seed": seed, "seeds": 1, "devices": 1, "parallel": None, "part_of_seeds": True}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    agent: str = "dreamer_v3",
    env: str | Env | HostEnv | None = None,
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
    eval_every: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    max_skipped: int = MAX_SKIPPED,
    workers: int | None = None,
    worker_timeout: float = host.DEFAULTS.timeout,
    max_restarts: int = host.DEFAULTS.max_restarts,
    memory_map: bool = False,
    wandb: str | None = None,
    progress: bool | TextIO = True,
    **overrides: Any,
) -> Run:
    """Trains an agent into a run folder, and evaluates it over 100 episodes (16 where environments are on the host).

    Args:
      agent: a name, see `wmjax list agents`.
      env: a name, see `wmjax list envs`, or an `Env` or `HostEnv` with its own kind of actions; by default the agent's
        own example.
      preset: a name, see `wmjax list presets`; "small" by default.
      seed: of everything that training draws; 0 by default.
      seeds: how many to train at once, in one program, from `seed` upwards; 1 by default. More than one, and more than
        one device, are for environments on the device.
      steps: env steps (frames over all environments) to train for, rounded up to whole iterations; the preset's by
        default. No schedule depends on it, so a run may be resumed with more. Not for agents all of whose stages have
        a length, such as World Models.
      devices: how many to spread environments, replay and batches over; 1 by default.
      parallel: how, "shard_map" (by default) or "pmap".
      out: the run folder; by default a new one under `runs/`.
      resume: go on with the run in `out`; the result is the same, byte for byte, as if it had never stopped, except
        that environments on the host begin new episodes. Of the settings above and of `overrides`, those that are not
        given stay as they are. Others may be changed, and the run then says so, as long as it is not environment, seed,
        image size or action repeat, and its state keeps its shapes.
      image_size, action_repeat: of the environment; the preset's by default.
      eval_every: env steps between evaluations of 16 episodes; a tenth of `steps` by default.
      checkpoint_seconds: least time between two checkpoints, which are written in the background.
      max_skipped: updates in a row whose loss or gradient may be other than finite; each is skipped and counted.
      workers: processes that step environments on the host, which these four are for; one per processor by default.
      worker_timeout: seconds for a step, after which a worker counts as hanging and is replaced.
      max_restarts: environments that may be lost within an hour before the run stops, with everything saved.
      memory_map: read replay from its files instead of keeping it in memory; it may then be larger than memory.
      wandb: a project of Weights & Biases to send metrics to as well.
      progress: where lines of progress go: True for standard output, False for nowhere.
      overrides: fields of the agent's configuration.

    Raises:
      UsageError: something asked for cannot be done; found before training starts.
      Interrupted: Ctrl-C or SIGTERM came; the run was saved. A second signal stops at once.
      RunError: the run cannot go on: its updates are not finite, its checkpoints are damaged, its end cannot be saved.
    """
    made = setup(
        agent, env, preset=preset, seed=seed, seeds=seeds, steps=steps, devices=devices, parallel=parallel,
        image_size=image_size, action_repeat=action_repeat, overrides=overrides,
        before=read_description(out) if resume and out is not None else None,
    )  # fmt: skip
    eval_every = max(1, made.steps // 10) if eval_every is None else eval_every
    check_integer("eval_every", eval_every, 1)
    check_integer("max_skipped", max_skipped, 0)
    check_number("checkpoint_seconds", checkpoint_seconds)
    if workers is not None:
        check_integer("workers", workers, 1)
    check_integer("max_restarts", max_restarts, 0)
    check_number("worker_timeout", worker_timeout, positive=True)
    if wandb is not None:
        wandb_log.check()
    options = host.Options(workers, worker_timeout, max_restarts, memory_map)
    stream = {True: sys.stdout, False: None}.get(progress, progress)
    say = lambda text: print(text, file=stream, flush=True) if stream is not None else None
    with _open_folder(out, resume, made, say) as path:
        say(describe(made, path))
        with catch_signals() as caught, _programs(made, path, options, resume, say, caught) as run_programs:
            plan = Plan(
                made.agent, made.env, path, made.seeds, made.steps, eval_every, checkpoint_seconds, max_skipped, stream,
                options, wandb,
            )  # fmt: skip
            driver = Driver(plan, run_programs, caught)
            state = driver.run(driver.start(resume, say))
            if caught:
                raise Interrupted(caught[0], path)
            digest = checkpoint.digest(driver.gather(state))
        agent_state = driver.local(state)
        episodes = FINAL_HOST_EPISODES if isinstance(made.env, HostEnv) else FINAL_EPISODES
        returns = driver.evaluator(agent_state.params, driver.per_seed(evaluation_key), episodes)
        scores = summarize_seeds(dict(zip(made.seeds, np.atleast_2d(returns), strict=True)))
        _write_scores(made, path, scores, say)
        say(f"mean return {scores.mean:.3f} over {scores.episodes} episodes, IQM {scores.iqm:.3f}")
        say(f"run folder {path}")
        say(f"state sha256 {digest}")
    run = Run(path, made.description, made.config, made.agent, made.env, agent_state)
    count = len(made.seeds)
    return run if count == 1 else _with_members(run, [tree_of_seed(agent_state, i) for i in range(count)])


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
            records=math.ceil(made.steps / made.env.spec.action_repeat), resume=resume,
        )  # fmt: skip
        with contextlib.closing(loop):
            yield host.programs(loop)
    else:
        yield _device_programs(made)


def _template(made: Setup) -> PyTree:
    """Shapes and dtypes of a run's state."""
    return (
        host.HostLoop(made.agent, made.env).template
        if isinstance(made.env, HostEnv)
        else _device_programs(made).template
    )


def _device_programs(made: Setup) -> Programs:
    # `init` runs once, so time spent on optimizing it is lost.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    description = made.description
    return programs(
        made.agent,
        made.env,
        seeds=description["seeds"],
        devices=description["devices"],
        backend=description["parallel"] or BACKENDS[0],
        options=options,
    )


def describe(made: Setup, path: Path) -> str:
    """The resolved configuration in some lines of text."""
    d = made.description
    repeat = f", action repeat {made.env.spec.action_repeat}" if made.env.spec.action_repeat > 1 else ""
    seeds = f"seed {d['seed']}" if d["seeds"] == 1 else f"seeds {made.seeds[0]} to {made.seeds[-1]}"
    spread = f", {d['devices']} devices ({d['parallel']})" if d["devices"] > 1 else ""
    head = f"{d['agent']} on {d['env'] or 'an Env value'}{repeat}, preset {d['preset']}, {seeds}{spread}"
    flat: dict[str, Any] = {}
    for name, value in d["config"].items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    fields = " ".join(f"{name}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in flat.items())
    obs = ", ".join(f"{name} {space}" for name, space in made.env.spec.obs.items())
    lines = [f"{head}, {made.steps:,} env steps", f"observes {obs}; acts in {made.env.spec.action}"]
    return "\n".join([*lines, *textwrap.wrap(fields, 118), f"run folder {path}"])


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


@contextlib.contextmanager
def _open_folder(out: str | Path | None, resume: bool, made: Setup, say: Callable[[str], None]) -> Iterator[Path]:
    """The run folder, locked for as long as the context lasts, with `config.json` in it."""
    if resume and out is None:
        raise UsageError("resume: needs the run folder to go on with, out")
    if resume:
        read_description(out)
    path = Path(out) if out is not None else _new_folder(made.description)
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"out: {str(path)!r} exists and is not empty; give another folder, or resume the run in it")
    lock, new = filelock.FileLock(path / LOCK), not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"out: {str(path)!r} is locked; another process is training in it") from None
    except OSError as error:
        raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
    try:
        if resume:
            _check_resumable(made, path, say)
        try:
            write_json(path / CONFIG, made.description)
            if len(made.seeds) > 1:
                for seed, folder in zip(made.seeds, member_paths(path, made.description), strict=True):
                    folder.mkdir(exist_ok=True)
                    write_json(folder / CONFIG, _member_description(made.description, seed))
        except OSError as error:
            raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
        try:
            yield path
        except UsageError:  # found before anything was trained, so the folder is left as it was
            if not resume:
                _remove_description(path, made, new)
            raise
    finally:
        lock.release()


def _remove_description(path: Path, made: Setup, new: bool) -> None:
    """Removes what `_open_folder` has written, and the folder itself if it is new, unless there is more in it."""
    members = member_paths(path, made.description) if len(made.seeds) > 1 else []
    found = {inner for folder in (path, *members) if folder.is_dir() for inner in folder.iterdir()}
    if found - {path / LOCK, *members, *(folder / CONFIG for folder in (path, *members))}:
        return
    for folder in members:
        shutil.rmtree(folder, ignore_errors=True)
    for name in (CONFIG, LOCK):
        (path / name).unlink(missing_ok=True)
    if new:
        path.rmdir()


def _new_folder(description: dict[str, Any]) -> Path:
    env = (description["env"] or "env").replace(":", "-").replace("/", "-")
    return Path("runs") / f"{description['agent']}-{env}-{description['seed']}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _check_resumable(made: Setup, path: Path, say: Callable[[str], None]) -> None:
    """Says which settings differ from those of the run so far.

    Raises `UsageError`, with all of them, if it then would be another run or its state have other shapes.
    """
    before = read_description(path)
    if before.get("part_of_seeds"):
        raise UsageError(f"resume: {str(path)!r} has the agent of one seed only; resume the run it is part of")
    flat = lambda d: {k: v for k, v in d.items() if k not in ("config", "version", "steps")} | d["config"]
    was, now = flat(before), flat(json.loads(json.dumps(made.description)))
    changed = {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}
    listed = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in changed.items())
    if fixed := sorted(changed.keys() & set(IDENTITY)):
        raise UsageError(f"resume: in {str(path)!r} {listed}; {', '.join(fixed)} cannot change")
    if changed and checkpoint.latest(path / CHECKPOINTS) is not None:
        try:
            checkpoint.check(path / CHECKPOINTS, _template(made))
        except UsageError as error:
            raise UsageError(f"resume: in {str(path)!r} {listed}; its state does not fit that: {error}") from None
    if changed:
        say(f"resume with changed settings: {listed}")


def with_human_normalized(scores: Scores, env: str | None) -> dict[str, Any]:
    """`Scores.to_json`, for Atari with the mean as a share of what a human earns beyond random play."""
    normalized = human_normalized(env, scores.mean)
    return scores.to_json() | ({"human_normalized": normalized} if normalized is not None else {})


def _write_scores(made: Setup, path: Path, scores: Scores, say: Callable[[str], None]) -> None:
    """`eval.json` of the run and of its seeds; a full disk costs the files, not what is printed."""
    about = {"env": made.description["env"], "action": None}
    try:
        write_json(path / EVAL, with_human_normalized(scores, about["env"]) | about | {"seed": made.seeds[0]})
        for seed, own in (scores.seeds or {}).items():
            found = with_human_normalized(own, about["env"])
            write_json(member_path(path, seed) / EVAL, found | about | {"seed": seed})
    except OSError as error:
        say(f"warning: {EVAL} in {str(path)!r} cannot be written ({error.strerror})")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs between processes; a program's second start then takes seconds.

    The folder is that of JAX's own setting if there is one, else of the variable `WMJAX_CACHE`, else `wmjax/xla` in the
    user's cache folder. `WMJAX_CACHE=off` turns it off. Returns the folder, or None.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted.lower() in ("off", "0", "none"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(wanted).expanduser() if wanted else home / "wmjax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
