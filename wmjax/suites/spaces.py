"""What Gymnasium's spaces become: named images, vectors and choices, and actions of three kinds.

`plain` says what a space is in data that JSON can hold. From it an `ObsReader` and an `ActionReader` are made, wherever
they are needed: in the workers, and in the main process for a program that acts by itself. They are pure functions with
what they need beside them, and can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from wmjax.suites import SuiteError, pictures

CONTAINERS = ("Dict", "Tuple")
KINDS = (*CONTAINERS, "Box", "Discrete", "MultiDiscrete", "MultiBinary")
MOST_CHOICES = 2**20  # of an entry or an action, which become one-hot
UNBOUNDED = float(np.finfo(np.float32).max)  # how some libraries write "no bound"
TAKES = {"f": "fiub", "i": "iub", "u": "iub", "b": "iub"}  # kinds of numbers that are read for a kind of dtype


class Fault(Exception):
    """What an environment gave is not what its spaces say; the message names the entry."""


# ---------------------------------------------------------------------------------------------------------------------
# What a space is


def plain(space: Any) -> dict[str, Any]:
    """A `gymnasium.Space` as data for JSON: its kind, and what that kind has. Of an unknown kind, only its name."""
    # Those that derive from one of Gymnasium's count as that.
    kind = next((cls.__name__ for cls in type(space).__mro__ if cls.__name__ in KINDS), type(space).__name__)
    if kind in CONTAINERS:
        items = space.spaces.items() if kind == "Dict" else enumerate(space.spaces)
        return {"kind": kind, "spaces": [[_key(key), plain(inner)] for key, inner in items]}
    about = {"kind": kind}
    if kind in KINDS:
        about |= {"dtype": str(np.dtype(space.dtype)), "shape": list(space.shape)}
    if kind == "Box":
        about |= {"low": _compact(space.low), "high": _compact(space.high)}
    if kind == "Discrete":
        about |= {"n": int(space.n), "start": int(space.start)}
    if kind == "MultiDiscrete":
        about |= {"nvec": np.ravel(space.nvec).tolist(), "start": np.ravel(space.start).tolist()}
    return about


def _key(key: Any) -> str | int:
    if isinstance(key, str | int):
        return key
    raise SuiteError(f"env: the key {key!r} of its observation_space is not valid; strings and integers are")


def _compact(bound: np.ndarray) -> Any:
    """One number where all entries agree, else one for each, in lists."""
    bound = np.asarray(bound)
    bound = bound.astype(np.float64) if bound.dtype.kind == "f" else bound  # exact, but for longer ones
    alike = bound.size > 0 and (bound == bound.flat[0]).all()
    return bound.flat[0].item() if alike else bound.tolist()


def _show(about: dict[str, Any]) -> str:
    if about["kind"] != "Box":
        return f"of the kind {about['kind']}"
    low, high = (bound if not isinstance(bound, list) else "[...]" for bound in (about["low"], about["high"]))
    return f"Box({low}, {high}, {tuple(about['shape'])}, {about['dtype']})"


def _check_size(what: str, about: dict[str, Any]) -> None:
    """Raises `SuiteError` for a space that holds nothing, such as a box of the shape (0,), or too many choices."""
    if math.prod(about.get("shape", ())) == 0:
        raise SuiteError(f"env: {what} has the shape {tuple(about['shape'])}, which holds nothing")
    count = about["n"] if about["kind"] == "Discrete" else sum(about.get("nvec", ()))
    if count > MOST_CHOICES:
        raise SuiteError(f"env: {what} has {count:,} choices; valid are at most {MOST_CHOICES:,}")


# ---------------------------------------------------------------------------------------------------------------------
# Observations


class Entry(NamedTuple):
    """One entry of observations: what is given for it, and what is read."""

    name: str
    kind: str  # "image", "vector", "choice" or "one_hot"
    given: tuple[int, ...]  # shape of what is given
    dtype: np.dtype  # of that, or of what its numbers can be cast to
    shape: tuple[int, ...]  # of what is read
    low: Any  # bounds of what is given, numbers or arrays
    high: Any
    order: tuple[int, ...] = ()  # of an image's axes, see `pictures.axes`
    counts: tuple[int, ...] = ()  # of choices
    starts: tuple[int, ...] = ()
    any_size: bool = False  # whether an image of any height and width may be given

    def describe(self) -> dict[str, Any]:
        """Name, dtype and shape of what is read, its bounds or number of choices."""
        about = {"name": self.name, "dtype": "float32", "shape": list(self.shape)}
        if self.kind == "image":
            return about | {"dtype": "uint8", "low": 0, "high": 255}
        if self.kind == "choice":
            return about | {"dtype": "int32", "n": self.counts[0]}
        if self.kind == "one_hot":
            return about | {"low": 0.0, "high": 1.0}
        return about | {"low": float(np.min(self.low)), "high": float(np.max(self.high))}

    def read(self, value: Any) -> np.ndarray:
        """What is given, as uint8 `[H, W, C]`, float32 `[D]` or an int32. Raises `Fault` where it is another thing."""
        array = self._checked(value)
        if self.kind == "image":
            image = pictures.arrange(array.astype(np.uint8, copy=False), self.order)
            return image if image.shape == self.shape else pictures.resize(image, self.shape[0])
        if self.kind == "choice":
            return np.int32(int(array) - self.starts[0])
        if self.kind == "one_hot":
            flat = np.zeros(self.shape, np.float32)
            flat[np.cumsum((0, *self.counts[:-1])) + array.ravel().astype(np.int64) - self.starts] = 1
            return flat
        return array.astype(np.float32, copy=False).reshape(self.shape)

    def _checked(self, value: Any) -> np.ndarray:
        what = f"observation {self.name!r}"
        try:
            array = np.asarray(value)
        except Exception:  # lists of unequal lengths, a tensor on another device, whatever converting it raises
            raise Fault(f"{what} is not an array, {self._valid()} is") from None
        if array.dtype.kind not in "fiub" and array.shape == ():
            raise Fault(f"{what} is {value!r:.80}, not {self._valid()}")
        if not self._fits(array.shape):
            raise Fault(f"{what} has the shape {array.shape}, not {self.given}")
        if array.dtype.kind not in TAKES[self.dtype.kind]:
            shown = f"{value!r:.80}" if self.kind == "choice" else array.dtype
            raise Fault(f"{what} is {shown}, not {self._valid()}")
        if self.dtype.kind == "f":
            with np.errstate(over="ignore"):
                array = array.astype(np.float32, copy=False)
            if not np.isfinite(array).all():  # as float64 it may have been
                raise Fault(f"{what} is not finite")
            return array
        outside = (array < self.low) | (array > self.high)
        if outside.any():
            shown = array[outside].flat[0]
            raise Fault(f"{what} is {shown}, not {self._valid()}" if self.kind == "choice" else
                        f"{what} holds {shown}, which is outside of {self._valid()}")  # fmt: skip
        return array

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if self.any_size:
            return len(shape) == 3 and shape[2] == self.given[2] and min(shape) > 0
        return shape == self.given

    def _valid(self) -> str:
        if self.kind == "choice":
            return f"one of {self.counts[0]} choices from {self.starts[0]} upwards"
        if self.dtype.kind == "f":
            return str(self.dtype)
        return f"{self.dtype} in [{np.min(self.low)}, {np.max(self.high)}]"


class ObsReader(NamedTuple):
    """Turns observations of one environment into arrays by name.

    Pictures (uint8 `[H, W]`, `[H, W, C]` or `[C, H, W]`, or a stack of them, see `pictures.axes`) are called "image"
    and become uint8 `[H, W, C]`. A `Discrete` entry is called "choice" and becomes an int32. Other boxes are called
    "vector", as are `MultiDiscrete` (one-hot) and `MultiBinary`, and become float32 `[D]`. Entries of a `Dict` keep
    their own names, joined with "/" where nested.
    """

    space: dict[str, Any]  # `plain`
    entries: tuple[Entry, ...]
    image_size: int | None = None  # that was asked for

    def describe(self) -> list[dict[str, Any]]:
        """Name, dtype, shape, bounds and number of choices of every entry."""
        return [entry.describe() for entry in self.entries]

    def read(self, obs: Any) -> dict[str, np.ndarray]:
        """Arrays of an observation by name. Raises `Fault` where it is not what the space says, or not finite."""
        values = _walk(self.space, obs)
        return {entry.name: entry.read(value) for entry, value in zip(self.entries, values, strict=True)}

    def accept(self, obs: Any) -> dict[str, np.ndarray]:
        """As `read`, of observations in the environment's own form or, in all or in part, as `read` gives them.

        So it takes a dictionary by the names of entries, the one entry alone, and entries that have the shape that
        is read (where the environment's own shape is another one; a choice is always its own). Raises `Fault`.
        """
        names = {entry.name for entry in self.entries}
        if isinstance(obs, Mapping) and set(obs) == names:
            values: Iterable[Any] = [obs[entry.name] for entry in self.entries]
        elif len(names) == 1 and not isinstance(obs, Mapping | tuple):
            values = [obs]
        else:
            values = _walk(self.space, obs)
        return {entry.name: _accept(entry, value) for entry, value in zip(self.entries, values, strict=True)}

    def pictures(self) -> bool:
        """Whether any entry is a picture."""
        return any(entry.kind == "image" for entry in self.entries)

    def notes(self) -> list[str]:
        """What is done to pictures that are not read as they are, a line for each such entry."""
        said = []
        for entry in self.entries:
            if entry.kind == "image":
                height, width = (entry.given[axis] for axis in entry.order[:2])
                stacked = f"{entry.given[0]} pictures side by side in the channels" if len(entry.given) == 4 else ""
                sized = f"{height}x{width} resized to {entry.shape[0]}x{entry.shape[1]}"
                parts = [stacked, sized if (height, width) != entry.shape[:2] else ""]
                said += [f"observation {entry.name!r}: {', '.join(filter(None, parts))}"] if any(parts) else []
        return said


def obs_reader(space: dict[str, Any], image_size: int | None) -> ObsReader:
    """The reader of a space.

    Args:
      space: what `plain` said.
      image_size: side of all pictures; None for their own where they are square and at most 128 pixels wide, else 64.

    Raises:
      SuiteError: a space of another kind, one that may or may not be pictures, or an image size without a picture.
    """
    entries = tuple(_entry(path, leaf, image_size) for path, leaf in _leaves(space))
    if not entries:
        raise SuiteError("env: its observation_space has no entries")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SuiteError(f"env: two entries of its observation_space are called {twice!r}; names must differ")
    reader = ObsReader(space, entries, image_size)
    if image_size is not None and not reader.pictures():
        raise SuiteError(f"image_size: {image_size} is not valid for an environment that observes no picture")
    return reader


def reader_of(described: list[dict[str, Any]], any_size: bool = True) -> ObsReader:
    """The reader of observations that are by themselves what `Entry.describe` says; pictures may have `any_size`."""
    entries = tuple(_described(about, any_size) for about in described)
    return ObsReader({"kind": "Dict", "spaces": [[entry.name, {"kind": ""}] for entry in entries]}, entries)


def _described(about: dict[str, Any], any_size: bool) -> Entry:
    name, shape, dtype = about["name"], tuple(about["shape"]), np.dtype(about["dtype"])
    low, high = about.get("low", 0), about.get("high", about.get("n", 0) - 1)
    if "n" in about:
        return Entry(name, "choice", (), dtype, (), low, high, counts=(about["n"],), starts=(0,))
    if dtype == np.uint8 and len(shape) == 3:
        any_size = any_size and shape[0] == shape[1]
        return Entry(name, "image", shape, dtype, shape, 0, 255, order=(0, 1, 2), any_size=any_size)
    return Entry(name, "vector", shape, dtype, shape, low, high)


def _accept(entry: Entry, value: Any) -> np.ndarray:
    try:
        shape = np.shape(value)
    except ValueError:  # lists of unequal lengths, as `read` says
        shape = entry.given
    if entry.kind != "choice" and shape == entry.shape != entry.given:
        return _described(entry.describe(), any_size=False).read(value)
    if entry.kind == "vector" and entry.dtype.kind != "f" and shape == entry.shape:
        array = np.asarray(value)  # whole numbers may be written as what is read, which is float32
        if array.dtype.kind == "f" and ((array == np.rint(array)) & (array >= entry.low) & (array <= entry.high)).all():
            return array.astype(np.float32)
    return entry.read(value)


def _leaves(space: dict[str, Any], path: tuple = ()) -> Iterator[tuple[tuple, dict[str, Any]]]:
    if space["kind"] in CONTAINERS:
        for key, inner in space["spaces"]:
            yield from _leaves(inner, (*path, key))
    else:
        yield path, space


def _walk(space: dict[str, Any], obs: Any, names: tuple[str, ...] = ()) -> Iterator[Any]:
    """The leaves of an observation, in the order of `_leaves`. Raises `Fault` where its containers are others."""
    if space["kind"] not in CONTAINERS:
        yield obs
        return
    what = f"observation {'/'.join(names)!r}" if names else "it"
    keys = [key for key, _ in space["spaces"]]
    called = lambda key: repr("/".join((*names, str(key))))
    if space["kind"] == "Dict":
        if not isinstance(obs, Mapping):
            raise Fault(f"{what} is {_short(obs)}, not a dict with the entries {keys}")
        for key in [key for key in obs if key not in keys]:
            raise Fault(f"observation {called(key)} is not in its space, whose entries are {keys}")
        for key in [key for key in keys if key not in obs]:
            raise Fault(f"observation {called(key)} is missing; the entries of its space are {keys}")
    elif not isinstance(obs, tuple | list | np.ndarray) or getattr(obs, "shape", None) == () or len(obs) != len(keys):
        raise Fault(f"{what} is {_short(obs)}, not a tuple of {len(keys)}")
    for key, inner in space["spaces"]:
        yield from _walk(inner, obs[key], (*names, str(key)))


def _short(value: Any) -> str:
    """A value in a message: what it is where it is small, or its type."""
    if isinstance(value, np.ndarray):
        return f"an array of the shape {value.shape}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if value is None or isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _entry(path: tuple, about: dict[str, Any], image_size: int | None) -> Entry:
    kind, named = about["kind"], "/".join(map(str, path))
    if kind not in KINDS:
        raise SuiteError(
            f"env: observation {named or kind.lower()!r} is a {kind} space, which is not supported; valid are Box, "
            "Discrete, MultiDiscrete, MultiBinary, and a Dict or Tuple of these"
        )
    name = named or ("image" if _order(about) else "choice" if kind == "Discrete" else "vector")
    _check_size(f"observation {name!r}", about)
    shape, dtype = tuple(about["shape"]), np.dtype(about["dtype"])
    if kind == "Box":
        return _box(name, not path, about, image_size)
    if kind == "Discrete":
        start, count = about["start"], about["n"]
        return Entry(name, "choice", (), dtype, (), start, start + count - 1, counts=(count,), starts=(start,))
    if kind == "MultiDiscrete":
        counts, starts = tuple(about["nvec"]), tuple(about["start"])
        low = np.reshape(starts, shape)
        high = low + np.reshape(counts, shape) - 1
        return Entry(name, "one_hot", shape, dtype, (sum(counts),), low, high, counts=counts, starts=starts)
    return Entry(name, "vector", shape, dtype, (math.prod(shape),), 0, 1)


def _order(about: dict[str, Any]) -> tuple[int, ...] | None:
    """The axes of a box of pictures, as `pictures.axes` says; None for any other space."""
    picture = about["kind"] == "Box" and about["dtype"] == "uint8" and np.max(about["high"]) >= pictures.BRIGHT
    return pictures.axes(tuple(about["shape"])) if picture else None


def _box(name: str, bare: bool, about: dict[str, Any], image_size: int | None) -> Entry:
    shape, dtype = tuple(about["shape"]), np.dtype(about["dtype"])
    low, high = (np.asarray(about[x]) if isinstance(about[x], list) else about[x] for x in ("low", "high"))
    order = _order(about)
    if order is not None:
        height, width = (shape[axis] for axis in order[:2])
        size = pictures.default_size(height, width) if image_size is None else image_size
        channels = math.prod(shape) // (height * width)
        return Entry(name, "image", shape, dtype, (size, size, channels), low, high, order=order)
    least, most = float(np.min(low)), float(np.max(high))
    if (dtype == np.uint8 and len(shape) == 3) or pictures.resemble(shape, least, most):
        raise SuiteError(f"env: {pictures.remedy(name, bare, shape, str(dtype), least, most)}")
    return Entry(name, "vector", shape, dtype, (math.prod(shape),), low, high)


# ---------------------------------------------------------------------------------------------------------------------
# Actions


class ActionReader:
    """Turns an int32 choice, int32 choices `[k]` or float32 `[A]` into an action of a Gymnasium space.

    The action is contained in the space, and of the type that `space.sample()` gives: an integer of NumPy's, or an
    array of the space's dtype and shape. Where float32 cannot tell a box's numbers apart (bounds above 3.4e38 or below
    1e-30, or an interval that is narrow for where it lies), the box is described as [-1, 1] and stretched here.

    Raises `SuiteError` for spaces (as `plain` says) other than `Discrete`, `MultiDiscrete`, `MultiBinary` and a `Box`
    of floats.
    """

    def __init__(self, space: dict[str, Any]) -> None:
        kind = space["kind"]
        floats = kind == "Box" and space["dtype"] in ("float16", "float32", "float64")
        if not floats and kind not in ("Discrete", "MultiDiscrete", "MultiBinary"):
            integers = "; integers in bounds are a MultiDiscrete" if kind == "Box" else ""
            raise SuiteError(
                f"env: its action space {_show(space)} is not supported; valid are Discrete, MultiDiscrete, "
                f"MultiBinary and a Box of floats of 16 to 64 bits{integers}"
            )
        _check_size("its action space", space)
        self.space = space
        self._kind, self._dtype, self._shape = kind, np.dtype(space["dtype"]), tuple(space["shape"])
        size = math.prod(self._shape)
        if kind == "Box":
            low, high = (
                np.broadcast_to(np.asarray(space[x], np.float64), self._shape).ravel() for x in ("low", "high")
            )
            self._low, self._high, self._stretched = low, high, _needs_float64(low, high)
            if self._stretched:
                low, high = -np.ones(size), np.ones(size)
            about = {"kind": "box", "low": low.tolist(), "high": high.tolist(), "dtype": "float32", "shape": [size]}
        elif kind == "Discrete":
            self._start = space["start"]
            about = {"kind": "discrete", "n": space["n"], "dtype": "int32", "shape": []}
        else:
            self._start = np.array(space.get("start", [0] * size), self._dtype)
            about = {"kind": "multi_discrete", "ns": space.get("nvec", [2] * size), "dtype": "int32", "shape": [size]}
        self._about = about

    def describe(self) -> dict[str, Any]:
        """Kind, dtype, shape, and choices or bounds."""
        return self._about

    def read(self, action: Any) -> Any:
        """The action for the environment's `step`, from one as described."""
        if self._kind == "Discrete":
            return self._dtype.type(self._start + int(action))
        if self._kind != "Box":
            return (self._start + np.asarray(action).astype(self._dtype)).astype(self._dtype).reshape(self._shape)
        action = np.asarray(action, np.float64).ravel()
        if self._stretched:
            action = (1 - action) / 2 * self._low + (1 + action) / 2 * self._high
        # Bounds are of the space's dtype, and rounding to it keeps the order, so what is clipped stays within.
        return np.clip(action, self._low, self._high).astype(self._dtype).reshape(self._shape)

    def sample(self, rng: np.random.Generator) -> Any:
        """Any action as described, to try the environment with; numbers without a bound are drawn near 0."""
        about = self._about
        if about["kind"] != "box":
            return rng.integers(about["n"] if about["kind"] == "discrete" else about["ns"])
        low, high = (np.clip(about[x], -1e4, 1e4) for x in ("low", "high"))
        return (low + rng.random(low.shape) * (high - low)).astype(np.float32)


def _needs_float64(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether an interval of finite bounds has too few numbers of float32, or none."""
    largest = np.maximum(np.abs(low), np.abs(high))
    if not (largest < np.finfo(np.float64).max).all() or (largest == UNBOUNDED).any():
        return False  # it has no bounds
    apart = high > low
    few = high / 2 - low / 2 < 1e-3 * largest / 2
    return bool((apart & (few | (largest > UNBOUNDED) | (largest < 1e-30))).any())
