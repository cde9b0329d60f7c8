"""`wmjax compare`, `wmjax ablate`: agents side by side, and without their parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wmjax.cli.arguments import AblateArgs, CompareArgs, SideBySideArgs, env_args, explain, parse, split_agent
from wmjax.cli.output import say
from wmjax.types import RunError, UsageError

if TYPE_CHECKING:
    from wmjax.comparison import Comparison


def compare(argv: Sequence[str]) -> None:
    args = parse(CompareArgs, argv, "wmjax compare")
    if not args.agents.strip(", "):
        raise UsageError("agents: missing; names with commas between them, or all")
    from wmjax import comparison

    agents = _names(args.agents)
    if args.runs is not None and not args.runs:
        raise UsageError("runs: missing; one run folder or more is valid, without --runs they are trained")
    if args.runs and (args.env or args.agents != "all"):
        raise UsageError("runs: they have their agents and environments; --agents and --env are not valid beside them")
    how = _options(args) | {"runs": args.runs or (), "strict": args.strict, "trust_env": args.trust_env}
    _told(comparison.compare(agents, args.env or ("catch",), **how))


def ablate(argv: Sequence[str]) -> None:
    agent, argv = split_agent(argv, AblateArgs)
    from wmjax import comparison, presets

    if agent is None:
        explain(AblateArgs, argv, "wmjax ablate", presets.AGENTS)
        raise UsageError(f"agent: missing; valid are {', '.join(presets.AGENTS)}")
    args = parse(AblateArgs, argv, f"wmjax ablate {agent}")
    only = () if args.only is None else _names(args.only)
    _told(comparison.ablate(agent, args.env, only=only, **_options(args)))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _options(args: SideBySideArgs) -> dict[str, Any]:
    """By name, as both functions take them."""
    if args.out is None:
        raise UsageError("out: missing; --out FOLDER is where runs and report go, and where the same command goes on")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(SideBySideArgs)}
    values["env_args"] = env_args(values.pop("env_arg")) or None
    return values | {"say": say}


def _told(found: Comparison) -> None:
    """Says what came of it; an error where a run failed."""
    for env in found.report["environments"]:
        for group in env["groups"]:
            end, seeds = group["end"], len(group["seeds"])
            spread = "" if end["interval"] is None else " [{:.3f}, {:.3f}]".format(*end["interval"])
            score = "not evaluated" if end["iqm"] is None else f"IQM {end['iqm']:.3f}{spread} of {seeds} seeds"
            few = f" ({group['too_few']})" if group["too_few"] else ""
            say(f"{env['env']}, {group['label']}: {score}{few}")
    say(f"wrote {' and '.join(map(str, found.written))}")
    failures = found.report["failures"]
    if failures:
        first = failures[0]
        raise RunError(
            f"{len(failures)} of the runs failed, as the report names them; the same command tries again. The first: "
            f"{first['label']} on {first['env']}: {first['reason']}"
        )
