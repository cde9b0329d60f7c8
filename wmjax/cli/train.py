"""`wmjax train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import wmjax
from wmjax.cli.arguments import (
    CONNECTING,
    HELP,
    TrainArgs,
    changes,
    env_args,
    explain,
    parse_with_fields,
    split_agent,
    value_of,
)
from wmjax.fields import replace
from wmjax.loops.display import SafeStream
from wmjax.types import UsageError

STOPS = ("print_config", "dry_run")  # options that print something instead of training


class Start(NamedTuple):
    """What holds where the command line says nothing."""

    agent: str
    config: Any  # of the agent, without what a file says
    fields: dict[str, Any]  # that a file says
    arguments: dict[str, Any]  # of `train`, by name, that a file says
    before: dict[str, Any]  # what `config.json` of a run that goes on says


def train(argv: Sequence[str]) -> None:
    safe = SafeStream(sys.stdout) if sys.stdout is not None else None  # what is printed cannot end a run
    with contextlib.redirect_stdout(safe):
        _train(argv)


def _train(argv: Sequence[str]) -> None:
    agent, argv = split_agent(argv)
    if {"--coordinator", "--distributed"} & {word.partition("=")[0] for word in argv}:
        # Where a process ends, JAX tells the others of it in dozens of lines, besides the one that says it.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stops = {f"--{name.replace('_', mark)}" for name in STOPS for mark in "-_"}
    if (agent is not None or "--resume" in argv) and not (HELP | stops) & set(argv):
        # The imports take a second or more.
        print(f"wmjax {wmjax.__version__}{f': {agent}' if agent is not None else ''}", flush=True)
    from wmjax import presets

    start = _start(agent, argv)
    if start is None:
        explain(TrainArgs, argv, "wmjax train", presets.AGENTS)
        if "--resume" in argv and value_of("--out", argv) is None:
            raise UsageError("resume: needs the run folder to go on with, --out RUN")
        raise UsageError(f"agent: missing; valid are {', '.join(presets.AGENTS)}")
    args = _parse(start, argv)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    values["env_args"] = start.arguments.get("env_args", {}) | env_args(values.pop("env_arg")) or None
    file, print_config, dry_run = (values.pop(name) for name in ("config", *STOPS))
    connecting = {name: values.pop(name) for name in CONNECTING}
    if file is not None:
        from wmjax.envs.handed import check_trust

        named = None if value_of("--env", argv) is not None else args.env
        check_trust(named, start.arguments.get("env_args") or {}, args.trust_env, env_args(args.env_arg))
    chosen = changes(start.config, args.agent)
    if print_config or dry_run:
        _show(start, values, chosen, print_config)
        return
    from wmjax import distributed, training

    distributed.connect(**connecting)
    training.train(start.agent, **values, **chosen)


def _start(agent: str | None, argv: Sequence[str]) -> Start | None:
    """None where neither the command line nor a file names an agent."""
    from wmjax import presets
    from wmjax.cli import configs
    from wmjax.run_folder import read_description

    file, preset, out = (value_of(flag, argv) for flag in ("--config", "--preset", "--out"))
    given = configs.read(file, agent) if file is not None else None
    before = read_description(out) if out is not None and "--resume" in argv else {}
    for named, where in ((given and given.agent, f"config: {file!r}"), (before.get("agent"), f"resume: {out!r}")):
        if named is not None and agent is not None and named != agent and agent in presets.AGENTS:
            raise UsageError(f"{where} is of the agent {named!r}, not of {agent!r}; agent cannot change")
        agent = agent or named
    if agent is None:
        return None
    if given is not None and not given.names_env and value_of("--env", argv) is None:
        raise UsageError(
            f"config: {file!r} is of a run on an Env value, which no file can bring; --env NAME is valid beside it, or "
            "from Python wmjax.train(env=..., **wmjax.read_config(FILE))"
        )
    fields, arguments = (given.fields, given.arguments) if given is not None else ({}, {})
    fields, arguments = _moved(agent, preset, value_of("--env", argv), dict(fields), dict(arguments))
    env = value_of("--env", argv) or arguments.get("env") or before.get("env") or presets.default_env(agent)
    config = presets.starting_config(agent, preset or arguments.get("preset"), before, env)
    return Start(agent, config, fields, arguments, before)


def _moved(
    agent: str, preset: str | None, env: str | None, fields: dict[str, Any], arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says, where the command line names another preset or environment.

    What is only the file's preset's, or its environment's, is then left out for that of the other one. Of a file that
    names none, all is kept.
    """
    from wmjax import presets

    own_preset, own_env = arguments.get("preset"), arguments.get("env")
    moved = lambda named, own: own is not None and named not in (None, own)
    if moved(preset, own_preset) or moved(env, own_env):
        own_config, settings = presets.resolve(agent, own_preset or presets.DEFAULT_PRESET, own_env)
        fields = changes(own_config, replace(own_config, fields))
        own = settings._asdict()
        arguments = {name: value for name, value in arguments.items() if name not in own or value != own[name]}
    if moved(env, own_env):
        arguments.pop("env_args", None)
    return fields, arguments


def _parse(start: Start, argv: Sequence[str]) -> Any:
    said = {name: value for name, value in start.arguments.items() if name != "env_args"}
    config = replace(start.config, start.fields)
    return parse_with_fields(TrainArgs, config, argv, f"wmjax train {start.agent}", **said)


def _show(start: Start, values: Mapping[str, Any], chosen: Mapping[str, Any], print_config: bool) -> None:
    """Prints what would be trained: as a file of settings, or what it would take."""
    from wmjax import checks, determinism, estimate
    from wmjax.cli import configs
    from wmjax.settings import ASKED, describe, setup

    if not print_config:  # before JAX starts
        if values["deterministic"]:
            determinism.turn_on()
        determinism.turn_on_again(start.before, lambda text: print(text, file=sys.stderr))
    named = {name: values[name] for name in ("env", *ASKED) if name in values}
    made = setup(start.agent, **named, overrides=dict(chosen), before=start.before)
    kept = (*made.description, "start_timeout", *configs.NOT_SETTINGS)
    others = {k: v for k, v in values.items() if k not in kept and v is not None and v is not False}
    for name, value in others.items():
        if name in checks.BOUNDS:
            checks.number(name, value)
    if print_config:
        settings = {name: value for name, value in made.description.items() if name not in configs.TOLD}
        settings |= {"data": made.data.path} if made.data is not None else {}
        config = settings.pop("config")
        known = {name: value for name, value in settings.items() if value is not None}
        print(configs.write(known | others | {"config": config}), end="")
    else:
        told = estimate.outlook(made, values["memory_map"], values["out"])
        print(f"{describe(made, values['out'])}\n{told}\nnothing was written")
