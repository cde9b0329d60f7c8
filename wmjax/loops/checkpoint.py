"""Checkpoints: any pytree of arrays, written by Orbax behind a few functions, and checked when it is read.

A step is a folder of its own, which appears whole or not at all:

    FOLDER/000000012345/arrays/         Orbax's, one array per leaf
    FOLDER/000000012345/manifest.json   path, dtype, shape and SHA-256 of every leaf

Several processes save together: each writes the blocks of arrays that only it has, as `blocks-0.safetensors` and so on,
and the first process all the rest; it puts the step in its place. Each block has a SHA-256 of its own.

Orbax notices a truncated file but not a flipped bit, so every leaf that is read is hashed again. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from wmjax import distributed, files
from wmjax.loops import shards
from wmjax.loops.shards import ALONE, Team, is_sha256, sha256
from wmjax.types import PyTree, RunError, UsageError

FORMAT, OLDEST = 2, 1  # of the manifest and of what lies beside it; the oldest where there are no blocks
MANIFEST = "manifest.json"
OTHER = "it belongs to another agent, configuration or version"
MANIFEST_BYTES = 2**26
CHUNK_BYTES = 2**26  # of an array that Orbax compresses and writes at once, and for which it needs memory
STEP = re.compile("[0-9]{12}")  # the name of a step; folders of other names are not ours
# What is being written, and what is being replaced.
BEGUN = re.compile(rf"\.([0-9]{{12}})\.(tmp|old|{shards.PART_FOLDER.pattern})")


class CheckpointCorruptError(RunError):
    """A checkpoint is not what was saved; the message names the file."""


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def paths(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, as in "agent/params/actor/kernel"; fields and dictionary keys are named alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _array(leaf: Any) -> Any:
    """The leaf as an array of a dtype that JAX has. What lies in host memory stays there: it may be large."""
    if isinstance(leaf, jax.Array | shards.Part):
        return leaf
    return np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))


def _host(leaf: Any) -> np.ndarray:
    """The leaf in host memory; a key as its data. What several processes share, all of them have to ask for."""
    leaf = _array(leaf)
    if shards.is_shared(leaf):
        return shards.whole(leaf)
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")


def _data_shape(leaf: Any) -> tuple[int, ...]:
    """Of the array that is stored for a leaf: a key's data has axes of its own."""
    return jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else leaf.shape


def _describe(leaf: Any) -> dict[str, Any]:
    leaf = _array(leaf)
    entry = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    return entry | {"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else entry


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(tree: PyTree) -> str:
    """SHA-256, in hex, over the path, dtype, shape and bytes of every leaf, in the order of the paths.

    Two trees have one digest if and only if they are equal bit for bit (NaNs and signed zeros included).
    """
    hashed = lambda x: shards.sha256_of(x) if isinstance(x, shards.Part) else sha256(_host(x))
    entries = {path: _describe(x) | {"sha256": hashed(x)} for path, x in paths(tree).items()}
    return hashlib.sha256(_canonical(entries)).hexdigest()


def _orbax() -> tuple[Any, Any]:
    """Orbax takes a second to import, so only those who read or write a checkpoint do."""
    import orbax.checkpoint as ocp

    # What is written is our own copy (`snapshot`); by default Orbax makes another.
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    # Each process writes and reads by itself: it waits for no other one.
    one = ocp.options.MultiprocessingOptions(
        primary_host=distributed.index(), active_processes={distributed.index()},
        barrier_sync_key_prefix=f"process-{distributed.index()}",
    )  # fmt: skip
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=one)
    return ocp, ocp.Checkpointer(handler, multiprocessing_options=one)


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content | {"sha256": hashlib.sha256(_canonical(content)).hexdigest()}, indent=1)
    files.write(path, text.encode())


