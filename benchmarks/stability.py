"""Whether an agent keeps what it has learned, and what goes first if it does not.

    python -m benchmarks.stability --agent iris --steps 153600 --out RUN [--fields '{"replay_capacity": 50000}']
    python -m benchmarks.stability --draw FILE.png --out RUN [RUN ...]

Trains on `catch`. Beside the periodic evaluations it asks the world model about episodes of random play that it never
learns from: which reward it expects of the last action of those that are missed and of those that are caught, and how
well it predicts the next frame. What is found is kept in RUN/stability.jsonl. A run that is there goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import wmjax
from wmjax.loops.report import read_metrics
from wmjax.loops.rollout import Position, random_act, rollout
from wmjax.ops import noise
from wmjax.types import Agent, Array, Env, PyTree

ENV, EPISODES, STEPS, EVERY = "catch", 256, 10, 2048  # STEPS: records of an episode of catch
KEY = 0x57AB1E
FILE = "stability.jsonl"


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    out: tuple[Path, ...]  # the run folder; to draw: one or more
    agent: str = "iris"
    seed: int = 0
    steps: int | None = None  # the preset's budget by default
    fields: str = "{}"  # of the agent's configuration, as JSON
    draw: Path | None = None  # write this picture of runs that are there


def make_probe(agent: Agent, env: Env) -> Callable[[PyTree], dict[str, Array]]:
    """A compiled function of an agent's variables: what the world model knows of random play, as float32 scalars."""
    key_reset, key_act, key_model = jax.random.split(jax.random.key(KEY), 3)

    def probe(variables: PyTree) -> dict[str, Array]:
        state, first = jax.vmap(env.reset)(jax.random.split(key_reset, EPISODES))
        _, records = rollout(
            partial(random_act(agent, env.spec), explore=True),
            env,
            variables,
            key_act,
            Position(state, first, agent.act_carry(variables, EPISODES)),
            STEPS,
        )
        step, action = records.step, records.action
        before = jnp.concatenate([jnp.zeros_like(action[:1]), action[:-1]])
        embed = agent.model.encode(variables, step.obs)
        start = agent.model.init_state(variables, EPISODES)

        def follow(state, inputs):
            """Filters a record, and then predicts what its action leads to."""
            t, previous, embed, is_first, action = inputs
            keys = noise.split(noise.fold_in(key_model, t), 3)
            state = agent.model.observe(variables, keys[0], state, previous, embed, is_first)
            seen = agent.model.decode(variables, state)["image"]
            ahead = agent.model.imagine(variables, keys[1], state, action)
            return state, (seen, agent.model.decode(variables, ahead)["image"], *agent.model.predict(variables, ahead))

        inputs = jnp.arange(STEPS), before, embed, step.is_first, action
        _, (seen, ahead, reward, _) = jax.lax.scan(follow, start, inputs)
        error = lambda a, b: jnp.mean(((a - b.astype(jnp.float32)) / 255) ** 2)
        missed, caught = step.reward[1:] < 0, step.reward[1:] > 0
        return {
            "reward_if_missed": jnp.mean(reward[:-1], where=missed),
            "reward_if_caught": jnp.mean(reward[:-1], where=caught),
            "reconstruction": error(seen, step.obs["image"]),
            "next_frame": error(ahead[:-1], step.obs["image"][1:]),
        }

    return jax.jit(probe)


def train(args: Args) -> None:
    """Trains, and appends a line of what the probe says every `EVERY` env steps."""
    out, probe, last = args.out[0], [], [-EVERY]

    def ask(metrics: dict[str, Any], run: wmjax.Run) -> None:
        step = metrics["step"]
        if step // EVERY == last[0] // EVERY:
            return
        last[0] = step
        if not probe:
            probe.append(make_probe(run.agent, run.env))
        found = {name: float(value) for name, value in probe[0](run.state.variables).items()}
        with (out / FILE).open("a") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")

    resume = (out / "config.json").exists()
    fields = {} if resume else json.loads(args.fields)
    wmjax.train(
        args.agent,
        ENV,
        seed=args.seed,
        steps=args.steps,
        eval_every=4096,
        out=out,
        resume=resume,
        callback=ask,
        **fields,
    )


def draw(args: Args) -> None:
    """A row of panels for each run: return, what the model is like, how well it predicts, the actor's entropy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(args.out), 4, figsize=(14, 2.6 * len(args.out)), squeeze=False, sharex=True)
    for row, path in zip(axes, args.out, strict=True):
        lines, config = read_metrics(path), json.loads((path / "config.json").read_text())
        series = partial(_series, lines)
        row[0].plot(*series("episode/return"), color="0.7", label="collected")
        row[0].plot(*series("eval/return"), color="C0", label="evaluated")
        row[0].set_ylabel(f"return, seed {config['seed']}")
        (_of_probe if (path / FILE).exists() else _of_tokenizer)(row, path, series)
        entropy = next((name for x in lines for name in x if name.endswith("policy_entropy")), "")
        row[3].plot(*series(entropy), color="C5", label="entropy of the policy")
        row[3].plot(*series(entropy.replace("policy_entropy", "imagined_reward")), color="C6", label="imagined reward")
        for axis in row:
            axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("env steps")
    figure.tight_layout()
    figure.savefig(args.draw, dpi=110)
    print(f"wrote {args.draw}")


def _of_probe(row: Any, path: Path, series: Callable) -> None:
    """What `train` wrote down."""
    del series
    found = [json.loads(line) for line in (path / FILE).read_text().splitlines()]
    for name, color in (("reward_if_missed", "C3"), ("reward_if_caught", "C2")):
        row[1].plot([x["step"] for x in found], [x[name] for x in found], color, label=name.replace("_", " "))
    row[1].set_ylabel("expected reward,\nrandom play")
    for name, color in (("reconstruction", "C1"), ("next_frame", "C4")):
        row[2].semilogy([x["step"] for x in found], [x[name] for x in found], color, label=name.replace("_", " "))
    row[2].set_ylabel("squared error,\nrandom play")


def _of_tokenizer(row: Any, path: Path, series: Callable) -> None:
    """Of any run of IRIS, from its metrics."""
    del path
    for name, color in (("recon", "C1"), ("commit", "C3")):
        row[1].semilogy(*series(f"tokenizer/loss/{name}"), color, label=name)
    row[1].set_ylabel("loss of the tokenizer")
    row[2].semilogy(*series("world_model/loss/frame"), "C4", label="next token")
    row[2].set_ylabel("loss of the\nworld model, nats")


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return tuple(np.array(known).reshape(-1, 2).T)


if __name__ == "__main__":
    parsed = tyro.cli(Args, description=__doc__)
    train(parsed) if parsed.draw is None else draw(parsed)
