"""NumPy's arrays in a pickle."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from wmjax import checks, files
from wmjax.authors import pickled
from wmjax.authors.stored import Refused, Stored, check_shape, size_of

DTYPES = ("b1", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
CORE = ("numpy.core", "numpy._core")  # up to NumPy 1, and from 2 on


class _Dtype(pickled.Built):
    def __init__(self, code: Any, *how: Any):
        if code not in DTYPES:
            raise Refused(f"an array in it has the dtype {checks.show(code)}; {', '.join(DTYPES)} are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise Refused("an array in it has a byte order that is not known")
        self.dtype = self.dtype.newbyteorder(order)


class Array(pickled.Built):
    """An array that a pickle describes, as it does."""

    def __init__(self, path: Path):
        self.path, self.stored = path, None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or type(state[3]) is not bool:
            raise Refused("an array in it is described in a way that is not known")
        _, shape, dtype, columns_first, data = state
        self.describe(data, dtype, shape, "F" if columns_first else "C")

    def describe(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | pickled.Run) or order not in ("C", "F"):
            raise Refused("an array in it is described in a way that is not known")
        shape, dtype = check_shape(shape), dtype.dtype
        size = data.size if isinstance(data, pickled.Run) else len(data)
        if size_of(shape, dtype) != size:
            raise Refused(f"an array in it of shape {shape} and dtype {dtype} should have other than {size:,} bytes")
        get = partial(files.part, self.path, *data) if isinstance(data, pickled.Run) else lambda: data
        self.stored = Stored(shape, dtype, lambda: np.frombuffer(get(), dtype).reshape(shape, order=order))


def names(path: Path) -> pickled.Names:
    """What a pickle in a file may name so that it holds arrays."""

    def from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
        array = Array(path)
        array.describe(data, dtype, shape, order)
        return array

    return {
        "numpy.dtype": _Dtype,
        "numpy.ndarray": None,
        **dict.fromkeys((f"{core}.multiarray._reconstruct" for core in CORE), lambda kind, shape, code: Array(path)),
        **dict.fromkeys((f"{core}.numeric._frombuffer" for core in CORE), from_buffer),
    }


def load(path: Path) -> Any:
    """What a pickle says that may hold arrays. Raises `Refused` where it holds more, `OSError` where it cannot be read.

    `pickletools` tells what it asks for; nothing of that is done.
    """
    with files.open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        return pickled.load(file, size, names(path))
