"""Agents side by side, and an agent without its parts: one report over seeds, with intervals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wmjax import checks, presets
from wmjax.agents import AGENTS
from wmjax.comparison.ablations import ablations
from wmjax.comparison.cells import Cell, folder_name, run_cells
from wmjax.comparison.check import Found, check
from wmjax.fields import dotted
from wmjax.names import nearest
from wmjax.run_folder import CONFIG, alone
from wmjax.types import UsageError

SEEDS = 3
RUNS = "runs"  # the folder of the runs, in that of a comparison
TIMED = 1000  # times the steps of the preset: where seconds end a run, its steps are not to


class Comparison(NamedTuple):
    """What came of it."""

    path: Path  # of its folder
    report: dict[str, Any]  # what report.json holds
    written: list[Path]  # its files: page, numbers, and a picture where there is a run


class Subject(NamedTuple):
    """What is trained: an agent as it is or without a part, in one environment."""

    agent: str
    env: str
    name: str = ""  # of the ablation
    changes: Mapping[str, Any] = {}  # fields of the agent
    about: str = ""
    steps: int | None = None


def compare(
    agents: str | Sequence[str] = "all",
    envs: str | Sequence[str] = "catch",
    *,
    out: str | Path,
    runs: Sequence[str | Path] = (),
    seeds: int = SEEDS,
    first_seed: int = 0,
    strict: bool = False,
    say: Callable[[str], None] = print,
    **how: Any,
) -> Comparison:
    """Trains agents in environments, a run for each seed, and reports on them side by side.

    Called again with the same arguments it goes on where it was: runs that are done are kept, others resumed, those
    that failed tried again.

    Args:
      agents: names, or "all".
      envs: names of environments.
      out: the folder of all runs and of the report.
      runs: run folders that are there already; then nothing is trained, and `agents` and `envs` are not used.
      seeds, first_seed: how many runs of each agent in each environment, from which seed on. They learn in one program
        where the environment is on the device, else one after the other.
      strict: raise where an agent cannot take an environment, before anything is trained, in place of leaving it out.
      say: is told what goes on.
      how: `steps` for all; or `seconds` of wall time for all; by default each has its preset's steps. `preset`,
        `image_size`, `action_repeat`, `env_args`, `eval_every` are as for `train`. `jobs`: how many runs at once, 1 by
        default. `context`, `horizon`: of the open-loop predictions. `threshold`: a return that counts as learned.
        `trust_env`: whether code that `runs` name as their environments' may be run, as for `load`.

    Raises:
      UsageError: something asked for is not valid.
      KeyboardInterrupt: Ctrl-C or SIGTERM came; what was running was saved.
    """
    how = _checked(how)
    if runs:
        notes = ["The runs were there already: what ran beside them is not known, and times and speeds are of that."]
        return _report(_folder(out), _paths(runs), how, title="Agents side by side", say=say, notes=notes)
    names, envs = _names("agents", agents), _names("envs", envs)
    for name in names:
        if name not in ("all", *AGENTS):
            raise nearest("agents", name, ["all", *AGENTS])
    names = list(AGENTS) if "all" in names else names
    subjects = [Subject(agent, env) for env in dict.fromkeys(envs) for agent in dict.fromkeys(names)]
    return _run(subjects, out, _seeds(seeds, first_seed), strict, how, "Agents side by side", say)


def ablate(
    agent: str,
    env: str | None = None,
    *,
    out: str | Path,
    only: str | Sequence[str] = (),
    seeds: int = SEEDS,
    first_seed: int = 0,
    say: Callable[[str], None] = print,
    **how: Any,
) -> Comparison:
    """Trains an agent as it is and with each of its named ablations (`ablations.ABLATIONS`), and reports on them.

    Args:
      agent: its name.
      env: the task of all; by default that of each ablation, or the agent's own example.
      only: a name, or names, of ablations; () for all of the agent.
      out, seeds, first_seed, say, how: as for `compare`.

    Raises as `compare`.
    """
    how = _checked(how)
    if checks.text("agent", agent) not in AGENTS:
        raise nearest("agent", agent, AGENTS)
    own, only = ablations(agent), _names("only", only)
    for name in only:
        if name not in own:
            raise nearest("only", name, own)
    if not own:
        raise UsageError(f"agent: {agent!r} has no named ablations; comparison/ablations.py is where they stand")
    subjects: dict[Subject, None] = {}
    for ablation in (own[name] for name in (only or own)):
        where, steps = env or ablation.env or presets.default_env(agent), how["steps"] or ablation.steps
        for name, changes, about in (("", {}, ""), (ablation.name, ablation.changes, ablation.about)):
            subjects[Subject(agent, where, name, _Fields(changes), about, steps)] = None
    return _run(list(subjects), out, _seeds(seeds, first_seed), True, how, f"{agent} without its parts", say)


def _names(field: str, given: Any) -> list[str]:
    """One name, or a list or tuple of them, as a list. Raises `UsageError` for anything else."""
    if not isinstance(given, str | list | tuple):
        raise checks.invalid(field, given, "a name or a list of names")
    return [checks.text(field, name) for name in ([given] if isinstance(given, str) else given)]


def _paths(given: Any) -> list[Path]:
    """A list or tuple of paths. Raises `UsageError` for anything else."""
    if not isinstance(given, list | tuple):
        raise checks.invalid("runs", given, "a list of run folders")
    return [checks.path("runs", path) for path in given]


class _Fields(dict):
    """A mapping that tells subjects apart."""

    def __hash__(self) -> int:
        return hash(json.dumps(self, sort_keys=True, default=str))


def _seeds(seeds: Any, first_seed: Any) -> tuple[int, ...]:
    seeds, first = checks.number("seeds", seeds), checks.number("first_seed", first_seed, checks.BOUNDS["seed"])
    checks.number("first_seed + seeds", first + seeds, checks.BOUNDS["seed"])
    return tuple(range(first, first + seeds))


DEFAULTS: dict[str, Any] = dict(
    steps=None, seconds=None, preset=None, image_size=None, action_repeat=None, env_args=None, eval_every=None, jobs=1,
    context=5, horizon=15, threshold=None, trust_env=False, command=None,
)  # fmt: skip


def _checked(how: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, valid. Raises `UsageError`."""
    for name in how:
        if name not in DEFAULTS:
            raise nearest("option", name, DEFAULTS)
    how = DEFAULTS | dict(how)
    for name in ("steps", "seconds", "image_size", "action_repeat", "eval_every", "context", "horizon", "jobs"):
        how[name] = checks.optional(name, how[name])
    if how["threshold"] is not None:
        checks.number("threshold", how["threshold"], checks.Bounds(-checks.LARGEST, checks.LARGEST, whole=False))
    if how["steps"] is not None and how["seconds"] is not None:
        raise UsageError("steps, seconds: one of them is valid, for both are the budget of a run")
    return how


