"""Whether every agent learns on every seed: `python -m benchmarks.learning [--only NAME ...] [--out FOLDER]`.

Trains each default (preset `small`, at its budget) over the seeds below, evaluates 100 fresh episodes of each, and ends
with exit code 1 if one of them stays under its threshold. Called again it goes on where it was. The report of
`wmjax compare` is in FOLDER/ENV, and FOLDER/learning.md has the table of the README.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import tyro

import wmjax
from wmjax import files
from wmjax.agents import AGENTS

FIRST_SEED, SEEDS = 0, 3


class Row(NamedTuple):
    """What is demanded of an agent in an environment."""

    agent: str
    env: str
    threshold: float  # of the mean return of each seed


ROWS = (
    *(Row(agent, "catch", 0.9) for agent in AGENTS),  # -1 missed, 1 caught
    *(Row(agent, "pendulum", -250.0) for agent in AGENTS if agent != "iris"),  # which takes discrete actions only
    Row("world_models", "racing", 900.0),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    only: tuple[str, ...] = ()  # agents or environments; by default all
    out: Path = Path("runs/learning")
    first_seed: int = FIRST_SEED
    seeds: int = SEEDS
    jobs: int = 1  # runs at once


def chosen(only: tuple[str, ...]) -> list[Row]:
    """The rows of these agents and of these environments; where both are named, of both."""
    agents, envs = ({x for x in only if x in names} for names in (set(AGENTS), {row.env for row in ROWS}))
    if unknown := set(only) - agents - envs:
        sys.exit(f"only: unknown {', '.join(sorted(unknown))}; valid are {', '.join(AGENTS)}, catch, pendulum, racing")
    rows = [row for row in ROWS if (not agents or row.agent in agents) and (not envs or row.env in envs)]
    if not rows:  # nothing would be demanded, and so nothing could fail
        sys.exit(f"only: nothing is demanded of {', '.join(sorted(agents))} on {', '.join(sorted(envs))}")
    return rows


def judge(row: Row, report: dict[str, Any], count: int) -> tuple[list[str], bool]:
    """A row of the table, and whether every seed is above the threshold."""
    groups = [group for env in report["environments"] for group in env["groups"] if group["agent"] == row.agent]
    returns = [x for group in groups for x in group["end"]["by_seed"]]
    fine = len(returns) == count and all(x is not None and x >= row.threshold for x in returns)
    end = groups[0]["end"] if groups else {"iqm": None, "interval": None}
    show = lambda x: "failed" if x is None else f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}"
    between = "" if end["interval"] is None else f" [{', '.join(map(show, end['interval']))}]"
    minutes = max((x for group in groups for x in group["seconds"] if x), default=0) / 60
    cells = [row.agent, row.env, ", ".join(map(show, returns)) or "failed", f"{show(end['iqm'])}{between}"]
    cells += [f"{groups[0]['budget']:,}" if groups else "", f"{minutes:.0f} min", show(row.threshold)]
    return [*cells, "yes" if fine else "**no**"], fine


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = chosen(args.only)
    found = []
    for env in dict.fromkeys(row.env for row in rows):
        names = [row.agent for row in rows if row.env == env]
        about = dict(seeds=args.seeds, first_seed=args.first_seed, jobs=args.jobs)
        report = wmjax.compare(names, env, out=args.out / env, **about).report
        found += [judge(row, report, args.seeds) for row in rows if row.env == env]
    seeds = f"{args.first_seed} to {args.first_seed + args.seeds - 1}"
    head = [
        "agent",
        "environment",
        f"return of seeds {seeds}",
        "IQM",
        "env steps",
        "time, all seeds",
        "at least",
        "fine",
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(cells for cells, _ in found))]
    files.write(args.out / "learning.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    sys.exit(0 if all(fine for _, fine in found) else 1)


if __name__ == "__main__":
    main()
