"""`wmjax train`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

import wmjax
from wmjax.cli.arguments import TrainArgs, env_args, parse, split_agent, value_of
from wmjax.loops.display import SafeStream
from wmjax.types import UsageError


def train(argv: Sequence[str]) -> None:
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:  # what is printed cannot end a run
            stack.enter_context(contextlib.redirect_stdout(SafeStream(sys.stdout)))
        _train(argv)


def _train(argv: Sequence[str]) -> None:
    agent, argv = split_agent(argv)
    if agent is not None and not {"-h", "--help"} & set(argv):
        print(f"wmjax {wmjax.__version__}: {agent}", flush=True)  # the imports take a second or more
    from wmjax import presets

    if agent is None:
        if {"-h", "--help"} & set(argv):
            parse(TrainArgs, argv, "wmjax train AGENT")
        raise UsageError(f"agent: missing; valid are {', '.join(presets.AGENTS)}")
    config = _config_to_start_from(agent, argv)
    # Every field takes a value, switches too; the preset's are shown as defaults.
    fields = Annotated[type(config), tyro.conf.FlagConversionOff]
    args_class = dataclasses.make_dataclass(
        "TrainAgentArgs", [("agent", fields, config)], bases=(TrainArgs,), frozen=True
    )
    args_class.__doc__ = TrainArgs.__doc__
    args = parse(args_class, argv, f"wmjax train {agent}")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainArgs)}
    values["env_args"] = env_args(values.pop("env_arg")) or None
    chosen = {
        field.name: getattr(args.agent, field.name)
        for field in dataclasses.fields(config)
        if getattr(args.agent, field.name) != getattr(config, field.name)
    }
    _say_cache()
    from wmjax import run

    run.train(agent, **values, **chosen)


def _config_to_start_from(agent: str, argv: Sequence[str]) -> Any:
    """What the fields of the agent are where they are not given."""
    from wmjax import presets

    preset, out, before = value_of("--preset", argv, None), value_of("--out", argv, None), {}
    if preset is None and out is not None and "--resume" in argv:
        from wmjax.folder import read_description

        before = read_description(out)
    return presets.starting_config(agent, preset, before if before.get("agent") == agent else {})


def _say_cache() -> None:
    from wmjax.cache import enable_compilation_cache

    folder = enable_compilation_cache()
    print(f"compilation cache {folder}" if folder else "compilation cache off", flush=True)
