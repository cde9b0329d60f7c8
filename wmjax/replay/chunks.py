"""Immutable files of records. A file is named by the SHA-256 of its bytes, so a torn one is known by its name.

The format is that of safetensors, which other tools read: eight bytes with the length of a JSON header, the header with
dtype, shape and offsets of every array, and the arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmjax import files

SUFFIX = ".safetensors"
PARTS = "parts"  # in a file that lists others: uint8 [files, 32], each with as many columns, side by side
NAME = re.compile("[0-9a-f]{64}" + re.escape(SUFFIX))  # files of other names are not ours
HEADER_BYTES = 2**20
ALIGN = 64  # bytes; of the header, so that arrays can be mapped to memory
DTYPES = {
    "uint8": "U8", "bool": "BOOL", "int32": "I32", "float32": "F32", "float16": "F16", "int64": "I64", "float64": "F64",
}  # fmt: skip


def _header(arrays: Mapping[str, np.ndarray]) -> bytes:
    entries, offset = {}, 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        entries[name] = {"dtype": DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def path_of(folder: Path, digest: bytes) -> Path:
    """Where the file of a digest lies."""
    return folder / (digest.hex() + SUFFIX)


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Writes arrays as one file, whole or not at all; returns its digest. Raises `OSError`, as where a disk is full."""
    files.own_folder(folder)
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    parts = [_header(arrays), *(array.reshape(-1).view(np.uint8).data for array in arrays.values())]
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    files.write(path_of(folder, hasher.digest()), *parts)
    return hasher.digest()


def is_whole(folder: Path, digest: bytes) -> bool:
    """Whether the file of a digest is there and as it was written."""
    try:
        with files.open_regular(path_of(folder, digest)) as file:
            return hashlib.file_digest(file, "sha256").digest() == digest
    except OSError:
        return False


def mapped(folder: Path, digest: bytes) -> dict[str, np.ndarray]:
    """The arrays of a whole file, mapped to memory, read-only. They keep one file descriptor between them.

    Raises `ValueError` where the file is not one of arrays.
    """
    with files.open_regular(path_of(folder, digest)) as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(buffer[:8], "little")
    if size > min(HEADER_BYTES, len(buffer) - 8):
        raise ValueError(f"a header of {size} bytes")
    start, names, arrays = 8 + size, {short: long for long, short in DTYPES.items()}, {}
    try:
        for name, entry in files.parse_json(buffer[8:start]).items():
            shape, offset = entry["shape"], start + entry["data_offsets"][0]
            arrays[name] = np.frombuffer(buffer, names[entry["dtype"]], math.prod(shape), offset).reshape(shape)
    except (AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"its header is not one of arrays ({error})") from None
    return arrays


def parts(folder: Path, digest: bytes) -> list[bytes]:
    """Digests of the files that together hold what a file stands for: its own, or those that it lists.

    Raises `OSError` or `ValueError` where it is torn or missing.
    """
    if not is_whole(folder, digest):
        raise ValueError("it is torn or missing")
    found = mapped(folder, digest)
    if found.keys() != {PARTS}:
        return [digest]
    if found[PARTS].dtype != np.uint8 or found[PARTS].shape[1:] != (32,) or not len(found[PARTS]):
        raise ValueError("it lists no files")
    return [row.tobytes() for row in found[PARTS]]


class Range(NamedTuple):
    """Some of the columns that files hold together."""

    begin: int
    end: int
    of: int  # columns there are


def columns(folder: Path, digest: bytes, wanted: Range) -> tuple[dict[str, np.ndarray], bytes | None]:
    """Columns of the arrays `[rows, columns, ...]` that a file stands for, and which file has just these, if one has.

    Raises `OSError` or `ValueError` where a file that is needed is torn or missing, or is not one of such columns.
    """
    listed = parts(folder, digest)
    if wanted.of % len(listed):
        raise ValueError(f"{len(listed)} files do not share {wanted.of} columns")
    each = wanted.of // len(listed)
    needed = range(wanted.begin // each, -(-wanted.end // each))
    if not all(listed[i] == digest or is_whole(folder, listed[i]) for i in needed):
        raise ValueError("a file that it lists is torn or missing")
    found = [mapped(folder, listed[i]) for i in needed]
    if any(x.ndim < 2 or x.shape[1] != each for arrays in found for x in arrays.values()):
        raise ValueError(f"its arrays do not have {each} columns")
    if any(arrays.keys() != found[0].keys() for arrays in found):
        raise ValueError("its files hold different arrays")
    if (wanted.begin, wanted.end) == (needed.start * each, needed.stop * each) and len(found) == 1:
        return found[0], listed[needed.start]
    own = slice(wanted.begin - needed.start * each, wanted.end - needed.start * each)
    return {name: np.concatenate([x[name] for x in found], 1)[:, own] for name in found[0]}, None


def keep(folder: Path, digests: Iterable[bytes]) -> None:
    """Removes all of our files but those of some digests."""
    wanted = {path_of(folder, digest).name for digest in digests}
    _remove(folder, lambda name: NAME.fullmatch(name) is not None and name not in wanted)


def tidy(folder: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    _remove(folder, lambda name: (begun := files.TEMPORARY.fullmatch(name)) is not None and NAME.fullmatch(begun[1]))


def _remove(folder: Path, unwanted: Callable[[str], Any]) -> None:
    if folder.is_symlink() or not folder.is_dir():  # what a link leads to is not ours
        return
    for path in folder.iterdir():
        if unwanted(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
