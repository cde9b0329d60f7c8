"""Runs the stages of a recipe on the host's side: in chunks, between which it reports, evaluates and saves.

What happens between chunks depends on the clock; what is computed does not, so a run is the same however it is cut.
Several processes go by the clock of the first, which alone writes and speaks; the others bring what they have of the
state.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import distributed
from wmjax.loops import checkpoint, device, memory
from wmjax.loops.ahead import Ahead, compiler_thread
from wmjax.loops.device import RunState
from wmjax.loops.display import Clock, Display
from wmjax.loops.host.rollout import HostEvaluator, Options
from wmjax.loops.on_data import is_playable
from wmjax.loops.parallel import Programs, tree_of_seed
from wmjax.loops.report import Left, Report
from wmjax.loops.rollout import PERIODIC_EPISODES, Evaluator
from wmjax.loops.schedule import Schedule, first
from wmjax.loops.shards import Team
from wmjax.ops import noise
from wmjax.run_folder import BEST, CHECKPOINTS, member_description, member_path
from wmjax.types import Agent, AgentState, Array, Env, HostEnv, RunError, UsageError

KEEP = 2  # checkpoints of the whole run; what is best holds the agent alone
LOG_SECONDS = 10.0  # aimed at between two lines of progress
CHECKPOINT_SHARE = 0.05  # of the run's time at most; large replays are saved less often
STAGE_SECONDS = 20.0  # a stage that took longer is saved when it ends: to compile the next one may take a minute
LARGE = 0.5  # of the free memory, from which on a state is made only once it is known what the stages need besides
EVAL_KEY = 0x45564131  # folded into the seed, so that no draw of training is met again


class Interrupted(KeyboardInterrupt):
    """Training was interrupted by a signal, and the run was saved; `signum` says by which."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"interrupted; saved in {path}")
        self.signum = signum


class NotFiniteError(RunError):
    """Too many updates in a row had a loss or gradient that was not finite; the message says what there is to go on."""


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluation_key(seed: int) -> Array:
    """The key of evaluations under a seed, apart from the keys of training under the same seed."""
    return jax.random.fold_in(jax.random.key(seed), EVAL_KEY)


def make_evaluator(
    agent: Agent,
    env: Env | HostEnv,
    *,
    seeds: bool = False,
    max_steps: int | None = None,
    shared: bool = False,
    **host: Any,
) -> Evaluator | HostEvaluator:
    """An `Evaluator`, or for environments on the host a `HostEvaluator`, which alone takes the rest."""
    if isinstance(env, HostEnv):
        return HostEvaluator(agent, env, max_steps=max_steps, shared=shared, **host)
    return Evaluator(agent, env, seeds=seeds, max_steps=max_steps, shared=shared)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Plan(NamedTuple):
    """What a driver is to do, and where."""

    agent: Agent  # its recipe says the numbers of the whole run
    env: Env | HostEnv
    path: Path
    seeds: tuple[int, ...]  # more than one: the state has a leading axis of seeds
    steps: int  # env steps to train for
    eval_every: int  # env steps; 0: never
    checkpoint_seconds: float
    max_skipped: int  # updates in a row
    display: Display | None = None  # where progress goes
    host: Options = Options()  # of environments on the host
    wandb: str | None = None  # a project of Weights & Biases
    # (what a line of progress has, by name; the agent at that moment, which is donated afterwards) -> False to stop
    callback: Callable[[dict[str, Any], AgentState], Any] | None = None
    description: dict[str, Any] | None = None  # what `config.json` says, kept with every checkpoint


