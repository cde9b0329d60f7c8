"""Times environments on the host: `python -m benchmarks.host [--env NAME] [--out FILE.json]`.

Let nothing else run. Three questions, each over some numbers of worker processes: how many steps per second the workers
give, beside Gymnasium's own vector environment (one process for each environment); how many the host loop gives without
learning; and what share of its time it waits for environments while it learns. Medians of five, in turn.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import jax
import numpy as np
import tyro

from benchmarks.timing import machine, times
from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops import device
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import Options
from wmjax.types import HostEnv, Recipe, Stage

REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    env: str = "gym:CartPole-v1"
    agent: str = "dreamer_v3"  # with its preset `small`
    workers: tuple[int, ...] = (1, 2, 4)
    num_envs: int = 16
    steps: int = 500  # of every environment
    out: Path | None = None  # write the rows and the machine here, as JSON


def median_rate(run: Callable[[], object], steps: int) -> float:
    """Environment steps per second."""
    return statistics.median(steps / seconds for seconds in times(run, REPEATS))


def gymnasium_rate(args: Args) -> float:
    """Of Gymnasium's own vector environment, with random actions that were drawn before."""
    make = lambda: gymnasium.make(args.env.partition(":")[2])
    envs = gymnasium.vector.AsyncVectorEnv([make] * args.num_envs, context="spawn")
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(args.steps)]
    rate = median_rate(lambda: [envs.step(action) for action in actions], args.steps * args.num_envs)
    envs.close()
    return rate


def workers_rate(args: Args, env: HostEnv, workers: int) -> float:
    """Of our workers alone, with one action."""
    envs = env.start(args.num_envs, workers=workers)
    envs.reset([[0, i] for i in range(args.num_envs)])
    native = np.asarray(jax.vmap(env.native)(np.zeros((args.num_envs, *_action_shape(env)), np.float32)))

    def run() -> None:
        for _ in range(args.steps):
            envs.send(native)
            envs.receive()

    rate = median_rate(run, args.steps * args.num_envs)
    envs.close()
    return rate


def _action_shape(env: HostEnv) -> tuple[int, ...]:
    return (env.spec.action.n,) if hasattr(env.spec.action, "n") else env.spec.action.shape


def loop_rate(args: Args, env: HostEnv, workers: int) -> float:
    """Of the host loop that acts at random, fills replay and learns nothing."""
    agent = _agent(args, env)
    stage = Stage("collect", args.steps, 1, None)
    agent = agent._replace(recipe=Recipe(args.num_envs, agent.recipe.replay_capacity, (stage,)))
    loop = HostLoop(agent, env, options=Options(workers=workers))
    state = loop.init(jax.random.key(0))
    run_stage = loop.compile_stage(stage)
    state, _ = run_stage(state, 2)
    rate = median_rate(lambda: run_stage(state, args.steps), args.steps * args.num_envs)
    loop.close()
    return rate


def waiting(args: Args, env: HostEnv, workers: int) -> dict[str, float]:
    """Shares of the time of the host loop that learns, by what it waited for, and its steps per second."""
    agent = _agent(args, env)
    loop = HostLoop(agent, env, options=Options(workers=workers))
    state = loop.init(jax.random.key(0))
    *before, last = agent.recipe.stages
    for stage in before:
        state, _ = loop.compile_stage(stage)(state, stage.iterations)
        state = device.next_stage(state)
    run_stage = loop.compile_stage(last)
    state, _ = run_stage(state, 3)
    iterations, start = max(1, 100 // last.collect), time.perf_counter()
    state, metrics = run_stage(state, iterations)
    seconds = time.perf_counter() - start
    loop.close()
    shares = {name: float(metrics[f"time/{name}"]) for name in ("envs", "device", "replay")}
    return {"rate": iterations * last.collect * args.num_envs / seconds} | shares


def _agent(args: Args, env: HostEnv):
    config, _ = presets.resolve(args.agent, "small", None, {"num_envs": args.num_envs})
    return AGENTS[args.agent][1](env.spec, config)


def main() -> None:
    """Runs all and prints rows as they come."""
    args = tyro.cli(Args)
    env = agent_actions(make_env(args.env))
    rows = [{"name": "gymnasium.vector", "workers": args.num_envs, "rate": gymnasium_rate(args)}]
    print(f"{args.env}, {args.num_envs} environments: gymnasium.vector {rows[0]['rate']:.0f} steps/s", flush=True)
    for workers in args.workers:
        row = {"workers": workers, "rate": workers_rate(args, env, workers)}
        row |= {"loop": loop_rate(args, env, workers), "learning": waiting(args, env, workers)}
        rows.append(row)
        learning = "  ".join(f"{name} {value:.3g}" for name, value in row["learning"].items())
        print(f"{workers} workers: {row['rate']:.0f} steps/s, loop without learning {row['loop']:.0f}; {learning}")
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), "env": args.env, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
