"""Files of a step of a run's dream: programs that other runtimes read, and beside them real moments to begin at."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wmjax import files
from wmjax.dream_step import onnx_program, stablehlo
from wmjax.dream_step.step import STATE, DreamStep, make_step
from wmjax.exporting import new_file
from wmjax.run import Run, load
from wmjax.types import UsageError

SUFFIXES = {"onnx": ".onnx", "stablehlo": ".stablehlo"}
SERIALIZE = {"onnx": onnx_program.serialize, "stablehlo": stablehlo.serialize}


def step_files(onnx: str | Path | None, stablehlo: str | Path | None) -> dict[str, Path]:
    """The paths to write, by format.

    Raises `UsageError` where one is not valid, it or its JSON is there already, or what writes ONNX is not installed.
    """
    given = {name: path for name, path in {"onnx": onnx, "stablehlo": stablehlo}.items() if path is not None}
    paths = {name: new_file(path, SUFFIXES[name], name) for name, path in given.items()}
    for name, path in paths.items():
        new_file(path.with_suffix(".json"), ".json", name)
    if "onnx" in paths:
        onnx_program.check_installed()
    return paths


def export_step(
    run: Run | str | Path,
    *,
    onnx: str | Path | None = None,
    stablehlo: str | Path | None = None,
    seed: int | None = None,
    which: str = "latest",
    **how: Any,
) -> dict[str, Any]:
    """Writes one step of a run's dream, for programs that have neither wmjax nor, of ONNX, JAX.

    What it takes and gives is `{name: array}`, of a batch of one: `docs/export.md` lists the names. A program is
    compared with JAX over 50 steps from a real moment before it is written, and differs by 1e-4 at most; where an
    output is so steep that moving the state by 1e-6 moves it further, by that. Beside it, with the suffix .json, are
    moments to begin at, and what inputs and outputs are.

    Args:
      run: a run, or what `load` takes.
      onnx: file for ONNX, which ends in .onnx and is not there yet; needs the extra `onnx`.
      stablehlo: file for `jax.export.deserialize`, for CPUs and NVIDIA's GPUs, which ends in .stablehlo.
      seed: of a run of several seeds, which one.
      which: "latest" or "best", of a run folder.
      how: further arguments of `load`.

    Returns:
      By format `bytes` and `difference`, the largest that was found; and `left_out`, what the agent lacks and why.

    Raises:
      UsageError: as `load`; no file is asked for, or one is there already, or cannot be written, and then none is; what
        writes ONNX is not installed, or lacks an operation, which is named with its module.
      RunError: a program does not compute what JAX does; nothing is written then.
    """
    paths = step_files(onnx, stablehlo)
    if not paths:
        raise UsageError("onnx: missing; a file to write, such as dream.onnx, or stablehlo is valid")
    step = make_step((run if isinstance(run, Run) else load(run, which=which, **how)).of_seed(seed))
    new, found = [], {}
    about = json.dumps(description(step), separators=(",", ":")).encode()
    for name, path in paths.items():
        data, difference = SERIALIZE[name](step)
        new += [(name, path.with_suffix(".json"), about), (name, path, data)]
        found[name] = {"bytes": len(data), "difference": difference}
    step_files(onnx, stablehlo)  # something may have come there meanwhile
    for i, (name, path, data) in enumerate(new):
        try:
            files.write(path, data)
        except OSError as error:
            for _, earlier, _ in new[:i]:
                files.remove(earlier)
            raise UsageError(f"{name}: {str(path)!r} cannot be written: {error.strerror}") from None
    return found | {"left_out": step.left_out}


def description(step: DreamStep, starts: bool = True) -> dict[str, Any]:
    """What a program needs to know of a step, as JSON: names, shapes, controls, and moments to begin at."""
    shapes = lambda given: {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in given.items()}
    about = {**step.about, "inputs": shapes(step.inputs), "outputs": shapes(step.outputs), "left_out": step.left_out}
    if starts:
        about["starts"] = [
            {"state": _flat(state), "frame": {name: _png(x) for name, x in pictures.items()}}
            for state, pictures in zip(step.starts, step.pictures, strict=True)
        ]
    return about


def _flat(state: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Each array as one list of numbers; float32 by as few digits as tell it."""
    number = lambda x: float(str(x)) if x.dtype == np.float32 and x else x.item() or 0
    return {name: [number(value) for value in x.ravel()] for name, x in state.items() if name.startswith(STATE)}


def _png(picture: np.ndarray) -> str:
    """A picture as an address that pages show."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
