"""The report of a comparison: `report.json` with all numbers, `report.html` and `report.png` that show them."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wmjax
from wmjax import files
from wmjax.comparison import page, pictures, statistics, summary
from wmjax.comparison.references import reference
from wmjax.comparison.results import Group, group_runs
from wmjax.run_folder import write_json
from wmjax.types import RunError, UsageError

RANDOM_EPISODES = 64


def write_report(
    out: Path,
    folders: Sequence[str | Path],
    how: Mapping[str, Any],
    *,
    title: str,
    say: Callable[[str], None] = print,
    names: Mapping[Path, str] | None = None,
    failures: Sequence[Mapping[str, Any]] = (),
    skipped: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    ablations: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Reads runs, puts their numbers together and writes them; returns what `report.json` holds, and the files.

    Args:
      out: the folder.
      folders: of runs.
      how: options of `compare`: `context`, `horizon`, `threshold`, `jobs`, and those that a reader wants to know.
      title: of the page.
      say: is told what goes on.
      names: labels of runs, by folder.
      failures, skipped: runs that ended before their time and what could not be trained: `label`, `env`, `reason`.
      notes: what else a reader should know.
      ablations: what each changes, by its label.
    """
    groups = group_runs(folders, names)
    by_env: dict[str, list[Group]] = {}
    for group in groups:
        by_env.setdefault(group.env, []).append(group)
    environments = []
    for env, own in by_env.items():
        found = _open_loop(own, how, say)
        known = reference(env)
        if known.random is None:
            known = known._replace(random=_random(own[0], say, how["trust_env"]))
        if how["threshold"] is not None:
            known = known._replace(threshold=how["threshold"])
        environments.append(summary.environment(env, own, known, found))
    report = {
        "title": title,
        "version": wmjax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()},
        "settings": {
            name: value for name, value in how.items() if value is not None and value is not False and name != "command"
        },
        "least_runs": statistics.LEAST_RUNS,
        "resamples": statistics.RESAMPLES,
        "notes": list(notes),
        "ablations": dict(ablations or {}),
        "environments": environments,
        "over_environments": [] if ablations else summary.over_environments(environments),
        "failures": list(failures),
        "skipped": list(skipped),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    files.write(out / "report.html", page.html(report).encode())
    written = [out / "report.html", out / "report.json"]
    if environments:
        written.append(pictures.write_png(out / "report.png", title, environments))
    return report, written


def _command() -> str:
    program = Path(sys.argv[0]).name
    return shlex.join(["wmjax" if program == "__main__.py" else program, *sys.argv[1:]])


def _open_loop(groups: Sequence[Group], how: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    from wmjax.comparison.open_loop import open_loop_errors

    try:
        return open_loop_errors(groups, how["context"], how["horizon"], say, trust_env=how["trust_env"])
    except Exception as error:  # hours of training are worth more than one figure; the page says what it was
        return {"notes": [f"no open-loop errors ({type(error).__name__}): {error}"]}


def _random(group: Group, say: Callable[[str], None], trust_env: bool) -> float | None:
    """Mean return of random play in the environment of a group; None where it cannot be played."""
    from wmjax.loops.driver import evaluation_key, make_evaluator
    from wmjax.loops.rollout import random_act
    from wmjax.run import load

    try:
        run = load(group.runs[0].path, trust_env=trust_env)
        say(f"random play on {group.env}")
        chance = run.agent._replace(act=random_act(run.agent, run.env.spec))
        played = make_evaluator(chance, run.env)(run.state.variables, evaluation_key(0), RANDOM_EPISODES)
    except (UsageError, RunError):
        return None
    return float(played.returns.mean())
