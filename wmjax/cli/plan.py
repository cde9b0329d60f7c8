"""`wmjax plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wmjax.cli.arguments import PlanArgs, changes, env_args, explain, parse_with_fields, split_agent, value_of
from wmjax.types import UsageError

if TYPE_CHECKING:
    from wmjax.sizing import Plan


def plan(argv: Sequence[str]) -> None:
    agent, argv = split_agent(argv, PlanArgs)
    from wmjax import presets

    if agent is None:
        explain(PlanArgs, argv, "wmjax plan", presets.AGENTS)
        raise UsageError(f"agent: missing; valid are {', '.join(presets.AGENTS)}")
    env = value_of("--env", argv) or presets.default_env(agent)
    config = presets.starting_config(agent, value_of("--preset", argv), {}, env)
    args = parse_with_fields(PlanArgs, config, argv, f"wmjax plan {agent}")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(PlanArgs)}
    values["env_args"], as_json = env_args(values.pop("env_arg")) or None, values.pop("json")
    from wmjax.sizing import plan as make

    found = make(agent, **values, say=lambda text: print(text, file=sys.stderr), **changes(config, args.agent))
    print(json.dumps(_plain(found)) if as_json else _table(found))


def _plain(value: Any) -> Any:
    """Named tuples as objects, with their totals."""
    if hasattr(value, "_asdict"):
        fields = {name: _plain(item) for name, item in value._asdict().items()}
        return fields | ({"total": value.total} if hasattr(value, "total") else {})
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _table(found: Plan) -> str:
    from wmjax.loops.memory import amount

    spread = f", {found.seeds} seeds" * (found.seeds > 1) + f", {found.devices} devices" * (found.devices > 1)
    rows = [f"{found.agent} on {found.env or 'an Env value'}, preset {found.preset}{spread}", "", "parameters"]
    row = lambda name, value, more="": rows.append(f"  {name:24s} {value:>16s}  {more}".rstrip())
    for name, number in found.parameters.items():
        row(name, f"{number:,}")
    row("all", f"{sum(found.parameters.values()):,}")
    rows += ["", f"memory{' on each device' * (found.devices > 1)}"]
    known = f"as compiled for {found.compiled_for}" if found.compiled_for else "estimated, within about a fifth"
    notes = {"temporaries": known, "host_replay": "at most, in the host's memory"}
    for name, size in found.memory._asdict().items():
        if size or name != "host_replay":
            row(name.replace("_", " "), amount(size), notes.get(name, ""))
    row("all on the device", amount(found.memory.total))
    rows += ["", "multiply-adds of matrix products and convolutions, of one seed on one device"]
    for job in found.jobs:
        kinds = ", ".join(job.by_kind)
        row(job.name, f"{job.multiply_adds:.3e}", f"{kinds}; {amount(job.temporary_bytes)} of temporaries")
    row("acting, per env step", f"{found.multiply_adds_per_env_step:.3e}")
    if found.card is not None:
        rows += ["", f"at {found.share:.0%} of the peaks of {found.card.name}, if products were all that takes time"]
        for job in (*found.jobs, found.acting):
            row(job.name, f"{1e3 * job.seconds:.3g} ms")
        for stage in found.stages:
            rates = {"updates/s": stage.updates_per_second, "env steps/s": stage.env_steps_per_second}
            said = ", ".join(f"{rate:,.3g} {unit}" for unit, rate in rates.items() if rate)
            row(f"stage {stage.name}", f"{stage.seconds:,.0f} s", said)
    rows += ["", "it fits" if found.fits else f"it does not fit: {found.advice}"]
    return "\n".join(rows)
