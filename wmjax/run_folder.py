"""The run folder: what lies where in it, who may write to it, and how it is read.

A run folder holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` (the newest states of the whole
run), `best/` (the agent at its highest periodic evaluation), `evals/` (a file for each evaluation of these),
`eval.json` (the newest of these files once more), `usage.json` (memory and compile time), and the pictures drawn of it.
A run of several seeds has a folder of this kind for each of them, `seed-0/` and so on, with the agent alone in its
checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import re
import stat
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import filelock

import wmjax
from wmjax import checks, files
from wmjax.types import UsageError

CONFIG, EVAL, LOCK = "config.json", "eval.json", ".lock"
EVALS, METRICS = "evals", "metrics.jsonl"
CHECKPOINTS, BEST, REPLAY = "checkpoints", "best", "replay"
# Settings without which a saved state means something else. Others may change where a run is resumed, as long as the
# state keeps its shapes.
IDENTITY = ("agent", "env", "env_args", "seed", "seeds", "image_size", "action_repeat")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # the file system has none

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# What lies where


def member_path(path: Path, seed: int) -> Path:
    """The folder of one seed, in that of a run of several."""
    return path / f"seed-{seed}"


# What a description says of one seed on one device.
ONE = {"seeds": 1, "devices": 1, "parallel": None, "shard_params": 1}


def members(path: str | Path, description: dict[str, Any]) -> dict[int, Path]:
    """The folders with one seed each of a run of several, by seed; {} for a run of one."""
    first, count = description["seed"], description["seeds"]
    return {first + i: member_path(Path(path), first + i) for i in range(count)} if count > 1 else {}


def member_description(description: dict[str, Any], seed: int) -> dict[str, Any]:
    """What `config.json` in the folder of one seed says."""
    return description | ONE | {"seed": seed, "part_of_seeds": True}


# ---------------------------------------------------------------------------------------------------------------------
# What `config.json` says

CONFIG_BYTES = 2**20
LARGEST = 2**53  # of whole numbers that are exact everywhere
DEPTH = 5  # of values within values
MISSING = type("Missing", (), {"__repr__": lambda self: "<missing>"})()


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is made of numbers, text, true, false and null, in lists and objects, not too many in another."""
    if isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, str):
        return len(value) < 256 and (value == "" or value.isprintable())
    return (
        value is None
        or isinstance(value, bool)
        or abs(value) <= (LARGEST if isinstance(value, int) else checks.LARGEST)
    )


def _plain(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not _is_plain(value):
        raise checks.invalid(name, value, "an object of numbers, text, true, false, null, lists and objects of these")


def _object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise checks.invalid(name, value, "an object")


def _texts(name: str, value: Any) -> None:
    _object(name, value)
    for key, text in value.items():
        if not key.isidentifier() or len(key) > 80:
            raise checks.invalid(name, key, "short names")
        checks.text(f"{name}: {key}", text)


def _data(name: str, value: Any) -> None:
    _object(name, value)
    for key, check in {"path": checks.path, "fingerprint": checks.text, "spec": _object}.items():
        if key != "path" or key in value:  # a file of `wmjax export` does not say where its data lay
            check(f"{name}: {key}", value.get(key))


# What raises `UsageError` where the value of a name is not valid; `OR_NULL` says where it may be null.
SCHEMA: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("version", "agent", "env", "preset"), checks.text),
    **dict.fromkeys(("seed", "seeds", "devices"), checks.number),
    "parallel": partial(checks.choice, valid=("shard_map", "pmap")),
    **dict.fromkeys(("image_size", "action_repeat", "steps"), checks.number),
    "config": _plain,
}
OPTIONAL = {"part_of_seeds": checks.flag, "equations": _texts, "shard_params": checks.number}
OPTIONAL |= dict.fromkeys(("env_args", "about", "origin"), _object) | {"data": _data}
OR_NULL = {"env", "parallel", "image_size", "action_repeat", "env_args", "about", "data"}


def warn(text: str) -> None:
    """One line on standard error, for what is read without a run that could say it."""
    print(f"wmjax: {text}", file=sys.stderr)


