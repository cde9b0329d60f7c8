"""The authors' trained checkpoints as runs: read as data, compared with a configuration, written as a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks, files, presets, settings, weights
from wmjax.authors import dreamer_v3, iris, world_models
from wmjax.authors.stored import Found, Layer, Refused
from wmjax.cache import enable_compilation_cache
from wmjax.fields import replace
from wmjax.loops import checkpoint, memory
from wmjax.names import nearest
from wmjax.run_folder import CHECKPOINTS, check_new, open_folder, warn
from wmjax.types import AgentState, UsageError

LAYOUTS: dict[str, ModuleType] = {"iris": iris, "dreamer_v3": dreamer_v3, "world_models": world_models}
LISTED = 6  # layers that do not fit, in an error
TIMES = 4  # of a checkpoint's size, that are held at once: as read, as parameters, and a copy to write


def import_weights(
    agent: str,
    path: str | Path,
    out: str | Path,
    *,
    env: Any = None,
    preset: str | None = None,
    steps: int | None = None,
    image_size: int | None = None,
    action_repeat: int | None = None,
    env_args: Mapping[str, Any] | None = None,
    start_timeout: float | None = None,
    say: Callable[[str], None] = lambda text: None,
    **overrides: Any,
) -> dict[str, Any]:
    """Makes a run of what an agent's authors have trained. Nothing that a file says is run.

    Args:
      agent: "iris", "dreamer_v3" or "world_models".
      path: of IRIS the file; of DreamerV3 the folder of a run or of a checkpoint, or agent.pkl; of World Models the
        folder that `vae/`, `rnn/` and `log/` are in.
      out: the run folder, which is not there yet or empty.
      env: what the agent was trained in, as for `train`. World Models' files say it.
      preset: whose configuration holds where the layers' shapes do not tell; the authors' by default.
      steps: env steps that it was trained for, where the files do not say so.
      image_size: side of pictures in pixels; by default what the layers are made for.
      action_repeat, env_args, start_timeout: as for `train`.
      say: is told, a line each, what is left out.
      overrides: fields of the agent's configuration, before what shapes tell.

    Returns:
      Where it comes from, which `config.json` keeps as `origin`: `source`, the code that writes such files; `files`,
      with the name, `bytes` and `sha256` of each; `parameters` and their `digest`; and `left_out`, how many arrays.

    Raises:
      UsageError: the files are not such a checkpoint, are damaged or ask for anything but arrays; the layers are not
        those of the configuration; a field is not valid; or the folder is not empty. Nothing is written then.
    """
    enable_compilation_cache()
    if not isinstance(agent, str) or agent not in LAYOUTS:
        raise nearest("agent", agent, LAYOUTS)
    path, out, steps = checks.path("path", path), checks.path("out", out), checks.optional("steps", steps)
    check_new(out)
    layout, refuse = LAYOUTS[agent], partial(_refused, path)
    try:
        found = layout.read(path)
        made = _made(
            layout, agent, found, overrides, env=env, preset=preset, image_size=image_size,
            action_repeat=action_repeat, env_args=env_args, start_timeout=start_timeout,
        )  # fmt: skip
        layers = _told(layout, layout.ours, found, made.config, made.env.spec)
        template = jax.eval_shape(made.agent.init, jax.random.key(0))
        _check_layers(layers, template.variables, refuse)
        weights.check_memory([layer.stored for layer in layers.values()], TIMES, refuse)
        params = weights.nested({name: _array(layer) for name, layer in layers.items()})
        origin = _origin(layout, found, path, params)
    except Refused as error:
        raise refuse(str(error)) from None
    except OSError as error:
        raise refuse(error.strerror or str(error)) from None
    if found.left_out:
        say(f"left out {len(found.left_out)} arrays by which nothing acts, such as {found.left_out[0]}")
    step = steps if steps is not None else found.steps or 0
    description = made.description | {"origin": origin}
    with memory.running_out():
        part = lambda shapes: {name: jax.tree.map(jnp.asarray, params[name]) for name in shapes}
        state = AgentState(part(template.params), {}, (), jnp.int32(0), part(template.non_trainable))
        with open_folder(out, False, description, lambda folder: None, warn) as folder:
            try:
                checkpoint.save(folder / CHECKPOINTS, step, {"agent": state}, info={"description": description})
            except Exception as error:  # Orbax raises whatever its storage raises
                files.remove(folder / CHECKPOINTS)
                reason = str(error).strip().partition("\n")[0][:200]
                raise UsageError(f"out: {str(out)!r} cannot be written: {reason}") from None
    return origin


def _refused(path: Path, reason: str) -> UsageError:
    return UsageError(f"path: {str(path)!r} cannot be imported: {reason}")


def _made(layout: ModuleType, agent: str, found: Found, overrides: Mapping[str, Any], **asked: Any) -> settings.Setup:
    """The run that the files are of: what was asked for, else what shapes tell, else the authors' preset."""
    preset, env, args = layout.PRESET, None, {}
    if hasattr(layout, "task"):
        preset, env, args = _told(layout, layout.task, found)
    asked["preset"] = asked["preset"] or preset
    if asked["env"] is None:
        if env is None:
            raise UsageError(
                f"env: missing; the environment that the agent was trained in, such as --env {layout.EXAMPLE}"
            )
        asked |= {"env": env, "env_args": args | dict(asked["env_args"] or {})}
    named = isinstance(asked["env"], str)
    stated = replace(presets.resolve(agent, asked["preset"], asked["env"] if named else None)[0], overrides)
    fields, side = _told(layout, layout.fields, found, stated)
    if named and asked["image_size"] is None:
        asked["image_size"] = side
    env = asked.pop("env")
    return settings.setup(agent, env, overrides=fields | dict(overrides), **asked)


