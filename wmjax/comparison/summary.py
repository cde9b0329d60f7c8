"""All numbers of a comparison, as `report.json` has them: by environment, from groups of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from wmjax.comparison import statistics
from wmjax.comparison.references import Reference
from wmjax.comparison.results import Group, SeedRun, at, curve, equal_place, first_above

POINTS = 60  # of curves
PROFILE_POINTS = 101


def environment(
    env: str, groups: Sequence[Group], reference: Reference, open_loop: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What there is to say of the runs in one environment."""
    runs = [run for group in groups for run in group.runs]
    steps, seconds = equal_place(runs, "steps"), equal_place(runs, "seconds")
    return {
        "env": env,
        "reference": reference._asdict(),
        "equal_steps": steps,
        "equal_seconds": seconds,
        "groups": [_group(group, reference.threshold, steps, seconds) for group in groups],
        "improvement": _improvement(groups),
        "profiles": _profiles(groups),
        "open_loop": dict(open_loop or {}),
    }


def score(values: Sequence[float | None]) -> dict[str, Any]:
    """What returns of seeds come to; nothing where one is missing."""
    found: dict[str, Any] = {"by_seed": list(values), "mean": None, "median": None, "iqm": None, "interval": None}
    if values and all(value is not None and math.isfinite(value) for value in values):
        scores = np.array(values, np.float64)[:, None]
        found |= {name: float(getattr(statistics, name)(scores)) for name in ("mean", "iqm")}
        found["median"] = float(np.median(scores))  # of the seeds; of several tasks it is over tasks
        found["interval"] = _pair(statistics.interval(statistics.iqm, scores))
    return found


def _pair(interval: statistics.Interval | None) -> list[Any] | None:
    return None if interval is None else [np.asarray(side).tolist() for side in interval]


def _group(group: Group, threshold: float | None, steps: float | None, seconds: float | None) -> dict[str, Any]:
    runs, about = group.runs, group.runs[0].description
    told = about.get("about") or {}
    first = [None if threshold is None else first_above(run, threshold) for run in runs]
    reached = [place for place in first if place is not None]
    # Of those that never get there the time is infinite: a median over all seeds where at least half do.
    half = len(reached) * 2 > len(runs)
    median = lambda i: float(np.median([np.inf if place is None else place[i] for place in first])) if half else None
    usage = [run.usage for run in runs]
    most = lambda name: max((found[name] for found in usage if found.get(name) is not None), default=None)
    mean = lambda values: float(np.mean(found)) if (found := [x for x in values if x is not None]) else None
    return {
        "label": group.label,
        "agent": group.agent,
        "preset": group.preset,
        "changes": group.changes,
        "image_size": about["image_size"],
        "action_repeat": about["action_repeat"],
        "folders": [str(run.path) for run in runs],
        "seeds": [run.seed for run in runs],
        "seeds_at_once": max(run.description["seeds"] for run in runs),
        "budget": about["steps"],
        "too_few": statistics.too_few(len(runs)),
        "unfinished": [run.seed for run in runs if run.final is None],
        "episodes": max(run.episodes for run in runs),
        "steps": [run.last_step for run in runs],
        "seconds": [run.last_seconds for run in runs],
        "end": score([run.final for run in runs]),
        "at_equal_steps": score([None if steps is None else at(run, steps, over="steps") for run in runs]),
        "at_equal_seconds": score([None if seconds is None else at(run, seconds, over="seconds") for run in runs]),
        "reached": len(reached),
        "threshold_steps": median(0),
        "threshold_seconds": median(1),
        "parameters": told.get("parameters"),
        "devices": told.get("devices"),
        "versions": told.get("versions"),
        "command": told.get("command"),
        "peak_memory_bytes": most("peak_memory_bytes"),
        "peak_device_bytes": most("peak_device_bytes"),
        "compile_seconds": most("compile_seconds"),
        "compile_seconds_saved": most("compile_seconds_saved"),
        "update_seconds": mean(run.update_seconds for run in runs),
        "steps_per_second": mean(run.steps_per_second for run in runs),
        "curves": {over: _curve(runs, over) for over in ("steps", "seconds")},
    }


def _curve(runs: Sequence[SeedRun], over: str) -> dict[str, Any] | None:
    """IQM and interval over seeds, from where all are evaluated to where the first one ends; and each seed's own."""
    curves = [curve(run, over) for run in runs]
    own = [{"x": x.tolist(), "y": y.tolist()} for x, y in curves]
    if not all(len(x) for x, _ in curves):
        return {"by_seed": own, "x": [], "iqm": [], "interval": None}
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    places = np.linspace(start, end, POINTS) if end > start else np.array([end])
    values = np.stack([np.interp(places, x, y) for x, y in curves])  # [runs, T]
    scores = values.T[:, :, None]  # [T, runs, 1]
    interval = statistics.interval(statistics.iqm, scores, resamples=2000)
    return {
        "by_seed": own,
        "x": places.tolist(),
        "iqm": statistics.iqm(scores).tolist(),
        "interval": _pair(interval),
    }


def _finished(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if np.isfinite(group.scores).all()]


def _improvement(groups: Sequence[Group]) -> dict[str, Any]:
    """P(row > column) of returns at the end, each with its interval or None, for groups that finished."""
    found = _finished(groups)
    pair = lambda x, y: {
        "probability": float(statistics.probability_of_improvement(x.scores, y.scores)),
        "interval": _pair(statistics.interval(statistics.probability_of_improvement, x.scores, y.scores)),
    }
    labels = [group.label for group in found]
    return {"labels": labels, "matrix": [[None if x is y else pair(x, y) for y in found] for x in found]}


def _profiles(groups: Sequence[Group]) -> dict[str, Any]:
    """Share of seeds above each return, at the end."""
    found = _finished(groups)
    if not found:
        return {"thresholds": [], "groups": {}}
    every = np.concatenate([group.scores for group in found])
    margin = 0.05 * max(float(np.ptp(every)), 1e-6)
    thresholds = np.linspace(every.min() - margin, every.max() + margin, PROFILE_POINTS)
    profile = partial(statistics.performance_profile, thresholds=thresholds)
    one = lambda scores: {
        "share": profile(scores).tolist(),
        "interval": _pair(statistics.interval(profile, scores, resamples=2000)),
    }
    return {"thresholds": thresholds.tolist(), "groups": {group.label: one(group.scores) for group in found}}


def over_environments(environments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of groups that ran in all of several environments: statistics of returns with 0 for random and 1 for the best.

    Empty where there is one environment, or one of them has no such references.
    """
    scales = [(env["reference"]["random"], env["reference"]["best"]) for env in environments]
    if len(environments) < 2 or any(None in scale for scale in scales):
        return []
    found = []
    labels = [[group["label"] for group in env["groups"]] for env in environments]
    for label in (label for label in labels[0] if all(label in others for others in labels)):
        own = [next(g for g in env["groups"] if g["label"] == label)["end"]["by_seed"] for env in environments]
        runs = min(map(len, own))
        if not runs or any(value is None for values in own for value in values):
            continue
        columns = [(np.array(v[:runs]) - low) / (high - low) for v, (low, high) in zip(own, scales, strict=True)]
        scores = np.stack(columns, -1)
        values: dict[str, Callable] = {n: getattr(statistics, n) for n in ("iqm", "mean", "median", "optimality_gap")}
        found.append(
            {"label": label, "runs": runs}
            | {
                n: {"value": float(f(scores)), "interval": _pair(statistics.interval(f, scores))}
                for n, f in values.items()
            }
        )
    return found
