"""How runs learned: returns over env steps, and fitness over generations of those that search."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.figures import charts
from wmjax.loops.report import read_metrics
from wmjax.types import UsageError


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
      path: of the picture; its suffix says its format (`charts.picture_path`).
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

    path = charts.picture_path(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    groups = defaultdict(list)
    for label, folder in runs:
        groups[charts.plain(label)].append(folder)
    for number, (label, folders) in enumerate(groups.items()):
        for words, style, shaded, curve in curves(folders):
            told, color = f"{label} ({curve.runs} seed{'s' * (curve.runs > 1)}){words}", f"C{number}"
            axes.plot(curve.steps, curve.mean, style, color=color, label=told)
            if shaded:
                axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
    charts.legend_below(figure)
    return charts.save(figure, path)


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
      path: of the picture; its suffix says its format (`charts.picture_path`).
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
