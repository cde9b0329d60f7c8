"""What runs came to, read from their folders: one value for each seed, put together by what was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax import files, presets
from wmjax.loops.report import read_metrics
from wmjax.loops.usage import read_usage
from wmjax.run_folder import EVALS, member_description, members, read_description
from wmjax.types import UsageError

EVAL_BYTES = 2**26


class SeedRun(NamedTuple):
    """One seed of one run."""

    path: Path  # of its folder, in that of the run where there are several seeds
    seed: int
    description: dict[str, Any]  # `config.json` of the run
    final: float | None  # mean return of the evaluation at its end; None: not evaluated
    episodes: int  # of that
    steps: np.ndarray  # env steps [E] of the evaluations: periodic ones, then the final one
    seconds: np.ndarray  # [E], since the run began: compiling, evaluating and saving count
    returns: np.ndarray  # [E], mean over episodes
    last_step: int
    last_seconds: float
    steps_per_second: float | None  # env steps over the time spent training, all seeds of the program together
    update_seconds: float | None  # of an update of each of them, with the steps that it waits for
    usage: dict[str, Any]  # `usage.json` of the run


class Group(NamedTuple):
    """Runs that differ in their seeds alone."""

    label: str
    agent: str
    env: str
    preset: str
    changes: dict[str, Any]  # fields that differ from the preset's
    runs: tuple[SeedRun, ...]  # by seed

    @property
    def scores(self) -> np.ndarray:
        """Returns at the end, `[runs, 1]`, NaN where there is none."""
        return np.array([[np.nan if run.final is None else run.final] for run in self.runs])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_run(path: str | Path) -> list[SeedRun]:
    """A run folder: one value for each of its seeds. Raises `UsageError` where it is not a run folder."""
    path = Path(path)
    description = read_description(path)
    inner = members(path, description) or {description["seed"]: path}
    usage, timing = read_usage(path), _speeds(read_metrics(path))
    found = []
    for seed, folder in inner.items():
        lines = read_metrics(folder)
        last_step, last_seconds = (lines[-1]["step"], lines[-1].get("time") or 0.0) if lines else (0, 0.0)
        curve = [
            (line["step"], line.get("time") or 0.0, line["eval/return"])
            for line in lines
            if line.get("eval/return") is not None
        ]
        own = member_description(description, seed) if len(inner) > 1 else description
        final, episodes = _final(folder, own, last_step)
        if final is not None:
            curve = [point for point in curve if point[0] < last_step or point[1] < last_seconds]
            curve.append((last_step, last_seconds, final))
        columns = np.array(curve, np.float64).reshape(-1, 3).T
        found.append(
            SeedRun(folder, seed, description, final, episodes, *columns, last_step, last_seconds, *timing, usage)
        )
    return found


def _final(folder: Path, description: Mapping[str, Any], step: int) -> tuple[float | None, int]:
    """Mean return and episodes of the evaluation at the end: in its own environment, with its own actions and seed."""
    best: tuple[float | None, int] = (None, 0)
    action = description["config"].get("eval_action")
    wanted = {"which": "latest", "step": step, "env": description["env"], "seed": description["seed"]}
    for path in sorted((folder / EVALS).glob(f"step-{step}-latest-*.json")):
        try:
            record = files.parse_json(files.read(path, EVAL_BYTES))
        except (OSError, ValueError):
            continue
        if not isinstance(record, dict) or any(record.get(name) != value for name, value in wanted.items()):
            continue
        if record.get("action") not in (None, action) or record.get("max_steps") or record.get("policy"):
            continue
        if (record.get("env_args") or {}) != (description.get("env_args") or {}):
            continue
        mean, episodes = record.get("mean"), record.get("episodes")
        if isinstance(mean, int | float) and isinstance(episodes, int) and episodes > best[1]:
            best = float(mean), episodes
    return best


def _speeds(lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Env steps per second and seconds per update, over the time that is spent training (`loops.report`)."""
    seconds = learning = steps = updates = 0.0
    before: Mapping[str, Any] = {"step": 0, "updates": 0}
    for line in lines:
        new_steps, new_updates = line["step"] - before["step"], (line.get("updates") or 0) - (before["updates"] or 0)
        before = {"step": line["step"], "updates": line.get("updates") or 0}
        rate = line.get("steps_per_second") or 0.0
        if new_steps > 0 and rate > 0:
            spent = new_steps / rate
        elif new_updates > 0 and line.get("updates_per_second"):
            spent = new_updates / line["updates_per_second"]
        else:
            continue
        seconds, steps = seconds + spent, steps + max(new_steps, 0)
        if new_updates > 0:
            learning, updates = learning + spent, updates + new_updates
    return steps / seconds if seconds and steps else None, learning / updates if updates else None


# ---------------------------------------------------------------------------------------------------------------------
# Putting together


