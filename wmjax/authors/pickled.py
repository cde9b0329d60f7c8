"""Pickles read as data, by a machine that imports nothing and calls nothing but the functions of a given table.

Python's own unpickler runs what a pickle names, and allocates what it asks for before it looks whether that is there.
Here an opcode that checkpoints have no need of is refused by its name, and so is a name that is not in the table; texts
and opcodes are bounded, and long runs of bytes stay in the file: what is given is where they lie.

Source: the opcodes are those of Python's `pickletools`.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from wmjax import checks
from wmjax.authors.stored import Refused

OPCODES = 100_000  # a checkpoint of a thousand tensors has a third of that
TEXT_BYTES = 2**16  # of one text
READ_BYTES = 2**24  # of all texts and short runs of bytes together
INLINE_BYTES = 256  # longer runs of bytes are not read
NAME_BYTES = 256  # of a module, or of what it holds
PROTOCOL = 5

Names = Mapping[str, Callable | None]  # by "module.name", what stands for a call of it; None: it is not called


class Run(NamedTuple):
    """Bytes that lie in the file and were not read."""

    offset: int
    size: int


class Global(NamedTuple):
    """A name of the table."""

    name: str
    call: Callable | None


class Built:
    """What a function of the table gives, where a pickle may say more of it afterwards."""

    def build(self, state: Any) -> None:
        """Takes what is said. Raises `Refused` where it is not valid."""
        raise NotImplementedError


def load(file: BinaryIO, size: int, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle of protocol 2 to 5 says, of None, truth values, numbers, texts, bytes, lists, tuples, dictionaries.

    Args:
      file: at the start of the pickle, which takes all of the rest.
      size: bytes of the file up to there.
      names: what it may name.
      persistent: what stands for something that the pickle says is stored elsewhere; None: it may not.

    Raises:
      Refused: it is cut off, or asks for anything else.
    """
    machine = _Machine(file, size, names, persistent)
    try:
        return machine.run()
    except IndexError:
        raise Refused("its pickle takes what is not there") from None
    except RecursionError:
        raise Refused("its pickle is nested too deeply") from None


