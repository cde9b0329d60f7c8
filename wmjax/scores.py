"""What returns of evaluation episodes come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from wmjax.envs.atari_scores import human_normalized


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


def with_human_normalized(scores: Scores, env: str | None) -> dict[str, Any]:
    """`Scores.to_json`, for Atari with the mean as a share of what a human earns beyond random play."""
    normalized = human_normalized(env, scores.mean)
    return scores.to_json() | ({"human_normalized": normalized} if normalized is not None else {})
