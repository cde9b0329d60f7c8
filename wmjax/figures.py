"""Pictures of a run: what its world model dreams, and how it learned."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks, dreaming, files
from wmjax.loops import compiler, memory
from wmjax.loops.host import rollout as host_rollout
from wmjax.loops.report import read_metrics
from wmjax.loops.rollout import Position, rollout
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Env, EnvSpec, HostEnv, PyTree, Trajectory, UsageError

STREAMS = 64
HOST_STREAMS = 16  # of environments in other processes
COLUMNS = 8  # windows in a GIF
GRID_ROWS = 4  # of reconstructions, in a PNG
GAP = 2  # pixels between its panels
VIDEO_STEPS = 1000
VIDEO_MILLISECONDS = 50  # for a step

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
    streams, steps = window_records(env, context, horizon)
    with memory.running_out():
        records = play(agent, env, params, key, streams, steps)
        return predictor(agent, context, horizon)(params, key, records)


def window_records(env: Env | HostEnv, context: int, horizon: int) -> tuple[int, int]:
    """Streams and steps to record for windows of so many steps. Raises `UsageError` where memory does not reach."""
    context, horizon = checks.number("context", context), checks.number("horizon", horizon)
    length = context + horizon
    spread = env.spec.max_episode_steps or length  # windows start within the first episode, or near to it
    spread = min(spread + 1, 500)
    streams = HOST_STREAMS if isinstance(env, HostEnv) else STREAMS
    field = f"context: {context}" if context > horizon else f"horizon: {horizon}"
    memory.check_records(field, env.spec, streams * (spread + length), streams * length)
    return streams, spread + length


def predictor(agent: Agent, context: int, horizon: int) -> Callable[[PyTree, Array, Record], OpenLoop]:
    """The compiled function `(params, key, records [steps, streams, ...]) -> OpenLoop`, a window of each stream."""
    length = context + horizon

    def predict(params: PyTree, key: Array, records: Record) -> tuple[dict, dict, Array]:
        spread = records.step.reward.shape[0] - length
        _, _, key_start, key_model = jax.random.split(key, 4)
        starts = jax.random.randint(key_start, records.step.reward.shape[1:], 0, spread)
        cut = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length), (1, 0), 1)
        step, action = jax.tree.map(lambda x: cut(x, starts), (records.step, records.action))
        mask = lambda action: jnp.ones(action.shape[:2], bool)
        # What came before a window is part of what the model knows: it may expect that episodes begin in one way.
        history = Trajectory(records.step, records.action, mask(records.action), ())
        history = jax.tree.map(lambda x: x[:spread], history)
        before = dreaming.observe_until(agent.model, params, jax.random.fold_in(key_model, 1), history, starts)
        batch = Trajectory(step, action, mask(action), ())
        predicted = dreaming.open_loop(agent.model, params, key_model, batch, context, before)
        valid = jnp.cumsum(step.is_first[context:], 0) == 0
        return step.obs, predicted, valid

    compiled = jax.jit(predict, compiler_options=compiler.options())
    return lambda params, key, records: OpenLoop(*jax.device_get(compiled(params, key, records)))


def play(agent: Agent, env: Env | HostEnv, params: PyTree, key: Array, streams: int, steps: int) -> Record:
    """Records `[steps, streams, ...]` of acting as in evaluation, without latents."""
    if isinstance(env, HostEnv):
        return host_rollout.play(agent, env, params, key, streams, steps)

    def steps_of(params: PyTree, key: Array) -> Record:
        key_reset, key_act, *_ = jax.random.split(key, 4)
        state, timestep = jax.vmap(env.reset)(noise.row_keys(key_reset, streams))
        position = Position(state, timestep, agent.act_carry(params, streams))
        _, records = rollout(partial(agent.act, explore=False), env, params, key_act, position, steps)
        return records._replace(latent=())

    return jax.jit(steps_of, compiler_options=compiler.options())(params, key)


# ---------------------------------------------------------------------------------------------------------------------
# An episode


def pictures(spec: EnvSpec) -> list[str]:
    """Names of the observations that can be shown. Raises `UsageError` where there is none."""
    names = [name for name, space in spec.obs.items() if getattr(space, "dtype", "") == "uint8"]
    if not names:
        raise UsageError(f"video: the observations {', '.join(sorted(spec.obs))} are no pictures; leave it out")
    return names


def suffix(name: str, names: Sequence[str]) -> str:
    """What tells the file of one entry of observations from those of others: "" where there is one only."""
    return "" if len(names) == 1 else f"-{name.replace('/', '-')}"


def write_episode(folder: str | Path, agent: Agent, env: Env | HostEnv, params: PyTree, key: Array) -> list[Path]:
    """Plays one episode as in evaluation, and writes what is seen in it as `episode.gif`, or one GIF for each picture.

    At most `VIDEO_STEPS` steps of it. Pictures below 64 pixels are enlarged.

    Returns:
      The files.

    Raises:
      UsageError: the environment observes no picture.
    """
    names = pictures(env.spec)
    steps = min(env.spec.max_episode_steps or VIDEO_STEPS, VIDEO_STEPS) + 1  # with the first record
    step = jax.device_get(play(agent, env, params, key, 1, steps).step)
    length = 1 + int(step.is_last[:, 0].argmax()) if step.is_last.any() else steps
    written = []
    for name in names:
        frames = _rgb(step.obs[name][:length, 0])
        path = Path(folder) / f"episode{suffix(name, names)}.gif"
        _write_picture(path, _enlarged(frames, frames.shape[1]), duration=VIDEO_MILLISECONDS, loop=0)
        written.append(path)
    return written


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


def _rgb(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames, 3, -1) if frames.shape[-1] == 1 else frames[..., :3]


def _enlarged(pixels: np.ndarray, side: int) -> np.ndarray:
    """Pictures `[..., H, W, C]`, so large that what has so many pixels at a side has about 64."""
    times = max(1, 64 // side)
    return pixels.repeat(times, -3).repeat(times, -2)


def _write_picture(path: str | Path, pixels: np.ndarray, **options: Any) -> None:
    import imageio.v3 as iio

    files.write(Path(path), iio.imwrite("<bytes>", pixels, extension=Path(path).suffix, **options))


def _panel(frames: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, C]` side by side as RGB, `[H, N * (W + GAP), 3]`."""
    frames = _rgb(frames)
    return np.concatenate(np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=40), 1)


