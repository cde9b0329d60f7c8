"""Compiles a program of ours for an NVIDIA H100 on a machine without one, and counts what it would launch, and why.

    python -m benchmarks.gpu_text update dreamer_v3 paper size=1m compute_dtype=bfloat16
    python -m benchmarks.gpu_text stage  dreamer_v3 small --seeds 8 --text stage.hlo
    python -m benchmarks.gpu_text policy iris small --top 20
    python -m benchmarks.gpu_text all --column after --out benchmarks/results/gpu_text.json

Needs CUDA's plugin for JAX and its libraries, but neither a card nor a driver; about 5 GB, in an environment of their
own (tried with Python 3.12 and JAX 0.11.2): `pip install "jax[cuda13]==0.11.2" .`

A launch is an instruction of the optimized program that runs on the card: a fusion, a call of a library, a copy. Those
in loops count as often as their loop runs; a loop whose number of trips is not known counts once and is named. Of each
loop, and of what is outside, stand the lines of `wmjax/` that most of its launches are for: a profile. Without a card
nothing is tuned, so compile time is the compiler's alone, and launches differ a little from those of a tuned program.
Memory is the program's own plan, beside what `wmjax plan` estimates of it. What is shown leaves out loops with less
than a hundredth of the launches.
"""

from __future__ import annotations

import os

