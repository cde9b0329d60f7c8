"""Files of `torch.save`: an archive of one pickle and one member for each storage, none of them compressed.

Names, sizes and places of all members are checked before one is read, and its bytes against their CRC-32 when it is.

Source: the layout of ZIP archives is PKWARE's APPNOTE; what PyTorch keeps in one is in its notes on serialization.
"""

from __future__ import annotations

import io
import math
import re
import stat
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from wmjax import checks, files
from wmjax.authors import pickled
from wmjax.authors.stored import Refused, Stored, check_shape

MEMBERS = 20_000
DIRECTORY_BYTES = 2**23
PICKLE_BYTES = 2**24
TAIL = 22 + 2**16  # bytes in which the end of an archive is looked for: a record, and a comment

# Storages, as PyTorch calls them; bfloat16 is the upper half of a float32.
DTYPES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": "<u2", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "<i1", "Byte": "<u1", "Bool": "<u1",
}  # fmt: skip


class Member(NamedTuple):
    """Where the bytes of a member lie."""

    offset: int
    size: int
    crc: int


class Archive(NamedTuple):
    """Members by name."""

    path: Path
    members: dict[str, Member]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Raises `Refused` where there is none, it has more than `limit` bytes, or it is damaged."""
        if name not in self.members:
            raise Refused(f"it holds no {checks.show(name)}")
        member = self.members[name]
        if limit is not None and member.size > limit:
            raise Refused(f"its {checks.show(name)} has {member.size:,} bytes; at most {limit:,} are read")
        data = files.part(self.path, member.offset, member.size)
        if zlib.crc32(data) != member.crc:
            raise Refused(f"its {checks.show(name)} does not match its CRC-32; it is damaged")
        return data


# ---------------------------------------------------------------------------------------------------------------------
# The archive


def open_archive(path: Path) -> Archive:
    """The members of an archive. Raises `Refused` where it is not one of `torch.save`; `OSError`."""
    with files.open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":
            raise Refused("it is not an archive as torch.save writes them (from PyTorch 1.6 on)")
        count, length, start = _directory(file, size)
        if count > MEMBERS or length > DIRECTORY_BYTES or start + length > size:
            raise Refused(f"its directory has {count:,} members in {length:,} bytes at {start:,}, which is not valid")
        file.seek(start)
        directory = _exactly(file, length)
        members: dict[str, Member] = {}
        position = 0
        for _ in range(count):
            name, offset, length, crc, position = _entry(directory, position)
            if name in members:
                raise Refused(f"it holds {checks.show(name)} twice")
            members[name] = Member(_data(file, name, offset, length, start), length, crc)
    end = 0
    for name, member in sorted(members.items(), key=lambda item: item[1].offset):
        if member.offset < end:
            raise Refused(f"its member {checks.show(name)} lies within another one")
        end = member.offset + member.size
    return Archive(path, members)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise Refused("it is cut off")
    return data


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Members, bytes and place of the directory, from the record at the end."""
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise Refused("it has no directory at its end; it is cut off")
    disk, first, here, count, length, start, comment = struct.unpack("<4xHHHHIIH", tail[at : at + 22])
    if at + 22 + comment != len(tail) or disk or first or here != count:
        raise Refused("the record at its end is not valid")
    if count == 0xFFFF or length == 0xFFFFFFFF or start == 0xFFFFFFFF:
        if at < 20 or tail[at - 20 : at - 16] != b"PK\x06\x07":
            raise Refused("the record at its end is not valid")
        (place,) = struct.unpack("<8xQ4x", tail[at - 20 : at])
        if place + 56 > size:
            raise Refused("the record at its end is not valid")
        file.seek(place)
        record = _exactly(file, 56)
        if record[:4] != b"PK\x06\x06":
            raise Refused("the record at its end is not valid")
        count, length, start = struct.unpack("<32xQQQ", record)
    return count, length, start


def _entry(directory: bytes, at: int) -> tuple[str, int, int, int, int]:
    """Name, place of the header, bytes and CRC-32 of a member, and where the next entry begins."""
    if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > len(directory):
        raise Refused("its directory is not valid")
    flags, method, crc, packed, size, n, m, k, attributes, offset = struct.unpack(
        "<8xHH4xIIIHHH4xII", directory[at : at + 46]
    )
    end = at + 46 + n + m + k
    if end > len(directory):
        raise Refused("its directory is not valid")
    try:
        name = directory[at + 46 : at + 46 + n].decode("utf-8")
    except UnicodeDecodeError:
        raise Refused("a member has a name that is not UTF-8") from None
    _check_name(name, attributes >> 16)
    if flags & 1:
        raise Refused(f"its member {checks.show(name)} is encrypted")
    if method:
        raise Refused(f"its member {checks.show(name)} is compressed, which torch.save does not do; it is not unpacked")
    packed, size, offset = _wide(directory[at + 46 + n : at + 46 + n + m], packed, size, offset)
    if packed != size:
        raise Refused(f"its member {checks.show(name)} would have {size:,} bytes, of {packed:,} in the file")
    return name, offset, size, crc, end


