"""Whether another program computes what JAX does: both dream on from a real moment, by the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from wmjax.dream_step.step import NEXT, NOISE, STATE, DreamStep
from wmjax.types import RunError

STEPS = 50
WITHIN = 1e-4  # of numbers beyond 1 relative to them
# A step may be steeper than that: DreamerV3 weighs probabilities by up to 5e8 in its rewards. There an output may be
# as far away as it goes when the state moves by so much, of numbers beyond 1 relative to them.
MOVE, MOVES = 1e-6, 4
# Two draws may be so close that rounding decides, and what follows is another dream; so there is a second one.
SEEDS = (0, 1)

Arrays = Mapping[str, np.ndarray]


def draw(step: DreamStep, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Random numbers and an action by chance for one step, and the temperature that the model draws at."""
    given = {}
    for name, x in step.inputs.items():
        if name.startswith(NOISE):
            given[name] = getattr(random, name.rpartition(".")[2])(size=x.shape).astype(np.float32)
    size = step.inputs["action"].shape[-1]
    discrete = "choices" in step.about["controls"]
    counts = [len(labels) for labels in step.about["controls"]["choices"]] if discrete else []
    parts = [np.eye(n, dtype=np.float32)[random.integers(n)] for n in counts] or [random.uniform(-1, 1, size)]
    given["action"] = np.concatenate(parts)[None].astype(np.float32)
    if "temperature" in step.inputs:
        given["temperature"] = np.float32(step.about["temperature"])
    return given


def on_cpu(step: DreamStep) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """The step compiled by JAX for the CPU, whose arithmetic is float32 throughout."""
    compiled = jax.jit(step.function)

    def run(given: Arrays) -> dict[str, np.ndarray]:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.device_get(compiled(dict(given)))

    return run


def compare(step: DreamStep, other: Callable[[Arrays], Arrays], what: str) -> float:
    """The largest difference over `STEPS` steps of a dream, in which each goes on from its own state.

    Args:
      step: the step.
      other: another program of it, `{name: array} -> {name: array}`.
      what: it is called in the error.

    Raises:
      RunError: an output differs by more than `WITHIN` and than its own steepness, in each of the dreams.
    """
    reference, found = on_cpu(step), ""
    for seed in SEEDS:
        largest, found = _roll_out(step, reference, other, np.random.default_rng(seed))
        if not found:
            return largest
    raise RunError(f"{what}: it does not compute what JAX does: {found}; nothing is written")


def _roll_out(step: DreamStep, reference: Callable, other: Callable, random: np.random.Generator) -> tuple[float, str]:
    states, largest = [step.starts[0]] * 2, 0.0
    for i in range(STEPS):
        given = draw(step, random)
        mine, theirs = reference({**states[0], **given}), other({**states[1], **given})
        steep = None
        for name, x in mine.items():
            x, y = np.asarray(x, np.float64), np.asarray(theirs[name], np.float64)
            if x.shape != y.shape:
                return largest, f"{name} has the shape {list(y.shape)}, must be {list(x.shape)}"
            error = np.abs(x - y) / np.maximum(1, np.abs(x))
            error = np.where(np.isnan(x) & np.isnan(y), 0, error)
            if not np.all(error <= WITHIN):
                steep = _steepness(step, reference, {**states[0], **given}, mine) if steep is None else steep
                if not np.all((error <= WITHIN) | (error <= steep[name])):
                    return largest, f"{name} differs by {np.max(error):.3g} in step {i + 1}"
            largest = max(largest, float(np.max(error, initial=0)))
        states = [{name: x[NEXT + name.removeprefix(STATE)] for name in states[0]} for x in (mine, theirs)]
    return largest, ""


def _steepness(step: DreamStep, reference: Callable, given: Arrays, mine: Arrays) -> dict[str, np.ndarray]:
    """How far each output goes, in the same units as the error, when the state moves by `MOVE`."""
    random, furthest = np.random.default_rng(0), {name: np.zeros_like(x, np.float64) for name, x in mine.items()}
    for _ in range(MOVES):
        moved = dict(given)
        for name, x in given.items():
            if name.startswith(STATE) and np.issubdtype(x.dtype, np.floating):
                moved[name] = (x + MOVE * np.maximum(1, np.abs(x)) * random.choice([-1, 1], x.shape)).astype(x.dtype)
        for name, x in reference(moved).items():
            before = np.asarray(mine[name], np.float64)
            gone = np.abs(np.asarray(x, np.float64) - before) / np.maximum(1, np.abs(before))
            furthest[name] = np.maximum(furthest[name], gone)
    return furthest
