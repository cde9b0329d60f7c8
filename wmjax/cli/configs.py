"""Configuration files: the settings of a run as YAML or JSON. The `config.json` of a run is one of them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from wmjax import checks, files, presets
from wmjax.cli.arguments import CONNECTING, TrainArgs
from wmjax.envs.handed import check_trust
from wmjax.fields import check_fields
from wmjax.names import nearest
from wmjax.types import UsageError

MOST_BYTES = 2**20
TOLD = ("version", "about", "part_of_seeds", "origin")  # what `config.json` says besides settings
NOT_SETTINGS = ("config", "print_config", "dry_run", "resume", "out", "trust_env", "env_arg", *CONNECTING)


class _Loader(yaml.SafeLoader):
    """YAML without references, which may stand for more than memory holds, and with names that come once.

    Numbers such as 1e-4, which YAML 1.1 takes for text, are numbers.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not valid")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [self.construct_object(key) for key, _ in node.value]
        twice = next((name for position, name in enumerate(names) if name in names[:position]), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} comes twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a file says."""

    agent: str | None
    arguments: dict[str, Any]  # of `train`, by name
    fields: dict[str, Any]  # of the agent's configuration
    names_env: bool  # False: of a run on an environment without a name, which the file cannot bring


def read(path: str | Path, agent: str | None = None, *, trust_env: bool | None = None) -> Given:
    """Reads a file of YAML or JSON and checks its names and types. Raises `UsageError` naming it and what is not valid.

    It may have fields of `agent`, where it names none itself. `trust_env` says whether an environment that it names may
    run code of its own; None leaves that to the caller.
    """
    path = Path(path)
    try:
        return _read(path, agent, trust_env)
    except UsageError as error:
        raise type(error)(f"config: {str(path)!r}: {error}") from None


def _read(path: Path, agent: str | None, trust_env: bool | None) -> Given:
    said = _parse(path)
    if not isinstance(said, Mapping):
        raise UsageError("has no settings by name")
    names_env = said.get("env", "") is not None
    said = {name: value for name, value in said.items() if name not in TOLD and value is not None}
    own, fields, args = said.pop("agent", None), said.pop("config", {}), said.pop("env_args", None)
    if own is not None and own not in presets.AGENTS:
        raise nearest("agent", own, presets.AGENTS)
    if isinstance(said.get("data"), Mapping):  # of a run on data
        said |= {name: value for name in ("skip_damaged", "memory_map") if (value := said["data"].get(name))}
        said["data"] = said["data"].get("path")
    settings = [field.name for field in dataclasses.fields(TrainArgs) if field.name not in NOT_SETTINGS]
    for name in said:
        if name not in settings:
            raise nearest("setting", name, ["agent", "config", "env_args", *settings])
    arguments = check_fields(TrainArgs, said)
    if args is not None:
        arguments["env_args"] = _mapping("env_args", args)
    fields = dict(_mapping("config", fields))
    if fields and (own or agent) in presets.AGENTS:
        check_fields(presets.AGENTS[own or agent][0], fields)
    if trust_env is not None:
        check_trust(arguments.get("env"), arguments.get("env_args") or {}, trust_env)
    return Given(own, arguments, fields, names_env)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name}: {value!r:.80} is not valid; values by name are")
    return value


def _parse(path: Path) -> Any:
    try:
        text = files.read(path, MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: such as a zero byte in its name
        raise UsageError(f"cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UsageError(f"is neither YAML nor JSON{where}: {reason}") from None


def read_config(path: str | Path, *, trust_env: bool = False) -> dict[str, Any]:
    """Arguments for `train`, out of a file of YAML or JSON, such as the `config.json` of a run.

    `wmjax.train(**wmjax.read_config("runs/one/config.json"), out="runs/two")` trains with the same settings.

    Args:
      path: of the file.
      trust_env: whether an environment that it names may run code that is not installed with the package.

    Raises:
      UsageError: the file cannot be read, or what it says is not valid; the message names file and key.
    """
    given = read(checks.path("config", path), trust_env=checks.flag("trust_env", trust_env))
    return ({} if given.agent is None else {"agent": given.agent}) | given.arguments | given.fields


def write(values: Mapping[str, Any]) -> str:
    """The text of such a file."""
    plain = json.loads(json.dumps(values, default=str))  # tuples are lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