def _wide(extra: bytes, packed: int, size: int, offset: int) -> tuple[int, int, int]:
    """Sizes and place of a member, which an extra field of 64 bits holds where they need so many."""
    at, wide = 0, []
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            wide = list(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
        at += 4 + length
    found = []
    for value in (size, packed, offset):  # in the order of the field
        if value == 0xFFFFFFFF:
            if not wide:
                raise Refused("its directory is not valid")
            value = wide.pop(0)
        found.append(value)
    return found[1], found[0], found[2]


def _check_name(name: str, mode: int) -> None:
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ".." in parts or "" in parts or ":" in parts[0]:
        raise Refused(f"its member {checks.show(name)} has a name that is not valid in such a file")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        raise Refused(f"its member {checks.show(name)} is a link or no file")


def _data(file: BinaryIO, name: str, offset: int, length: int, end: int) -> int:
    """Where the bytes of a member begin. Raises `Refused` where they do not lie before `end`, or its header differs."""
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Refused(f"its member {checks.show(name)} is not where its directory says")
    n, m = struct.unpack("<26xHH", header)
    if file.read(n) != name.encode():
        raise Refused(f"its member {checks.show(name)} has another name where it lies")
    start = offset + 30 + n + m
    if start + length > end:
        raise Refused(f"its member {checks.show(name)} is cut off")
    return start


# ---------------------------------------------------------------------------------------------------------------------
# The tensors in it


class _Dict(dict, pickled.Built):
    """An `OrderedDict`; of a state dict a pickle says the version of its modules besides, which is left out."""

    def build(self, state: Any) -> None:
        del state


class _Storage(NamedTuple):
    kind: str
    member: str
    count: int


def load(path: Path) -> Any:
    """What `torch.save` has written, with tensors as `Stored`. Raises `Refused` where it holds more; `OSError`."""
    archive = open_archive(path)
    pickles = [name for name in archive.members if re.fullmatch("[^/]+/data.pkl", name)]
    if len(pickles) != 1:
        raise Refused("it does not hold one data.pkl, as a file of torch.save does")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.members and archive.read(f"{folder}byteorder", 16) != b"little":
        raise Refused("its numbers are not little-endian")

    def storage(what: Any) -> _Storage:
        is_one = isinstance(what, tuple) and len(what) == 5 and what[0] == "storage" and type(what[4]) is int
        if not is_one or not isinstance(what[1], pickled.Global) or not isinstance(what[2], str):
            raise Refused("its pickle says that something is stored elsewhere")
        kind, member = what[1].name.removeprefix("torch.").removesuffix("Storage"), f"{folder}data/{what[2]}"
        if kind not in DTYPES or member not in archive.members:
            raise Refused(f"it holds no {checks.show(member)}, which its pickle says to be a {kind:.20} storage")
        size, has = what[4] * np.dtype(DTYPES[kind]).itemsize, archive.members[member].size
        if not 0 <= size <= has:
            raise Refused(f"its {checks.show(member)} has {has:,} bytes, and its pickle says {size:,}")
        return _Storage(kind, member, what[4])

    names = {
        "collections.OrderedDict": lambda: _Dict(),
        "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(archive, *args),
        "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
        **{f"torch.{kind}Storage": None for kind in DTYPES},
    }
    data = archive.read(pickles[0], PICKLE_BYTES)
    return pickled.load(io.BytesIO(data), len(data), names, storage)


def _tensor(archive: Archive, storage: Any, offset: Any, shape: Any, strides: Any, *how: Any) -> Stored:
    """A tensor: a part of a storage. It may not have more entries than that."""
    shape, strides = check_shape(shape), check_shape(strides)
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise Refused("a tensor in it is described in a way that is not known")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count and (last >= storage.count or count > storage.count):
        raise Refused(f"a tensor in it of shape {shape} is not all in its storage of {storage.count:,} numbers")
    dtype = np.dtype(DTYPES[storage.kind])

    def read() -> np.ndarray:
        flat = np.frombuffer(archive.read(storage.member), dtype, storage.count)
        steps = [stride * dtype.itemsize for stride in strides]
        array = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False).copy()
        return (array.astype("<u4") << 16).view("<f4") if storage.kind == "BFloat16" else array

    return Stored(shape, np.dtype("<f4") if storage.kind == "BFloat16" else dtype, read)
