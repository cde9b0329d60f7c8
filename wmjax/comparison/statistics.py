"""What scores over seeds and tasks come to, and how sure that is.

Scores are `[..., runs, tasks]`, float: a run for each seed; statistics are taken over the last two axes, and any others
in front of them, such as points in time, stay. Definitions are those of Agarwal et al. 2021, "Deep RL at the Edge of
the Statistical Precipice", and of its library, rliable 1.2; a fresh install of that does not import any more (2026: it
needs arch, which breaks with pandas 3), so they stand here, and are tested against its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wmjax.scores import iqm as middle_mean

LEAST_RUNS = 3  # seeds below which no interval is given: resampling one or two of them says nothing
RESAMPLES = 5000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Percentiles of a statistic over bootstrap resamples."""

    low: np.ndarray
    high: np.ndarray


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over tasks of the mean over runs."""
    return scores.mean((-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of the mean over runs."""
    return np.median(scores.mean(-2), -1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: over all runs of all tasks without the lowest and the highest quarter, rounded down.

    Of three seeds of one task none is dropped, of four the lowest and the highest.
    """
    return middle_mean(scores.reshape(*scores.shape[:-2], -1))


def optimality_gap(scores: np.ndarray, threshold: float = 1.0) -> np.ndarray:
    """By how much scores fall short of a threshold, on average; what lies above it counts as the threshold."""
    return threshold - np.minimum(scores, threshold).mean((-2, -1))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """P(a run of x scores higher than one of y), mean over tasks; a tie counts half.

    `x` is `[..., runs of x, tasks]`, `y` is `[..., runs of y, tasks]`.
    """
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of runs, over all tasks, that score above each threshold: `[..., thresholds]`."""
    return (scores[..., None] > thresholds).mean((-3, -2))


def interval(
    statistic: Callable[..., np.ndarray],
    *scores: np.ndarray,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """Percentile interval by stratified bootstrap: runs are drawn anew, with replacement, within each task.

    Args:
      statistic: of as many arrays as there are `scores`, which are drawn apart from each other.
      scores: `[..., runs, tasks]`; axes in front share their draws, so whole curves are resampled.
      resamples, confidence: how many; the share of them within the interval.
      seed: of the draws.

    Returns:
      None where any of `scores` has fewer than `LEAST_RUNS` runs.
    """
    if min(x.shape[-2] for x in scores) < LEAST_RUNS:
        return None
    rng = np.random.default_rng(seed)
    drawn = [x[..., rng.integers(0, x.shape[-2], (resamples, *x.shape[-2:])), np.arange(x.shape[-1])] for x in scores]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(statistic(*drawn), [tail, 100 - tail], axis=scores[0].ndim - 2)
    return Interval(low, high)


def too_few(runs: int) -> str:
    """Says that there are too few seeds for an interval; "" where there are enough."""
    if runs >= LEAST_RUNS:
        return ""
    return f"{runs} seed{'s' * (runs != 1)}: too few for an interval, which takes {LEAST_RUNS} or more"
