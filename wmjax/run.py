"""Runs from Python: train one into a folder, load it again, evaluate it, act with it.

A run folder holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` (the newest states of the whole
run), `best/` (the agent at its highest periodic evaluation), `eval.json`, and the pictures drawn of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

import wmjax
from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import checkpoint, device
from wmjax.loops.report import Report
from wmjax.loops.rollout import evaluate
from wmjax.types import Agent, AgentState, Array, Env, PyTree, TimeStep, UsageError

CONFIG, CHECKPOINTS, BEST, EVAL = "config.json", "checkpoints", "best", "eval.json"
FINAL_EPISODES = 100
PERIODIC_EPISODES = 16  # also how many play at once, so that one compiled program serves every evaluation
LOG_SECONDS = 10.0  # aimed at between two lines of progress
CHECKPOINT_SECONDS = 180.0
CHECKPOINT_SHARE = 0.05  # of the run's time; large replays are saved less often
EVAL_KEY, ACT_KEY = 0x45564131, 0x41435431  # folded into the seed, so that no draw of training is met again
CACHE_VARIABLE = "WMJAX_CACHE"


class Interrupted(KeyboardInterrupt):
    """Training was interrupted by a signal, and the run was saved; `signum` says by which."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"interrupted; saved in {path}")
        self.signum = signum


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


class Setup(NamedTuple):
    """A run before its first step, or one that is read back: all that `config.json` says, made into values."""

    description: dict[str, Any]  # what `config.json` holds
    config: Any  # the agent's frozen dataclass
    agent: Agent
    env: Env  # takes what the agent emits
    steps: int  # env steps to train for


