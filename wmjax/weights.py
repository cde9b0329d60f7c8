"""Parameters in one file: what an agent acts and dreams by, and the trained agents that come with the package.

A file of safetensors has a tensor for each array, by the names of its modules, such as "rssm/gru/kernel". Its metadata,
JSON by name, says the rest:

    wmjax         the number of this format
    description   what `config.json` of the run says: agent, environment, configuration
    card          where the parameters come from and what they achieve: command, steps, time, return, digest
    sha256        of each tensor

A file is data: its sizes are checked before anything is read, and what it names is made under the rules of `run.load`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wmjax import checks, files
from wmjax.loops import checkpoint, memory, shards
from wmjax.loops.on_data import spec_alone
from wmjax.names import nearest
from wmjax.run_folder import ONE, Say, check_description, read_description
from wmjax.types import Agent, Array, EnvSpec, PyTree, TimeStep, UsageError

FORMAT = 1
SUFFIX, PREFIX = ".safetensors", "pretrained:"
PRETRAINED = Path(__file__).parent / "pretrained"  # AGENT/ENV.safetensors
HEADER_BYTES = 2**22
DTYPES = {"F32": "float32", "F16": "float16"}  # of tensors, by the names that files have for them


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters


def acting(agent: Agent, spec: EnvSpec) -> dict[str, PyTree]:
    """Shapes of the parameters that acting, dreaming and planning read, by module; critics, for one, are left out.

    What is read is seen in a trace of all functions of the agent and its model; nothing is computed.
    """
    variables = jax.eval_shape(agent.init, jax.random.key(0)).variables
    leaves, structure = jax.tree.flatten(variables)
    owners = jax.tree.leaves({name: jax.tree.map(lambda x, name=name: name, tree) for name, tree in variables.items()})

    def all_functions(leaves: list[Array], key: Array, step: TimeStep) -> PyTree:
        params, model = jax.tree.unflatten(structure, leaves), agent.model
        step = jax.tree.map(lambda x: x[None], step)
        carry = agent.act_carry(params, 1)
        carry, action, _ = agent.act(params, key, carry, step, explore=False)
        embed = model.encode(params, step.obs)
        state = model.observe(params, key, model.init_state(params, 1), action, embed, step.is_first)
        state = model.imagine(params, key, state, action)
        chosen = agent.policy(params, key, agent.policy_carry(params, 1), state, explore=False)
        return carry, chosen, model.predict(params, state), model.decode(params, state)

    _, step = spec_alone(spec).reset(jax.random.key(0))
    traced = jax.make_jaxpr(all_functions)(leaves, jax.random.key(0), step).jaxpr
    read = {id(variable) for equation in traced.eqns for variable in equation.invars}
    names = {name for name, variable in zip(owners, traced.invars, strict=False) if id(variable) in read}
    return {name: tree for name, tree in variables.items() if name in names}


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, of leaves by name. Raises `ValueError` where a name is of a leaf and of a dictionary."""
    tree: dict[str, Any] = {}
    for name, leaf in sorted(leaves.items()):
        *modules, last = name.split("/")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
            if not isinstance(inner, dict):
                raise ValueError(name)
        if last in inner:
            raise ValueError(name)
        inner[last] = leaf
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Which file


def pretrained() -> list[str]:
    """Names of the agents that come with the package, such as "dreamer_v3/catch"."""
    return sorted(str(path.relative_to(PRETRAINED).with_suffix("")) for path in PRETRAINED.glob(f"*/*{SUFFIX}"))


def locate(path: str | Path) -> Path | None:
    """The file that is meant by its path, or by "pretrained:NAME"; None for any other path, which may be a run folder.

    Raises `UsageError` for an unknown NAME, with the nearest.
    """
    if str(path).startswith(PREFIX):
        name, known = str(path).removeprefix(PREFIX), pretrained()
        if name not in known:
            raise nearest("pretrained", name, known)
        return PRETRAINED / f"{name}{SUFFIX}"
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else None


def outputs(path: str | Path, digest: str) -> Path:
    """Where evaluations and pictures of a file are written: a folder in the current one, which may not be there yet.

    Of a file that is not the package's it has the first digits of its digest: others may have the same name. Raises
    `UsageError` where something else, or a link, has the name.
    """
    folder = Path(f"exported-{Path(path).stem}-{digest[:8]}")
    if str(path).startswith(PREFIX):
        folder = Path("pretrained-" + str(path).removeprefix(PREFIX).replace("/", "-"))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(
            f"run: what comes of {str(path)!r} is written to {str(folder)!r}, which is there and is no folder"
        )
    return folder


