"""Files in folders that others may have written to: read within bounds, and written without following a link.

A file is written beside its name and then takes that name, so that it is whole or not there. What had the name before
is replaced and not written to, be it a link or one of several names of a file elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

# What `replacing` calls a file, and the name that it is to have.
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}-(.+)", re.DOTALL)


def _not_regular(path: Path, what: str = "not a regular file") -> OSError:
    return OSError(errno.EINVAL, what, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read. Raises `OSError` where it is a pipe or a device, which may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


def read(path: Path, limit: int) -> bytes:
    """The bytes of a file. Raises `OSError` where it is not a regular one, or has more than `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", str(path))
    return data


def part(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file. Raises `OSError` where it is not a regular one, or does not have so many there any more."""
    with open_regular(path) as file:
        if offset + size > os.fstat(file.fileno()).st_size:
            raise OSError(errno.EIO, "it has become shorter", str(path))
        file.seek(offset)
        return file.read(size)


def parse_json(data: bytes) -> Any:
    """What JSON in UTF-8 says, a byte order mark before it or not.

    Raises `ValueError` also for what Python's own parser lets pass or fails at: NaN and infinities, integers beyond any
    float, a name that is given twice, nesting without end.
    """
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            parse_constant=_refuse,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text:.80} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _whole(text: str) -> int:
    if math.isinf(float(text)):
        raise ValueError(f"{text:.80} is beyond any float")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} is given twice")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def own_folder(path: Path) -> None:
    """Makes a folder if there is none. Raises `OSError` where another thing has its name, a link to a folder too."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, which is not followed to write", str(path))
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, to be written in the context; then it takes that name.

    Its own name ends like that of `path`. Raises `OSError` where it cannot be made, or where a folder, a pipe or a
    device has the name; the file is then removed.
    """
    path = Path(path)
    _check_replaceable(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))
    try:
        yield temporary
        _check_replaceable(path)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise _not_regular(path, "a folder" if stat.S_ISDIR(mode) else "not a regular file")


def write(path: Path, *parts: Any) -> None:
    """Writes bytes, or buffers of them, one after the other, so that they survive a loss of power."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def open_to_append(path: Path) -> int:
    """A descriptor that writes at the end of a file. Raises `OSError` where that is a link, or has other names too."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, as far as that can be done."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
