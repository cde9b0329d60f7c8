"""Times sampling from large rings: `python benchmarks/replay.py [--rows N] [--num-envs N] [--out FILE.json]`.

Let nothing else run. Every form that the agents' recipes sample by, on the device's replay and on the host's, and
adding one row to a ring that is sampled by all of them. Records are small, so that what counts is where a batch comes
from. Medians of twenty, after two.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks.speed import machine
from wmjax.replay import device as replays
from wmjax.replay.device import Record
from wmjax.replay.host import HostReplay
from wmjax.types import Sampling, TimeStep

BATCH, EPISODE = 50, 500  # windows; rows of an episode, about
FORMS = {
    "uniform": Sampling(50, context=1),
    "online": Sampling(50, context=1, online=True),
    "in order": Sampling(50, context=1, over="in_order"),
    "within episodes": Sampling(32, context=1, within_episode=True),
    "episodes, then within one": Sampling(50, context=1, over="episodes", within_episode=True),
    "episodes, then within one, ends more often": Sampling(
        50, over="episodes", within_episode=True, prioritize_ends=True
    ),
    "first frames": Sampling(1, starts="first"),
    "episodes, padded right": Sampling(21, over="episodes", pad="right"),
    "episodes, padded left": Sampling(1, context=20, over="episodes", pad="left"),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    rows: int = 2_000_000
    num_envs: tuple[int, ...] = (1, 16)  # the ring is filled for each
    out: Path | None = None  # write the times and the machine here, as JSON


def records(first: int, steps: int, num_envs: int) -> Record:
    """Rows `[steps, num_envs]` of episodes that are shorter in each environment, and begin elsewhere."""
    row, env = np.arange(first, first + steps)[:, None], np.arange(num_envs)
    place, length = row + 37 * env, np.maximum(EPISODE - 7 * env, 60)
    begins, ends = place % length == 0, place % length == length - 1
    one = np.zeros((steps, num_envs, 1), np.float32)
    return Record(TimeStep({"vector": one}, one[..., 0], begins, ends, np.zeros_like(ends)), one, ())


def median_ms(call: Callable[[int], object], repeats: int = 22) -> float:
    """Of one call, by number; the first two are not counted."""
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(number))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def filled(rows: int, num_envs: int, samplings: tuple[Sampling, ...]) -> replays.Replay:
    """A ring that has been full for some time."""
    add, steps = jax.jit(replays.add, donate_argnums=0), min(rows, 10_000)
    replay = replays.init(jax.tree.map(lambda x: x[0], records(0, 1, num_envs)), num_envs, rows * num_envs, samplings)
    for first in range(0, rows + rows // 3, steps):
        replay = add(replay, records(first, steps, num_envs))
    return replay


def on_device(rows: int, num_envs: int) -> dict[str, float]:
    """Milliseconds by form."""
    replay, key = filled(rows, num_envs, tuple(FORMS.values())), jax.random.key(0)
    sample = jax.jit(replays.sample, static_argnums=(2, 3), donate_argnums=0)
    add, row, times = jax.jit(replays.add, donate_argnums=0), records(0, 1, num_envs), {}

    def draw(sampling: Sampling, number: int) -> object:
        nonlocal replay
        replay, batch, _ = sample(replay, jax.random.fold_in(key, number), sampling, BATCH)
        return batch

    def extend(_: int) -> object:
        nonlocal replay
        replay = add(replay, row)
        return replay.added

    times["add one row"] = median_ms(extend)
    return times | {name: median_ms(lambda i, how=how: draw(how, i)) for name, how in FORMS.items()}


def on_host(rows: int, num_envs: int) -> dict[str, float]:
    """Milliseconds by form: `draw`, which decides where a batch comes from."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), records(0, 1, num_envs))
    replay = HostReplay(example, num_envs, rows * num_envs, tuple(FORMS.values()))
    steps, row, key = min(rows, 10_000), records(0, 1, num_envs), jax.random.key(0)
    for first in range(0, rows + rows // 3, steps):
        replay.add(records(first, steps, num_envs))
    times = {"add one row": median_ms(lambda _: replay.add(row))}
    for name, how in FORMS.items():
        times[name] = median_ms(lambda i, how=how: replay.draw(jax.random.fold_in(key, i), how, BATCH)[1])
    replay.close()
    return times


def main(args: Args) -> None:
    report = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "rows": args.rows, "batch": BATCH}
    report["ms"] = {}
    for place, measure in (("device", on_device), ("host", on_host)):
        for num_envs in args.num_envs:
            found = report["ms"][f"{place}, {num_envs} environments"] = measure(args.rows, num_envs)
            for name, value in found.items():
                print(f"{place:6s} {num_envs:3d} envs  {name:45s} {value:9.3f} ms", flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
