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
from typing import Any

import numpy as np

from wmjax import files

SUFFIX = ".safetensors"
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
