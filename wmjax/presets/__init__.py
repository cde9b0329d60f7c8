"""Named configurations, and how long to train on each environment.

`small` learns on a laptop's CPU in minutes; it is the same for every environment except for its budget: how many steps,
and for World Models how many updates and generations. `guide` has the sizes of the implementation guide. `paper` is the
authors' own. What a preset changes is in the file of its agent, what depends on the environment in `budgets.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from wmjax.agents import AGENTS
from wmjax.fields import check_fields, replace
from wmjax.names import nearest
from wmjax.presets import dreamer_v1, dreamer_v2, dreamer_v3, iris, world_models
from wmjax.presets.budgets import RunSettings, config_fields, run_settings
from wmjax.types import UsageError

DEFAULT_PRESET = "small"
# The environment that an agent is trained on if none is named: discrete actions, or continuous ones.
DEFAULT_ENVS = {
    "dreamer_v1": "pendulum", "dreamer_v2": "catch", "dreamer_v3": "catch", "world_models": "racing", "iris": "catch",
}  # fmt: skip
PRESET_NOTES = {
    "small": "learns on a laptop's CPU in minutes; the default",
    "guide": "the sizes of the implementation guide",
    "paper": "the authors' hyperparameters (DreamerV1: control suite; DreamerV2: Atari, as in the released code)",
    "paper_discrete": "the paper's changes for discrete actions and early termination",
    "paper_atari": "Atari with the numbers of the paper's table, where they differ from the released code",
    "paper_dmc": "the authors' hyperparameters for the DeepMind Control Suite",
    "paper_atari100k": "the authors' hyperparameters for Atari in 400 thousand frames",
    "paper_dmc_proprio": "the authors' hyperparameters for the DeepMind Control Suite, from vectors",
    "paper_dmc_vision": "the authors' hyperparameters for the DeepMind Control Suite, from pixels",
    "paper_crafter": "the authors' hyperparameters for Crafter",
    "paper_car": "the authors' hyperparameters for CarRacing",
    "paper_doom": "the authors' hyperparameters for Doom, evolved in dreams",
}

# Overrides of the paper's defaults, by agent and preset.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    module.__name__.rpartition(".")[2]: module.PRESETS
    for module in (dreamer_v1, dreamer_v2, dreamer_v3, world_models, iris)
}


def default_env(agent: str) -> str:
    """The environment that an agent is tried on first. Raises `UsageError` for an unknown agent."""
    _config_class(agent)
    return DEFAULT_ENVS[agent]


def resolve(
    agent: str, preset: str = DEFAULT_PRESET, env: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Any, RunSettings]:
    """The configuration of an agent, and the settings of a run.

    Args:
      agent: a name in `AGENTS`.
      preset: a name in `PRESETS[agent]`.
      env: an environment's name; None for one that has none. It is not checked here.
      overrides: fields of the agent's configuration.

    Returns:
      The validated frozen configuration, and the run settings.

    Raises:
      UsageError: unknown agent, preset or field, with the nearest valid name; a value of a wrong type or range.
    """
    config_class = _config_class(agent)
    if not isinstance(preset, str) or preset not in PRESETS[agent]:
        raise nearest("preset", preset, PRESETS[agent])
    config = config_class()
    for fields in (PRESETS[agent][preset], *config_fields(agent, preset, env), overrides or {}):
        config = replace(config, fields)
    config.validate()
    return config, run_settings(agent, preset, env)


def starting_config(agent: str, preset: str | None, before: Mapping[str, Any], env: str | None = None) -> Any:
    """A configuration before anything is overridden.

    Args:
      agent: a name in `AGENTS`.
      preset: a name in `PRESETS[agent]`, or None.
      before: what `config.json` says of a run that goes on, which holds where there is no preset; or nothing.
      env: an environment's name, as for `resolve`.

    Raises `UsageError` as `resolve`, and where the configuration of the run is not one of this version.
    """
    if before and preset is None:
        return saved_config(before)
    return resolve(agent, DEFAULT_PRESET if preset is None else preset, env)[0]


def saved_config(description: Mapping[str, Any]) -> Any:
    """The configuration that `config.json` holds. Raises `UsageError` where it is not one of this version."""
    agent = description["agent"]
    config_class = _config_class(agent)
    fields = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(description["config"].keys() - fields):
        raise UsageError(
            f"config.json: its {unknown[0]!r} is no field of {agent} in this version of wmjax; another wrote the run"
        )
    return config_class(**check_fields(config_class, description["config"]))


def _config_class(agent: str) -> type:
    if not isinstance(agent, str) or agent not in AGENTS:
        raise nearest("agent", agent, AGENTS)
    return AGENTS[agent][0]