def write_dream_gif(path: str | Path, result: OpenLoop, context: int, name: str) -> None:
    """Writes a GIF with rows truth, model and error; columns are windows, those whose episodes go on longest.

    While the model sees the observations a bar along the bottom is green, then orange. Beyond the end of a window's
    episode its three images are dimmed.
    """
    order = np.argsort(-result.valid.sum(0), kind="stable")[:COLUMNS]
    truth, model = (np.clip(x[name][:, order], 0, 255).astype(np.float32) for x in (result.truth, result.model))
    valid = np.concatenate([np.ones((context, len(order)), bool), result.valid[:, order]])
    frames = []
    for t in range(len(truth)):
        rows = (truth[t], model[t], np.abs(truth[t] - model[t]))
        light = np.where(valid[t], 1.0, 0.25)[:, None, None, None]
        picture = np.concatenate([_panel(np.rint(row * light).astype(np.uint8)) for row in rows])
        picture = _enlarged(picture, truth.shape[2])
        bar = np.full((4, picture.shape[1], 3), (60, 180, 75) if t < context else (245, 130, 48), np.uint8)
        frames.append(np.concatenate([picture, bar]))
    _write_picture(path, np.stack(frames), duration=300, loop=0)


def reconstruction_errors(result: OpenLoop, context: int) -> dict[str, float]:
    """Mean squared error of the last frame that the model saw, for each observation; images count in [0, 1]."""
    errors = {}
    for name, truth in result.truth.items():
        seen, model = truth[context - 1].astype(np.float32), result.model[name][context - 1].astype(np.float32)
        if model.shape == seen.shape:
            errors[name] = float(np.square((seen - model) / (255.0 if truth.dtype == np.uint8 else 1.0)).mean())
    return errors