class Driver:
    """Takes a run from its state to the end of its recipe, or to the chunk in which a signal is caught.

    Args:
      plan: what to do.
      programs: compiled for the plan's agent, environment and seeds.
      caught: signals caught so far.
    """

    def __init__(self, plan: Plan, programs: Programs, caught: list[int]) -> None:
        self._plan, self._programs, self._caught = plan, programs, caught
        self._several = len(plan.seeds) > 1
        self.schedule = Schedule(plan.agent, plan.env, plan.steps, plan.eval_every)
        self._display, self._clock = plan.display or Display(None), Clock()
        host = dict(options=plan.host, say=self._display.say, stop=lambda: bool(caught), make_way=programs.make_way)
        plays = is_playable(plan.env)
        how = dict(seeds=self._several, shared=True, **host)
        self.evaluator = make_evaluator(plan.agent, plan.env, **how) if plays else None
        self._leads = distributed.leads()
        self._folders = [member_path(plan.path, seed) for seed in plan.seeds] if self._several else [plan.path]
        self._compiler = compiler_thread()
        self._ahead: dict[int, Ahead] = {}  # stages by their index
        self._saved = time.monotonic()
        self._saved_steps: list[int] = []  # the last, which may be on its way to the disk
        self._save_seconds = 0.0
        self._error: BaseException | None = None  # that the callback raised
        self._calls_back = False  # whether this process has a callback, or another one
        self.stopped = False  # whether the callback said so, or failed
        self._ending = False

    def close(self) -> None:
        """Begins to compile no more."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _compile_ahead(self, now: int) -> None:
        """Begins to compile the stages after `now` and the evaluation, while those before them compile and run."""
        if not self._programs.ahead:
            return
        template, stages = self._programs.taken, self._plan.agent.recipe.stages
        for index in range(now + 1, len(stages)):
            if self.schedule.lengths[index]:
                advance = self._programs.compile_stage(stages[index])
                self._ahead[index] = Ahead(self._compiler, advance, template, 1)
        if isinstance(self.evaluator, Evaluator):
            keys = jax.eval_shape(lambda: self.per_seed(evaluation_key))
            self.evaluator.compile_ahead(self._compiler, template.agent.variables, keys)

    def _check_ahead(self) -> None:
        """Before a large state takes memory: raises `UsageError` where the stages after the first need too much of it.

        Waits until they are compiled; a small state is worth no waiting, and its stages are checked when they begin.
        """
        free, template = memory.room(), self._programs.taken
        if free is None or memory.tree_bytes(template) < LARGE * free.bytes:
            return
        for index, program in self._ahead.items():
            stage = self._plan.agent.recipe.stages[index]
            with self._display.working(f"compiling the stage `{stage.name}` (once, then cached)"):
                memory.check_program(self._plan.agent.recipe, stage, template, program.compiled(), held=False)

    def _ends(self) -> bool:
        """Whether something keeps the run from going on; of several processes, as they have agreed."""
        return self._ending or (distributed.count() == 1 and self._wants_to_end())

    def _wants_to_end(self) -> bool:
        return bool(self._caught or self.stopped or self._programs.failure)

    def _agree(self, chunk: int, saves: bool) -> tuple[int, bool]:
        """What the first process says of the next chunk and of saving; the run ends where one of them wants it to."""
        told = distributed.gather([chunk, saves, self._wants_to_end(), max(self._caught, default=0)])
        self._ending = bool(told[:, 2].any())
        if (signum := int(told[:, 3].max())) and not self._caught:
            self._caught.append(signum)
        return int(told[0, 0]), bool(told[0, 1])

    def per_seed(self, make: Callable[[int], Array]) -> Array:
        """`make` of every seed, stacked if there are several."""
        values = [make(seed) for seed in self._plan.seeds]
        return jnp.stack(values) if self._several else values[0]

    def start(self, resume: bool, warn: Callable[[str], None]) -> RunState:
        """The run's first state or, to resume, its newest saved one.

        Raises:
          UsageError: what was saved has other leaves, shapes or dtypes.
          CheckpointCorruptError: no checkpoint is as it was written.
        """
        folder = self._plan.path / CHECKPOINTS
        if not resume or distributed.exchange(checkpoint.latest(folder))[0] is None:
            self._set_aside(-1, 0, warn)
            self._compile_ahead(0)
            self._check_ahead()
            with self._display.working("compiling the run's first state (once, then cached)"):
                return jax.block_until_ready(self._programs.init(self.per_seed(jax.random.key)))
        with self._display.working("reading the newest checkpoint"):
            how = dict(exact=True, together=distributed.count() > 1)
            _, state = checkpoint.restore_newest(folder, self._programs.template, warn, **how)
            # What has another number than its state is set aside too: it would stay the newest for ever.
            self._set_aside(self.schedule.env_steps(state), self.schedule.iteration(state), warn)
            state = state._replace(skips=device.count_anew(state.skips, self._plan.max_skipped))
            self._compile_ahead(first(state.stage))
            return self._programs.place(state)

    def _set_aside(self, step: int, iteration: int, warn: Callable[[str], None]) -> None:
        """Takes what was saved after a step out of the way of a run that goes on from there."""
        if not self._leads:
            return
        for folder in {self._plan.path, *self._folders}:
            checkpoint.set_aside(folder / CHECKPOINTS, after=step)
        for folder in self._folders:
            later = checkpoint.set_aside(folder / BEST, after=step)
            with contextlib.suppress(checkpoint.CheckpointCorruptError, UsageError):
                # The steps of a search for parameters may take none of the environment.
                then = checkpoint.info(folder / BEST, step).get("iteration", 0)
                if isinstance(then, int) and then > iteration:
                    checkpoint.put_aside(folder / BEST, step)
                    later.append(step)
            if later:
                there = checkpoint.latest(folder / BEST)
                now = "none yet" if there is None else f"that of step {there}"
                which = ", ".join(map(str, later))
                warn(
                    f"warning: {folder / BEST}: step {which} is set aside (.damaged), for the run goes on from step "
                    f"{max(step, 0)}; the best agent is {now}"
                )

    def run(self, state: RunState) -> RunState:
        """Trains, and saves the whole run where it ends. What the callback raises is raised after that.

        Raises:
          NotFiniteError: more than `max_skipped` updates in a row were not finite, in every seed.
          ReplicasDifferError: devices came to differ.
          RunError: the last state could not be saved.
        """
        plan, stages = self._plan, self._plan.agent.recipe.stages
        resume = {"resume_step": self.schedule.env_steps(state), "resume_iteration": self.schedule.iteration(state)}
        with contextlib.ExitStack() as stack:
            shared = {"clock": self._clock, **resume}
            path, wandb = (plan.path, plan.wandb) if self._leads else (None, None)
            report = Report(path, total_steps=plan.steps, display=self._display, wandb=wandb, **shared)
            self._report = stack.enter_context(report)
            members = self._folders if self._several and self._leads else []
            self._members = [stack.enter_context(Report(folder, **shared)) for folder in members]
            token = distributed.exchange(secrets.token_hex(8))[0]
            self._team = Team(distributed.index(), distributed.count(), token)
            self._calls_back = any(distributed.exchange(plan.callback is not None))
            self._saver = checkpoint.Saver(self._display.say)
            stack.callback(self._saver.close)
            self._best = [self._best_before(folder / BEST) if self._leads else math.inf for folder in self._folders]
            while True:
                index = first(state.stage)
                state = self._run_stage(state, index)
                cut = first(state.iteration) < (stages[index].iterations or 0)  # the steps were used up before its end
                if self._ends() or cut or index + 1 == len(stages):
                    break
                state = device.next_stage(state)
                if self._agree(1, self._due(state, STAGE_SECONDS))[1]:
                    self._save(state)
            self._programs.check_replicas(state)
            self._save(state)
            self._saver.close()
            distributed.wait()  # until the step is in its place
        if failure := self._programs.failure or self._error:
            raise failure
        if self._saver.failed:
            raise RunError(f"the end of the run could not be saved: {', '.join(map(str, sorted(self._saver.failed)))}")
        return state

    def _best_before(self, folder: Path) -> float:
        """The mean return of the best agent saved so far. One that cannot be read is set aside, and that is said."""
        for step in reversed(checkpoint.steps(folder)):
            try:
                mean = checkpoint.info(folder, step).get("mean")
                if isinstance(mean, int | float):
                    return float(mean)
                reason = f"{folder}: step {step} does not say its mean return"
            except checkpoint.CheckpointCorruptError as error:
                reason = error
            checkpoint.put_aside(folder, step)
            self._display.say(f"warning: {reason}; it is set aside (.damaged)")
        return -math.inf

    def _run_stage(self, state: RunState, index: int) -> RunState:
        schedule, stage = self.schedule, self._plan.agent.recipe.stages[index]
        total, done = schedule.lengths[index], first(state.iteration)
        advance = self._ahead.get(index) or self._programs.compile_stage(stage)
        compiling = self._display.working(f"compiling the stage `{stage.name}` (once, then cached)")
        chunk = 1  # the first line of progress comes as soon as it can
        self._report.starts(stage.name, done)
        while done < total and not self._ends():
            size = min(chunk, total - done, schedule.until_evaluation(state))
            before = schedule.evaluations(state)
            start = self._clock.seconds()
            with compiling:
                if chunk == 1 and isinstance(advance, Ahead):
                    memory.check_program(self._plan.agent.recipe, stage, state, advance.compiled(), held=True)
                state, metrics = jax.block_until_ready(advance(state, size))
            compiling = contextlib.nullcontext()
            seconds = self._clock.seconds() - start
            done = first(state.iteration)  # fewer than asked for where a stage on the host was interrupted
            metrics = {name: np.asarray(value) for name, value in metrics.items()}
            now = schedule.evaluations(state)
            if now > before:
                metrics |= self._evaluate(state)
            end = schedule.evaluations(state, more=total - done)
            last = index + 1 == len(schedule.lengths)
            left = Left(done, total, last, max(0, end - now), collects=bool(stage.collect))
            self._log(stage.name, state, metrics, schedule.replay_ratio(state), left)
            self._saver.poll()
            self._stop_if_not_finite(state)
            # The first chunk tells little: then grow by at most eight times.
            chunk = max(1, min(8 * size, round(size * LOG_SECONDS / max(seconds, 1e-3)))) if done > size else 8
            chunk, saves = self._agree(chunk, self._due(state, self._plan.checkpoint_seconds))
            if done < total and saves:
                self._save(state)
        return state

    def _log(self, stage: str, state: RunState, metrics: Mapping[str, np.ndarray], ratio: float, left: Left) -> None:
        """One line of the run, with means over seeds, and one of every seed."""
        step, updates = self.schedule.env_steps(state), np.ravel(self._programs.replica(state.agent.step))
        metrics = {**metrics, "skipped": np.asarray(self._programs.replica(state.skips.total))}
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # no seed has a value yet
            means = {name: np.nanmean(value) for name, value in metrics.items()}
        iteration = self.schedule.iteration(state)
        record = self._report.log(stage, step, int(updates.max()), means, ratio, iteration=iteration, left=left)
        for i, report in enumerate(self._members):
            own = {name: value[i] for name, value in metrics.items()}
            report.log(stage, step, int(updates[i]), own, ratio, iteration=iteration)
        if self._calls_back:
            with self._clock.pause():  # all processes ask for the agent, though only some may have a callback
                self._call_back(record, self._programs.replica(state.agent))

    def _call_back(self, record: dict[str, Any], agent: AgentState) -> None:
        """The run ends after a callback that returned False or raised; what it raised is kept until all is saved."""
        if self._plan.callback is None:
            return
        try:
            answer = self._plan.callback(record, agent)
        except BaseException as error:
            self._error, self.stopped = error, True
        else:
            self.stopped = isinstance(answer, bool | np.bool_) and not answer

    def _stop_if_not_finite(self, state: RunState) -> None:
        plan, folder = self._plan, self._plan.path / CHECKPOINTS
        longest = int(np.min(self._programs.replica(state.skips.longest)))
        if longest <= plan.max_skipped:
            return
        if distributed.exchange(checkpoint.latest(folder))[0] is None:  # the agent is as its last finite update left it
            self._save(state)
        self._saver.close()
        raise NotFiniteError(
            f"{longest} updates in a row had a loss or gradient that was not finite (max_skipped {plan.max_skipped}); "
            f"none of them was applied. The last good checkpoint is step {checkpoint.latest(folder)} in {folder}; the "
            "run may be resumed from it with other settings, such as a lower learning rate"
        )

    def _evaluate(self, state: RunState) -> dict[str, np.ndarray]:
        """Metrics of the periodic evaluation, of each seed; keeps the agents that are the best so far."""
        step, agent = self.schedule.env_steps(state), self._programs.replica(state.agent)
        keys = noise.fold_in(self.per_seed(evaluation_key), self.schedule.position(state))
        with self._report.evaluating(f"evaluating over {PERIODIC_EPISODES} episodes"):
            played = self.evaluator(agent.variables, keys, PERIODIC_EPISODES)
        means = played.returns.mean(-1)
        for i, (folder, mean) in enumerate(zip(self._folders, np.atleast_1d(means), strict=True)):
            if mean > self._best[i]:
                self._best[i] = float(mean)
                best = tree_of_seed(agent, i) if self._several else agent
                info = self._about(i) | {"mean": float(mean), "iteration": self.schedule.iteration(state)}
                self._saver.save(folder / BEST, step, {"agent": best}, keep=1, since=self._oldest(), info=info)
        told = {"eval/return": means, "eval/length": played.lengths.mean(-1), "eval/cut": played.cut.sum(-1)}
        return {name: np.where(np.isnan(means), np.nan, value) for name, value in told.items()}

    def _about(self, index: int | None) -> dict[str, Any]:
        """The description of the run, or that in the folder of one of its seeds."""
        description = self._plan.description
        if self._several and index is not None and description is not None:
            description = member_description(description, self._plan.seeds[index])
        return {"description": description}

    def _oldest(self) -> int | None:
        """The step of the oldest checkpoint. A run that goes on from it needs what was best until then."""
        return min([*checkpoint.steps(self._plan.path / CHECKPOINTS), *self._saved_steps], default=None)

    def _due(self, state: RunState, seconds: float) -> bool:
        """Whether to save so long after the last time: seldom enough, and not while updates are being skipped."""
        wait = max(seconds, self._save_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved > wait and not np.any(self._programs.replica(state.skips.in_a_row))

    def _save(self, state: RunState) -> None:
        """Saves the whole run, and of several seeds every agent by itself."""
        start, step = time.monotonic(), self.schedule.env_steps(state)
        self._team = self._team._replace(number=self._team.number + 1)
        with self._clock.pause():
            folder = self._plan.path / CHECKPOINTS
            try:
                how = dict(keep=KEEP, info=self._about(None), team=self._team)
                self._saver.save(folder, step, self._programs.gather(state), **how)
            except OSError as error:  # what the host keeps outside of the state could not be written
                self._saver.refuse(folder, step, error)
            if self._several:
                agent = self._programs.replica(state.agent)
                for i, folder in enumerate(self._folders if self._leads else ()):
                    tree = {"agent": tree_of_seed(agent, i)}
                    self._saver.save(folder / CHECKPOINTS, step, tree, keep=KEEP, info=self._about(i))
        self._saved_steps = [step]
        self._saved = time.monotonic()
        self._save_seconds = self._saved - start
