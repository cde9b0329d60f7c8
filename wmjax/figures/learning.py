"""How runs learned: returns over env steps, and fitness over generations of those that search; a panel for each env."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.figures import charts
from wmjax.loops.report import read_metrics
from wmjax.types import UsageError

POINTS = 100  # of a curve
SMOOTHED = 0.05  # of a training curve, over which it is averaged
COLUMNS = 2  # of panels
Line = tuple[Sequence[float], Sequence[float]]  # x and y


class Labelled(NamedTuple):
    """A run folder of one seed, and what it is drawn as; those with one label and environment are drawn together."""

    label: str
    folder: str | Path
    env: str = ""  # name of its environment


class Curve(NamedTuple):
    """Returns over the runs of one agent in one environment."""

    steps: np.ndarray  # env steps [P], or generations
    mean: np.ndarray  # [P]
    interval: tuple[np.ndarray, np.ndarray] | None  # 95% of the mean, by bootstrap over runs; None: too few of them
    runs: int


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def evaluation_line(folder: str | Path, **how: Any) -> Line:
    """Env steps and mean returns of a run's periodic evaluations; of several at one step the last.

    `how` are further arguments of `read_metrics`.
    """
    last = {x["step"]: x["eval/return"] for x in read_metrics(folder, **how) if x.get("eval/return") is not None}
    return list(last), list(last.values())


def training_line(folder: str | Path, **how: Any) -> Line:
    """Env steps and returns of the episodes that a run was trained on, exploration included, averaged over time.

    Each value is the mean over `SMOOTHED` of the lines around it. `how` are further arguments of `read_metrics`.
    """
    lines = [line for line in read_metrics(folder, **how) if line.get("episode/return") is not None]
    returns = np.array([line["episode/return"] for line in lines], np.float64)
    around = np.ones(2 * int(len(returns) * SMOOTHED / 2) + 1)
    sums, counts = (np.convolve(x, around, "same") for x in (returns, np.ones(len(returns)))) if lines else ((), ())
    return [line["step"] for line in lines], list(np.divide(sums, counts))


def over_runs(lines: Sequence[Line], points: int = POINTS) -> Curve:
    """The mean of the lines of several runs, from where all have begun to where the first one ends.

    It has no points where one ends before another has begun.
    """
    from wmjax.comparison import statistics  # which draws by what is here

    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if end < start:
        return Curve(np.empty(0), np.empty(0), None, len(lines))
    places = np.linspace(start, end, points)
    values = np.stack([np.interp(places, x, y) for x, y in lines], -1)  # [points, runs]
    interval = statistics.interval(statistics.mean, values[..., None], resamples=2000)
    return Curve(places, values.mean(-1), interval, len(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

Draw = Callable[[Any, str, str, Sequence[str | Path]], None]  # (axes, label, color, folders)


def plot_learning_curves(path: str | Path, runs: Sequence[Labelled | tuple]) -> Path:
    """Draws returns of evaluations over env steps, with those of training, smoothed and pale, behind them.

    Of several seeds: their mean, each one thin, and from three on the 95% interval of the mean by bootstrap over seeds.
    Lines show what random play earns, and what counts as learned, where that is known.

    Args:
      path: of the picture; its suffix says its format (`charts.picture_path`).
      runs: as `Labelled`, or as its fields.

    Returns:
      The file.

    Raises:
      UsageError: a run has neither evaluations nor finished episodes yet, or the picture cannot be written.
    """

    def draw(axes: Any, label: str, color: str, folders: Sequence[str | Path]) -> None:
        quiet = lambda text: None  # what is damaged is said once
        trained = [training_line(folder) for folder in folders]
        found = [evaluation_line(folder, say=quiet) for folder in folders]
        for folder, lines in zip(folders, zip(trained, found, strict=True), strict=True):
            if not any(x for x, _ in lines):
                raise UsageError(f"run: {str(folder)!r} has no evaluations and no finished episodes to plot yet")
        told = f"{label} ({len(folders)} seed{'s' * (len(folders) > 1)})"
        if trained := [line for line in trained if line[0]]:
            curve = over_runs(trained)
            words = told if not any(x for x, _ in found) else None
            axes.plot(curve.steps, curve.mean, color=color, alpha=0.35, linewidth=1.2, zorder=1, label=words)
        if evaluated := [line for line in found if line[0]]:
            _draw_mean(axes, told, color, evaluated)

    note = "returns of evaluations; pale: of training, which explores, smoothed"
    return _draw(path, "env steps", "return of an episode", runs, draw, note)


def _draw_mean(axes: Any, told: str, color: str, lines: Sequence[Line]) -> None:
    """The mean of lines and its interval, and each of them thin."""
    if len(lines) == 1:
        axes.plot(*lines[0], color=color, marker="o", markersize=4, linewidth=2, label=told)
        return
    curve = over_runs(lines)
    for line in lines:
        axes.plot(*line, color=color, marker="o", markersize=2, linewidth=0.7, alpha=0.5)
    axes.plot(curve.steps, curve.mean, color=color, linewidth=2.2, label=told)
    if curve.interval is not None:
        axes.fill_between(curve.steps, *curve.interval, color=color, alpha=0.2, linewidth=0)


def _draw(path: str | Path, x: str, y: str, runs: Sequence[Labelled | tuple], draw: Draw, note: str) -> Path:
    """A panel for each environment, in which `draw` draws the runs of one label in one color."""
    from matplotlib.figure import Figure

    from wmjax.comparison.statistics import LEAST_RUNS

    path, panels = charts.picture_path(path), {}
    for run in (Labelled(*run) for run in runs):
        folders = panels.setdefault(run.env, {}).setdefault(run.label, [])
        folders += [run.folder] if run.folder not in folders else []
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(7.6 if columns == 1 else 5.6 * columns, 1 + 3.8 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (env, panel) in zip(places, panels.items(), strict=False):
        axes.set(xlabel=x, ylabel=y, title=charts.plain(env))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params("x", nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        for label, folders in panel.items():
            draw(axes, charts.plain(label), f"C{labels.index(label) % 10}", folders)
        _draw_references(axes, env)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    most = max(len(folders) for panel in panels.values() for folders in panel.values())
    if most > 1:
        band = "band: its 95% interval" if most >= LEAST_RUNS else f"no interval below {LEAST_RUNS} seeds"
        note = f"{note}\nmean over seeds; thin: each seed; {band}"
    charts.legend_below(figure, note)
    return charts.save(figure, path)


def _draw_references(axes: Any, env: str) -> None:
    """What random play earns in an environment and what counts as learned, with words beside the panel."""
    from wmjax.comparison.references import reference

    known = reference(env)
    for value, words, style in ((known.random, "random", ":"), (known.threshold, "threshold", "--")):
        if value is not None:
            axes.axhline(value, color="0.35", linestyle=style, linewidth=1.2, zorder=0)
            axes.annotate(
                f"{words}\n{value:g}", (1, value), (4, 0), xycoords=("axes fraction", "data"), va="center",
                textcoords="offset points", fontsize="small", color="0.35", annotation_clip=False,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Fitness

FITNESS = {  # what it is, and the style of its line
    "fitness_best": ("best of a generation", ":"),
    "fitness_mean": ("mean of a generation", "--"),
    "mean_return": ("distribution mean", "-"),
}


def fitness_curves(folder: str | Path, **how: Any) -> dict[str, Line]:
    """Generations and values of each of `FITNESS` in a run that searched for parameters; {} in one that did not.

    `how` are further arguments of `read_metrics`.
    """
    curves: dict[str, Line] = {}
    for line in read_metrics(folder, **how):
        for key, value in line.items():
            part, _, name = key.rpartition("/")
            if name in FITNESS and part and value is not None and line.get(f"{part}/generation") is not None:
                x, y = curves.setdefault(name, ([], []))
                x.append(line[f"{part}/generation"])
                y.append(value)
    return curves


def plot_fitness_curves(path: str | Path, runs: Sequence[Labelled | tuple], points: int = POINTS) -> Path:
    """Draws fitness over generations: of the best candidate, of all, and of the distribution's mean.

    The best of a population is best by luck, too; the distribution's mean is evaluated on episodes of its own. Lines
    are means over the runs of one label, with the 95% interval around that of the distribution's mean.

    Args:
      path: of the picture; its suffix says its format (`charts.picture_path`).
      runs: as `Labelled`, or as its fields.
      points: of each curve.

    Returns:
      The file.

    Raises:
      UsageError: a run has no generation yet, or the picture cannot be written.
    """

    def draw(axes: Any, label: str, color: str, folders: Sequence[str | Path]) -> None:
        found = [fitness_curves(folder) for folder in folders]
        for folder, values in zip(folders, found, strict=True):
            if set(values) != set(FITNESS):
                raise UsageError(f"run: {str(folder)!r} has no generation to plot yet")
        for name, (words, style) in FITNESS.items():
            curve = over_runs([values[name] for values in found], points)
            told = f"{label} ({curve.runs} seed{'s' * (curve.runs > 1)}), {words}"
            axes.plot(curve.steps, curve.mean, style, color=color, linewidth=2, label=told)
            if name == "mean_return" and curve.interval is not None:
                axes.fill_between(curve.steps, *curve.interval, color=color, alpha=0.2, linewidth=0)

    note = "where the search is in the dream, so is its fitness"
    return _draw(path, "generation", "fitness: mean return of episodes", runs, draw, note)