def write_reconstructions(path: str | Path, result: OpenLoop, context: int, name: str) -> None:
    """Writes a PNG of the last frames that the model saw, one of each window, each above its reconstruction."""
    truth, model = result.truth[name][context - 1], np.clip(np.rint(result.model[name][context - 1]), 0, 255)
    rows = []
    for start in range(0, min(len(truth), GRID_ROWS * COLUMNS), COLUMNS):
        columns = slice(start, start + COLUMNS)
        pair = np.concatenate([_panel(truth[columns]), _panel(model[columns].astype(np.uint8))])
        rows.append(np.pad(pair, ((0, 2 * GAP), (0, 0), (0, 0)), constant_values=40))
    width = max(row.shape[1] for row in rows)
    grid = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    _write_picture(path, _enlarged(grid, truth.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves


class Curve(NamedTuple):
    """Returns over env steps, over the runs of one agent in one environment."""

    steps: np.ndarray  # [P], or generations
    mean: np.ndarray  # [P]
    low: np.ndarray  # [P], 95% interval of the mean over runs; equal to the mean where there is one run
    high: np.ndarray
    runs: int


def _curve(curves: Sequence[tuple[Sequence[float], Sequence[float]]], points: int) -> Curve:
    """Of the curves (x, y) of several runs, from where all have begun to where the first one ends.

    The interval is mean ± 1.96 standard errors.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = np.linspace(start, max(start, end), points)
    values, count = np.stack([np.interp(places, x, y) for x, y in curves]), len(curves)
    mean, spread = values.mean(0), 1.96 * values.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros(points)
    return Curve(places, mean, mean - spread, mean + spread, count)


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
    return _curve(curves, points)


def plot_learning_curves(path: str | Path, runs: Sequence[tuple[str, str | Path]]) -> Path:
    """Draws learning curves, one for each label, with the mean and interval over the runs that share it.

    Args:
      path: of the picture; its suffix says its format (`picture_path`).
      runs: (label, run folder) pairs.

    Returns:
      The file.
    """
    curves = lambda folders: [("", "-", True, learning_curve(folders))]
    return _draw(path, "env steps", "episode return", runs, curves)


def _draw(
    path: str | Path,
    x: str,
    y: str,
    runs: Sequence[tuple[str, str | Path]],
    curves: Callable[[list[str | Path]], Iterable[tuple[str, str, bool, Curve]]],
) -> Path:
    """Draws what `curves` makes of the run folders of one label: what follows the label, a style, whether the interval
    is shown, and the curve."""
    from matplotlib.figure import Figure

    path = picture_path(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    groups = defaultdict(list)
    for label, folder in runs:
        groups[label.replace("$", r"\$")].append(folder)  # no mathematics
    for number, (label, folders) in enumerate(groups.items()):
        for words, style, shaded, curve in curves(folders):
            told, color = f"{label} ({curve.runs} seed{'s' * (curve.runs > 1)}){words}", f"C{number}"
            axes.plot(curve.steps, curve.mean, style, color=color, label=told)
            if shaded:
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
    return _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=path.suffix[1:].lower())
        files.write(path, picture.getbuffer())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: of TeX
        raise UsageError(f"out: {str(path)!r} cannot be written: {str(error).splitlines()[0]}") from None
    return path


def picture_path(path: str | Path) -> Path:
    """Where a chart is written: `path`, with `.png` where it has no suffix.

    Raises `UsageError` where no chart can be written there: the suffix is of no format, or needs TeX, which is not
    there; a folder or a device has the name; the folder above is not there or cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path, formats = checks.path("out", path), Figure().canvas.get_supported_filetypes()
    if path.is_dir():
        raise UsageError(f"out: {str(path)!r} is a folder; a file in it is valid, such as {str(path / 'curve.png')!r}")
    if not path.suffix.rstrip("."):
        if not path.name.strip(".") or path.name.removeprefix(".").lower() in formats:
            raise UsageError(f"out: {str(path)!r} has no name before its suffix")
        path = path if path.exists() and not path.is_file() else path.with_name(f"{path.name.rstrip('.')}.png")
    if path.exists() and not path.is_file():
        raise UsageError(f"out: {str(path)!r} is not a regular file, and no other is replaced")
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"out: {str(path)!r} has a suffix of no format; valid are {', '.join(sorted(formats))}")
    if path.suffix.lower() == ".pgf" and not shutil.which(tex := matplotlib.rcParams["pgf.texsystem"]):
        raise UsageError(
            f"out: {str(path)!r} needs TeX ({tex}), which is not installed; .pdf or .svg are valid without"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "cannot be written to" if path.parent.is_dir() else "does not exist"
        raise UsageError(f"out: {str(path)!r} cannot be written: the folder {str(path.parent)!r} {why}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Fitness curves

FITNESS = {  # what it is, and the style of its line
    "fitness_best": ("best of a generation", ":"),
    "fitness_mean": ("mean of a generation", "--"),
    "mean_return": ("distribution mean", "-"),
}


def fitness_curves(folder: str | Path, **how: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Generations and values of each of `FITNESS` in a run that searched for parameters; {} in one that did not.

    `how` are further arguments of `read_metrics`.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for line in read_metrics(folder, **how):
        for key, value in line.items():
            part, _, name = key.rpartition("/")
            if name in FITNESS and part and value is not None and line.get(f"{part}/generation") is not None:
                x, y = curves.setdefault(name, ([], []))
                x.append(line[f"{part}/generation"])
                y.append(value)
    return curves


def plot_fitness_curves(path: str | Path, runs: Sequence[tuple[str, str | Path]], points: int = 100) -> Path:
    """Draws fitness over generations: of the best candidate, of all, and of the distribution's mean.

    The best of a population is best by luck, too; the distribution's mean is evaluated on episodes of its own. Lines
    are means over the runs of one label, with the 95% interval around that of the distribution's mean.

    Args:
      path: of the picture; its suffix says its format (`picture_path`).
      runs: (label, run folder) pairs.
      points: of each curve.

    Returns:
      The file.

    Raises:
      UsageError: a run has no generation yet, or the picture cannot be written.
    """

    def curves(folders: list[str | Path]) -> Iterator[tuple[str, str, bool, Curve]]:
        found = [fitness_curves(folder) for folder in folders]
        for folder, values in zip(folders, found, strict=True):
            if set(values) != set(FITNESS):
                raise UsageError(f"run: {str(folder)!r} has no generation to plot yet")
        for name, (words, style) in FITNESS.items():
            yield f", {words}", style, name == "mean_return", _curve([values[name] for values in found], points)

    return _draw(path, "generation", "fitness: mean return of episodes", runs, curves)
