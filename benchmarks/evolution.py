"""Times CMA-ES beside pycma, and evolution in dreams and in `racing`: `python benchmarks/evolution.py [--only WORD]`.

Needs the extra `test` for pycma. Let nothing else run. Every time is the median of five or more.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.speed import Args, Table, machine, median_time
from wmjax import evolution
from wmjax.evolution import StrategyConfig


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


def main(args: Args) -> None:
    table = Table(args.only)
    strategies(table)
    report = {"machine": machine(), "rows": table.rows}
    print(json.dumps(report["machine"], indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
