"""`wmjax list`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from wmjax.cli.arguments import ListArgs, parse


def list_names(argv: Sequence[str]) -> None:
    what = parse(ListArgs, argv, "wmjax list").what
    rows: list[tuple[str, ...]]
    if what == "envs":
        from wmjax.envs import env_names

        rows = [tuple(info) for info in env_names()]
    elif what == "agents":
        from wmjax.agents import AGENTS

        rows = [
            (name, sys.modules[factory.__module__].__doc__.splitlines()[0]) for name, (_, factory) in AGENTS.items()
        ]
    else:
        from wmjax.presets import PRESET_NOTES, PRESETS

        rows = [(agent, name, PRESET_NOTES[name]) for agent, table in PRESETS.items() for name in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows)} {what}")
