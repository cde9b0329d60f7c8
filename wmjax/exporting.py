"""What a run has learned, in one file that acts and dreams, with a card that says where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wmjax
from wmjax import checks, presets, weights
from wmjax.loops import checkpoint
from wmjax.loops.report import read_metrics
from wmjax.run import Run, load
from wmjax.run_folder import ONE
from wmjax.types import PyTree, UsageError

NORMAL_99 = 2.576  # standard deviations to either side that 99 of 100 draws lie within


def load_params(path: str | Path, *, seed: int | None = None, which: str = "latest", **how: Any) -> dict[str, PyTree]:
    """The parameters that an agent acts and dreams by: what its functions take as `params`.

    Args:
      path: a run folder, a file of `export`, or "pretrained:NAME".
      seed: of a run of several seeds, which one.
      which: "latest" or "best", of a run folder.
      how: further arguments of `load`, for a run folder whose environment is needed to read it.

    Returns:
      float32 arrays in nested dictionaries, by the names of the modules, such as `params["rssm"]["gru"]["kernel"]`; the
      same of a run and of what was exported of it in float32, bit for bit.

    Raises:
      UsageError: as `load`; the run has several seeds and none is chosen, or not this one.
    """
    file = weights.locate(checks.path("run", path))
    if file is None:
        return _acting(load(path, which=which, **how).of_seed(seed))
    if seed is not None or which != "latest" or how:
        raise UsageError(f"run: {str(path)!r} is a file, which holds one agent; leave out seed, which and env")
    return weights.load(weights.read(file))


def export(
    run: Run | str | Path,
    path: str | Path,
    *,
    dtype: str = "float32",
    seed: int | None = None,
    action: str | None = None,
    episodes: int | None = None,
    which: str = "latest",
    **how: Any,
) -> dict[str, Any]:
    """Writes what acts and dreams of a run to one file of safetensors, which `load` reads: no replay, no optimizer.

    Args:
      run: a run, or what `load` takes.
      path: of the file, which ends in .safetensors and is not there yet.
      dtype: "float32", which is exact, or "float16", half as large.
      seed: of a run of several seeds, which one.
      action: "sample" or "mode", how what is exported acts when it is evaluated; by default as the run does.
      episodes: to play with what is exported; what they come to is then in the card.
      which: "latest" or "best", of a run folder.
      how: further arguments of `load`.

    Returns:
      The card: `command`, `seed`, `steps`, `which`, `seconds` of training and the `device` they were spent on,
      `version`, `parameters`, `dtype`, `return` (None where nothing was played), and `digest`, which is checked when
      the file is read.

    Raises:
      UsageError: as `load`; the run has several seeds and none is chosen, or not this one; the dtype cannot hold a
        parameter; there is such a file already, or it cannot be written.
    """
    path, episodes = new_file(path), checks.optional("episodes", episodes)
    checks.choice("dtype", dtype, weights.DTYPES.values())
    whole = run if isinstance(run, Run) else load(run, which=which, **how)
    file = None if isinstance(run, Run) else weights.locate(run)
    run = whole.of_seed(seed)
    if run.planner is not None:
        raise UsageError("run: it acts by a planner, which no file has; the run that it was made of is valid")
    if action is not None:
        agent, _ = run.playing(0, None, action)
        run = dataclasses.replace(run, agent=agent, config=dataclasses.replace(run.config, eval_action=action))
    config = json.loads(json.dumps(dataclasses.asdict(run.config)))  # as `config.json` has it: tuples are lists
    params = weights.narrowed(_acting(run), dtype)
    card = {
        "command": _command(whole.description, config), "seed": run.seed, "steps": run.step, "which": run.which,
        "seconds": _seconds(run), "device": _device(run), "version": wmjax.__version__,
        "parameters": sum(x.size for x in checkpoint.paths(params).values()), "dtype": dtype, "return": None,
    }  # fmt: skip
    if file is not None:  # which knows what came before it
        before = weights.read(file).card
        card |= {name: before[name] for name in ("command", "seconds", "device", "version")}
    if episodes is not None:
        card["return"] = _played(run, params, episodes)
    description = {k: v for k, v in run.description.items() if k not in ("about", "part_of_seeds")}
    description |= ONE | {"config": config}
    if description.get("data"):
        description["data"] = {name: value for name, value in description["data"].items() if name != "path"}
    new_file(path)  # something may have come there while episodes were played
    try:
        return weights.write(path, params, description, card)
    except OSError as error:
        raise UsageError(f"file: {str(path)!r} cannot be written: {error.strerror}") from None


def new_file(path: str | Path, suffix: str = weights.SUFFIX, field: str = "file") -> Path:
    """A path to write to. Raises `UsageError` where it has another suffix, something is there, or no folder for it."""
    path = checks.path(field, path)
    if path.suffix != suffix or str(path).startswith(weights.PREFIX):
        raise UsageError(f"{field}: {str(path)!r} is not valid; a name that ends in {suffix} is")
    if path.exists() or path.is_symlink():
        raise UsageError(f"{field}: {str(path)!r} is there already; another name is valid")
    if not path.parent.is_dir():
        raise UsageError(f"{field}: {str(path)!r} cannot be written: the folder {str(path.parent)!r} does not exist")
    return path


def _acting(run: Run) -> dict[str, PyTree]:
    return {name: run.state.variables[name] for name in weights.acting(run.agent, run.env.spec)}


def _seconds(run: Run) -> float | None:
    """Of training, until the agent was as it is; None where no metrics say so."""
    try:
        times = [line.get("time") for line in read_metrics(run.path, say=lambda text: None) if line["step"] <= run.step]
    except (UsageError, OSError, KeyError, TypeError):
        return None
    return next((time for time in reversed(times) if isinstance(time, float | int)), None)


def _device(run: Run) -> str:
    """What it was trained on."""
    with contextlib.suppress(UsageError, KeyError, TypeError, IndexError):  # nobody has checked what is said there
        return checks.text("device", run.description["about"]["devices"][0])
    return "unknown"


def _played(run: Run, params: dict[str, PyTree], episodes: int) -> dict[str, Any]:
    """What so many episodes come to with the parameters as they are in the file.

    `interval` is where the mean return of as many other episodes falls 99 times out of 100, if these are many: that
    mean has the spread of this one, so theirs is √2 times as large. It is one point where all returns are equal, and
    None of a single episode, which shows no spread.
    """
    widened = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    state = run.state._replace(params=widened, opt_state={}, stats=(), non_trainable={})
    scores = dataclasses.replace(run, state=state, _acting=None).evaluate(episodes)
    interval = None
    if episodes > 1:
        spread = NORMAL_99 * math.sqrt(2 / (episodes - 1)) * scores.std  # which divides by `episodes`
        interval = [scores.mean - spread, scores.mean + spread]
    found = {"mean": scores.mean, "interval": interval, "std": scores.std, "iqm": scores.iqm}
    found |= {"ci95": list(scores.ci95), "episodes": episodes, "cut": scores.cut, "seed": 0}
    return found | {"action": run.config.eval_action}


def _command(description: Mapping[str, Any], config: dict[str, Any]) -> str:
    """The command that trains with the same settings and configuration, which says what is not the preset's."""
    from wmjax.comparison.results import changes_of

    d, data = description, description.get("data")
    if origin := d.get("origin"):
        return f"none: imported by wmjax import {d['agent']}, of {checks.show(origin.get('source'))[1:-1]}"
    if d.get("equations"):
        return f"none: from Python, by wmjax.train(..., equations=...) with {', '.join(d['equations'].values())}"
    words = ["wmjax", "train", d["agent"]] + (["--env", d["env"]] if d["env"] else [])
    _, settings = presets.resolve(d["agent"], d["preset"], d["env"])
    words += ["--preset", d["preset"]] if d["preset"] != presets.DEFAULT_PRESET else []
    words += ["--seed", d["seed"]] + (["--seeds", d["seeds"]] if d["seeds"] > 1 else [])
    words += ["--data", "FOLDER"] if data else []
    for name in ("steps", "image_size", "action_repeat"):
        if d[name] not in (None, getattr(settings, name)):
            words += [f"--{name.replace('_', '-')}", d[name]]
    for name, value in (d.get("env_args") or {}).items():
        if settings.env_args.get(name) != value:
            words += ["--env-arg", name, value]
    for name, value in changes_of({**d, "config": config}).items():
        words += [f"--agent.{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join(map(str, words))
