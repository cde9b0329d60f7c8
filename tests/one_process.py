"""Trains a tiny run as one of several processes: `python -m tests.one_process '{"coordinator": ..., ...}'`.

Started by `test_distributed.py`, for a process can join others only before JAX starts. Prints what the tests compare.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as the command line does, before JAX starts

import jax
import numpy as np

import wmjax
from tests.envs import gymnasium_envs
from tests.test_conformance import ROWS
from wmjax import distributed
from wmjax.agents.world_models import EvolveConfig
from wmjax.loops import checkpoint, parallel
from wmjax.replay import host as replays
from wmjax.types import RunError, UsageError

MADE = "made:"  # and the name of an environment in `gymnasium_envs`
# Twenty updates or more of each agent, with sizes that four devices share.
DREAMER = dict(num_envs=8, batch_size=8, replay_capacity=512, prefill=64)
RUNS = {
    "dreamer_v1": (240, DREAMER | dict(train_every=16, train_steps=2, pretrain=0)),
    "dreamer_v2": (240, DREAMER | dict(train_every=16, train_steps=2, pretrain=0)),
    # Without bins, of which a mean over few is mostly rounding: the outer ones are at 5e8.
    "dreamer_v3": (240, DREAMER | dict(train_ratio=8.0, reward_head="symlog_mse", critic_head="symlog_mse")),
    "iris": (
        320,
        dict(
            num_envs=8, collect=4, tokenizer_updates=4, world_model_updates=4, actor_critic_updates=4,
            tokenizer_batch=8, world_model_batch=8, actor_critic_batch=8, replay_capacity=512, tokenizer_after=1,
            world_model_after=2, actor_critic_after=3,
        ),
    ),
    "world_models": (
        None,
        dict(
            collection="random", num_envs=8, collect_steps=128, replay_capacity=128, vision_batch_size=8,
            memory_batch_size=8, vision_updates=20, memory_updates=20,
            evolve=EvolveConfig(
                where="env", population=8, rollouts=2, generations=2, mean_every=2, mean_rollouts=8, starts=32,
            ),
        ),
    ),
}  # fmt: skip


def main(asked: dict) -> None:
    name, out, told, calls, env = (asked.pop(name, {}) for name in ("agent", "out", "train", "calls_back", "env"))
    replays.CHUNK_BYTES = asked.pop("chunk_bytes", replays.CHUNK_BYTES)
    distributed.connect(**asked)
    env = getattr(gymnasium_envs, env.removeprefix(MADE)) if env and env.startswith(MADE) else env
    steps, changes = RUNS[name]
    config = dataclasses.replace(ROWS[name].config, **changes)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    env_args = {} if env or name == "world_models" else {"image_size": 16}
    how = dict(steps=steps, eval_every=80, devices=len(jax.devices()), seed=5) | env_args | fields | told
    whole = lambda run: all(x.is_fully_addressable for x in jax.tree.leaves(run.state.variables))
    callback = (lambda metrics, run: print("called back", whole(run), metrics["step"])) if calls else None
    run = wmjax.train(name, env or "catch", out=out, callback=callback, **how)
    leaves = checkpoint.paths(run.state.variables)
    said = {path: np.asarray(x).tobytes() for path, x in leaves.items() if not checkpoint._is_key(x)}
    print("digest", checkpoint.digest({path: np.asarray(x) for path, x in leaves.items() if path in said}), flush=True)
    if distributed.leads():
        np.savez(Path(out) / "variables.npz", **{path: np.asarray(leaves[path]) for path in said})
    assert parallel.default_devices() == (1 if distributed.count() == 1 else len(jax.devices()))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UsageError as error:
        print(f"usage: {error}", file=sys.stderr)
        sys.exit(distributed.leave(2))
    except RunError as error:
        print(f"run: {error}", file=sys.stderr)
        sys.exit(distributed.leave(1))
