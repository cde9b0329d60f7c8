"""Times CMA-ES beside pycma, and evolution in dreams and in `racing`: `python -m benchmarks.evolution [--only WORD]`.

Needs the extra `test` for pycma. Let nothing else run. Every time is the median of five or more.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.speed import Args
from benchmarks.timing import Table, machine, median_time
from wmjax import evolution, presets
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.evolution import StrategyConfig
from wmjax.types import Agent, EnvSpec, TimeStep, Trajectory

POPULATIONS, ROLLOUTS = (16, 32, 64, 128, 256), (4, 16)


def pycma_generation(n: int, population: int, repeats: int) -> float:
    """Seconds of ask + tell of pycma, with a fitness that costs nothing."""
    import cma

    es = cma.CMAEvolutionStrategy(n * [0.0], 0.1, {"popsize": population, "verbose": -9, "seed": 1})
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        candidates = es.ask()
        costs = np.random.default_rng(0).normal(size=population)
        es.tell(candidates, list(costs))
        times.append(time.perf_counter() - start)
    return statistics.mean(times[2:])  # the mean: its eigendecomposition comes in some generations only


def ask_and_tell(kind: str, n: int, population: int, generations: int, runs: int = 1) -> float:
    """Seconds of ask + tell of all runs together, averaged over compiled generations."""
    strategy = evolution.make_strategy(StrategyConfig(n, population, kind))
    state = jax.jit(jax.vmap(lambda key: strategy.init(key, jnp.zeros(n))))(jax.random.split(jax.random.key(0), runs))
    fitness = jax.random.normal(jax.random.key(1), (population,))

    def generation(state, key):
        key_ask, key_tell = jax.random.split(key)
        candidates, state = strategy.ask(key_ask, state)
        return strategy.tell(key_tell, state, candidates, fitness), None

    def run(state, key):
        return jax.lax.scan(generation, state, jax.random.split(key, generations))[0]

    if runs == 1:  # a `vmap` of one would decompose the covariance in every generation
        run, state = jax.jit(run), jax.tree.map(lambda x: x[0], state)
        key = jax.random.key(2)
    else:
        run, key = jax.jit(jax.vmap(run)), jax.random.split(jax.random.key(2), runs)
    return median_time(lambda: run(state, key)) / generations


def strategies(table: Table) -> None:
    both = ("cma_es", "sep_cma_es")
    for n, kinds, repeats in ((99, both, 60), (867, both, 14), (5000, ("sep_cma_es",), 10)):
        for kind in kinds:
            name = f"ask + tell, {kind}, n = {n}, population 64"
            if table.wants(name):
                table.add(name, 1e3 * ask_and_tell(kind, n, 64, 10 if n > 99 else 50), "ms")
        name = f"ask + tell, pycma, n = {n}, population 64"
        if table.wants(name) and n < 5000:
            table.add(name, 1e3 * pycma_generation(n, 64, repeats), "ms")
    for runs in (1, 4, 16):
        name = f"ask + tell, cma_es, n = 99, population 16, {runs} runs"
        if table.wants(name):
            table.add(name, 1e3 * ask_and_tell("cma_es", 99, 16, 50, runs), "ms")


def noise_batch(agent: Agent, spec: EnvSpec, length: int, batch: int) -> Trajectory:
    """Records of the right shapes, with latents."""
    key = jax.random.key(0)
    image = jax.random.randint(key, (length, batch, *spec.obs["image"].shape), 0, 256).astype(jnp.uint8)
    false = jnp.zeros((length, batch), bool)
    step = TimeStep({"image": image}, jax.random.normal(key, (length, batch)), false, false, false)
    action = jax.random.uniform(key, (length, batch, *spec.action.shape), minval=-1)
    latent = jax.eval_shape(lambda: agent.recipe.stages[0].act((), key, agent.act_carry({}, batch), jax.tree.map(
        lambda x: x[0], step), explore=True))[2]  # fmt: skip
    latent = jax.tree.map(lambda x: jax.random.normal(key, (length, *x.shape)).astype(x.dtype), latent)
    return Trajectory(step, action, ~false, latent)


def updates(table: Table) -> None:
    """V on 100 pictures and M on 100 sequences of 32 steps, at the paper's sizes."""
    config = presets.resolve("world_models", "paper_car", None, {"memory_length": 32})[0]
    env = agent_actions(make_env("racing", image_size=64))
    agent = AGENTS["world_models"][1](env.spec, config)
    state = jax.jit(agent.init)(jax.random.key(0))
    for stage in agent.recipe.stages:
        for update in stage.updates:
            window = update.sampling.context + update.sampling.length
            name = f"world_models paper_car, {update.name}, {update.batch_size} x {update.sampling.length}"
            if update.name != "encode" and table.wants(name):
                batch = noise_batch(agent, env.spec, window, update.batch_size)
                run = jax.jit(lambda *a, fn=update.fn: fn(*a)[:2])
                table.add(name, 1e3 * median_time(lambda: run(state, jax.random.key(1), batch)), "ms")  # noqa: B023