def description_of(path: str | Path) -> dict[str, Any]:
    """What a run folder, a file or a pretrained agent says of its run. Raises `UsageError` where it is none."""
    file = locate(path)
    return read_description(path) if file is None else read(file).description


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class File(NamedTuple):
    """What a file says; its tensors are not read yet."""

    path: Path
    description: dict[str, Any]
    card: dict[str, Any]
    tensors: dict[str, jax.ShapeDtypeStruct]  # as they are stored, by name
    sha256: dict[str, str]  # of each


def _refused(path: Path, reason: str) -> UsageError:
    return UsageError(f"run: {str(path)!r} cannot be read: {reason}")


def read(path: str | Path, say: Say | None = None) -> File:
    """What a file says, and shapes of what it holds; `say` is told where a newer version has written it.

    Raises `UsageError` where it is not one of `wmjax export`, is cut off, or says what is not valid.
    """
    path = checks.path("run", path)
    refuse = partial(_refused, path)
    try:
        _check_header(path)
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
    except OSError as error:
        raise refuse(error.strerror or str(error)) from None
    except SafetensorError as error:
        raise refuse(f"it is not whole ({error})") from None
    if "wmjax" not in metadata:
        raise refuse("it is not a file of `wmjax export`, for its metadata does not say so")
    if metadata["wmjax"] != str(FORMAT):
        raise refuse(f"its format is {checks.show(metadata['wmjax'])}; {FORMAT} is read by this version")
    said = {}
    for name in ("description", "card", "sha256"):
        try:
            said[name] = files.parse_json(metadata.get(name, "").encode())
        except ValueError as error:
            raise refuse(f"{name} in its metadata is no JSON ({error})") from None
    by = check_description(said["description"], refuse, "description")
    if by and say is not None:
        say(f"warning: {path}{by}; what it says may mean something else there")
    _check_card(said["card"], refuse)
    if not isinstance(said["sha256"], dict):
        raise refuse("sha256 in its metadata must be an object")
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise refuse(f"its tensor {checks.show(name)} is of {dtype}; {' and '.join(DTYPES)} are valid")
    tensors = {name: jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for name, (dtype, shape) in found.items()}
    description = said["description"] | ONE
    return File(path, description, said["card"], tensors, said["sha256"])