def setup(
    agent: str = "dreamer_v3",
    env: str | Env = "catch",
    *,
    preset: str = presets.DEFAULT_PRESET,
    seed: int = 0,
    steps: int | None = None,
    image_size: int | None = None,
    action_repeat: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> Setup:
    """Resolves names and settings; see `train` for the arguments. Raises `UsageError` before anything is computed."""
    name = env if isinstance(env, str) else None
    config, settings = presets.resolve(agent, preset, name, overrides)
    steps = settings.steps if steps is None else steps
    for field, value, low in (("seed", seed, 0), ("steps", steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise UsageError(f"{field}: {value!r} is not valid; an integer in [{low}, 2**31) is")
    if name is None and (image_size, action_repeat) != (None, None):
        raise UsageError("image_size, action_repeat: not valid with an Env value, which has its own")
    image_size = settings.image_size if image_size is None and name else image_size
    action_repeat = settings.action_repeat if action_repeat is None and name else action_repeat
    description = {
        "version": wmjax.__version__,
        "agent": agent,
        "env": name,
        "preset": preset,
        "seed": seed,
        "image_size": image_size,
        "action_repeat": action_repeat,
        "config": dataclasses.asdict(config),
    }
    return _setup(description, config, env, steps)


def _setup(description: dict[str, Any], config: Any, env: str | Env, steps: int) -> Setup:
    if isinstance(env, str):
        env = make_env(env, image_size=description["image_size"], action_repeat=description["action_repeat"])
    env = agent_actions(env)
    agent = AGENTS[description["agent"]][1](env.spec, config)
    return Setup(description, config, agent, env, steps)


def read_description(path: str | Path) -> dict[str, Any]:
    """What `config.json` of a run folder says. Raises `UsageError` if the folder is not one."""
    try:
        description = json.loads((Path(path) / CONFIG).read_text())
        description["agent"], description["config"], description["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"run: {str(path)!r} is not a run folder; it holds no readable {CONFIG}") from None
    return description


class Scores(NamedTuple):
    """Returns of evaluation episodes and what they come to."""

    mean: float
    std: float
    iqm: float  # mean of the middle half
    ci95: tuple[float, float]  # of the IQM, by bootstrap
    episodes: int
    returns: list[float]


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


class Evaluator:
    """Plays evaluation episodes; compiled once, whatever their number. Episode i depends on the key and i only."""

    def __init__(self, agent: Agent, env: Env) -> None:
        self._play = jax.jit(lambda params, key: evaluate(agent, env, params, key, PERIODIC_EPISODES))

    def __call__(self, params: PyTree, key: Array, episodes: int) -> np.ndarray:
        """Returns float32 `[episodes]`. Raises `UsageError` unless `episodes` is an integer of at least 1."""
        if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 1:
            raise UsageError(f"episodes: {episodes!r} is not valid; an integer of at least 1 is")
        rounds = range(math.ceil(episodes / PERIODIC_EPISODES))
        played = [np.asarray(self._play(params, jax.random.fold_in(key, i)).returns) for i in rounds]
        return np.concatenate(played)[:episodes]


def evaluation_key(seed: int) -> Array:
    """The key of evaluations under a seed, apart from the keys of training under the same seed."""
    return jax.random.fold_in(jax.random.key(seed), EVAL_KEY)


@dataclasses.dataclass
class Run:
    """A trained agent in its environment.

    All is a value except what `act` remembers between calls: one stream of observations is being acted on at a time.
    """

    path: Path
    description: dict[str, Any]  # what `config.json` says
    config: Any  # the agent's configuration
    agent: Agent
    env: Env  # takes what the agent emits
    state: AgentState
    _acting: Any = dataclasses.field(default=None, repr=False)

    def evaluate(
        self, episodes: int = FINAL_EPISODES, seed: int = 0, *, env: Env | str | None = None, action: str | None = None
    ) -> Scores:
        """Scores over the first episodes of fresh environments.

        Args:
          episodes: at least 1.
          seed: of the evaluation; the same seed gives the same episodes.
          env: another environment, by name or value, with the same observations and actions.
          action: "sample" or "mode"; by default what the agent's configuration says (`eval_action`).
        """
        agent, where = self.agent, self.env if env is None else self._other_env(env)
        if action is not None:
            overrides = presets.check_fields(type(self.config), {"eval_action": action})
            agent = AGENTS[self.description["agent"]][1](self.env.spec, dataclasses.replace(self.config, **overrides))
        return summarize(Evaluator(agent, where)(self.state.params, evaluation_key(seed), episodes))

    def _other_env(self, env: Env | str) -> Env:
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


def _act_program(agent: Agent, env: Env) -> Any:
    """`act` of one environment, compiled, with the action in the environment's own form."""
    # An environment that hands back the action it was given shows what `agent_actions` turns one into.
    native = agent_actions(env._replace(step=lambda key, state, action: action))

    def act(params: PyTree, key: Array, carry: PyTree, step: TimeStep) -> tuple[PyTree, Array]:
        carry, action, _ = agent.act(params, key, carry, step, explore=False)
        return carry, native.step(key, None, action[0])

    return jax.jit(act)


def load(path: str | Path, *, env: Env | None = None, which: str = "latest") -> Run:
    """Reads a run.

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
    if description["agent"] not in AGENTS:
        raise presets.nearest("agent", description["agent"], AGENTS)
    config_class = AGENTS[description["agent"]][0]
    config = config_class(**presets.check_fields(config_class, description["config"]))
    made = _setup(description, config, env or description["env"], 1)
    folder = path / (CHECKPOINTS if which == "latest" else BEST)
    if checkpoint.latest(folder) is None:
        raise UsageError(f"run: {str(path)!r} has no checkpoint in {folder.name}/ yet")
    template = {"agent": jax.eval_shape(made.agent.init, jax.random.key(0))}
    state = checkpoint.restore(folder, template)["agent"]
    return Run(path, description, config, made.agent, made.env, state)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(
    agent: str = "dreamer_v3",
    env: str | Env = "catch",
    *,
    preset: str = presets.DEFAULT_PRESET,
    seed: int = 0,
    steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    image_size: int | None = None,
    action_repeat: int | None = None,
    eval_every: int | None = None,
    progress: bool | TextIO = True,
    **overrides: Any,
) -> Run:
    """Trains an agent into a run folder, and evaluates it over 100 episodes.

    Args:
      agent: a name, see `wmjax list agents`.
      env: a name, see `wmjax list envs`, or an `Env` with its own kind of actions.
      preset: a name, see `wmjax list presets`.
      seed: of everything that training draws.
      steps: env steps (frames over all environments) to train for, rounded up to whole iterations; the preset's by
        default. No schedule depends on it, so a run may be resumed with more.
      out: the run folder; by default a new one under `runs/`.
      resume: go on with the run in `out`, whose configuration must be the same; the result is the same, byte for byte,
        as if it had never stopped.
      image_size, action_repeat: of the environment; the preset's by default.
      eval_every: env steps between evaluations of 16 episodes; a tenth of `steps` by default.
      progress: where lines of progress go: True for standard output, False for nowhere.
      overrides: fields of the agent's configuration.

    Raises:
      UsageError: something asked for cannot be done; found before training starts.
      Interrupted: Ctrl-C or SIGTERM came; the run was saved. A second signal stops at once.
    """
    made = setup(
        agent, env, preset=preset, seed=seed, steps=steps, image_size=image_size, action_repeat=action_repeat,
        overrides=overrides,
    )  # fmt: skip
    eval_every = max(1, made.steps // 10) if eval_every is None else eval_every
    if eval_every < 1:
        raise UsageError(f"eval_every: {eval_every!r} is not valid; an integer of at least 1 is")
    device.check(made.agent)
    path = _open_folder(out, resume, made.description)
    stream = {True: sys.stdout, False: None}.get(progress, progress)
    say = lambda text: print(text, file=stream, flush=True) if stream is not None else None
    say(describe(made, path))
    with _catch_signals() as caught:
        state = _start(made, path if resume else None)
        driver = _Driver(made, path, eval_every, caught)
        step = driver.env_steps(state)
        with Report(path, total_steps=made.steps, resume_step=step, stream=stream) as report:
            state = driver.run(state, report)
        driver.save(state)
        if caught:
            raise Interrupted(caught[0], path)
    scores = summarize(driver.evaluator(state.agent.params, evaluation_key(seed), FINAL_EPISODES))
    write_json(path / EVAL, scores._asdict() | {"seed": seed, "env": made.description["env"], "action": None})
    say(f"mean return {scores.mean:.3f} over {scores.episodes} episodes, IQM {scores.iqm:.3f}")
    say(f"run folder {path}")
    say(f"state sha256 {checkpoint.digest(state)}")
    return Run(path, made.description, made.config, made.agent, made.env, state.agent)


def describe(made: Setup, path: Path) -> str:
    """The resolved configuration in some lines of text."""
    d = made.description
    repeat = f", action repeat {made.env.spec.action_repeat}" if made.env.spec.action_repeat > 1 else ""
    head = f"{d['agent']} on {d['env'] or 'an Env value'}{repeat}, preset {d['preset']}, seed {d['seed']}"
    fields = " ".join(
        f"{name}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in d["config"].items()
    )
    obs = ", ".join(f"{name} {space}" for name, space in made.env.spec.obs.items())
    lines = [f"{head}, {made.steps:,} env steps", f"observes {obs}; acts in {made.env.spec.action}"]
    return "\n".join([*lines, *textwrap.wrap(fields, 118), f"run folder {path}"])


def _open_folder(out: str | Path | None, resume: bool, description: dict[str, Any]) -> Path:
    """The run folder, with `config.json` in it."""
    if resume:
        if out is None:
            raise UsageError("resume: needs the run folder to go on with, out")
        _check_same(read_description(out), description, out)
        return Path(out)
    if out is None:
        env = (description["env"] or "env").replace(":", "-").replace("/", "-")
        out = Path("runs") / f"{description['agent']}-{env}-{description['seed']}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"out: {str(path)!r} exists and is not empty; give another folder, or resume the run in it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / CONFIG, description)
    except OSError as error:
        raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
    return path


def _check_same(before: dict[str, Any], now: dict[str, Any], path: str | Path) -> None:
    """Raises `UsageError` at the first setting that differs; the program's version may."""
    flat = lambda d: {k: v for k, v in d.items() if k not in ("config", "version")} | d["config"]
    before, now = flat(before), flat(json.loads(json.dumps(now)))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            was, wanted = before.get(name), now.get(name)
            raise UsageError(f"resume: {name} is {was!r} in {str(path)!r}, not {wanted!r}; only steps may change")


def _start(made: Setup, path: Path | None) -> device.RunState:
    """The run's first state, or its newest saved one. Compiled, as it would take a minute op by op."""
    # It runs once, so time spent on optimizing it is lost.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = functools.partial(device.init, made.agent, made.env)
    key = jax.random.key(made.description["seed"])
    if path is not None and checkpoint.latest(path / CHECKPOINTS) is not None:
        return checkpoint.restore(path / CHECKPOINTS, jax.eval_shape(init, key))
    return jax.jit(init).lower(key).compile(compiler_options=options)(key)


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of stopping; the second one stops. Only in the main thread."""
    caught: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Driver:
    """Runs the stages of a recipe in chunks; between them it reports, evaluates and saves.

    What it does depends on the clock, what it computes does not: a run state is the same however it is cut.
    """

    def __init__(self, made: Setup, path: Path, eval_every: int, caught: list[int]) -> None:
        self._made, self._path, self._eval_every, self._caught = made, path, eval_every, caught
        self.evaluator = Evaluator(made.agent, made.env)
        best = path / BEST
        self._best = checkpoint.info(best)["mean"] if checkpoint.latest(best) is not None else -math.inf
        self._saved = time.monotonic()
        self._save_seconds = 0.0

    def env_steps(self, state: device.RunState) -> int:
        return device.env_steps(self._made.agent, self._made.env, state)

    def _iterations(self, index: int) -> int:
        """Of a stage; an open one uses up the step budget."""
        recipe, env = self._made.agent.recipe, self._made.env
        stage = recipe.stages[index]
        if stage.iterations is not None:
            return stage.iterations
        frames = recipe.num_envs * env.spec.action_repeat
        before = sum(s.collect * s.iterations for s in recipe.stages[:index]) * frames
        return max(0, math.ceil((self._made.steps - before) / (stage.collect * frames)))

    def _replay_ratio(self, index: int, iteration: int) -> float:
        recipe = self._made.agent.recipe
        trained = collected = 0
        for number, stage in enumerate(recipe.stages[: index + 1]):
            done = iteration if number == index else stage.iterations
            trained += done * sum(u.repeats * u.batch_size * u.sampling.length for u in stage.updates)
            collected += done * stage.collect * recipe.num_envs
        return trained / max(collected, 1)

    def run(self, state: device.RunState, report: Report) -> device.RunState:
        """Trains to the end of the recipe, or until a signal is caught."""
        stages = self._made.agent.recipe.stages
        while True:
            index = int(state.stage)
            state = self._run_stage(state, index, report)
            if self._caught or index + 1 == len(stages):
                return state
            state = device.next_stage(state)

    def _run_stage(self, state: device.RunState, index: int, report: Report) -> device.RunState:
        stage = self._made.agent.recipe.stages[index]
        total, done = self._iterations(index), int(state.iteration)
        advance = device.compile_stage(self._made.agent, self._made.env, stage)
        frames = stage.collect * self._made.agent.recipe.num_envs * self._made.env.spec.action_repeat
        chunk = 1  # the first line of progress comes as soon as it can
        while done < total and not self._caught:
            to_evaluation = self._eval_every - self.env_steps(state) % self._eval_every
            size = min(chunk, total - done, max(1, math.ceil(to_evaluation / max(frames, 1))))
            start = time.monotonic()
            step = self.env_steps(state)
            state, metrics = jax.block_until_ready(advance(state, size))
            seconds = time.monotonic() - start
            done += size
            metrics = dict(metrics)
            if stage.updates and self.env_steps(state) // self._eval_every > step // self._eval_every:
                metrics["eval/return"] = self._evaluate(state)
            ratio = self._replay_ratio(index, done)
            report.log(stage.name, self.env_steps(state), int(state.agent.step), metrics, ratio)
            # The first chunk's time is mostly the compiler's: then grow by at most eight times.
            chunk = max(1, min(8 * size, round(size * LOG_SECONDS / max(seconds, 1e-3)))) if done > size else 8
            if done < total and self._due():
                self.save(state)
        return state

    def _evaluate(self, state: device.RunState) -> float:
        """Mean return of the periodic evaluation; keeps the agent if it is the best so far."""
        step = self.env_steps(state)
        key = jax.random.fold_in(evaluation_key(self._made.description["seed"]), step)
        mean = float(self.evaluator(state.agent.params, key, PERIODIC_EPISODES).mean())
        if mean > self._best:
            self._best = mean
            checkpoint.save(self._path / BEST, step, {"agent": state.agent}, keep=1, info={"mean": mean})
        return mean

    def _due(self) -> bool:
        wait = max(CHECKPOINT_SECONDS, self._save_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved > wait

    def save(self, state: device.RunState) -> None:
        """Saves the whole run."""
        start = time.monotonic()
        checkpoint.save(self._path / CHECKPOINTS, self.env_steps(state), state, keep=2)
        self._saved = time.monotonic()
        self._save_seconds = self._saved - start


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


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
