"""Checkpoints: any pytree of arrays, written by Orbax behind three functions, and checked when it is read.

A step is a folder of its own, which appears whole or not at all:

    FOLDER/000000012345/arrays/         Orbax's, one array per leaf
    FOLDER/000000012345/manifest.json   path, dtype, shape and SHA-256 of every leaf

Orbax notices a truncated file but not a flipped bit, so every leaf that is read is hashed again. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.types import PyTree, UsageError

FORMAT = 1  # of the manifest and of what lies beside it


class CheckpointCorruptError(RuntimeError):
    """A checkpoint is not what was saved; the message names the file."""


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _paths(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, as in "agent/params/actor/kernel"; fields and dictionary keys are named alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _host(leaf: Any) -> np.ndarray:
    """The leaf in host memory; a key as its data, numpy and Python scalars as arrays without axes."""
    leaf = jnp.asarray(leaf)
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")


def _data_shape(leaf: Any) -> tuple[int, ...]:
    """Of the array that is stored for a leaf: a key's data has axes of its own."""
    return jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else leaf.shape


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _entry(leaf: Any, array: np.ndarray) -> dict[str, Any]:
    leaf = jnp.asarray(leaf)
    entry = {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "sha256": _hash(array)}
    return entry | {"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else entry


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(tree: PyTree) -> str:
    """SHA-256, in hex, over the path, dtype, shape and bytes of every leaf, in the order of the paths.

    Two trees have one digest if and only if they are equal bit for bit (NaNs and signed zeros included).
    """
    return hashlib.sha256(_canonical({path: _entry(x, _host(x)) for path, x in _paths(tree).items()})).hexdigest()


def _orbax() -> tuple[Any, Any]:
    """Orbax takes a second to import, so only those who read or write a checkpoint do."""
    import orbax.checkpoint as ocp

    return ocp, ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content | {"sha256": hashlib.sha256(_canonical(content)).hexdigest()}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
        version = content["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointCorruptError(f"{path}: not a readable manifest ({error})") from error
    if isinstance(version, int) and version > FORMAT:
        raise UsageError(f"checkpoint {path.parent}: format {version} is newer than {FORMAT}, which this version reads")
    if hashlib.sha256(_canonical(content)).hexdigest() != claimed:
        raise CheckpointCorruptError(f"{path}: its content does not match its SHA-256")
    return content


def steps(folder: str | Path) -> list[int]:
    """Steps that `folder` holds, oldest first; [] if it does not exist."""
    folder = Path(folder)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def latest(folder: str | Path) -> int | None:
    """The newest step, or None."""
    return max(steps(folder), default=None)


def _place(folder: str | Path, step: int | None) -> Path:
    step = latest(folder) if step is None else step
    if step is None or step not in steps(folder):
        wanted = "" if step is None else f", not step {step}"
        raise UsageError(
            f"checkpoint {folder}: holds {f'steps {steps(folder)}' if steps(folder) else 'nothing'}{wanted}"
        )
    return Path(folder).absolute() / f"{step:012d}"


def save(folder: str | Path, step: int, tree: PyTree, *, keep: int = 3, info: dict[str, Any] | None = None) -> Path:
    """Saves a tree as one step, then removes all but the newest `keep` steps.

    The arrays are copied before it returns, so their buffers may be donated afterwards. Interrupted at any moment, it
    leaves the steps there were, or those and the new one. To keep a best state apart, save it to a folder of its own
    with `keep=1`.

    Args:
      folder: made if absent.
      step: not negative; replaces a step of this number.
      tree: leaves are arrays, random keys, or numpy or Python scalars.
      keep: at least 1.
      info: anything that JSON can say, read back by `info`.
    """
    folder = Path(folder).absolute()
    final, temporary = folder / f"{step:012d}", folder / f".{step:012d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    leaves = _paths(tree)
    arrays = {path: _host(leaf) for path, leaf in leaves.items()}
    entries = {path: _entry(leaf, arrays[path]) for path, leaf in leaves.items()}
    stored = {path: array for path, array in arrays.items() if array.size}  # Orbax refuses arrays of size zero
    if stored:
        ocp, checkpointer = _orbax()
        checkpointer.save(temporary / "arrays", args=ocp.args.PyTreeSave(stored))
    content = {"format": FORMAT, "step": step, "info": info or {}, "leaves": entries}
    _write_manifest(temporary / "manifest.json", content)
    if final.exists():
        final.rename(folder / f".{step:012d}.old")
    temporary.rename(final)
    for old in [*folder.glob(".*.old"), *(folder / f"{old:012d}" for old in steps(folder)[:-keep])]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def info(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """What `save` was given as `info`; of the newest step by default."""
    return _read_manifest(_place(folder, step) / "manifest.json")["info"]


def _check_template(place: Path, template: dict[str, Any], entries: dict[str, Any]) -> None:
    """Raises `UsageError` at the first leaf that was not saved, or saved with another shape or dtype."""
    for path, leaf in template.items():
        if path not in entries:
            raise UsageError(f"checkpoint {place}: holds no {path!r}; it belongs to another agent or configuration")
        saved = entries[path]["dtype"], tuple(entries[path]["shape"])
        if saved != (str(leaf.dtype), leaf.shape):
            raise UsageError(f"checkpoint {place}: {path!r} is {saved[0]} {saved[1]}, not {leaf.dtype} {leaf.shape}")


def _read_arrays(place: Path, template: dict[str, Any]) -> dict[str, np.ndarray]:
    wanted = {path: leaf for path, leaf in template.items() if np.prod(_data_shape(leaf))}
    arrays = {path: np.zeros(_data_shape(leaf), leaf.dtype) for path, leaf in template.items() if path not in wanted}
    if not wanted:
        return arrays
    ocp, checkpointer = _orbax()
    args = ocp.args.PyTreeRestore(
        item=dict.fromkeys(wanted, 0),
        restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray) for path in wanted},
        partial_restore=True,
    )
    try:
        return arrays | checkpointer.restore(place / "arrays", args=args)
    except Exception as error:  # Orbax raises whatever its storage raises
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointCorruptError(f"{place / 'arrays'}: cannot be read ({reason})") from error


def restore(folder: str | Path, template: PyTree, step: int | None = None) -> PyTree:
    """Reads a tree of the template's structure, and no leaf that the template does not have.

    So `{"agent": agent_template}` reads the agent alone from the checkpoint of a whole run.

    Args:
      folder: as given to `save`.
      template: arrays or `jax.ShapeDtypeStruct`s, for instance from `jax.eval_shape`.
      step: the newest by default.

    Raises:
      UsageError: there is no such step, or it holds other leaves, shapes or dtypes; found before anything is allocated.
      CheckpointCorruptError: the files are not as they were written.
    """
    place = _place(folder, step)
    entries = _read_manifest(place / "manifest.json")["leaves"]
    shapes = jax.eval_shape(lambda tree: tree, template)
    wanted = _paths(shapes)
    _check_template(place, wanted, entries)
    arrays = _read_arrays(place, wanted)
    leaves = []
    for path, leaf in wanted.items():
        array, entry = np.asarray(arrays[path], order="C"), entries[path]
        if array.shape != _data_shape(leaf) or _hash(array) != entry["sha256"]:
            raise CheckpointCorruptError(f"{place / 'arrays'}: {path!r} does not match its SHA-256")
        leaves.append(jax.random.wrap_key_data(array, impl=entry["impl"]) if _is_key(leaf) else jnp.array(array))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
