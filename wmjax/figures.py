"""Pictures of a run: what its world model dreams, and how it learned."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import dreaming
from wmjax.loops import host_rollout
from wmjax.loops.report import read_metrics
from wmjax.loops.rollout import Position, rollout
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Env, HostEnv, PyTree, Trajectory, UsageError

STREAMS = 64
HOST_STREAMS = 16  # of environments in other processes
COLUMNS = 8  # windows in a GIF
GAP = 2  # pixels between its panels

# ---------------------------------------------------------------------------------------------------------------------
# Open-loop prediction


class OpenLoop(NamedTuple):
    """What happened and what the model expected, over windows of `context + horizon` steps."""

    truth: dict[str, np.ndarray]  # [T, N, ...], as the environment gave it
    model: dict[str, np.ndarray]  # [T, N, ...], float32
    valid: np.ndarray  # bool [horizon, N], still the episode that the context ended in


def open_loop(agent: Agent, env: Env | HostEnv, params: PyTree, key: Array, context: int, horizon: int) -> OpenLoop:
    """Plays `STREAMS` environments and lets the model predict windows of what it did not see.

    On the host there are `HOST_STREAMS`. Each environment supplies one window, which starts at a random step, so that
    every part of an episode is met.

    Args:
      agent: acts as in evaluation, and brings the model.
      env: takes what the agent emits.
      params: of the agent.
      key: consumed.
      context: steps that the model sees, at least 1.
      horizon: steps that it predicts from the actions alone, at least 1.
    """
    for name, value in (("context", context), ("horizon", horizon)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}: {value!r} is not valid; an integer of at least 1 is")
    length = context + horizon
    spread = env.spec.max_episode_steps or length  # windows start within the first episode, or near to it
    spread = min(spread + 1, 500)

    def predict(params: PyTree, key: Array, records: Record) -> tuple[dict, dict, Array]:
        _, _, key_start, key_model = jax.random.split(key, 4)
        starts = jax.random.randint(key_start, records.step.reward.shape[1:], 0, spread)
        cut = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length), (1, 0), 1)
        step, action = jax.tree.map(lambda x: cut(x, starts), (records.step, records.action))
        batch = Trajectory(step, action, jnp.ones(action.shape[:2], bool), ())
        predicted = dreaming.open_loop(agent.model, params, key_model, batch, context)
        valid = jnp.cumsum(step.is_first[context:], 0) == 0
        return step.obs, predicted, valid

    def play(params: PyTree, key: Array) -> tuple[dict, dict, Array]:
        key_reset, key_act, *_ = jax.random.split(key, 4)
        state, timestep = jax.vmap(env.reset)(noise.row_keys(key_reset, STREAMS))
        position = Position(state, timestep, agent.act_carry(params, STREAMS))
        step = jax.vmap(env.step)
        _, records = rollout(agent.act, step, params, key_act, position, spread + length, explore=False)
        return predict(params, key, records)

    if isinstance(env, HostEnv):
        records = host_rollout.play(agent, env, params, key, HOST_STREAMS, spread + length)
        return OpenLoop(*jax.device_get(jax.jit(predict)(params, key, records)))
    return OpenLoop(*jax.device_get(jax.jit(play)(params, key)))


def horizon_errors(result: OpenLoop, context: int) -> dict[str, Any]:
    """Mean squared error by horizon of the model and of two predictors that know no dynamics.

    Images count in [0, 1], averaged over pixels. Steps beyond the end of the window's episode do not count.

    Returns:
      For each observation: `model`, `repeat_last` (the last frame seen stays) and `mean_frame` (the mean over all
      frames of all windows, which knows the test frames), lists over horizons 1, 2, ...; null where no window counts.
      And `count`, how many windows do.
    """
    weight = result.valid / np.maximum(result.valid.sum(1, keepdims=True), 1)
    count = result.valid.sum(1)
    report: dict[str, Any] = {"count": count.tolist()}
    for name, truth in result.truth.items():
        scale = 255.0 if truth.dtype == np.uint8 else 1.0
        truth, model = truth.astype(np.float32) / scale, result.model[name].astype(np.float32) / scale
        later = truth[context:]
        guesses = {"model": model[context:], "repeat_last": truth[context - 1], "mean_frame": truth.mean((0, 1))}
        if model.shape != truth.shape:  # a distribution over choices has no such error
            continue
        report[name] = {}
        for kind, guess in guesses.items():
            error = np.square(later - guess).reshape(*later.shape[:2], -1).mean(-1)
            report[name][kind] = [float(e) if n else None for e, n in zip((error * weight).sum(1), count, strict=True)]
    return report


def _panel(frames: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, C]` side by side as RGB, `[H, N * (W + GAP), 3]`."""
    frames = np.repeat(frames, 3, -1) if frames.shape[-1] == 1 else frames[..., :3]
    return np.concatenate(np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=40), 1)