def generation(where: str, population: int, rollouts: int, horizon: int = 100, **settings) -> tuple[Callable, tuple]:
    """A generation in dreams of the paper's M, or in `racing` with V and M as in `small`; and its arguments."""
    search = dict(where=where, population=population, rollouts=rollouts, horizon=horizon, starts=1024)
    settings = {"evolve": search, "reward_head": "mse"} | settings
    if where == "env":
        settings = {"depth": 8, "latent": 16, "hidden": 64} | settings
    config = presets.resolve("world_models", "paper_car", None, settings)[0]
    env = agent_actions(make_env("racing", image_size=64, action_repeat=4))
    agent = AGENTS["world_models"][1](env.spec, config)
    evolve = agent.recipe.stages[-1].evolve
    state = jax.jit(agent.init)(jax.random.key(0))
    batch = noise_batch(agent, env.spec, evolve.sampling.length, evolve.batch_size)
    play = functools.partial(evolution.player, agent, env, evolve)
    run = lambda state, key, batch: evolution.generate(evolve, play(batch), state, key)
    return run, (state, jax.random.key(1), batch)


def generations(table: Table) -> None:
    """Generations in dreams, for several sizes of population, and in `racing` itself."""
    sizes = [("dream", population, rollouts) for rollouts in ROLLOUTS for population in POPULATIONS]
    for where, population, rollouts in [*sizes, ("env", 64, 4)]:
        name = f"generation in {where}, {population} x {rollouts} x 100 steps"
        if not table.wants(name):
            continue
        function, arguments = generation(where, population, rollouts)
        run = jax.jit(function)
        seconds = median_time(lambda: run(*arguments))  # noqa: B023
        table.add(
            name, population * rollouts * 100 / seconds, "steps/s", generations_per_minute=60 / seconds, seconds=seconds
        )
        table.rows[-1] |= dict(where=where, population=population, rollouts=rollouts)


def draw(rows: list[dict], path: Path) -> None:
    """Seconds of a generation in dreams over the episodes in it, with the line of equal cost for each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="population x rollouts", ylabel="seconds")
    dreams = [row for row in rows if row.get("where") == "dream"]
    for rollouts in ROLLOUTS:
        some = [row for row in dreams if row["rollouts"] == rollouts]
        axes.plot(
            [r["population"] * rollouts for r in some], [r["seconds"] for r in some], "o-", label=f"{rollouts} rollouts"
        )
    episodes = sorted(row["population"] * row["rollouts"] for row in dreams)
    most = max(dreams, key=lambda row: row["population"] * row["rollouts"])
    each = most["seconds"] / (most["population"] * most["rollouts"])
    axes.plot(episodes, [each * n for n in episodes], "k:", label="linear")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    table = Table(args.only)
    strategies(table)
    updates(table)
    generations(table)
    report = {"machine": machine(), "rows": table.rows}
    print(json.dumps(report["machine"], indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
        if any(row.get("where") == "dream" for row in table.rows):
            draw(table.rows, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args))
