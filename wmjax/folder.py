"""The run folder: what lies where in it, who may write to it, and how it is read.

A run folder holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` (the newest states of the whole
run), `best/` (the agent at its highest periodic evaluation), `eval.json`, and the pictures drawn of it. A run of
several seeds has a folder of this kind for each of them, `seed-0/` and so on, with the agent alone in its checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from wmjax.types import UsageError

CONFIG, EVAL, LOCK = "config.json", "eval.json", ".lock"
CHECKPOINTS, BEST = "checkpoints", "best"
# Settings without which a saved state means something else. Others may change where a run is resumed, as long as the
# state keeps its shapes.
IDENTITY = ("agent", "env", "seed", "seeds", "image_size", "action_repeat")

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# What lies where


def member_path(path: Path, seed: int) -> Path:
    """The folder of one seed, in that of a run of several."""
    return path / f"seed-{seed}"


def members(path: str | Path, description: dict[str, Any]) -> dict[int, Path]:
    """The folders with one seed each of a run of several, by seed; {} for a run of one."""
    first, count = description["seed"], description["seeds"]
    return {first + i: member_path(Path(path), first + i) for i in range(count)} if count > 1 else {}


def member_description(description: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `config.json` in the folder of one seed says."""
    return description | {"seed": seed, "seeds": 1, "devices": 1, "parallel": None, "part_of_seeds": True}


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_description(path: str | Path) -> dict[str, Any]:
    """What `config.json` of a run folder says. Raises `UsageError` if the folder is not one."""
    try:
        description = json.loads((Path(path) / CONFIG).read_text())
        description["agent"], description["config"], description["seed"], description["seeds"], description["devices"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"run: {str(path)!r} is not a run folder; it holds no readable {CONFIG}") from None
    return description


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Training in it


@contextlib.contextmanager
def open_folder(
    out: str | Path | None, resume: bool, description: dict[str, Any], fits: Callable[[Path], None], say: Say
) -> Iterator[Path]:
    """The run folder, locked for as long as the context lasts, with `config.json` in it.

    Args:
      out: where; None for a new folder under `runs/`.
      resume: whether the run in it goes on.
      description: what `config.json` is to say.
      fits: raises `UsageError` where the state that was saved in a folder is not one of this run.
      say: is told which settings changed.

    Raises:
      UsageError: the folder cannot be written, is in use, or holds another run; it is then left as it was.
    """
    if resume and out is None:
        raise UsageError("resume: needs the run folder to go on with, out")
    if resume:
        read_description(out)
    path = Path(out) if out is not None else _new_folder(description)
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"out: {str(path)!r} exists and is not empty; give another folder, or resume the run in it")
    lock, new = filelock.FileLock(path / LOCK), not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"out: {str(path)!r} is locked; another process is training in it") from None
    except OSError as error:
        raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
    try:
        if resume:
            _check_resumable(description, path, fits, say)
        try:
            write_json(path / CONFIG, description)
            for seed, folder in members(path, description).items():
                folder.mkdir(exist_ok=True)
                write_json(folder / CONFIG, member_description(description, seed))
        except OSError as error:
            raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
        try:
            yield path
        except UsageError:  # found before anything was trained, so the folder is left as it was
            if not resume:
                _remove_description(path, description, new)
            raise
    finally:
        lock.release()


def _remove_description(path: Path, description: dict[str, Any], new: bool) -> None:
    """Removes what `open_folder` has written, and the folder itself if it is new, unless there is more in it."""
    inner = members(path, description).values()
    found = {x for folder in (path, *inner) if folder.is_dir() for x in folder.iterdir()}
    if found - {path / LOCK, *inner, *(folder / CONFIG for folder in (path, *inner))}:
        return
    for folder in inner:
        shutil.rmtree(folder, ignore_errors=True)
    for name in (CONFIG, LOCK):
        (path / name).unlink(missing_ok=True)
    if new:
        path.rmdir()


def _new_folder(description: dict[str, Any]) -> Path:
    env = (description["env"] or "env").replace(":", "-").replace("/", "-")
    return Path("runs") / f"{description['agent']}-{env}-{description['seed']}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _check_resumable(description: dict[str, Any], path: Path, fits: Callable[[Path], None], say: Say) -> None:
    """Says which settings differ from those of the run so far.

    Raises `UsageError`, with all of them, if it then would be another run or its state have other shapes.
    """
    before = read_description(path)
    if before.get("part_of_seeds"):
        raise UsageError(f"resume: {str(path)!r} has the agent of one seed only; resume the run it is part of")
    flat = lambda d: {k: v for k, v in d.items() if k not in ("config", "version", "steps")} | d["config"]
    was, now = flat(before), flat(json.loads(json.dumps(description)))
    changed = {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}
    listed = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in changed.items())
    if fixed := sorted(changed.keys() & set(IDENTITY)):
        raise UsageError(f"resume: in {str(path)!r} {listed}; {', '.join(fixed)} cannot change")
    if changed:
        try:
            fits(path)
        except UsageError as error:
            raise UsageError(f"resume: in {str(path)!r} {listed}; its state does not fit that: {error}") from None
        say(f"resume with changed settings: {listed}")
