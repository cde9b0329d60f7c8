"""Resident memory of a run over many updates: `python -m benchmarks.memory [--env NAME]` writes a JSON and a plot.

The run is a process of its own that saves and evaluates all the time; it is small, so that its updates are many. Linux.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import tyro

from wmjax.loops.report import read_metrics

# One update per step of the environments.
SIZES = dict(
    deter=8, hidden=8, stoch=2, classes=4, units=8, blocks=1, bins=5, stem="patch", length=4, batch_size=2, num_envs=2,
    train_ratio=8.0, prefill=16, horizon=3, imagine_last=0, replay_capacity=4096, actor_layers=1, critic_layers=1,
    prior_layers=1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    env: str = "probe:act_obs"  # or one on the host, such as gym:CartPole-v1
    steps: int = 20_000  # env steps, which are about as many updates
    checkpoint_seconds: float = 1.0  # between checkpoints
    evaluations: int = 10
    name: str = "memory"  # of the two files
    out: Path = Path("benchmarks/results")


def resident(pid: int) -> float | None:
    """Resident memory of a process in MB; None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    return int(sizes[0]) / 1024 if sizes else None


def resident_workers(pid: int) -> float:
    """Resident memory of the processes that a process has started, in MB; what they share counts for each."""
    try:
        pids = [p for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except OSError:
        return 0.0
    return sum((resident(int(p)) or 0.0) + resident_workers(int(p)) for p in pids)


def watch(args: Args, run: Path) -> list[tuple[float, float, float]]:
    """(updates so far, MB, MB of its workers) of a training run, twice a second."""
    every = args.steps // args.evaluations if args.evaluations else 2 * args.steps
    often = ["--eval-every", every, "--checkpoint-seconds", args.checkpoint_seconds]
    options = ["--env", args.env, "--action-repeat", 1, "--steps", args.steps, *often]
    fields = [word for name, value in SIZES.items() for word in (f"--agent.{name}", value)]
    command = [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", *options, "--out", run, *fields]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    points = []
    while process.poll() is None:
        megabytes = resident(process.pid)
        lines = read_metrics(run)
        if lines and megabytes is not None:
            points.append((lines[-1]["updates"], megabytes, resident_workers(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"training ended with {process.returncode}")
    return points


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        points = watch(args, Path(folder) / "run")
    updates, megabytes, workers = zip(*points, strict=True)
    args.out.mkdir(parents=True, exist_ok=True)
    series = {"updates": updates, "resident_mb": megabytes, "workers_mb": workers}
    (args.out / f"{args.name}.json").write_text(json.dumps(series) + "\n")
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(updates, megabytes, label="the run")
    if max(workers):
        axes.plot(updates, workers, label="its workers, together")
        axes.legend(loc="lower right")
    axes.set(xlabel="updates", ylabel="resident memory, MB", ylim=(0, None))
    figure.savefig(args.out / f"{args.name}.png", dpi=120)
    learning = [mb for n, mb, _ in points if n]
    print(f"{updates[-1]:,} updates: {learning[0]:.0f} MB after the first, {max(learning):.0f} MB at most")


if __name__ == "__main__":
    main(tyro.cli(Args))
