"""What returns of evaluation episodes come to, and how it is kept in a run folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax.envs.atari_scores import human_normalized
from wmjax.files import own_folder
from wmjax.run_folder import EVAL, EVALS, write_json

BLOCK = 2**22  # returns that the bootstrap draws at once


class Scores(NamedTuple):
    """Returns of evaluation episodes and what they come to. Of several seeds: over all of their episodes.

    Where a return is not finite, as those of environments that were lost, what they come to is NaN.
    """

    mean: float
    std: float
    iqm: float  # mean of the middle half
    ci95: tuple[float, float]  # of the IQM, by bootstrap
    episodes: int
    returns: list[float]
    lengths: list[int]  # of the episodes, in agent steps
    cut: int  # episodes that did not end within the evaluation's limit of steps; what they earned so far counts
    seeds: dict[int, Scores] | None = None  # of each seed by itself, where there are several

    def __repr__(self) -> str:
        low, high = self.ci95
        cut = f", cut={self.cut}" if self.cut else ""
        seeds = f", seeds={sorted(self.seeds)}" if self.seeds else ""
        spread = f"std={self.std:.4g}, iqm={self.iqm:.4g}, ci95=({low:.4g}, {high:.4g})"
        return f"Scores(mean={self.mean:.4g}, {spread}, episodes={self.episodes}{cut}{seeds})"

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, None for what is not finite; without `seeds` where there is one."""
        values = {name: _plain(value) for name, value in self._asdict().items() if name != "seeds"}
        seeds = self.seeds
        return values | ({"seeds": {str(seed): own.to_json() for seed, own in seeds.items()}} if seeds else {})

    def cut_line(self) -> str | None:
        """Says how many episodes were cut, and when; None where none was."""
        if not self.cut:
            return None
        return f"{self.cut} of {self.episodes} episodes were cut after {max(self.lengths):,} steps"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return value if math.isfinite(value) else None


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and the highest quarter, rounded down."""
    quarter = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., quarter : values.shape[-1] - quarter].mean(-1)


def summarize(returns: Any, lengths: Any = (), cut: Any = (), resamples: int = 2000) -> Scores:
    """Scores of returns, lengths and whether they were cut, each `[episodes]`.

    The interquartile mean drops a quarter of the episodes, rounded down, at either end; its interval is the percentile
    bootstrap over episodes with a fixed seed. Source: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical
    Precipice".
    """
    returns = np.asarray(returns, np.float64)
    count = len(returns)
    if np.isfinite(returns).all():
        rng, rows = np.random.default_rng(0), max(1, BLOCK // count)
        sizes = [min(rows, resamples - done) for done in range(0, resamples, rows)]
        means = np.concatenate([iqm(returns[rng.integers(0, count, (size, count))]) for size in sizes])
        low, high = np.percentile(means, [2.5, 97.5])
        found = float(returns.mean()), float(returns.std()), float(iqm(returns)), (float(low), float(high))
    else:
        found = math.nan, math.nan, math.nan, (math.nan, math.nan)
    return Scores(*found, count, [float(x) for x in returns], [int(x) for x in lengths], int(np.sum(cut)))


def summarize_seeds(played: Mapping[int, tuple[Any, Any, Any]]) -> Scores:
    """Scores of returns, lengths and cuts `[episodes]` by seed: over all, and of each where there are several."""
    pool = summarize(*(np.concatenate(x) for x in zip(*played.values(), strict=True)))
    return pool._replace(seeds={seed: summarize(*x) for seed, x in played.items()}) if len(played) > 1 else pool


# ---------------------------------------------------------------------------------------------------------------------
# Kept in a run folder


def record(scores: Scores, *, env: str | None, **about: Any) -> dict[str, Any]:
    """An evaluation as its file has it.

    Args:
      scores: what it came to; for Atari the mean is added as a share of what a human earns beyond random play.
      env: its name.
      about: what tells it from others, and is kept beside the scores.
    """
    normalized = human_normalized(env, scores.mean)
    more = {"human_normalized": normalized} if normalized is not None and math.isfinite(normalized) else {}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return scores.to_json() | more | {"env": env, **about, "date": date}


def keep(evaluations: Mapping[Path, Mapping[str, Any]]) -> list[Path]:
    """Writes records beside those of other evaluations, in `evals/`, and as the newest, `eval.json`.

    One replaces that of the same checkpoint, environment, actions or planner, seed and number of episodes.

    Args:
      evaluations: by folder, that of the run first, then those of its seeds where there are several.

    Returns:
      The files in the folder of the run.

    Raises:
      OSError: they cannot be written, or would be elsewhere, behind a link.
    """
    written = []
    for number, (folder, evaluation) in enumerate(evaluations.items()):
        if number:
            own_folder(folder)
        own_folder(folder / EVALS)
        for path in (folder / EVALS / _file_name(evaluation), folder / EVAL):
            write_json(path, evaluation)
            written.append(path)
    return written[:2]


def _file_name(evaluation: Mapping[str, Any]) -> str:
    env, more = evaluation["env"] or "env", {name: evaluation.get(name) for name in ("env_args", "max_steps")}
    if "planner" in evaluation:
        more["planner"] = evaluation["planner"]
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", env)[:60]
    if plain != env or any(more.values()):  # what is left out still tells files apart
        said = json.dumps({"env": env, **more}, sort_keys=True, default=str)
        plain += f"-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    e = evaluation
    how = e["policy"] if "policy" in e else e["action"]
    return f"step-{e['step']}-{e['which']}-{plain}-{how}-seed-{e['seed']}-{e['episodes']}-episodes.json"
