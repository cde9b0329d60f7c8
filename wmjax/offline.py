"""Fixed records to train on: where they lie, which environment they name, and how an agent is made for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from wmjax import checks
from wmjax.envs.handed import check_trust, source_of
from wmjax.episodes import Data, Source, open_source, spec_json
from wmjax.loops.schedule import samplings
from wmjax.types import Agent, EnvSpec, UntrustedError, UsageError


def given_data(
    data: Any, before: Mapping[str, Any], env: Any, trust: bool = False
) -> tuple[Source | None, dict[str, Any], list[str]]:
    """The data of a run, and what it says of the environment that it is of.

    Args:
      data: as for `train`.
      before: what `config.json` of a run that goes on says, or nothing.
      env: what the user named as the environment, or None.
      trust: whether code that the data names may be run.

    Returns:
      The source, or None; settings of the environment that hold where nothing else is given; and notes.
    """
    had = before.get("data")
    if before and data is not None and had is None:
        raise UsageError("data: the run was not trained on data, which cannot change; another folder (--out) is valid")
    if data is None and had is not None:
        if "path" not in had:
            raise UsageError("data: missing; config.json does not say where it lies, --data FOLDER is valid")
        data = had["path"]
    if data is None:
        return None, {}, []
    source, notes = open_source(data), []
    said = dict(source.settings)
    named = said.get("env")
    if named is not None and env is None and source_of(named) is not None and not trust:
        notes.append(f"data: its environment {named!r} would run code of its own, so it is not made; --env can name it")
        del said["env"]
    if env is not None and env != named:
        said.pop("env_args", None)
    try:
        check_trust(None, said.get("env_args") or {}, trust)
    except UntrustedError:
        odd = f"arguments {checks.show(said['env_args'])} of its environment, which may name code or a file"
        raise UsageError(f"data: {source.path!r} has {odd}; another --env, or --trust-env, is valid") from None
    return source, said, notes


def checked_spec(source: Source, spec: EnvSpec | None) -> None:
    """Raises `UsageError` where a source says that it is of another environment than one with this spec."""
    if spec is None or source.spec is None:
        return
    if spec.action_map is not None and source.path.startswith("minari:"):
        raise UsageError(f"data: the actions of {source.path!r} cannot be told from those that env maps to its own")
    for name, verb in (("obs", "observes"), ("action", "acts in"), ("action_repeat", "has action_repeat")):
        mine, other = getattr(source.spec, name), getattr(spec, name)
        if mine != other:
            raise UsageError(f"data: {source.path!r} is of an environment that {verb} {mine}; env {verb} {other}")


def described(data: Data, memory_map: bool, skip_damaged: bool) -> dict[str, Any]:
    """What `config.json` says of the data of a run."""
    return {
        "path": data.path, "fingerprint": data.fingerprint, "episodes": len(data.lengths), "records": data.records,
        "skipped": data.skipped, "skip_damaged": skip_damaged, "memory_map": memory_map, "spec": spec_json(data.spec),
    }  # fmt: skip


def check_same(data: Data, before: Mapping[str, Any]) -> None:
    """Raises `UsageError` where the data is not what the run was trained on so far."""
    had = before.get("data")
    if had and had.get("fingerprint") != data.fingerprint:
        raise UsageError(
            f"data: {data.path!r} is not what the run was trained on: its SHA-256 is {data.fingerprint!r} "
            f"({len(data.lengths)} episodes, {data.records} records) and was {checks.show(had.get('fingerprint'))} "
            f"({had.get('episodes')} episodes, {had.get('records')} records); the data as it was is valid"
        )


def fitted(config: Any, make_agent: Callable[[Any], Agent], data: Data, devices: int) -> Agent:
    """An agent whose replay the data fills, in as many streams as it has environments, or fewer where it is little.

    Raises `UsageError` where the records are too few, and where the agent cannot learn without an environment.
    """
    if getattr(getattr(config, "evolve", None), "where", None) == "env":
        raise UsageError(
            "evolve.where: 'env' plays in the environment, which training on data does not; 'dream' is valid "
            "(--agent.evolve.where dream)"
        )
    asked = samplings(make_agent(config).recipe)
    window = max((x.context + x.length for x in asked if not x.over == "in_order"), default=1)
    valid = [
        n for n in range(devices, config.num_envs + 1, devices) if config.num_envs % n == 0 and data.rows(n) >= window
    ]
    if not valid:
        raise UsageError(
            f"data: the {data.records} records of {data.path!r} are too few for a window of {window} steps"
            f"{f' on each of {devices} devices' if devices > 1 else ''}; more, or a shorter length, is valid"
        )
    within = max((x.length for x in asked if x.within_episode), default=0)
    if within and max(data.lengths) < within:
        raise UsageError(
            f"data: no episode of {data.path!r} has the {within} steps of a window that lies in one; the longest has "
            f"{max(data.lengths)}; a shorter length, or none within_episode, is valid"
        )
    streams = max(valid)
    fields = {"num_envs": streams, "replay_capacity": streams * data.rows(streams)}
    if hasattr(config, "collect_steps"):
        fields["collect_steps"] = fields["replay_capacity"]
    try:
        return make_agent(dataclasses.replace(config, **fields))
    except UsageError as error:
        raise UsageError(f"data: {data.records} records in {streams} streams are not enough: {error}") from None