def changes_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run's configuration that differ from its preset's, those of a part with a dot."""
    try:
        base = dataclasses.asdict(presets.resolve(description["agent"], description["preset"], description["env"])[0])
    except UsageError:
        return {}
    return _differing(json.loads(json.dumps(base)), description["config"])


def _differing(base: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping):
            found |= _differing(base[name], value, f"{prefix}{name}.")
        elif name in base and value != base[name]:  # what this version does not know tells nothing apart
            found[f"{prefix}{name}"] = value
    return found


def group_runs(folders: Iterable[str | Path], names: Mapping[Path, str] | None = None) -> list[Group]:
    """Run folders put together by agent, environment, preset, changed settings, budget and data, in their order.

    Args:
      folders: of runs.
      names: labels of some of them, such as the name of an ablation; the others get one that tells them apart.

    Raises:
      UsageError: one is not a run folder, is of an Env value, or brings a seed that another one has.
    """
    found: dict[str, list[SeedRun]] = {}
    labels: dict[str, str | None] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        runs = read_run(folder)
        about = runs[0].description
        if about["env"] is None:
            on = "data alone" if about.get("data") else "an Env value"
            raise UsageError(f"runs: {str(folder)!r} was trained on {on}, which has no name to compare under")
        name = (names or {}).get(folder)
        own = {key: about[key] for key in ("agent", "env", "preset", "image_size", "action_repeat", "steps")}
        own |= {"data": _data(about), "equations": about.get("equations") or {}}
        key = json.dumps([own, about.get("env_args") or {}, changes_of(about), name], sort_keys=True)
        labels[key] = name
        for run in runs:
            other = next((other for other in found.get(key, ()) if other.seed == run.seed), None)
            if other is not None:
                raise UsageError(
                    f"runs: seed {run.seed} of {about['agent']} is in {str(other.path)!r} and {str(run.path)!r}"
                )
            found.setdefault(key, []).append(run)
    groups: list[Group] = []
    for key, runs in found.items():
        about = runs[0].description
        label = labels[key] or label_of(about, [other[0].description for other in found.values()])
        if any((group.env, group.label) == (about["env"], label) for group in groups):
            label += f" steps={about['steps']}"
        runs = tuple(sorted(runs, key=lambda run: run.seed))
        groups.append(Group(label, about["agent"], about["env"], about["preset"], changes_of(about), runs))
    return groups


def _data(about: Mapping[str, Any]) -> str | None:
    """What tells the fixed records of a run from others; None where it collects its own."""
    data = about.get("data")
    return None if data is None else str(data.get("fingerprint"))


def label_of(about: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> str:
    """The agent, and what tells its runs on this environment from others."""
    rivals = [other for other in others if (other["agent"], other["env"]) == (about["agent"], about["env"])]
    parts = [about["agent"]]
    if len({other["preset"] for other in rivals}) > 1:
        parts.append(about["preset"])
    parts += [f"{name}={value}" for name, value in changes_of(about).items()]
    parts += [f"{name}={function}" for name, function in (about.get("equations") or {}).items()]
    for field in ("image_size", "action_repeat", "steps"):
        if len({other[field] for other in rivals}) > 1:
            parts.append(f"{field}={about[field]}")
    if len({_data(other) for other in rivals}) > 1:
        parts.append("collecting" if _data(about) is None else f"data={Path(about['data'].get('path', '')).name}")
    if len({json.dumps(other.get("env_args") or {}, sort_keys=True) for other in rivals}) > 1:
        parts += [f"{name}={value}" for name, value in (about.get("env_args") or {}).items()] or ["env as it is"]
    return " ".join(map(str, parts))


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def at(run: SeedRun, place: float, *, over: str) -> float | None:
    """The return of a run after so many env "steps" or "seconds", between its evaluations; None: before the first."""
    x, y = curve(run, over)
    if not len(x) or place < x[0]:
        return None
    return float(np.interp(place, x, y))


def curve(run: SeedRun, over: str) -> tuple[np.ndarray, np.ndarray]:
    """Places and returns `[E]` of its evaluations; of several at one place, as while nothing is collected, the last."""
    x = run.steps if over == "steps" else run.seconds
    last = np.append(x[1:] > x[:-1], True) if len(x) else np.zeros(0, bool)
    return x[last], run.returns[last]


def equal_place(runs: Iterable[SeedRun], over: str) -> float | None:
    """The most env steps, or seconds, that all runs have reached."""
    return min((float(run.last_step if over == "steps" else run.last_seconds) for run in runs), default=None)


def first_above(run: SeedRun, threshold: float) -> tuple[float, float] | None:
    """Env steps and seconds of the first evaluation that reaches a threshold; None: none does."""
    reached = np.flatnonzero(run.returns >= threshold)
    return (float(run.steps[reached[0]]), float(run.seconds[reached[0]])) if len(reached) else None
