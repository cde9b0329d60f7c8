"""Run folders as training leaves them, without training."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from wmjax import presets
from wmjax.fields import replace
from wmjax.scores import keep, record, summarize


def description(agent, env="catch", *, seed=0, seeds=1, steps=1000, preset="small", **changes):
    config = replace(presets.resolve(agent, preset)[0], changes)
    return {
        "version": "0.1.0", "agent": agent, "env": env, "preset": preset, "seed": seed, "seeds": seeds, "devices": 1,
        "parallel": None, "env_args": {}, "image_size": None, "action_repeat": 1, "steps": steps,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "about": {"parameters": 1234, "devices": ["cpu"], "versions": {"jax": "0.10"}, "command": "wmjax train"},
    }  # fmt: skip


def write_run(folder, agent, evaluations, final, *, seconds=100.0, **about):
    """A run of one seed, or of several where `final` is a list: `evaluations` [(step, return)] of each, and its end."""
    folder, several = Path(folder), isinstance(final, list)
    said = description(agent, seeds=len(final) if several else 1, **about)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(said))
    first = said["seed"]
    own = (
        [(folder / f"seed-{first + i}", first + i, x) for i, x in enumerate(final)]
        if several
        else [(folder, first, final)]
    )
    steps = said["steps"]
    lines = [
        {"step": step, "updates": step // 10, "time": seconds * step / steps, "stage": "train", "iteration": step,
         "steps_per_second": 20.0, "updates_per_second": 2.0, **({} if value is None else {"eval/return": value})}
        for step, value in evaluations
    ]  # fmt: skip
    for path, seed, mean in {folder: (folder, first, None), **{path: (path, *rest) for path, *rest in own}}.values():
        path.mkdir(exist_ok=True)
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if mean is not None:
            scores = summarize(np.full(4, mean), [9] * 4, [False] * 4)
            about = dict(env_args={}, action=said["config"]["eval_action"], seed=seed, step=lines[-1]["step"])
            keep({path: record(scores, env=said["env"], which="latest", max_steps=None, **about)})
    return folder
