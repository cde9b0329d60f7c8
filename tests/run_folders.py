"""What a run folder says, and damage to it, drawn at random: bytes, names, links, kinds of files, what JSON says."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTION = {
    "version": "0.1.0",
    "agent": "dreamer_v3",
    "env": "catch",
    "preset": "small",
    "seed": 0,
    "seeds": 1,
    "devices": 1,
    "parallel": None,
    "env_args": {},
    "image_size": 64,
    "action_repeat": 1,
    "steps": 100,
    "config": {"horizon": 10, "layers": [1, 2], "evolve": {"population": 8}, "cell": "gru", "remat": False},
}
ODD = [None, True, -1, 0, 1.5, 10**9, 10**30, "", "x", "x" * 5000, "a\nb", "\ud800", [], [[1]], {}, {"a": {"b": []}}]
NAMES = ["20261126", "²", "999999999999", "000000000030", ".000000000030.tmp", ".000000000030.old", "seed-0", "x.json"]


class Victims:
    """Files beside a run folder that nothing may touch."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "folder" / "arrays").mkdir(parents=True)
        digits = "0123456789abcdef" * 4
        for name in ("file", "folder/config.json", f"folder/{digits}.safetensors", "folder/arrays/x"):
            (place / name).write_text('{"precious": 1}\n')
        (place / "folder" / "000000000050").mkdir()
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        """Inodes, times and contents."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            status = path.lstat()
            found[str(path)] = status.st_ino, status.st_mtime_ns, path.is_dir() or path.read_bytes()
        return found


def _edit(value: Any, rng: random.Random) -> Any:
    """JSON with one value replaced, removed or added, at any depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.25:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value[rng.choice(["", "more", "step", "a/b", "../x"])] = rng.choice(ODD)
    else:
        value[key] = _edit(value[key], rng)
    return value


def _edit_json(path: Path, rng: random.Random) -> None:
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return _bytes(path, rng)
    value = _edit(value, rng)
    if path.name == "manifest.json" and isinstance(value, dict) and rng.random() < 0.8:  # with the hash that fits
        value.pop("sha256", None)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(value))


def _bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0 and data:
        data[place % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = rng.choice([b"\0" * 50, b"\n", b"[" * 100_000, b"\xff\xfe", b"NaN", b"}{"])
    elif kind == 3:
        data[place : place + 200] = rng.randbytes(200)
    elif kind == 4:
        data += data[place:]
    else:
        data.clear()
    path.write_bytes(bytes(data))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _put(path: Path, rng: random.Random, victims: Path) -> None:
    """Another kind of thing, or a link to elsewhere, under its name."""
    _remove(path)
    makers: list[Callable[[], Any]] = [
        lambda: path.symlink_to(victims / "file"),
        lambda: path.symlink_to(victims / "folder"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to(victims / "absent"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.link(victims / "file", path),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.write_text("3"),
        lambda: None,
    ]
    rng.choice(makers)()


def damage(run: Path, victims: Path, rng: random.Random) -> str:
    """Changes one thing in a run folder; what, in words."""
    paths = sorted(path for path in run.rglob("*") if not path.is_symlink())
    path, other = rng.choice(paths), rng.choice(paths)
    kinds = ["bytes", "json", "put", "rename", "swap", "stray", "link"]
    kind = rng.choices(kinds, [4, 5, 4, 1, 2, 1, 1])[0]
    if kind in ("bytes", "json"):
        path = rng.choice([x for x in paths if x.is_file() and (kind == "bytes" or x.suffix in (".json", ".jsonl"))])
        (_bytes if kind == "bytes" else _edit_json)(path, rng)
    elif kind == "put":
        _put(path, rng, victims)
    elif kind == "rename":
        _move(path, path.with_name(rng.choice(NAMES)))
    elif kind == "swap" and path != other and path not in other.parents and other not in path.parents:
        aside = run / "aside"
        path.rename(aside)
        other.rename(path)
        aside.rename(other)
    elif kind == "stray":
        place = rng.choice([x for x in paths if x.is_dir()]) / rng.choice(NAMES)
        if not os.path.lexists(place) and path not in place.parents:
            shutil.copytree(path, place) if path.is_dir() else shutil.copy(path, place)
    elif kind == "link":
        names = [".tmp-00000000-eval.json", ".eval.json.tmp", ".lock", "replay", "evals", "best", "dream.gif", "wandb"]
        place = run / rng.choice(names)
        if not os.path.lexists(place):
            place.symlink_to(victims / rng.choice(["file", "folder"]))
    return f"{kind} {path.relative_to(run)}"


def _move(path: Path, target: Path) -> None:
    if not os.path.lexists(target):
        path.rename(target)
