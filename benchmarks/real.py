"""Runs agents on real environments: `python -m benchmarks.real [--only NAME ...] [--out FILE.json]`.

Each trains with preset `small` for half of `seconds`, gets SIGTERM, is resumed, trains for the other half, and gets
SIGTERM again; then its dream and an episode are written, and it is evaluated. Let nothing else run. A run that ends
with an error ends this too.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from wmjax.loops.report import read_metrics

MUCH = ("--steps", "100000000")
# World Models trains by updates and generations, not steps; those of `small` would take longer than ten minutes here.
SHORT = (
    "--agent.collect_steps 4096 --agent.vision_updates 1000 --agent.memory_updates 600 --agent.evolve.population 16 "
    "--agent.evolve.rollouts 1 --agent.evolve.mean_every 1 --agent.evolve.mean_rollouts 16"
).split()


class Task(NamedTuple):
    """What is trained, and in what its world model's progress is seen."""

    agent: str
    env: str
    budget: float  # frames of the paper's runs
    losses: tuple[str, ...]
    flags: tuple[str, ...] = MUCH


V1_V2, V3 = ("train/loss/model",), ("train/loss",)
WORLD_MODELS, IRIS = ("vision/loss", "memory/loss"), ("tokenizer/loss", "world_model/loss")
DREAM = ("--agent.evolve.where", "dream")
TASKS = {
    "dreamer_v3_pong": Task("dreamer_v3", "atari:Pong", 400e3, V3),
    "dreamer_v3_cartpole": Task("dreamer_v3", "dmc:cartpole_swingup", 1e6, V3),
    "dreamer_v3_cartpole_proprio": Task("dreamer_v3", "dmc_proprio:cartpole_swingup", 500e3, V3),
    "dreamer_v3_crafter": Task("dreamer_v3", "crafter", 1e6, V3),
    "dreamer_v2_breakout": Task("dreamer_v2", "atari:Breakout", 200e6, V1_V2),
    "dreamer_v1_walker": Task("dreamer_v1", "dmc:walker_walk", 5e6, V1_V2),
    "iris_pong": Task("iris", "atari:Pong", 400e3, IRIS),
    "world_models_racing": Task("world_models", "gym:CarRacing-v3", 10e6, WORLD_MODELS, tuple(SHORT)),
    "world_models_doom": Task("world_models", "vizdoom:TakeCover", 10e6, WORLD_MODELS, DREAM),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    only: tuple[str, ...] = tuple(TASKS)
    seconds: int = 600  # of training, for each
    seed: int = 0
    episodes: int = 8
    runs: Path = Path("runs/real")  # their folders are made here
    out: Path = Path("benchmarks/results/real.json")  # rows of other runs in it are kept


def wmjax(*words: object, seconds: float | None = None) -> None:
    """Runs a command of wmjax; with `seconds`, until a SIGTERM then. Raises `SystemExit` if it fails."""
    process = subprocess.Popen([sys.executable, "-m", "wmjax.cli", *map(str, words)])
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"{' '.join(map(str, words))}: ended with {code}")


def summary(task: Task, run: Path) -> dict[str, Any]:
    """What the files of a run say of it."""
    lines = read_metrics(run)
    last, losses = lines[-1], {}
    for name in task.losses:
        values = [line[name] for line in lines if line.get(name) is not None]
        losses[name] = [values[0], values[-1]] if values else None
    learning = [line for line in lines if line["updates"]]
    dream, score = (json.loads((run / name).read_text()) for name in ("dream.json", "eval.json"))
    return {
        "command": " ".join(["wmjax train", task.agent, "--env", task.env, *task.flags]),
        "frames": last["step"],
        "budget": last["step"] / task.budget,
        "updates": last["updates"],
        "losses": losses,
        "stage": last["stage"],
        "waiting_for_envs": sum(line["time/envs"] for line in learning) / max(1, len(learning)),
        "restarts": max(line["envs/restarts"] for line in lines),
        "resident_gb": max(line["memory/resident_gb"] for line in lines),
        "eval": {name: value for name, value in score.items() if isinstance(value, (int, float))},
        "dream": {name: value for name, value in dream.items() if name != "count"},
        "pictures": sorted(path.name for path in run.glob("*.gif")),
    }


def main(args: Args) -> None:
    for name in args.only:
        task, run = TASKS[name], args.runs / name
        train = ["train", task.agent, "--env", task.env, "--seed", args.seed, "--out", run, *task.flags]
        wmjax(*train, seconds=args.seconds / 2)
        wmjax(*train, "--resume", seconds=args.seconds / 2)
        wmjax("dream", run)
        pixels = not task.env.startswith("dmc_proprio")
        wmjax("eval", run, "--episodes", args.episodes, *(["--video"] if pixels else []))
        rows = json.loads(args.out.read_text()) if args.out.exists() else {}
        rows[name] = summary(task, run)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
