"""The stages of a recipe: whether they can be run, how long they are, and how far a run through them is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from wmjax import checks
from wmjax.replay import device as replays
from wmjax.types import Agent, Array, Env, Evolve, HostEnv, Recipe, Sampling, Stage, Update, UsageError

if TYPE_CHECKING:
    from wmjax.loops.device import RunState

SEARCH_EVALUATIONS = 10  # over a search for parameters


def first(counter: Array) -> int:
    """A counter that is the same for all seeds and devices, on the host."""
    return int(np.ravel(counter)[0])


def readers(stage: Stage) -> list[Update | Evolve]:
    """What samples replay in a stage: its updates, and a search in dreams."""
    return [*stage.updates, *([stage.evolve] if stage.evolve and stage.evolve.where == "dream" else [])]


def samplings(recipe: Recipe) -> tuple[Sampling, ...]:
    """All that replay is sampled by in a run."""
    return tuple(reader.sampling for stage in recipe.stages for reader in readers(stage))


def check(agent: Agent) -> None:
    """Raises `UsageError` if the recipe cannot be run.

    Replay must be able to hold what is asked of it, and hold a whole window before the first update samples one.
    """
    recipe, rows, online = agent.recipe, 0, set()
    kept = recipe.replay_capacity // recipe.num_envs
    for position, stage in enumerate(recipe.stages):
        wrong = None
        if stage.iterations is None and position + 1 < len(recipe.stages):
            wrong = "only the last stage may leave its iterations open"
        elif stage.collect > kept:
            wrong = f"collect {stage.collect}, replay keeps {kept} steps of each env"
        elif not (stage.collect or stage.updates or stage.evolve):
            wrong = "it neither collects nor learns"
        elif stage.iterations is not None and stage.iterations > checks.COUNT:
            wrong = f"it has {stage.iterations} iterations, {checks.COUNT} is the most"
        elif many := [update for update in stage.updates if update.repeats > checks.UPDATES]:
            wrong = f"{many[0].repeats} updates {many[0].name!r} in one iteration; at most {checks.UPDATES} are valid"
        elif stage.iterations is None and not stage.collect:
            wrong = "it may leave its iterations open only if it collects"
        if wrong:
            raise UsageError(f"stage {stage.name!r}: {wrong}")
        for update in stage.updates:
            if update.batch_size % update.grad_accum:
                small = [n for n in range(1, math.isqrt(update.batch_size) + 1) if update.batch_size % n == 0]
                valid = ", ".join(map(str, sorted({*small, *(update.batch_size // n for n in small)})))
                raise UsageError(
                    f"grad_accum: {update.grad_accum} does not divide the batch of update {update.name!r}, which is of "
                    f"{update.batch_size} on each device; valid are {valid}"
                )
        for reader in readers(stage):
            sampling, rows_then = reader.sampling, rows + stage.collect
            replays.check(recipe.replay_capacity, recipe.num_envs, sampling, reader.batch_size)
            window = sampling.context + sampling.length
            online |= {window} if sampling.online else set()
            if rows_then < window:
                raise UsageError(
                    f"stage {stage.name!r}: its update {reader.name!r} samples {window} steps, but only {rows_then} of "
                    "each environment are collected before; a stage before it must collect"
                )
        rows += stage.collect * (stage.iterations or 0)
    if len(online) > 1:
        raise UsageError(f"online samplings of {sorted(online)} steps in one recipe: they must have one length")


class Schedule:
    """The stages of a recipe under a budget of env steps, and how far a run is.

    Env steps are the frames that all environments of a run advance, and one step for each episode that begins; all
    seeds of a run have the same count.

    Args:
      agent: brings the recipe.
      env: takes what the agent emits.
      steps: env steps to train for.
      eval_every: env steps between periodic evaluations; 0: never.
    """

    def __init__(self, agent: Agent, env: Env | HostEnv, steps: int = 0, eval_every: int = 0) -> None:
        self._stages, self._num_envs, self._every = agent.recipe.stages, agent.recipe.num_envs, eval_every
        self.frames = self._num_envs * env.spec.action_repeat  # env steps while every environment does one
        self.records = math.ceil(steps / env.spec.action_repeat)  # that are collected in all
        self.lengths = [self._length(index, stage, steps) for index, stage in enumerate(self._stages)]

    def _length(self, index: int, stage: Stage, steps: int) -> int:
        """Iterations of a stage; an open one uses up the budget, and no stage collects more than that."""
        if not stage.collect:
            return stage.iterations
        budget = max(0, math.ceil((steps - self.before(index)) / (stage.collect * self.frames)))
        return budget if stage.iterations is None else min(stage.iterations, budget)

    def before(self, index: int) -> int:
        """Env steps that the stages before one collect where the budget does not end them."""
        return sum(stage.collect * stage.iterations for stage in self._stages[:index]) * self.frames

    def whole(self) -> int | None:
        """Env steps of a recipe whose stages all have a length; None where its last one uses up the budget."""
        return None if self._stages[-1].iterations is None else self.before(len(self._stages))

    def env_steps(self, run: RunState) -> int:
        """So far."""
        return first(run.steps) * self.frames

    def _done(self, run: RunState) -> list[tuple[Stage, int]]:
        """The stages so far and the iterations of each that are done."""
        *before, now = self._stages[: first(run.stage) + 1]
        return [*((stage, stage.iterations) for stage in before), (now, first(run.iteration))]

    def iteration(self, run: RunState) -> int:
        """Iterations of all stages so far."""
        return sum(done for _, done in self._done(run))

    def replay_ratio(self, run: RunState) -> float:
        """Trained steps per collected step so far."""
        learned = lambda stage: sum(u.repeats * u.batch_size * u.sampling.length for u in stage.updates)
        trained = sum(done * learned(stage) for stage, done in self._done(run))
        return trained / max(sum(done * stage.collect * self._num_envs for stage, done in self._done(run)), 1)

    # -----------------------------------------------------------------------------------------------------------------
    # Periodic evaluations

    def _pace(self, index: int) -> int:
        """Env steps that an iteration of a stage counts for, as to when evaluations are due.

        Those that it takes. Where it takes none, those of the last stage before it that collected and learned; 0 if
        there was none.
        """
        learned = (stage.collect for stage in reversed(self._stages[:index]) if stage.collect and stage.updates)
        return (self._stages[index].collect or next(learned, 0)) * self.frames

    def position(self, run: RunState) -> int:
        """Env steps so far, and those that iterations without any counted for."""
        done = enumerate(self._done(run))
        return self.env_steps(run) + sum(n * self._pace(i) for i, (stage, n) in done if not stage.collect)

    def evaluations(self, run: RunState, more: int = 0) -> int:
        """How many are due: one after each `eval_every` env steps, and after each tenth of a search.

        With `more`, after so many more iterations of the stage.
        """
        index = first(run.stage)
        stage = self._stages[index]
        if not self._every:
            return 0
        if stage.evolve:
            return SEARCH_EVALUATIONS * (first(run.iteration) + more) // self.lengths[index]
        return (self.position(run) + more * self._pace(index)) // self._every if stage.updates else 0

    def until_evaluation(self, run: RunState) -> float:
        """Iterations of the stage until the next is due."""
        index = first(run.stage)
        pace, size = self._pace(index), math.inf
        if self._every and pace:
            size = math.ceil((self._every - self.position(run) % self._every) / pace)
        if self._every and self._stages[index].evolve:
            then = math.ceil((self.evaluations(run) + 1) * self.lengths[index] / SEARCH_EVALUATIONS)
            size = min(size, then - first(run.iteration))
        return size