def _told(layout: ModuleType, function: Callable, *args: Any) -> Any:
    """What a function of a layout says. Raises `Refused` where layers are missing, or have axes that it cannot read."""
    try:
        return function(*args)
    except (Refused, UsageError):
        raise
    except KeyError as error:
        raise Refused(f"it holds no {checks.show(error.args[0])}, which {layout.SOURCE} has") from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        raise Refused(f"its layers have shapes that are not those of {layout.SOURCE}") from None


def _check_layers(layers: dict[str, Layer], template: dict[str, Any], refuse: Callable[[str], UsageError]) -> None:
    """Raises `UsageError` with the layers that are not those of a template, by both names and shapes."""
    wanted, differ = checkpoint.paths(template), []
    for name in sorted(wanted.keys() | layers.keys()):
        if name not in layers:
            differ.append(f"{name} {wanted[name].shape} is not in it")
        elif name not in wanted:
            differ.append(f"{checks.show(layers[name].name)[1:-1]} {layers[name].stored.shape} is in it, too")
        elif layers[name].stored.shape != wanted[name].shape:
            words = f"{layers[name].stored.shape} and {name} should have {wanted[name].shape}"
            differ.append(f"{checks.show(layers[name].name)[1:-1]} has {words}")
        elif layers[name].stored.dtype.kind != "f":
            raise refuse(f"its {checks.show(layers[name].name)} is of {layers[name].stored.dtype}, not of floats")
    if differ:
        more = f"; and {len(differ) - LISTED} more" if len(differ) > LISTED else ""
        listed = "; ".join(differ[:LISTED])
        raise refuse(f"{len(differ)} layers do not fit the configuration and environment: {listed}{more}")


def _array(layer: Layer) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.asarray(layer.stored.read()).astype(np.float32, order="C")
    if not np.isfinite(array).all():
        raise Refused(f"its {checks.show(layer.name)} holds numbers that are not finite; nothing acts by them")
    return array


def _origin(layout: ModuleType, found: Found, path: Path, params: dict[str, Any]) -> dict[str, Any]:
    read = [
        {"name": str(file.relative_to(path)) if file != path else file.name, "bytes": file.stat().st_size,
         "sha256": _sha256(file)}
        for file in found.files
    ]  # fmt: skip
    return {
        "source": layout.SOURCE, "files": read, "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "digest": checkpoint.digest(params), "left_out": len(found.left_out),
    }  # fmt: skip


def _sha256(path: Path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
