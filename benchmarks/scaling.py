"""Time of an update on 1, 2 and 4 devices of one CPU and in 1 and 2 processes, and what the devices send each other.

    python -m benchmarks.scaling [--out FILE.json]

Devices are forced: they share the cores of the machine, so no more is computed in a second on four of them than on one.
With a batch that stays the same, what an update takes longer on more devices is what spreading costs; with one that
grows by the devices, as many times one device's update is what the cores would need at least. Each row is one or two
processes of its own, started after the row before; a few minutes in all.

Bytes are those that each device sends if collectives go around in rings, counted in the traced update by
`benchmarks.traffic`. By hand, of n devices: 2 (n - 1) / n times the gradient, in float32, or with sharded parameters
(n - 1) / n times all parameters, which are gathered, the gradient, which is scattered, and the step, which is gathered.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.timing import machine, times, typed_command
from benchmarks.traffic import through
from wmjax import distributed
from wmjax.agents import AGENTS
from wmjax.agents.dreamer_v3 import DreamerV3Config
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.estimate import count
from wmjax.loops import device, fsdp, parallel
from wmjax.replay import device as replays
from wmjax.types import Agent, Env

ENV, EACH, FIXED = "probe:act_obs", 4, 8  # rows of a batch: of each device where it grows, of all where it does not
UPDATES, CHUNKS = 8, 5  # timed at once, and how often; the median counts
# Parameters enough that statistics are little beside them, and vectors, whose programs compile soon.
CONFIG = DreamerV3Config(
    deter=256, hidden=64, units=64, blocks=4, stoch=8, classes=8, bins=41, length=8, horizon=5, imagine_last=0,
    num_envs=16, replay_capacity=1024, prefill=0, actor_layers=1, critic_layers=1, prior_layers=1, warmup=0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured."""

    devices: int
    processes: int
    batch_size: int
    shard_params: int = 1


ROWS = (
    *(Row(n, 1, size) for n in (1, 2, 4) for size in dict.fromkeys((FIXED, EACH * n))),
    *(Row(n, 2, size) for n in (2, 4) for size in dict.fromkeys((FIXED, EACH * n))),
    Row(4, 1, EACH * 4, shard_params=4),
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    out: Path = Path("benchmarks/results/scaling.json")
    note: str = ""  # about the machine, such as what else ran on it
    process: str = ""  # of a process that a row starts: the row and where the others are, as JSON


def made(row: Row) -> tuple[Agent, Env]:
    """One update in each iteration, whatever the batch."""
    ratio = row.batch_size * CONFIG.length / CONFIG.num_envs
    config = dataclasses.replace(CONFIG, batch_size=row.batch_size, train_ratio=ratio)
    env = agent_actions(make_env(ENV))
    return AGENTS["dreamer_v3"][1](env.spec, config, parallel.axis_name(row.devices, row.shard_params)), env


def sent(row: Row) -> tuple[float, float]:
    """Bytes that each device sends in an update: counted, and by hand."""
    agent, env = made(row)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    gradient, everything = 4 * count(state.params), 4 * count(state.variables)
    n, parts = row.devices, row.shard_params
    if n == 1:
        return 0.0, 0.0
    run = jax.eval_shape(partial(device.init, agent, env), jax.random.key(0))
    update = parallel.share(agent.recipe, n).stages[-1].updates[0]
    draw = lambda replay, key: replays.sample(replay, key, update.sampling, update.batch_size)[1]
    batch, function, axes = jax.eval_shape(draw, run.replay, run.key), update.fn, {parallel.AXIS: n}
    by_hand = 2 * (n - 1) / n * gradient
    if parts > 1:
        where = fsdp.axes(state, parts)
        cut = lambda x, axis: [size // parts if i == axis else size for i, size in enumerate(x.shape)]
        state = jax.tree.map(lambda x, axis: jax.ShapeDtypeStruct(cut(x, axis), x.dtype), state, where)
        axes = dict(zip(fsdp.AXES, (n // parts, parts), strict=True))
        function, by_hand = fsdp.on_parts(where, function), (n - 1) / n * (everything + 2 * gradient)
    traced = jax.make_jaxpr(function, axis_env=list(axes.items()))(state, run.key, batch)
    return through(traced, axes), by_hand


def measured(row: Row) -> dict[str, Any]:
    """Seconds of an update, of some at once, and the bytes that are sent in it and held between updates."""
    agent, env = made(row)
    programs = parallel.programs(agent, env, devices=row.devices, shard_params=row.shard_params)
    run = programs.init(jax.random.key(0))
    collect, train = agent.recipe.stages
    run, _ = programs.compile_stage(collect)(run, 1)
    learn, start = programs.compile_stage(train._replace(collect=0)), time.perf_counter()
    run, _ = learn(device.next_stage(run), UPDATES)
    compiling, state = time.perf_counter() - start, [run]

    def updates() -> Any:
        state[0], metrics = learn(state[0], UPDATES)
        return metrics

    taken = sorted(times(updates, CHUNKS))
    assert int(programs.replica(state[0].agent.step)) == UPDATES * (1 + CHUNKS)
    leaves = jax.tree.leaves((state[0].agent.params, state[0].agent.opt_state, state[0].agent.non_trainable))
    counted, by_hand = sent(row)
    return dataclasses.asdict(row) | {
        "seconds": taken[CHUNKS // 2] / UPDATES, "slowest": taken[-1] / UPDATES, "compile_seconds": compiling,
        "bytes_sent": counted, "by_hand": by_hand,
        "bytes_held": sum(x.addressable_shards[0].data.nbytes for x in leaves),
    }  # fmt: skip


def started(row: Row) -> dict[str, Any]:
    """A row, by processes of its own: what the first of them prints."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={row.devices // row.processes}"
    environment, found = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, []
    for i in range(row.processes):
        where = dict(coordinator=coordinator, num_processes=row.processes, process_id=i) if row.processes > 1 else {}
        said = json.dumps({"row": dataclasses.asdict(row), "where": where})
        command = [sys.executable, "-m", "benchmarks.scaling", "--process", said]
        found.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=600)[0] for process in found]
    finally:
        for process in found:
            process.kill()
    if any(process.returncode for process in found):
        raise SystemExit(f"{row}: a process failed")
    return json.loads(outputs[0].splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| devices | processes | batch | update | sent by a device | by hand | held by a device |"]
    lines.append("| --- " * 7 + "|")
    for row in rows:
        parts = f", parameters in {row['shard_params']} parts" if row["shard_params"] > 1 else ""
        megabytes = " | ".join(f"{row[name] / 1e6:.2f} MB" for name in ("bytes_sent", "by_hand", "bytes_held"))
        told = f"{row['devices']}{parts} | {row['processes']} | {row['batch_size']}"
        lines.append(f"| {told} | {1e3 * row['seconds']:.0f} ms | {megabytes} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Measures each row, prints the table, and writes it."""
    if args.process:
        asked = json.loads(args.process)
        distributed.connect(**asked["where"])
        print(json.dumps(measured(Row(**asked["row"]))), flush=True)
        distributed.wait()
        return
    rows = []
    for row in ROWS:
        rows.append(started(row))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    about = machine() | {"command": typed_command(), "note": args.note, "load": os.getloadavg()}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