def _run(
    subjects: Sequence[Subject], out: str | Path, seeds: tuple[int, ...], strict: bool, how: dict[str, Any], title: str,
    say: Callable[[str], None],
) -> Comparison:  # fmt: skip
    """Trains what can be trained, and reports."""
    out, how = _folder(out), how | {"trust_env": True}  # who names an environment trusts it
    say(f"checking {len(subjects)} configurations")
    same = {name: how[name] for name in ("preset", "image_size", "action_repeat", "env_args")}
    asked = [
        {"agent": s.agent, "env": s.env, "steps": _steps(s, how), "overrides": dict(s.changes), **same}
        for s in subjects
    ]
    found = check(asked)
    skipped = [(subject, each.error) for subject, each in zip(subjects, found, strict=True) if each.error is not None]
    taken = {subject.env for subject, each in zip(subjects, found, strict=True) if each.error is None}
    for subject, error in skipped:
        text = f"{_named(subject)} cannot be trained on {subject.env}: {error}"
        if strict or subject.env not in taken:
            raise UsageError(text)
        say(f"left out: {text}")
    takes = [(s, each) for s, each in zip(subjects, found, strict=True) if each.error is None]
    cells = {cell: subject for subject, each in takes for cell in _cells(subject, each, out, seeds, how)}
    with alone(out / RUNS):
        outcomes = run_cells(list(cells), jobs=how["jobs"], command=how["command"], say=say)
    failures = [
        {"label": _named(cells[cell]), "env": cell.env, "seeds": list(cell.seeds), "reason": outcome.reason,
         "peak_memory_bytes": outcome.peak_memory_bytes, "seconds": outcome.seconds}
        for cell, outcome in outcomes.items() if not outcome.done
    ]  # fmt: skip
    notes = [
        f"{subject.agent} on {subject.env}: its stages have lengths of their own, {each.steps:,} env steps in all"
        for subject, each in takes
        if each.whole and _steps(subject, how) is not None
    ]
    folders = [cell.path for cell, outcome in outcomes.items() if outcome.done]
    named = {
        cell.path: subject.name or subject.agent for cell, subject in cells.items() if any(s.name for s in subjects)
    }
    about = {
        "failures": failures,
        "skipped": [{"label": _named(s), "env": s.env, "reason": error} for s, error in skipped],
        "notes": notes,
        "ablations": {s.name: {"about": s.about, "changes": dotted(s.changes)} for s in subjects if s.name},
    }
    return _report(out, folders, how, title=title, say=say, names=named, **about)


