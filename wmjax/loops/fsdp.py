"""Parameters and optimizers' states spread over devices (FSDP): which part of an agent's state a device holds.

Between updates a device holds its part alone, as `RULES` say. An update gathers the parameters, and nothing else: the
mean gradient is scattered to the devices and each takes the step of its own columns of the optimizers' states
(`optim.descend`). Agents know nothing of it. They are given whole parameters, and what they give back is cut again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import jax

from wmjax.ops import flat
from wmjax.replay.host import tree_bytes
from wmjax.types import AgentState, Array, Axes, PyTree, UsageError

AXES = Axes("devices", "parts")
WHOLE = -1  # in the place of an axis: every device holds all of it
LEAST = flat.WIDTH  # entries, below which an array takes less than it would cost to gather


def _largest(shape: tuple[int, ...], parts: int) -> int:
    """The largest axis that can be divided evenly, of equal ones the last."""
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(axes, key=lambda axis: (shape[axis], axis)) if axes and math.prod(shape) >= LEAST else WHOLE


def _columns(shape: tuple[int, ...], parts: int) -> int:
    """The columns of rows that `ops.flat` made, whatever their number: `optim.descend` counts on it."""
    return 1 if len(shape) == 2 and shape[1] == flat.WIDTH else WHOLE


def _whole(shape: tuple[int, ...], parts: int) -> int:
    return WHOLE


# The first pattern that a leaf's path in `AgentState` begins with says along which axis it is spread.
RULES: tuple[tuple[str, Callable[[tuple[int, ...], int], int]], ...] = (
    ("params/|non_trainable/", _largest),
    ("opt_state/controller/", _whole),  # a search, which every device tells all results
    ("opt_state/", _columns),
    ("", _whole),
)


def check(parts: int, devices: int) -> None:
    """Raises `UsageError` unless so many devices can hold parameters in so many parts."""
    valid = [n for n in range(1, devices + 1) if devices % n == 0 and flat.WIDTH % n == 0]
    if parts not in valid:
        what = "one device" if devices == 1 else f"{devices} devices"
        listed = f"{', '.join(map(str, valid))} {'are' if len(valid) > 1 else 'is'}"
        raise UsageError(f"shard_params: {parts} is not valid with {what}; {listed}")


def axes(state: AgentState, parts: int, lead: int = 0) -> AgentState:
    """The axis that each leaf is spread over, an int, or `WHOLE`.

    Args:
      state: arrays, or their shapes, whole.
      parts: that it is divided into.
      lead: axes before those of one seed, which are not counted.
    """

    def axis(path: tuple, leaf: Array) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next(rule for pattern, rule in RULES if re.match(pattern, name))(leaf.shape[lead:], parts)

    return jax.tree_util.tree_map_with_path(axis, state)


def part_bytes(state: AgentState, parts: int) -> int:
    """What each device holds of an agent's state, or of its shapes."""
    size = lambda x, axis: tree_bytes(x) // (1 if axis == WHOLE else parts)
    return sum(jax.tree.leaves(jax.tree.map(size, state, axes(state, parts))))


# ---------------------------------------------------------------------------------------------------------------------
# In a program of one of several devices, under the named axis `AXES.parts`


def _gather(x: Array, axis: int) -> Array:
    return x if axis == WHOLE else jax.lax.all_gather(x, AXES.parts, axis=axis, tiled=True)


def _cut(x: Array, axis: int) -> Array:
    """What `_gather` was given."""
    if axis == WHOLE:
        return x
    size = x.shape[axis] // jax.lax.axis_size(AXES.parts)
    return jax.lax.dynamic_slice_in_dim(x, size * jax.lax.axis_index(AXES.parts), size, axis)


def gather(where: AgentState, state: AgentState) -> AgentState:
    """The state with whole parameters; optimizers' states stay as they are. `where` is what `axes` gave."""
    parameters = lambda state: (state.params, state.non_trainable)
    params, non_trainable = jax.tree.map(_gather, parameters(state), parameters(where))
    return state._replace(params=params, non_trainable=non_trainable)


def on_parts(where: AgentState, function: Callable) -> Callable:
    """A function `(state, *args) -> (state, *more)` of whole parameters, as one of what a device holds of them."""
    kept = where._replace(opt_state=jax.tree.map(lambda _: WHOLE, where.opt_state))

    def call(state: AgentState, *args: PyTree) -> tuple:
        whole = gather(where, state)
        new, *more = function(whole, *args)
        # What a function leaves alone stays the same value.
        cut = lambda new, old, part, axis: part if new is old else _cut(new, axis)
        return jax.tree.map(cut, new, whole, state, kept), *more

    return call


def wrappers(where: AgentState) -> dict[str, Callable]:
    """What `device.make_stage` is given so that a device holds only a part of the state."""
    return {"each": partial(on_parts, where), "whole": partial(gather, where)}
