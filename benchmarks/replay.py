"""Times sampling from large rings: `python -m benchmarks.replay [--rows N] [--num-envs N] [--out FILE]`.

Let nothing else run. Every form that the agents' recipes sample by, on the device's replay and on the host's, and
adding one row to a ring that is sampled by all of them. Records are small, so that what counts is where a batch comes
from. Medians of twenty.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks.timing import Table, machine, median_time
from wmjax.replay import device as replays
from wmjax.replay.device import Record
from wmjax.replay.host import HostReplay
from wmjax.types import Sampling, TimeStep

BATCH, EPISODE = 50, 500  # windows; rows of an episode, about
REPEATS, STEPS = 20, 10_000  # of what is timed; rows that are added at once
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


def filled(rows: int, num_envs: int, samplings: tuple[Sampling, ...]) -> replays.Replay:
    """A ring that has been full for some time."""
    add, steps = jax.jit(replays.add, donate_argnums=0), min(rows, STEPS)
    replay = replays.init(jax.tree.map(lambda x: x[0], records(0, 1, num_envs)), num_envs, rows * num_envs, samplings)
    for first in range(0, rows + rows // 3, steps):
        replay = add(replay, records(first, steps, num_envs))
    return replay


def on_device(table: Table, rows: int, num_envs: int) -> None:
    """What adding and sampling take, by form."""
    replay, keys = filled(rows, num_envs, tuple(FORMS.values())), map(jax.random.key, itertools.count())
    sample = jax.jit(replays.sample, static_argnums=(2, 3), donate_argnums=0)
    add, row = jax.jit(replays.add, donate_argnums=0), records(0, 1, num_envs)

    def draw(sampling: Sampling) -> object:
        nonlocal replay
        replay, batch, _ = sample(replay, next(keys), sampling, BATCH)
        return batch

    def extend() -> object:
        nonlocal replay
        replay = add(replay, row)
        return replay.added

    table.add(f"device, {num_envs} environments: add one row", 1e3 * median_time(extend, REPEATS), "ms")
    for name, how in FORMS.items():
        milliseconds = 1e3 * median_time(lambda how=how: draw(how), REPEATS)
        table.add(f"device, {num_envs} environments: {name}", milliseconds, "ms")


def on_host(table: Table, rows: int, num_envs: int) -> None:
    """The same for `HostReplay`; of sampling `draw`, which decides where a batch comes from."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), records(0, 1, num_envs))
    replay = HostReplay(example, num_envs, rows * num_envs, tuple(FORMS.values()))
    steps, row, keys = min(rows, STEPS), records(0, 1, num_envs), map(jax.random.key, itertools.count())
    for first in range(0, rows + rows // 3, steps):
        replay.add(records(first, steps, num_envs))
    milliseconds = 1e3 * median_time(lambda: replay.add(row), REPEATS)
    table.add(f"host, {num_envs} environments: add one row", milliseconds, "ms")
    for name, how in FORMS.items():
        milliseconds = 1e3 * median_time(lambda how=how: replay.draw(next(keys), how, BATCH)[1], REPEATS)
        table.add(f"host, {num_envs} environments: {name}", milliseconds, "ms")
    replay.close()


def main(args: Args) -> None:
    table = Table("")
    for measure in (on_device, on_host):
        for num_envs in args.num_envs:
            measure(table, args.rows, num_envs)
    if args.out:
        report = {"machine": machine(), "rows": table.rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