def read_description(path: str | Path, say: Say | None = None) -> dict[str, Any]:
    """What `config.json` of a run folder says; names in it that are not known are left as they are.

    Args:
      path: the folder.
      say: is told where a newer version has written it.

    Raises:
      UsageError: the folder is not one of a run, or a value is missing or not valid; it names the first.
    """
    refuse = lambda reason: UsageError(f"run: {str(path)!r} is not a run folder; {reason}")
    try:
        description = files.parse_json(files.read(Path(path) / CONFIG, CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise refuse(f"it holds no readable {CONFIG} ({getattr(error, 'strerror', None) or error})") from None
    by = check_description(description, refuse, CONFIG)
    if by and say is not None:
        say(f"warning: {Path(path) / CONFIG}{by}; what it says may mean something else there")
    return description


def check_description(description: Any, refuse: Callable[[str], UsageError], where: str) -> str:
    """Raises what `refuse` makes of the reason where a description, which came out of `where`, is not valid.

    Returns, in words, that a newer version has written it, or "".
    """
    if not isinstance(description, dict):
        raise refuse(f"its {where} must be an object, not {checks.show(description)}")
    if checks.is_deep(description, checks.LEVELS + 1):  # arguments of an environment are within it
        raise refuse(f"its {where} is nested too deeply")
    newer = _is_newer(description.get("version"))
    by = f" (written by wmjax {description['version']}, which is newer than this {wmjax.__version__})" if newer else ""
    for name, check in (SCHEMA | OPTIONAL).items():
        value = description.get(name, MISSING)
        if (value is None and name in OR_NULL) or (value is MISSING and name in OPTIONAL):
            continue
        try:
            check(name, value)
        except UsageError as error:
            raise refuse(f"in its {where} {error}{by}") from None
    return by


def _is_newer(version: Any) -> bool:
    """Whether a version, as in "1.20.3", comes after this one."""
    numbers = lambda text: [int(part) for part in text.split(".") if part.isascii() and part.isdigit()]
    return isinstance(version, str) and len(version) < 256 and numbers(version) > numbers(wmjax.__version__)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or not there."""
    files.write(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Training in it


def check_new(path: Path) -> None:
    """Raises `UsageError` where a path is not that of a new folder, or of an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"out: {str(path)!r} exists and is not empty; give another folder, or resume the run in it")


@contextlib.contextmanager
def open_folder(
    out: str | Path | None,
    resume: bool,
    description: dict[str, Any],
    fits: Callable[[Path], None],
    say: Say,
    *,
    no_lock: bool = False,
) -> Iterator[Path]:
    """The run folder, locked for as long as the context lasts, with `config.json` in it.

    Args:
      out: where; None for a new folder under `runs/`.
      resume: whether the run in it goes on.
      description: what `config.json` is to say.
      fits: raises `UsageError` where the state that was saved in a folder is not one of this run.
      say: is told which settings changed.
      no_lock: go on without a lock.

    Raises:
      UsageError: the folder cannot be written or locked, is in use, or holds another run; it is then left as it was.
    """
    if resume and out is None:
        raise UsageError("resume: needs the run folder to go on with, out")
    if resume:
        read_description(out)
    path = Path(out) if out is not None else _new_folder(description)
    if not resume:
        check_new(path)
    if len(_json(description)) > CONFIG_BYTES:
        raise UsageError(f"env_args: too long for {CONFIG}, which has at most {CONFIG_BYTES:,} bytes")
    _check_names(path, description)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    remedy = "; where no other process trains in it, no_lock (--no-lock) is valid"
    lock = _acquire(path, remedy, no_lock)
    try:
        if resume:
            _check_resumable(description, path, fits, say)
        try:
            write_json(path / CONFIG, description)
            for seed, folder in members(path, description).items():
                files.own_folder(folder)
                write_json(folder / CONFIG, member_description(description, seed))
        except OSError as error:
            if not resume:
                _remove_description(path, description, made)
            raise UsageError(f"out: {str(path)!r} cannot be written: {error.strerror}") from None
        try:
            yield path
        except UsageError:  # found before anything was trained, so the folder is left as it was
            if not resume:
                _remove_description(path, description, made)
            raise
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there, and locked.

    Raises `UsageError` where it cannot be, or is already; it is then left as it was.
    """
    lock = _acquire(folder)
    try:
        yield
    finally:
        lock.release()


def _acquire(folder: Path, remedy: str = "", no_lock: bool = False) -> Any:
    """The lock of a folder, which is made if it is not there; None with `no_lock`.

    Raises `UsageError`, with a remedy where there are no locks; the folder is then left as it was.
    """
    lock, lock_is_new = None if no_lock else _lock(folder / LOCK), not (folder / LOCK).exists()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"out: {str(folder)!r} is locked; another process is training in it") from None
    except (OSError, NotImplementedError) as error:
        _remove_new([folder / LOCK] if lock_is_new else [], made)
        if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
            raise UsageError(
                f"out: {str(folder)!r} cannot be locked, for its file system has no locks{remedy}"
            ) from None
        raise UsageError(f"out: {str(folder)!r} cannot be written: {error.strerror}") from None
    return lock


def _lock(path: Path) -> Any:
    """A lock of the system's own, which ends with the process; its substitute would outlive one that was killed."""
    native = "fallback_to_soft" in inspect.signature(filelock.FileLock.__init__).parameters
    return filelock.FileLock(path, **({"fallback_to_soft": False} if native else {}))


def _check_names(path: Path, description: dict[str, Any]) -> None:
    """Raises `UsageError` where what a run writes to has the name of another thing, such as a link to elsewhere."""
    for folder in (path, *members(path, description).values()):
        inner = [folder / name for name in (CHECKPOINTS, BEST, EVALS, REPLAY, "wandb")] + [folder] * (folder != path)
        for place, is_valid, text in [
            *((place, stat.S_ISDIR, "a folder") for place in inner),
            *((folder / name, stat.S_ISREG, "a file") for name in (LOCK, METRICS)),
        ]:
            with contextlib.suppress(OSError):  # it is not there, or cannot be reached to be written either
                found = place.lstat()
                if not is_valid(found.st_mode) or (is_valid is stat.S_ISREG and found.st_nlink > 1):
                    raise UsageError(f"out: {str(place)!r} is a link or not {text} of its own; {text} is valid there")


def _remove_new(new: list[Path], folders: list[Path]) -> None:
    """Removes files, and folders that are then empty, the innermost first."""
    with contextlib.suppress(OSError):
        for place in new:
            place.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()


def _remove_description(path: Path, description: dict[str, Any], made: list[Path]) -> None:
    """Removes what `open_folder` has written, and the folders that it has made, unless there is more in them."""
    inner = members(path, description).values()
    found = {x for folder in (path, *inner) if folder.is_dir() for x in folder.iterdir()}
    if found - {path / LOCK, *inner, *(folder / CONFIG for folder in (path, *inner))}:
        return
    for folder in inner:
        _remove_new([folder / CONFIG], [folder])
    _remove_new([path / CONFIG, path / LOCK], made)


def _new_folder(description: dict[str, Any]) -> Path:
    env = re.sub(r":[^:]*/(.*):", r":\1:", description["env"] or "env")  # of a file, its name
    env = re.sub(r"[^\w.-]+", "-", env)
    return Path("runs") / f"{description['agent']}-{env}-{description['seed']}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _differences(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings and fields of the agent's configuration that differ between two descriptions, but for their length."""
    plain = lambda d: (
        {k: v for k, v in d.items() if k not in ("config", "version", "steps", "about", "data")} | d["config"]
    )
    flat = lambda d: json.loads(json.dumps(plain(d) | {"env_args": d.get("env_args") or {}}))
    was, now = flat(was), flat(now)
    return {name: (was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)}


def say_edits(path: Path, description: dict[str, Any], info: dict[str, Any], say: Say) -> None:
    """Says where `config.json` is not what it was when a checkpoint with this `info` was saved: no hash shows that."""
    saved = info.get("description")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict) or checks.is_deep(saved):
        return  # it is of a version that did not keep it
    apart = ("devices", "parallel", "shard_params", "preset")
    changed = {k: v for k, v in _differences(saved, description).items() if k not in apart}
    if changed:
        show = checks.show
        word = lambda name: show(name)[1:-1]  # a manifest may say anything
        listed = ", ".join(f"{word(name)} was {show(old)} and is {show(new)}" for name, (old, new) in changed.items())
        say(f"warning: {path / CONFIG} is not as it was when the checkpoint was saved: {listed}")


def _check_resumable(description: dict[str, Any], path: Path, fits: Callable[[Path], None], say: Say) -> None:
    """Says which settings differ from those of the run so far.

    Raises `UsageError`, with all of them, if it then would be another run or its state have other shapes.
    """
    before = read_description(path)
    if before.get("part_of_seeds"):
        raise UsageError(f"resume: {str(path)!r} has the agent of one seed only; resume the run it is part of")
    changed = _differences(before, description)
    listed = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in changed.items())
    if fixed := sorted(changed.keys() & set(IDENTITY)):
        raise UsageError(f"resume: in {str(path)!r} {listed}; {', '.join(fixed)} cannot change")
    if changed:
        try:
            fits(path)
        except UsageError as error:
            raise UsageError(f"resume: in {str(path)!r} {listed}; its state does not fit that: {error}") from None
        say(f"resume with changed settings: {listed}")
