"""A traced program without calls in calls: one list of operations, of which other programs have the like.

What is left are loops and what computes. Where a program is lowered in several ways, this is the one that is not for a
CPU: there `nets.conv` cuts a convolution into what XLA does fastest, elsewhere it is one convolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from wmjax.arithmetic import programs_in
from wmjax.types import Array, PyTree

# What only calls another program: its name, and the parameter that is that program.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip
SAME = ("stop_gradient", "name", "copy", "copy_p", "optimization_barrier")  # values pass as they are


def plain(function: Callable, *args: PyTree) -> ClosedJaxpr:
    """The program of a function of arrays, or of their shapes, flat in the order of their leaves.

    Operations have the module that they are of as their scope (`module_of`).
    """
    traced = jax.make_jaxpr(function)(*args)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in traced.jaxpr.invars]
    return jax.make_jaxpr(lambda *values: _evaluate(traced.jaxpr, traced.consts, values))(*shapes)


def module_of(eqn: Any) -> str:
    """The modules and functions that an operation is in, such as "decoder/conv0"; "" where nothing says it."""
    return str(eqn.source_info.name_stack)


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Array]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        with jax.named_scope(module_of(eqn)) if module_of(eqn) else contextlib.nullcontext():
            found = _result(jaxpr, eqn, [read(v) for v in eqn.invars])
        values |= zip(eqn.outvars, found, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _result(jaxpr: Any, eqn: Any, given: list[Array]) -> list[Array]:
    name, params = eqn.primitive.name, eqn.params
    if name in SAME:
        return given
    if name in CALLS:
        return _called(params[CALLS[name]], given)
    if name == "platform_index":  # read by a `cond` alone, which knows its branches' platforms
        return [jnp.int32(0)]
    if platforms := params.get("branches_platforms"):
        return _called(params["branches"][platforms.index(None)], given[1:])
    if name == "stack":
        return [jnp.concatenate([jnp.expand_dims(x, params["axis"]) for x in given], params["axis"])]
    if name == "dynamic_update_slice" and (written := _written(*given[:2], given[2:])) is not None:
        return [written]
    if programs_in(params):
        eqn = eqn.replace(params={key: _inside(value) for key, value in params.items()})
    stack = type(eqn.source_info.name_stack)()  # the scope has been opened
    eqn = eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))
    wanted = {v: x for v, x in zip(eqn.invars, given, strict=True) if not isinstance(v, Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(wanted), outvars=eqn.outvars, eqns=[eqn])
    return jax.core.eval_jaxpr(alone, [], *wanted.values())


def _written(old: Array, new: Array, starts: list[Array]) -> Array | None:
    """`dynamic_update_slice` along one axis, of one place or at a constant one, by simpler operations; else None."""
    axes = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
    if len(axes) != 1:
        return None
    (axis,) = axes
    size, length, start = new.shape[axis], old.shape[axis], starts[axis]
    if not isinstance(start, jax.core.Tracer):
        start = min(max(int(start), 0), length - size)
        before, after = ((0, start), (start + size, length))
        parts = [jax.lax.slice_in_dim(old, *before, axis=axis), new, jax.lax.slice_in_dim(old, *after, axis=axis)]
        return jax.lax.concatenate([part for part in parts if part.shape[axis]], axis)
    if size > 1:
        return None
    start = jax.lax.max(jax.lax.min(start, start.dtype.type(length - 1)), start.dtype.type(0))
    place = jax.lax.broadcasted_iota(start.dtype, old.shape, axis)
    here = jax.lax.eq(place, jax.lax.broadcast(start, old.shape))
    return jax.lax.select(here, jax.lax.broadcast_in_dim(new, old.shape, range(old.ndim)), old)


def _called(program: Any, given: list[Array]) -> list[Array]:
    return _evaluate(getattr(program, "jaxpr", program), getattr(program, "consts", ()), given)


def _inside(value: Any) -> Any:
    """A parameter of an equation, with the programs in it plain as well."""
    if isinstance(value, tuple | list):
        return type(value)(map(_inside, value))
    if not hasattr(value, "jaxpr"):
        return value
    return plain(jaxpr_as_fun(value), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in value.in_avals))


def reads(program: ClosedJaxpr) -> list[set[int]]:
    """For each output the inputs that it depends on, by their places."""
    found = {v: {i} for i, v in enumerate(program.jaxpr.invars)}
    of = lambda v: set() if isinstance(v, Literal) else found.get(v, set())
    for eqn in program.jaxpr.eqns:
        found |= dict.fromkeys(eqn.outvars, set().union(*map(of, eqn.invars)))
    return [of(v) for v in program.jaxpr.outvars]


def needed(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program without operations that no output needs."""
    wanted = {v for v in program.jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(program.jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return program.replace(jaxpr=program.jaxpr.replace(eqns=kept[::-1]))


def single(program: ClosedJaxpr, eqn: Any) -> ClosedJaxpr:
    """One operation of a program, of all that it reads."""
    inputs = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
    jaxpr = program.jaxpr.replace(constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn])
    return ClosedJaxpr(jaxpr, [])