def write_dream_gif(path: str | Path, result: OpenLoop, context: int, name: str) -> None:
    """Writes a GIF with rows truth, model and error; columns are windows, those whose episodes go on longest.

    While the model sees the observations a bar along the bottom is green, then orange. Beyond the end of a window's
    episode its three images are dimmed.
    """
    import imageio.v3 as iio

    order = np.argsort(-result.valid.sum(0), kind="stable")[:COLUMNS]
    truth, model = (np.clip(x[name][:, order], 0, 255).astype(np.float32) for x in (result.truth, result.model))
    valid = np.concatenate([np.ones((context, len(order)), bool), result.valid[:, order]])
    enlarge = max(1, 64 // truth.shape[2])
    frames = []
    for t in range(len(truth)):
        rows = (truth[t], model[t], np.abs(truth[t] - model[t]))
        light = np.where(valid[t], 1.0, 0.25)[:, None, None, None]
        picture = np.concatenate([_panel(np.rint(row * light).astype(np.uint8)) for row in rows])
        picture = picture.repeat(enlarge, 0).repeat(enlarge, 1)
        bar = np.full((4, picture.shape[1], 3), (60, 180, 75) if t < context else (245, 130, 48), np.uint8)
        frames.append(np.concatenate([picture, bar]))
    iio.imwrite(path, np.stack(frames), duration=300, loop=0)


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves


class Curve(NamedTuple):
    """Returns over env steps, over the runs of one agent in one environment."""

    steps: np.ndarray  # [P]
    mean: np.ndarray  # [P]
    low: np.ndarray  # [P], 95% interval of the mean over runs; equal to the mean where there is one run
    high: np.ndarray
    runs: int


def learning_curve(folders: Sequence[str | Path], points: int = 100) -> Curve:
    """Episode returns of several runs on one grid of env steps, from where all have some to where the first one ends.

    The interval is mean ± 1.96 standard errors over runs. Raises `UsageError` for a run without finished episodes.
    """
    curves = []
    for folder in folders:
        lines = [line for line in read_metrics(folder) if line.get("episode/return") is not None]
        if not lines:
            raise UsageError(f"run: {str(folder)!r} has no finished episodes to plot yet")
        curves.append(([line["step"] for line in lines], [line["episode/return"] for line in lines]))
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    steps = np.linspace(start, max(start, end), points)
    values = np.stack([np.interp(steps, x, y) for x, y in curves])
    mean, count = values.mean(0), len(values)
    spread = 1.96 * values.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros_like(mean)
    return Curve(steps, mean, mean - spread, mean + spread, count)


def plot_learning_curves(path: str | Path, runs: Sequence[tuple[str, str | Path]]) -> None:
    """Draws learning curves, one for each label, with the mean and interval over the runs that share it.

    Args:
      path: of the picture; its suffix says its format.
      runs: (label, run folder) pairs.
    """
    from matplotlib.figure import Figure

    groups = defaultdict(list)
    for label, folder in runs:
        groups[label].append(folder)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, folders in groups.items():
        curve = learning_curve(folders)
        (line,) = axes.plot(curve.steps, curve.mean, label=f"{label} ({curve.runs} seed{'s' * (curve.runs > 1)})")
        axes.fill_between(curve.steps, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="env steps", ylabel="episode return")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"out: {str(path)!r} cannot be written: {str(error).splitlines()[0]}") from None