class _Machine:
    """The stack, what is kept of it, and where the file is."""

    def __init__(self, file, size, names, persistent):
        self.file, self.left, self.names, self.persistent = file, size - file.tell(), names, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack where a mark was set
        self.kept: dict[int, Any] = {}
        self.budget = READ_BYTES

    def run(self) -> Any:
        if self.take(1) != b"\x80":
            raise Refused("it is not a pickle of protocol 2 to 5")
        if not 2 <= (protocol := self.take(1)[0]) <= PROTOCOL:
            raise Refused(f"its pickle is of protocol {protocol}; 2 to {PROTOCOL} are read")
        for _ in range(OPCODES):
            code = self.take(1)
            if code == b".":
                if self.left:
                    raise Refused(f"{self.left:,} bytes follow the end of its pickle")
                (value,) = self.popped(1)
                return value
            if code not in STEPS:
                known = pickletools.code2op.get(code.decode("latin-1"))
                name = known.name if known else repr(code)
                raise Refused(f"its pickle has the opcode {name}, which no tensors need and which is not followed")
            STEPS[code](self)
        raise Refused(f"its pickle has more than {OPCODES:,} opcodes")

    # Reading.

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise Refused("its pickle is cut off")
        self.budget -= count
        if self.budget < 0:
            raise Refused(f"its pickle has more than {READ_BYTES:,} bytes besides its tensors")
        data = self.file.read(count)
        self.left -= len(data)
        if len(data) < count:
            raise Refused("its pickle is cut off")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        data = b""
        while not data.endswith(b"\n"):
            if len(data) > NAME_BYTES:
                raise Refused("its pickle has a name that is too long")
            data += self.take(1)
        return self.decoded(data[:-1])

    def decoded(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("its pickle has text that is not UTF-8") from None

    def text(self, form: str) -> None:
        count = self.number(form)
        if count > TEXT_BYTES:
            raise Refused(f"its pickle has a text of {count:,} bytes; at most {TEXT_BYTES:,} are read")
        self.stack.append(self.decoded(self.take(count)))

    def run_of_bytes(self, form: str) -> None:
        count = self.number(form)
        if count <= INLINE_BYTES:
            self.stack.append(self.take(count))
            return
        if count > self.left:
            raise Refused(f"its pickle is cut off: {count:,} bytes should follow, and {self.left:,} do")
        self.stack.append(Run(self.file.tell(), count))
        self.file.seek(count, 1)
        self.left -= count

    def frame(self) -> None:
        if self.number("<Q") > self.left:
            raise Refused("its pickle is cut off")

    def integer(self) -> None:
        count = self.take(1)[0]
        if count > 8:
            raise Refused(f"its pickle has an integer of {count} bytes; at most 8 are read")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    # The stack.

    def popped(self, count: int) -> list[Any]:
        """The last values, which no mark may lie between."""
        first = len(self.stack) - count
        if first < (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def after_mark(self) -> list[Any]:
        first = self.marks.pop()
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def make_tuple(self, count: int | None) -> None:
        self.stack.append(tuple(self.after_mark() if count is None else self.popped(count)))

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("its pickle appends to what is no list")
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        into = self.stack[-1]
        if not isinstance(into, dict) or len(values) % 2:
            raise Refused("its pickle sets entries of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise Refused("its pickle has a dictionary with keys that are neither text nor integers")
            into[key] = value

    def keep(self, place: int) -> None:
        self.kept[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.kept:
            raise IndexError
        self.stack.append(self.kept[place])

    # Names, and what is made by them.

    def named(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        if type(module) is not str or type(name) is not str or full not in self.names:
            raise Refused(f"its pickle names {checks.show(full)}, which no tensors need; it is not imported")
        self.stack.append(Global(full, self.names[full]))

    def reduce(self) -> None:
        function, args = self.popped(2)
        if type(function) is not Global or function.call is None or type(args) is not tuple:
            raise Refused("its pickle calls what no tensors need to be called; it is not followed")
        try:
            self.stack.append(function.call(*args))
        except (TypeError, OverflowError):
            raise Refused(f"its pickle calls {function.name} in a way that is not known") from None

    def build(self) -> None:
        (state,) = self.popped(1)
        if not isinstance(self.stack[-1], Built):
            raise Refused("its pickle sets attributes of what has none; it is not followed")
        self.stack[-1].build(state)

    def elsewhere(self) -> None:
        (what,) = self.popped(1)
        if self.persistent is None:
            raise Refused("its pickle says that something is stored elsewhere")
        self.stack.append(self.persistent(what))


STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x95": _Machine.frame,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m.stack.append(m.number("<i")),
    b"K": lambda m: m.stack.append(m.number("<B")),
    b"M": lambda m: m.stack.append(m.number("<H")),
    b"\x8a": _Machine.integer,
    b"G": lambda m: m.stack.append(m.number(">d")),
    b"\x8c": lambda m: m.text("<B"),
    b"X": lambda m: m.text("<I"),
    b"\x8d": lambda m: m.text("<Q"),
    b"C": lambda m: m.run_of_bytes("<B"),
    b"B": lambda m: m.run_of_bytes("<I"),
    b"\x8e": lambda m: m.run_of_bytes("<Q"),
    b"\x96": lambda m: m.run_of_bytes("<Q"),
    b"]": lambda m: m.stack.append([]),
    b"a": lambda m: m.extend(m.popped(1)),
    b"e": lambda m: m.extend(m.after_mark()),
    b")": lambda m: m.stack.append(()),
    b"t": lambda m: m.make_tuple(None),
    b"\x85": lambda m: m.make_tuple(1),
    b"\x86": lambda m: m.make_tuple(2),
    b"\x87": lambda m: m.make_tuple(3),
    b"}": lambda m: m.stack.append({}),
    b"s": lambda m: m.set_items(m.popped(2)),
    b"u": lambda m: m.set_items(m.after_mark()),
    b"q": lambda m: m.keep(m.number("<B")),
    b"r": lambda m: m.keep(m.number("<I")),
    b"\x94": lambda m: m.keep(len(m.kept)),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": lambda m: m.named(*m.popped(2)),
    b"R": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.elsewhere,
}
