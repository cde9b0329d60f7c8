"""JSON of nothing but numbers in lists, regular ones, without a Python object for each number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from wmjax import files
from wmjax.authors.stored import RANK, Refused

BYTES = 40 * 10**6  # of a file; the authors' largest has 31 MB at most
COUNT = 8 * 10**6  # numbers in it
LISTS = 10**5  # of them; the authors' V has 20,000
_NUMBER = rb"-?(?:0|[1-9][0-9]{0,30})(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,3})?"
_SPACE = rb"[ \t\r\n]*"
_RUN = re.compile(_SPACE + _NUMBER + rb"(?:" + _SPACE + rb"," + _SPACE + _NUMBER + rb")*+" + _SPACE)
_BETWEEN = re.compile(_SPACE + rb"([\[\],]|\Z)" + _SPACE)


class _List:
    """A list that is open: how many entries it has, and the shape that all of them have."""

    def __init__(self):
        self.count, self.inner = 0, None

    def add(self, shape: tuple[int, ...], count: int = 1) -> None:
        if self.count and shape != self.inner:
            raise Refused(f"lists in it are not regular: entries of the shapes {self.inner} and {shape} in one")
        self.count, self.inner = self.count + count, shape


def load(path: Path) -> list[np.ndarray]:
    """The entries of the outermost list, float32 each; a number is an array without axes.

    Raises `Refused` where it is anything else, cut off, too long, or has numbers that are not finite in float32;
    `OSError`.
    """
    text = files.read(path, BYTES)
    start = re.compile(_SPACE + rb"\[" + _SPACE).match(text)
    if start is None:
        raise Refused("it is no JSON list of numbers")
    found: list[np.ndarray] = []
    parts: list[np.ndarray] = []  # of the entry that is being read
    lists: list[_List] = []  # that are open in the outermost one
    at, left, opened, after_value = start.end(), COUNT, 0, False

    def entry(shape: tuple[int, ...]) -> None:
        if lists:
            lists[-1].add(shape)
        else:
            found.append(np.concatenate(parts).reshape(shape) if parts else np.zeros(shape, np.float32))
            parts.clear()

    while True:
        if not after_value and (run := _RUN.match(text, at)):
            numbers = _floats(run[0])
            left -= numbers.size
            if left < 0:
                raise Refused(f"it holds more than {COUNT:,} numbers")
            if lists:
                lists[-1].add((), numbers.size)
                parts.append(numbers)
            else:
                found.extend(numbers)
            at, after_value = run.end(), True
            continue
        between = _BETWEEN.match(text, at)
        sign = between[1] if between else None
        if not sign and between:
            raise Refused("it is cut off")
        if sign == b"," and after_value:
            after_value = False
        elif sign == b"[" and not after_value:
            lists.append(_List())
            opened += 1
            if len(lists) > RANK or opened > LISTS:
                raise Refused(f"lists in it lie more than {RANK} deep, or are more than {LISTS:,}")
        elif sign == b"]" and after_value:
            if not lists:
                break
            done = lists.pop()
            entry((done.count, *done.inner))
        else:
            raise Refused(f"it is no JSON list of numbers, at byte {at:,}: {text[at : at + 20]!r}")
        at = between.end()
    if between.end() != len(text):
        raise Refused(f"more follows the end of its list, at byte {between.end():,}")
    return [np.asarray(x) for x in found]


def _floats(run: bytes) -> np.ndarray:
    """Numbers with commas between them, float32."""
    with np.errstate(over="ignore"):
        numbers = np.fromstring(run, np.float32, sep=",")
    if not np.isfinite(numbers).all():
        raise Refused("it holds a number that float32 cannot hold")
    return numbers