def _check_header(path: Path) -> None:
    """Raises `UsageError` where the header is too long, or a tensor is not all there.

    The library checks sizes too, but names no tensor, and takes headers of any length up to 100 MB.
    """
    with files.open_regular(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(HEADER_BYTES, size):
            raise _refused(
                path, f"its header would have {length:,} bytes; at most {min(HEADER_BYTES, size):,} are valid"
            )
        try:
            header = files.parse_json(file.read(length))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            cut = [name for name, end in ends.items() if 8 + length + end > size]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise _refused(path, "its header is not one of safetensors") from None
    if cut:
        first = min(cut, key=ends.get)
        raise _refused(path, f"it ends before its tensor {checks.show(first)} does; it is cut off")


def _number_or_none(name: str, value: Any) -> None:
    checks.optional(name, value, checks.Bounds(-checks.LARGEST, checks.LARGEST, whole=False))


def _return(name: str, value: Any) -> None:
    """Of a card: numbers, and pairs of them, by name; or None."""
    if value is not None and not isinstance(value, dict):
        raise checks.invalid(name, value, "an object or null")
    for key, inner in (value or {}).items():
        for number in inner if isinstance(inner, list) else [inner]:
            if isinstance(number, str):
                checks.text(f"{name}: {key:.40}", number)
            else:
                _number_or_none(f"{name}: {key:.40}", number)


def _digest(name: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise checks.invalid(name, value, "64 hexadecimal digits")


# What raises `UsageError` where an entry of a card is not valid.
CARD = {
    "command": checks.text,
    "seed": checks.number,
    "steps": partial(checks.number, bounds=checks.Bounds(0, checks.COUNT)),
    "which": partial(checks.choice, valid=("latest", "best")),
    "seconds": _number_or_none,
    "device": checks.text,
    "version": checks.text,
    "parameters": partial(checks.number, bounds=checks.Bounds(0, 2**53)),
    "dtype": partial(checks.choice, valid=tuple(DTYPES.values())),
    "return": _return,
    "digest": _digest,
}


def _check_card(card: Any, refuse: Any) -> None:
    if not isinstance(card, dict):
        raise refuse("card in its metadata must be an object")
    for name, check in CARD.items():
        try:
            if name not in card:
                raise UsageError(f"{name} is missing")
            check(name, card[name])
        except UsageError as error:
            raise refuse(f"in its card {error}") from None


def check_shapes(file: File, template: dict[str, PyTree]) -> None:
    """Raises `UsageError`, naming the first tensor, where a file holds others than a template of dictionaries."""
    wanted, about = checkpoint.paths(template), file.description
    of = f"{about['agent']} on {about['env'] or 'its environment'} has, as it is configured in the file"
    for name, leaf in wanted.items():
        if name not in file.tensors:
            raise _refused(file.path, f"it holds no tensor {name!r}, which {of}")
        if file.tensors[name].shape != leaf.shape:
            shape = file.tensors[name].shape
            raise _refused(file.path, f"its tensor {name!r} has the shape {shape}, not {leaf.shape}, which {of}")
    if more := file.tensors.keys() - wanted.keys():
        raise _refused(file.path, f"it holds the tensor {checks.show(min(more))} too, which is none that {of}")


def check_memory(tensors: Iterable[Any], times: int, refuse: Callable[[str], UsageError]) -> None:
    """Raises what `refuse` makes of the reason where so many times the size of tensors does not fit in memory."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors)
    free = memory.available_bytes()
    if free is not None and times * size > memory.SPARE * free:
        words = f"its tensors take {memory.amount(size)} and {memory.amount(free)} of memory are free"
        raise refuse(f"{words}; {times} times their size is needed to read them")


def load(file: File) -> dict[str, PyTree]:
    """The parameters of a file, float32, in nested dictionaries.

    Raises `UsageError` where they would not fit in memory, or a tensor is not what was written.
    """
    check_memory(file.tensors.values(), 3, partial(_refused, file.path))
    stored = {}
    try:
        with safe_open(file.path, "numpy") as opened:
            for name in file.tensors:
                stored[name] = opened.get_tensor(name)
                if not np.isfinite(stored[name]).all():
                    raise _refused(file.path, f"its tensor {checks.show(name)} holds numbers that are not finite")
                if shards.sha256(stored[name]) != file.sha256.get(name):
                    raise _refused(
                        file.path, f"its tensor {checks.show(name)} does not match its SHA-256; it is damaged"
                    )
    except (OSError, SafetensorError) as error:
        raise _refused(file.path, str(error)) from None
    try:
        tree = nested(stored)
    except ValueError as error:
        raise _refused(file.path, f"its tensor {checks.show(str(error))} has a name that others begin with") from None
    if checkpoint.digest(tree) != file.card["digest"]:
        raise _refused(file.path, "its tensors together do not match the digest of its card")
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def narrowed(params: dict[str, PyTree], dtype: str) -> dict[str, PyTree]:
    """Parameters as NumPy arrays of a dtype.

    Raises `UsageError`, naming the first, where it cannot hold one, or one is not finite.
    """
    small = {}
    for name, x in checkpoint.paths(params).items():
        x = np.asarray(x)
        with np.errstate(over="ignore"):
            small[name] = x.astype(dtype, order="C")
        if not np.isfinite(x).all():
            raise UsageError(f"run: its parameter {name!r} holds numbers that are not finite; nothing acts by them")
        if not np.isfinite(small[name]).all():
            most = np.abs(x).max()
            raise UsageError(f"dtype: {dtype!r} cannot hold {name!r}, which goes up to {most:g}; float32 can")
    return nested(small)


def write(path: Path, params: dict[str, PyTree], description: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """Writes a file, and returns its card with the digest of its parameters.

    Raises `OSError` where it cannot be written.
    """
    stored, card = checkpoint.paths(params), card | {"digest": checkpoint.digest(params)}
    sha256 = {name: shards.sha256(x) for name, x in stored.items()}
    said = {"description": description, "card": card, "sha256": sha256}
    metadata = {"wmjax": str(FORMAT)} | {name: json.dumps(value) for name, value in said.items()}
    files.write(path, save(stored, metadata))
    return card