def _named(subject: Subject) -> str:
    return f"{subject.agent} {subject.name}".strip()


def _steps(subject: Subject, how: Mapping[str, Any]) -> int | None:
    return subject.steps if how["steps"] is None else how["steps"]


def _cells(subject: Subject, found: Found, out: Path, seeds: tuple[int, ...], how: Mapping[str, Any]) -> list[Cell]:
    """The runs of a subject: one with all seeds, or one for each where environments are on the host."""
    arguments = [subject.agent, "--env", subject.env, "--preset", how["preset"] or presets.DEFAULT_PRESET]
    steps = None if found.whole else _steps(subject, how)
    eval_every = how["eval_every"]
    if how["seconds"] is not None and not found.whole:
        steps, eval_every = min(checks.COUNT, TIMED * found.steps), eval_every or max(1, found.steps // 20)
    given = {"steps": steps, "seconds": how["seconds"], "eval-every": eval_every}
    given |= {"image-size": how["image_size"], "action-repeat": how["action_repeat"]}
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name}", str(value)]
    for name, value in (how["env_args"] or {}).items():
        arguments += ["--env-arg", name, json.dumps(value)]
    for name, value in dotted(subject.changes).items():
        values = value if isinstance(value, list | tuple) else [value]
        arguments += [f"--agent.{name}", *map(str, values)]
    cells = []
    for own in [(seed,) for seed in seeds] if found.on_host else [seeds]:
        told = ["--seed", str(own[0]), *(["--seeds", str(len(own))] if len(own) > 1 else [])]
        which = f"seed-{own[0]}" if len(own) == 1 else f"seeds-{own[0]}-to-{own[-1]}"
        budget = "" if subject.steps is None else f"{subject.steps}-steps"
        name = folder_name(subject.agent, subject.env, how["preset"] or "", subject.name, budget, which)
        cells.append(Cell(subject.agent, subject.env, subject.name, own, out / RUNS / name, (*arguments, *told)))
    return cells


def _folder(out: str | Path) -> Path:
    """Where a comparison goes. Raises `UsageError` where it cannot."""
    out = checks.path("out", out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: {str(out)!r} is not a folder; that of a comparison, or a new one, is valid")
    if (out / CONFIG).exists():
        raise UsageError(f"out: {str(out)!r} is the folder of a run; that of a comparison, or a new one, is valid")
    there = next(place for place in (out, *out.absolute().parents) if os.path.lexists(place))
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        raise UsageError(f"out: {str(out)!r} cannot be written; a folder that can be is valid")
    return out


def _report(out: Path, folders: Sequence[str | Path], how: Mapping[str, Any], **about: Any) -> Comparison:
    from wmjax.comparison.report import write_report

    return Comparison(out, *write_report(out, folders, how, **about))
