"""Immutable files of records. A file is named by the SHA-256 of its bytes, so a torn one is known by its name.

The format is that of safetensors, which other tools read: eight bytes with the length of a JSON header, the header with
dtype, shape and offsets of every array, and the arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

SUFFIX = ".safetensors"
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
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    parts = [_header(arrays), *(array.reshape(-1).view(np.uint8).data for array in arrays.values())]
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    final = path_of(folder, hasher.digest())
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return hasher.digest()


def is_whole(folder: Path, digest: bytes) -> bool:
    """Whether the file of a digest is there and as it was written."""
    try:
        with path_of(folder, digest).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == digest
    except OSError:
        return False


def mapped(folder: Path, digest: bytes) -> dict[str, np.ndarray]:
    """The arrays of a whole file, mapped to memory, read-only. They keep one file descriptor between them."""
    with path_of(folder, digest).open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(buffer[:8], "little")
    names = {short: long for long, short in DTYPES.items()}
    arrays = {}
    for name, entry in json.loads(buffer[8:start]).items():
        shape, offset = entry["shape"], start + entry["data_offsets"][0]
        arrays[name] = np.frombuffer(buffer, names[entry["dtype"]], math.prod(shape), offset).reshape(shape)
    return arrays


def keep(folder: Path, digests: Iterable[bytes]) -> None:
    """Removes all files but those of some digests."""
    wanted = {path_of(folder, digest).name for digest in digests}
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    for path in folder.glob(f".*{SUFFIX}.tmp"):
        path.unlink(missing_ok=True)