# Before JAX starts. Programs of another device than those there are can be compiled, not tuned.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
)
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu,cuda", "CUDA_VISIBLE_DEVICES": "-1"}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it complains of the card that is not there

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from benchmarks import launches
from benchmarks.timing import cpu_seconds
from wmjax.buffers import peak_bytes

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What `all` compiles, most telling first.
PROGRAMS = (
    "update dreamer_v3 small", "stage dreamer_v3 small", "update dreamer_v3 paper size=1m compute_dtype=bfloat16",
    "update dreamer_v2 small", "stage dreamer_v2 small", "update dreamer_v1 small", "stage dreamer_v1 small",
    "update iris small --name tokenizer", "update iris small --name world_model", "update iris small",
    "update world_models small --name vision", "update world_models small --name memory",
    "policy dreamer_v3 small", "policy iris small", "stage dreamer_v3 small --seeds 8",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    what: tyro.conf.Positional[Literal["update", "stage", "policy", "all"]]
    agent: tyro.conf.Positional[str] = "dreamer_v3"
    preset: tyro.conf.Positional[str] = "small"
    fields: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Of the agent's configuration."""
    env: str = "catch"
    """What the agent sees and does; one on the device."""
    name: str | None = None
    """Of the update or the stage; the last by default, and of several with this name."""
    seeds: int = 1
    """How many are mapped over; of an update or a stage."""
    top: int = 8
    """Lines that are shown of each loop, and of what is outside."""
    text: Path | None = None
    """Write the optimized program here."""
    out: Path | None = None
    """Write what was found here, as JSON; `all` adds its column to those that are there."""
    column: str = "after"
    """Of `all`: what the columns of its table tell apart, such as before and after a change."""


# ---------------------------------------------------------------------------------------------------------------------
# Compiling one


def compile_for_card(function: Callable, arguments: Any, **options: Any) -> tuple[dict[str, Any], Any]:
    """What it took to compile a function of arguments of these shapes, and the compiled program."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("d",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    start, cpu = time.perf_counter(), cpu_seconds()
    traced = jax.jit(function, **options).trace(*shapes)
    lowered = traced.lower()
    middle, cpu_middle = time.perf_counter(), cpu_seconds()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "trace_s": round(middle - start, 1),
        "trace_cpu_s": round(cpu_middle - cpu, 1),
        "compile_s": round(time.perf_counter() - middle, 1),
        "compile_cpu_s": round(cpu_seconds() - cpu_middle, 1),
        "temp_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "estimated_temp_mib": round(peak_bytes(traced.jaxpr, "cuda") / 2**20, 1),
        "argument_mib": round(memory.argument_size_in_bytes / 2**20, 1),
    }, compiled


def program(args: Args) -> tuple[str, Callable, tuple, dict[str, Any]]:
    """What is asked for: its name, function, arguments as shapes, and options of `jit`."""
    from wmjax import presets
    from wmjax.agents import AGENTS
    from wmjax.envs import make_env
    from wmjax.envs.wrappers import agent_actions
    from wmjax.loops import device
    from wmjax.replay import device as replays

    fields = {name: _value(text) for name, _, text in (field.partition("=") for field in args.fields)}
    config = presets.resolve(args.agent, args.preset, None, fields)[0]
    env = agent_actions(make_env(args.env))
    agent = AGENTS[args.agent][1](env.spec, config)
    several = (lambda fn: jax.vmap(fn, (0, None))) if args.seeds > 1 else lambda fn: fn
    key = jax.eval_shape(lambda: jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), args.seeds)) if args.seeds > 1 else key
    init = lambda k: device.init(agent, env, k)
    run = jax.eval_shape(jax.vmap(init) if args.seeds > 1 else init, keys)
    label = " ".join([args.what, args.agent, args.preset, *args.fields, args.env])
    label += f", {args.seeds} seeds" if args.seeds > 1 else ""
    if args.what == "stage":
        stage = named(agent.recipe.stages, args.name)
        function = several(device.make_stage(agent, env, stage))
        return f"{label} [{stage.name}]", function, (run, jax.ShapeDtypeStruct((), jnp.int32)), {"donate_argnums": 0}
    if args.what == "policy":
        params = jax.eval_shape(init, key).agent.variables
        carry = jax.eval_shape(lambda p: agent.act_carry(p, config.num_envs), params)
        act = lambda *a: agent.act(*a, explore=True)
        return f"{label}, {config.num_envs} envs", act, (params, key, carry, jax.eval_shape(init, key).timestep), {}
    update = named([u for stage in agent.recipe.stages for u in stage.updates], args.name)
    draw = lambda replay, k: replays.sample(replay, k, update.sampling, update.batch_size)[1]
    batch = jax.eval_shape(jax.vmap(draw) if args.seeds > 1 else draw, run.replay, keys)
    function = lambda state, k, batch: update.fn(state, k, batch)
    function = jax.vmap(function) if args.seeds > 1 else function
    return f"{label} [{update.name}]", function, (run.agent, keys, batch), {"donate_argnums": 0}


def named(parts: Sequence[Any], name: str | None) -> Any:
    """The last stage or update of this name, or of all."""
    found = [part for part in parts if name in (None, part.name)]
    if not found:
        raise SystemExit(f"name: unknown {name!r}; valid are {', '.join(dict.fromkeys(part.name for part in parts))}")
    return found[-1]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(args: Args) -> dict[str, Any]:
    """Compiles one program, and says what it launches."""
    jax.config.update("jax_enable_compilation_cache", False)
    label, function, arguments, options = program(args)
    took, compiled = compile_for_card(function, arguments, **options)
    text = compiled.as_text()
    if args.text:
        args.text.write_text(text)
    module = launches.read_module(text)
    found, unknown = launches.loops(module)
    kinds = launches.total(found)
    described = [
        {
            "loop": "outside" if loop.name == module.entry else loop.name, "trips": loop.trips, "times": loop.times,
            "launches": loop.launches, "for": dict(loop.places.most_common(args.top)),
        }
        for loop in found if 100 * loop.times * loop.launches >= kinds.total()
    ]  # fmt: skip
    return {
        "program": label, "launches": kinds.total(), **took,
        "instructions": sum(map(len, module.computations.values())),
        "by_kind": dict(kinds.most_common(8)), "loops": described, "unknown_trips": unknown,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Prints what `measure` found."""
    print(f"{row['program']}: {row['launches']:,} launches, {row['instructions']:,} instructions")
    print(
        f"  trace {row['trace_s']} s (cpu {row['trace_cpu_s']} s), compile {row['compile_s']} s (cpu "
        f"{row['compile_cpu_s']} s); temporaries {row['temp_mib']} MiB (estimated {row['estimated_temp_mib']}), "
        f"arguments {row['argument_mib']} MiB"
    )
    print(f"  {'  '.join(f'{kind} {number:,}' for kind, number in row['by_kind'].items())}")
    for loop in row["loops"]:
        print(f"  {loop['loop']}: {loop['launches']:,} launches, {loop['times']:,} times (a loop of {loop['trips']:,})")
        for place, number in loop["for"].items():
            print(f"    {number:6,} {place}")
    if row["unknown_trips"]:
        print(f"  counted once, for their trips are not known: {' '.join(row['unknown_trips'])}")


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def measure_all(args: Args) -> None:
    """Compiles `PROGRAMS`, each in a process of its own, one after the other, and adds a column to the file of all."""
    columns = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    rows = columns[args.column] = {}
    for words in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "row.json"
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu_text",
                *words.split(),
                "--top",
                str(args.top),
                "--out",
                str(found),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            row = json.loads(found.read_text()) if found.exists() else {"error": done.stderr[-2000:]}
        rows[words] = row
        print(f"{words}: {row.get('launches', 'failed')} launches, {row.get('compile_s', '')} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(columns, indent=1) + "\n")
    print(table(columns))


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Launches, compile time and temporary memory of all programs, by column, in Markdown."""
    names = [*columns]
    columns_of = ("launches", "trace + compile, processor s", "temporaries, MiB")
    heads = [f"{what}, {name}" for what in columns_of for name in names]
    lines = [f"| program | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for words in dict.fromkeys(words for rows in columns.values() for words in rows):
        found = [columns[name].get(words, {}) for name in names]
        cell = lambda row, show: show(row) if "launches" in row else ""
        cells = [cell(row, lambda row: f"{row['launches']:,}") for row in found]
        cells += [cell(row, lambda row: f"{row['trace_cpu_s']:.0f} + {row['compile_cpu_s']:.0f}") for row in found]
        cells += [cell(row, lambda row: f"{row['temp_mib']:,.0f}") for row in found]
        lines.append(f"| `{words}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    if args.what == "all":
        return measure_all(args)
    row = measure(args)
    show(row)
    if args.out:
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