def _read_manifest(place: Path) -> dict[str, Any]:
    """What the manifest of a step says. Raises as `restore`, also at the first entry that is not what `write` gives."""
    path = place / MANIFEST
    try:
        content = files.parse_json(files.read(path, MANIFEST_BYTES))
        claimed, version = content.pop("sha256"), content["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointCorruptError(f"{path}: not a readable manifest ({error})") from error
    if isinstance(version, int) and version > FORMAT:
        raise UsageError(f"checkpoint {place}: format {version} is newer than {FORMAT}, which this version reads")
    if hashlib.sha256(_canonical(content)).hexdigest() != claimed:
        raise CheckpointCorruptError(f"{path}: its content does not match its SHA-256")

    def refuse(entry: str, words: str) -> None:
        raise CheckpointCorruptError(f"{path}: its entry {entry[:200]!r} must be {words}")

    if type(content["format"]) is not int:
        refuse("format", "an integer")
    if type(content.get("step")) is not int or content["step"] != int(place.name):
        refuse("step", f"{int(place.name)}, the number of its folder")
    for name in ("info", "leaves"):
        if not isinstance(content.get(name), dict):
            refuse(name, "an object")
    is_text = lambda x: isinstance(x, str)

    is_key = lambda x: is_text(x) and x.startswith("key<")  # a dtype of random keys, JAX's own

    def is_dtype(x: Any) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            kind = jnp.dtype(x) if is_text(x) else None
            return kind is not None and kind.kind != "m" and (kind.kind == "b" or jnp.issubdtype(kind, np.number))
        return False

    is_size = lambda n: type(n) is int and 0 <= n < 2**63
    fields = {
        "impl": (is_text, "the name of a kind of random keys"),
        "shape": (lambda x: isinstance(x, list) and all(map(is_size, x)), "a list of sizes"),
        "dtype": (is_dtype, "the name of a dtype"),
        "sha256": (is_sha256, "64 hexadecimal digits"),
    }
    for leaf, entry in content["leaves"].items():
        if not isinstance(entry, dict):
            refuse(leaf, "an object")
        given = entry | ({"sha256": "0" * 64} if "blocks" in entry else {})
        if not is_key(entry.get("dtype")):
            given = {"impl": ""} | given
        for name, (is_valid, words) in fields.items():
            is_valid = is_key if name == "dtype" and "impl" in entry else is_valid
            if not is_valid(given.get(name)):
                refuse(f"{leaf}: {name}", words)
        if "blocks" in entry and (words := shards.fault(entry["shape"], entry["blocks"])):
            refuse(f"{leaf}: blocks", words)
    return content


def _folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"{step:012d}"


def steps(folder: str | Path) -> list[int]:
    """Steps that `folder` holds, oldest first; [] if it does not exist. Links and what has other names are none."""
    try:
        with os.scandir(folder) as found:
            return sorted(int(x.name) for x in found if STEP.fullmatch(x.name) and x.is_dir(follow_symlinks=False))
    except OSError:
        return []


def latest(folder: str | Path) -> int | None:
    """The newest step, or None."""
    return max(steps(folder), default=None)


def _place(folder: str | Path, step: int | None) -> Path:
    """Where a step lies, the newest by default. Raises `UsageError` where there is none."""
    there = steps(folder)
    step = max(there, default=None) if step is None else step
    if step not in there:
        wanted = "" if step is None else f", not step {step}"
        raise UsageError(f"checkpoint {folder}: holds {f'steps {there}' if there else 'nothing'}{wanted}")
    return _folder(Path(folder).absolute(), step)


def snapshot(tree: PyTree) -> dict[str, Any]:
    """A copy of a tree in host memory, for `write`; the buffers of the tree may be donated or changed afterwards.

    Of what several processes share, the blocks that this one saves.
    """
    copied = lambda leaf: shards.own_blocks(leaf) if shards.is_shared(leaf) else _host(leaf).copy()
    return {path: (copied(leaf), _describe(leaf)) for path, leaf in paths(tree).items()}


def save(folder: str | Path, step: int, tree: PyTree, **options: Any) -> Path:
    """Saves a tree, whose leaves are arrays, random keys, or numpy or Python scalars, as one step; see `write`.

    To keep a best state apart, save it to a folder of its own with `keep=1`. `Saver` does the same in the background.
    """
    return write(folder, step, snapshot(tree), **options)


def write(
    folder: str | Path, step: int, leaves: dict[str, Any], *, keep: int = 3, since: int | None = None,
    info: dict[str, Any] | None = None, team: Team = ALONE
) -> Path:  # fmt: skip
    """Writes one step, then removes older ones but the newest; with this step, `keep` are left of these.

    Interrupted at any moment, it leaves the steps there were, or those and the new one. Steps with higher numbers, of
    which a run that goes on from an earlier one sets its own aside, are left alone.

    Args:
      folder: made if absent; not a link.
      step: not negative; replaces a step of this number.
      leaves: what `snapshot` gave.
      keep: at least 1.
      since: also keep all steps after this number, and the newest up to it.
      info: anything that JSON can say, read back by `info`.
      team: the processes that save together; each has to call. Only the first puts the step in its place.

    Returns:
      Where it lies.
    """
    folder = Path(folder).absolute()
    final = _folder(folder, step)
    if team.index:
        shards.hand_over(final, leaves, team)
        return final
    files.own_folder(folder)
    recover(folder, team)
    temporary, replaced = (folder / f".{final.name}.{kind}" for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        whole = {path: array for path, (array, _) in leaves.items() if isinstance(array, np.ndarray)}
        stored = {path: array for path, array in whole.items() if array.size}  # Orbax refuses size zero
        if stored:
            ocp, checkpointer = _orbax()
            with contextlib.closing(checkpointer):
                how = dict.fromkeys(stored, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
                checkpointer.save(temporary / "arrays", args=ocp.args.PyTreeSave(stored, how))
        blocks = shards.write(temporary, leaves, team)
        for other in range(1, team.count):
            for path, more in shards.take_over(final, temporary, team, other).items():
                blocks[path] += more
        hashed = lambda path: {"blocks": blocks[path]} if path in blocks else {"sha256": sha256(whole[path])}
        entries = {path: entry | hashed(path) for path, (_, entry) in leaves.items()}
        content = {"format": FORMAT if blocks else OLDEST, "step": step, "info": info or {}, "leaves": entries}
        _write_manifest(temporary / MANIFEST, content)
    except BaseException:
        files.remove(temporary)  # on a full disk, room for the next attempt
        raise
    if step in steps(folder):
        final.rename(replaced)
    elif os.path.lexists(final):  # not a step, so not ours to remove
        put_aside(folder, step)
    temporary.rename(final)
    _sync_folder(folder)
    files.remove(replaced)
    older = [old for old in steps(folder) if old < step]
    superseded = max(0, len(older) - (keep - 1))
    if since is not None:
        superseded = min(superseded, max(0, sum(old <= since for old in older) - 1))
    for old in older[:superseded]:
        files.remove(_folder(folder, old))
    return final


def recover(folder: str | Path, team: Team = ALONE) -> None:
    """Tidies up after a process that was killed while it saved: what it had begun goes, what it was replacing stays.

    Parts of what the team saves now, or is going to save, are left alone.
    """
    for path in sorted(Path(folder).iterdir()):
        if not (begun := BEGUN.fullmatch(path.name)):
            continue
        if begun[2].startswith("part") and not shards.is_outdated(begun[2], team):
            continue
        final = path.with_name(begun[1])
        if begun[2] == "old" and not path.is_symlink() and path.is_dir() and not os.path.lexists(final):
            path.rename(final)
        else:
            files.remove(path)


def _sync_folder(folder: Path) -> None:
    """Has the names in a folder survive a loss of power, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Saver:
    """Saves in the background, while training goes on. A save that fails is a warning, and the steps before it stay.

    Args:
      warn: is told, from the thread that calls `save`, `poll` or `close`, what went wrong.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: dict[Path, tuple[int, Future]] = {}
        self.failed: set[Path] = set()  # folders whose last save failed

    def save(self, folder: str | Path, step: int, tree: PyTree, **options: Any) -> None:
        """As the function `save`. Returns once the arrays are copied and an earlier save to this folder has ended."""
        folder = Path(folder)
        self._settle(folder)
        self._pending[folder] = step, self._pool.submit(write, folder, step, snapshot(tree), **options)

    def poll(self) -> None:
        """Warns of saves that have failed since; waits for nothing."""
        for folder in [folder for folder, (_, future) in self._pending.items() if future.done()]:
            self._settle(folder)

    def close(self) -> None:
        """Waits until all is written."""
        for folder in list(self._pending):
            self._settle(folder)
        self._pool.shutdown()

    def _settle(self, folder: Path) -> None:
        step, future = self._pending.pop(folder, (None, None))
        if future is None:
            return
        self.failed.discard(folder)
        try:
            future.result()
        except Exception as error:  # Orbax raises whatever its storage raises; training is worth more than one save
            self._count_failure(folder, step, error)

    def refuse(self, folder: Path, step: int, error: Exception) -> None:
        """Counts a save that could not begin as failed, once an earlier one to its folder has ended, and warns."""
        self._settle(folder)
        self._count_failure(folder, step, error)

    def _count_failure(self, folder: Path, step: int, error: Exception) -> None:
        self.failed.add(folder)
        kept = f"step {latest(folder)} is kept" if steps(folder) else "no earlier step is there"
        reason = str(error).strip().partition("\n")[0][:200]
        self._warn(f"warning: checkpoint {folder}: step {step} could not be saved ({reason}); {kept}")


def info(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """What `save` was given as `info`; of the newest step by default."""
    return _read_manifest(_place(folder, step))["info"]


def shapes(folder: str | Path, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a step by path, such as "replay/added"; random keys are left out."""
    entries = _read_manifest(_place(folder, step))["leaves"]
    return {
        path: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
        for path, entry in entries.items()
        if "impl" not in entry
    }


def _newest(
    folder: str | Path, read: Callable[[int], Any], together: bool = False
) -> tuple[int, Any, CheckpointCorruptError | None]:
    """The newest step that can be read, what `read` gives of it, and the error of the newest if that is another.

    Together, it is the newest that all processes can read.

    Raises `UsageError` where there is no step, and the error of the newest where none can be read.
    """
    _place(folder, None)
    newest, there = None, steps(folder)
    for step in reversed(distributed.exchange(there)[0] if together else there):
        found, error = None, None
        try:
            found = read(step)
        except CheckpointCorruptError as corrupt:
            error = corrupt
        elsewhere = together and not distributed.gather([error is None]).all()
        if error is None and not elsewhere:
            return step, found, newest
        newest = (
            newest or error or CheckpointCorruptError(f"{_folder(Path(folder), step)}: another process cannot read it")
        )
    raise newest


def check(folder: str | Path, template: PyTree) -> None:
    """Raises `UsageError` unless the newest step whose manifest can be read holds exactly the template's leaves.

    Raises `CheckpointCorruptError` where none can.
    """
    step, entries, _ = _newest(folder, lambda step: _read_manifest(_place(folder, step))["leaves"])
    _check_template(_place(folder, step), paths(template), entries, exact=True)


def _check_template(place: Path, template: dict[str, Any], entries: dict[str, Any], exact: bool) -> None:
    """Raises `UsageError` at the first leaf that is not as it was saved; with `exact` also where there are more."""
    for path, leaf in template.items():
        if path not in entries:
            raise UsageError(f"checkpoint {place}: holds no {path!r}; {OTHER}")
        saved = entries[path]["dtype"], tuple(entries[path]["shape"])
        if saved != (str(leaf.dtype), leaf.shape):
            raise UsageError(f"checkpoint {place}: {path!r} is {saved[0]} {saved[1]}, not {leaf.dtype} {leaf.shape}")
    if exact and entries.keys() - template.keys():
        more = min(entries.keys() - template.keys())
        raise UsageError(f"checkpoint {place}: holds {more!r} too; {OTHER}")


def _check_files(folder: Path) -> None:
    """Raises `OSError` where a folder holds anything but files and folders: to open a pipe would take forever."""

    def fail(error: OSError) -> None:
        raise error

    for place, inner, names in os.walk(folder, onerror=fail):
        for path in (Path(place) / name for name in (*inner, *names)):
            mode = path.stat().st_mode
            if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not path.is_symlink())):
                raise OSError(f"{path} is not a file")


def _read_blocks(place: Path, template: dict[str, Any], entries: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays out of their blocks: those that this process needs for the sharding of a leaf, zeros elsewhere.

    What is not written to takes no memory.
    """
    wanted: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for path, leaf in template.items():
        for block in entries[path]["blocks"]:
            if shards.is_needed(block, leaf):
                wanted.setdefault(block["part"], []).append((path, block))
    arrays = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in template.items()}
    for part, blocks in wanted.items():
        file = shards.file_of(place, part)
        try:
            for path, block in blocks:
                shards.put(arrays[path], block, file)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise CheckpointCorruptError(f"{file}: cannot be read ({reason})") from error
    return arrays


def _read_arrays(folder: Path, template: dict[str, Any]) -> dict[str, np.ndarray]:
    wanted = {path: leaf for path, leaf in template.items() if math.prod(_data_shape(leaf))}
    arrays = {path: np.zeros(_data_shape(leaf), leaf.dtype) for path, leaf in template.items() if path not in wanted}
    if not wanted:
        return arrays
    try:
        _check_files(folder)
        ocp, checkpointer = _orbax()
        args = ocp.args.PyTreeRestore(
            item=dict.fromkeys(wanted, 0),
            restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray) for path in wanted},
            partial_restore=True,
        )
        with contextlib.closing(checkpointer):
            found = checkpointer.metadata(folder).item_metadata.tree
            for path, leaf in wanted.items():  # a damaged description could ask for any amount of memory
                stored, shape = found[path], _data_shape(leaf)
                if tuple(stored.shape) != shape or math.prod(stored.storage.chunk_shape) > math.prod(shape):
                    raise ValueError(f"{path!r} has the shape {tuple(stored.shape)}, not {shape}")
            return arrays | checkpointer.restore(folder, args=args)
    except Exception as error:  # Orbax raises whatever its storage raises
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointCorruptError(f"{folder}: cannot be read ({reason})") from error


def restore(folder: str | Path, template: PyTree, step: int | None = None, *, exact: bool = False) -> PyTree:
    """Reads a tree of the template's structure, and no leaf that the template does not have.

    So `{"agent": agent_template}` reads the agent alone from the checkpoint of a whole run.

    Args:
      folder: as given to `save`.
      template: arrays or `jax.ShapeDtypeStruct`s, for instance from `jax.eval_shape`. A leaf with a `sharding` is put
        where that says, others on the default device; of a `shards.Part` that part is read, into host memory.
      step: the newest by default.
      exact: refuse what holds more than the template.

    Raises:
      UsageError: there is no such step, or it holds other leaves, shapes or dtypes; found before anything is allocated.
      CheckpointCorruptError: the files are not as they were written.
    """
    place = _place(folder, step)
    entries = _read_manifest(place)["leaves"]
    whole = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, shards.Part) else x
    shapes = jax.eval_shape(lambda tree: tree, jax.tree.map(whole, template))
    wanted = paths(shapes)
    _check_template(place, wanted, entries, exact)
    given = paths(template)
    in_blocks = {path: given[path] for path in wanted if "blocks" in entries[path]}
    arrays = _read_arrays(place / "arrays", {path: leaf for path, leaf in wanted.items() if path not in in_blocks})
    arrays |= _read_blocks(place, in_blocks, entries)
    leaves = []
    for path, leaf in wanted.items():
        array, entry = np.asarray(arrays.pop(path), order="C"), entries[path]
        if array.shape != _data_shape(leaf) or (path not in in_blocks and sha256(array) != entry["sha256"]):
            raise CheckpointCorruptError(f"{place / 'arrays'}: {path!r} does not match its SHA-256")
        value = _key(place, path, array, entry, leaf) if _is_key(leaf) else array
        if isinstance(given[path], shards.Part):
            leaves.append(value[given[path].place].copy())
        else:
            leaves.append(shards.placed(value, getattr(given[path], "sharding", None)))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _key(place: Path, path: str, array: np.ndarray, entry: dict[str, Any], leaf: Any) -> Any:
    """A random key from its data, of the kind that its dtype says."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        key = jax.random.wrap_key_data(array, impl=entry["impl"])
        if key.dtype == leaf.dtype:
            return key
    raise CheckpointCorruptError(f"{place / MANIFEST}: its entry '{path}: impl' is not that of {leaf.dtype}")


def restore_newest(
    folder: str | Path, template: PyTree, warn: Callable[[str], None], *, exact: bool = False, together: bool = False
) -> tuple[int, PyTree]:
    """Reads the newest step that is as it was written.

    Args:
      folder, template, exact: as for `restore`.
      warn: is told of every newer step that is damaged.
      together: all processes call, and read the same step.

    Returns:
      Its number, and the tree.

    Raises:
      UsageError: there is no step, or the newest whole one holds other leaves, shapes or dtypes.
      CheckpointCorruptError: all are damaged; it names a file of the newest.
    """
    step, tree, newest = _newest(folder, lambda step: restore(folder, template, step, exact=exact), together)
    if newest is not None:
        warn(f"warning: {newest}; using step {step}, the newest that is whole")
    return step, tree


def set_aside(folder: str | Path, after: int) -> list[int]:
    """Takes the steps after a number out of the list, for a run that goes on from that step; their files stay.

    Returns which they were.
    """
    later = [step for step in steps(folder) if step > after]
    for step in later:
        put_aside(folder, step)
    return later


def put_aside(folder: str | Path, step: int) -> None:
    """Takes a step out of the list; its files stay, until another of this number is put there."""
    place = _folder(folder, step)
    aside = place.with_suffix(".damaged")
    files.remove(aside)
    place.rename(aside)
