"""Compiles and times rows of `benchmarks.work`, on request: `benchmarks.accelerator` starts this as a process.

A request is a line of JSON on standard input, the answer one on standard output; what else is printed goes to standard
error.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import launches
from benchmarks.timing import cpu_seconds, machine, times
from benchmarks.work import ROWS, Row, Work
from wmjax import arithmetic, cards

HIT = "/jax/compilation_cache/cache_hits"


def compile_row(row: Row, reduced: bool) -> tuple[Work, Callable, dict[str, Any]]:
    """A row's program, compiled, and what that took: seconds of preparing its arguments, tracing and compiling."""
    hits: list[str] = []
    listen = lambda event, **_: hits.append(event) if event == HIT else None
    start = time.perf_counter()
    work = row.make(reduced)
    jax.block_until_ready(work.arguments)
    prepared = time.perf_counter()
    program = work.function.trace(*work.arguments, *[1] * work.loops)
    lowered = program.lower()
    traced, cpu = time.perf_counter(), cpu_seconds()
    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    memory, counted = compiled.memory_analysis(), arithmetic.products(program.jaxpr)
    each = work.count if work.loops else 1  # updates of a call
    found = {
        "prepare_s": prepared - start, "trace_s": traced - prepared, "compile_s": time.perf_counter() - traced,
        "compile_cpu_s": cpu_seconds() - cpu, "compiled_before": bool(hits),
        "temp_mib": memory.temp_size_in_bytes / 2**20, "argument_mib": memory.argument_size_in_bytes / 2**20,
        "compute_dtype": getattr(work.config, "compute_dtype", None),
        "multiply_adds": arithmetic.multiply_adds(counted) / each, "peak_s": peak_seconds(counted),
    }  # fmt: skip
    if jax.default_backend() == "gpu":
        total = launches.total(launches.loops(launches.read_module(compiled.as_text()))[0]).total()
        found["launches"] = total / each
    return work, compiled, found


def peak_seconds(counted: Counter[arithmetic.Product]) -> float | None:
    """Of one call, if products ran at the card's peak and nothing else took time; None for a card that is not known."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    known = [card for name, card in cards.CARDS.items() if name.replace("-", "") in kind]
    if not known:
        return None
    card = max(known, key=lambda card: len(card.name))._replace(launch=0.0, bandwidth=math.inf)
    return cards.seconds(counted, card, 1.0)


def time_row(row: Row, reduced: bool, seconds: float) -> dict[str, Any]:
    """The median and the extremes of some measurements of a row, which take about so many seconds."""
    work, compiled, found = compile_row(row, reduced)
    state = work.arguments[0]

    def run(number: int) -> Any:
        nonlocal state
        if work.loops:
            state, out = compiled(state, number)
            return out
        return [compiled(*work.arguments) for _ in range(number)][-1]

    _, single = times(lambda: run(1), 2)
    number = 1 if reduced else max(1, min(1000, round(0.5 / single)))
    repeats = max(3, min(9, int(seconds / (number * single))))
    per_call = [taken / number for taken in times(lambda: run(number), repeats)]
    value = (lambda s: 1e3 * s / work.count) if work.unit == "ms" else lambda s: work.count / s
    values = sorted(map(value, per_call))
    found |= {"value": statistics.median(values), "low": values[0], "high": values[-1], "unit": work.unit}
    found |= {"measurements": repeats, "calls_of_each": number}
    if found["peak_s"] is not None:
        found["share_of_peak"] = found["peak_s"] / statistics.median(per_call)
    if not work.loops:  # each waited for, as where the result is needed at once
        found["waited_for"] = value(statistics.median(times(lambda: run(1), min(50, 1 + number))))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found | ({"peak_mib_so_far": peak / 2**20} if peak else {})


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for; {"error": text} where that fails."""
    rows = {row.name: row for row in ROWS}
    try:
        if request["do"] == "machine":
            memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
            precision = str(jax.config.jax_default_matmul_precision)
            return machine() | {"backend": jax.default_backend(), "memory_bytes": memory, "matmul_precision": precision}
        if request["do"] == "compile":
            return compile_row(rows[request["row"]], request["reduced"])[-1]
        return time_row(rows[request["row"]], request["reduced"], request["seconds"])
    except Exception as error:  # of whatever kind: the other rows go on
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"}
    finally:
        jax.clear_caches()
        gc.collect()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
