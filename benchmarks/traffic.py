"""Bytes that devices send each other in an update, and the connection that many devices need, on paper.

    python -m benchmarks.traffic

Counted are the operands of all collectives in the traced update of one of many devices, loops as often as they run.
By hand it is the gradient, which is averaged once, in float32; what is above that are means and statistics. A ring
moves 2 (n - 1) / n times that through each device. The time of an update is that of its products at a share of a card's
peak, as `wmjax plan` estimates it, for the preset's batch on every device; nothing is taken to overlap. Then a
connection of so many GB/s keeps the devices at `EFFICIENCY`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from jax.interpreters.partial_eval import dce_jaxpr

from wmjax import arithmetic, presets, sizing
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import device
from wmjax.loops.parallel import AXIS
from wmjax.replay import device as replays

# Of a collective's operand, what each of n devices in a ring sends.
_REDUCED = lambda n: 2 * (n - 1) / n
COLLECTIVES = dict.fromkeys(("psum", "psum_invariant", "pmin", "pmax"), _REDUCED)
COLLECTIVES |= dict.fromkeys(("reduce_scatter", "all_to_all"), lambda n: (n - 1) / n)
COLLECTIVES |= {"all_gather": lambda n: n - 1, "ppermute": lambda n: 1}
EFFICIENCY = 0.8
DEVICES = (8, 256)
SIZES = ("12m", "25m", "50m", "100m", "200m", "400m")
PROGRAMS = (
    *((f"dreamer_v3 {size}", "dreamer_v3", "paper", {"size": size}) for size in SIZES),
    ("iris paper", "iris", "paper", {}),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    card: str = "h100"
    share: float = 0.4  # of its peak
    only: tuple[str, ...] = ()  # names of programs
    out: Path = Path("benchmarks/results/traffic.json")


class Collective(NamedTuple):
    """One place of a program where devices send each other something."""

    kind: str
    axes: tuple[str, ...]  # names
    bytes: int  # of its operands, as often as it runs


def collectives(jaxpr: Any, times: int = 1) -> Iterator[Collective]:
    """Those of a traced program that runs so many times."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in COLLECTIVES:
            axes = params["axes"] if "axes" in params else params["axis_name"]
            size = sum(x.aval.size * x.aval.dtype.itemsize for x in eqn.invars if hasattr(x.aval, "dtype"))
            yield Collective(name, axes if isinstance(axes, tuple) else (axes,), times * size)
            continue
        for inner in arithmetic.programs_in(params):
            yield from collectives(inner, times * (params["length"] if name == "scan" else 1))


def sent(jaxpr: Any) -> Counter[str]:
    """Bytes of the operands of each kind of collective in a traced program."""
    total: Counter[str] = Counter()
    for found in collectives(jaxpr):
        total[found.kind] += found.bytes
    return total


def through(jaxpr: Any, sizes: dict[str, int]) -> float:
    """Bytes that each device sends if all collectives of a traced program go around in rings.

    Args:
      jaxpr: of one device.
      sizes: devices along each named axis.
    """
    devices = lambda axes: math.prod(sizes[name] for name in axes)
    return sum(COLLECTIVES[found.kind](devices(found.axes)) * found.bytes for found in collectives(jaxpr))


def traffic(name: str, preset: str, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Bytes that one device gives into collectives in each update, and by hand."""
    config = presets.resolve(name, preset, "catch", changes)[0]
    config = dataclasses.replace(config, replay_capacity=min(config.replay_capacity, 10_000))
    env = agent_actions(make_env("catch"))
    agent = AGENTS[name][1](env.spec, config, AXIS)
    state = jax.eval_shape(partial(device.init, agent, env), jax.random.key(0))
    found = {}
    for update in {update.name: update for stage in agent.recipe.stages for update in stage.updates}.values():
        draw = lambda replay, key, u=update: replays.sample(replay, key, u.sampling, u.batch_size)[1]
        batch = jax.eval_shape(draw, state.replay, state.key)
        traced = jax.make_jaxpr(update.fn, axis_env=[(AXIS, DEVICES[0])])(state.agent, state.key, batch)
        used, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))  # XLA removes the rest, too
        kinds = sent(used)
        found[update.name] = {"bytes": sum(kinds.values()), "by_kind": dict(kinds)}
    return found


def trained_bytes(name: str, preset: str, changes: dict[str, Any]) -> dict[str, int]:
    """float32 bytes of the parameters that each update has a gradient of, by the names of updates."""
    plan = sizing.plan(name, "catch", preset=preset, card="h100", **changes)
    every = plan.parameters
    if name == "iris":
        return {key: 4 * every[key] for key in ("tokenizer", "world_model", "actor_critic")}
    return {"train": 4 * sum(n for key, n in every.items() if not key.startswith("slow"))}


def main(args: Args) -> None:
    """Counts each program, prints what came out, and writes it."""
    rows = []
    for label, name, preset, changes in PROGRAMS:
        if args.only and label not in args.only:
            continue
        counted, by_hand = traffic(name, preset, changes), trained_bytes(name, preset, changes)
        plan = sizing.plan(name, "catch", preset=preset, card=args.card, share=args.share, **changes)
        seconds = {job.name: job.seconds for job in plan.jobs}
        for update, found in counted.items():
            row = {"program": label, "update": update, "bytes": found["bytes"], "by_hand": by_hand.get(update, 0)}
            row |= {"by_kind": found["by_kind"], "seconds": seconds[update]}
            for n in DEVICES:
                through, slack = 2 * (n - 1) / n * found["bytes"], seconds[update] * (1 / EFFICIENCY - 1)
                row[f"GB/s for {n} devices"] = through / slack / 1e9
            rows.append(row)
            print(
                f"{label:18s} {update:12s} {found['bytes'] / 1e6:9.1f} MB (by hand {row['by_hand'] / 1e6:9.1f}), "
                f"{1e3 * seconds[update]:8.2f} ms; "
                + ", ".join(f"{n} devices: {row[f'GB/s for {n} devices']:.1f} GB/s" for n in DEVICES),
                flush=True,
            )
    about = {"card": args.card, "share": args.share, "efficiency": EFFICIENCY, "jax": jax.__version__}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
