"""A scan over time whose loop does only what has to be done step by step.

`scan` computes what `jax.lax.scan` computes, and its gradients, within rounding. An accelerator launches the kernels of
a loop one by one, so time is their number; and on a CPU a step's small matrix products run far below its speed. So

- what does not depend on the carry (noise from keys, projections of the inputs) is computed for all steps at once,
  before the loop, wherever in the step it is written;
- the loop of the backward pass carries only the gradient of the carry. What it needs of the forward pass is computed
  before it, and gradients of parameters and inputs after it, for all steps at once: a parameter's is one matrix product
  over time and batch instead of one for each step and a sum.

A step is written as for `jax.lax.scan`; what to move is read from its trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts
from wmjax.types import Array, PyTree

# What a value of a step's trace depends on: on nothing but numbers in it, on what the step closes over, on the inputs
# of the step, on the carry.
_NUMBER, _CLOSED, _INPUT, _CARRY = range(4)
# Steps in a round of the loop: counting, reading and writing are kernels of a round, not of a step. An update of
# DreamerV3 `small` is 1,560 launches with 1 and 1,468 with 2; what compiling takes grows by 6 %.
UNROLL = 2


def scan(step: Callable, init: PyTree, xs: PyTree, *, remat: bool = False) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan(step, init, xs)` with as little as possible in the loop.

    Gradients are of reverse mode; forward mode may be taken of them, but of the scan itself only with `remat`.
    What a step prints it prints in its turn; once, or with `remat` again in the backward pass.

    Args:
      step: `(carry, x) -> (carry, y)`; what it closes over may be differentiated too.
      init: the first carry, of arrays.
      xs: arrays `[T, ...]`, one or more, T at least 1.
      remat: store only the carries for the backward pass and compute the insides of a step anew in it, one step at a
        time: less memory, more time.

    Returns:
      The last carry, and the y of all steps `[T, ...]`.
    """
    assert jax.tree.leaves(xs), "xs: no arrays; must be one or more"
    contracts.leading(1, xs=xs)
    assert jax.tree.leaves(xs)[0].shape[0], "xs: arrays of no steps; must be one or more"
    loop = _trace(step, init, xs)
    if remat:
        body = jax.checkpoint(loop.body(loop.closed), prevent_cse=False)
        return loop.result(*_run(body, *loop.operands, loop.length))
    return loop.result(*_deferred(loop)(loop.closed, *loop.operands))


class _Loop(NamedTuple):
    """A step cut in two: what was computed before the loop, and a function that does the rest."""

    inside: Callable  # (closed, carry, x) -> (carry, y), all lists of arrays
    silent: Callable  # the same without what a step does besides, such as printing
    closed: list[Array]  # what the rest needs of all steps
    init: list[Array]
    xs: list[Array]  # what the rest needs of each step, [T, ...]
    read: list[int]  # the leaves of the carry that a step reads
    repeated: dict[int, int]  # leaves of the new carry that are leaves of y, too
    structure: Any  # of (carry, y)
    length: int  # T

    @property
    def operands(self) -> tuple[list[Array], list[Array]]:
        return self.init, self.xs

    def body(self, closed: list[Array]) -> Callable:
        """The step that `lax.scan` takes."""
        return lambda carry, x: self.inside(closed, carry, x)

    def result(self, carry: list[Array], y: list[Array]) -> tuple[PyTree, PyTree]:
        """Both as the step had them."""
        return jax.tree.unflatten(self.structure, [*carry, *y])


def _trace(step: Callable, init: PyTree, xs: PyTree) -> _Loop:
    """Traces a step, and computes at once what it can."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    init = jax.tree.map(jnp.asarray, init)
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(init, one)
    wanted, made = (jax.tree.structure(tree) for tree in (init, shapes[0]))
    assert made == wanted, f"step: the carry it gives has the structure {made}; must be that of init, {wanted}"
    (carry, x), closed = (jax.tree.leaves(tree) for tree in (init, xs)), list(traced.consts)
    jaxpr = traced.jaxpr
    closed_vars, carry_vars, x_vars = jaxpr.constvars, jaxpr.invars[: len(carry)], jaxpr.invars[len(carry) :]
    outputs = jaxpr.outvars
    depends = dict.fromkeys(closed_vars, _CLOSED) | dict.fromkeys(x_vars, _INPUT) | dict.fromkeys(carry_vars, _CARRY)
    for eqn in jaxpr.eqns:
        most = _CARRY if eqn.effects else max((depends[v] for v in eqn.invars if not _is_literal(v)), default=_NUMBER)
        depends |= dict.fromkeys(eqn.outvars, most)
    stays = lambda eqn: not eqn.outvars or depends[eqn.outvars[0]] in (_NUMBER, _CARRY) or _grows(eqn)
    inside, needed = _needed(jaxpr.eqns, outputs, stays)
    silent, read = _needed(jaxpr.eqns, outputs, lambda eqn: eqn.outvars and stays(eqn))
    closed_given, x_given = ([v for v in needed if depends[v] == kind] for kind in (_CLOSED, _INPUT))
    before, _ = _needed(jaxpr.eqns, [*closed_given, *x_given], lambda eqn: eqn.outvars)

    def ahead(closed, x):
        values = _compute(jaxpr, before, [*closed_vars, *x_vars], [*closed, *x], [*closed_given, *x_given])
        return values[: len(closed_given)], values[len(closed_given) :]

    def rest(eqns, closed, carry, x):
        values = _compute(jaxpr, eqns, [*closed_given, *carry_vars, *x_given], [*closed, *carry, *x], outputs)
        values = [jnp.asarray(x, v.aval.dtype) for x, v in zip(values, outputs, strict=True)]  # some are plain numbers
        return values[: len(carry)], values[len(carry) :]

    closed, x = jax.vmap(ahead, (None, 0), (None, 0))(closed, x)
    new, y = outputs[: len(carry)], outputs[len(carry) :]
    repeated = {i: y.index(v) for i, v in enumerate(new) if not _is_literal(v) and v in y}
    read = [i for i, v in enumerate(carry_vars) if v in read]
    steps, structure = jax.tree.leaves(xs)[0].shape[0], jax.tree.structure(shapes)
    return _Loop(partial(rest, inside), partial(rest, silent), closed, carry, x, read, repeated, structure, steps)


def _deferred(loop: _Loop) -> Callable:
    """`lax.scan` of a loop, `(closed, init, xs) -> (carry, ys)`, whose gradient is computed for all steps at once."""

    @jax.custom_vjp
    def run(closed, init, xs):
        return _run(loop.body(closed), init, xs, loop.length)

    def forward(closed, init, xs):
        # New carries are kept, not those that a step begins with: these would have to outlive it.
        own = [i for i in loop.read if i not in loop.repeated]

        def step(carry, x):
            new, y = loop.inside(closed, carry, x)
            return new, (y, [new[i] for i in own])

        last, (ys, kept) = _run(step, init, xs, loop.length)
        after = {i: ys[j] for i, j in loop.repeated.items()} | dict(zip(own, kept, strict=True))
        before = lambda i: jnp.concatenate([init[i][None], after[i][:-1]])
        nobody = lambda i: jnp.broadcast_to(init[i], (loop.length, *init[i].shape))
        carries = [before(i) if i in loop.read else nobody(i) for i in range(len(init))]
        return (last, ys), (closed, carries, xs)

    def backward(saved, gradients):
        closed, carries, xs = saved
        of_last, of_ys = map(_real, gradients)
        real = lambda closed, carry, x: tuple(map(_real, loop.silent(closed, carry, x)))

        def step(of_carry, inputs):
            carry, x, of_y = inputs
            _, pull = jax.vjp(lambda floats: real(closed, _merge(carry, floats), x), _real(carry))
            return pull((of_carry, of_y))[0], of_carry

        back = _trace(step, of_last, (carries, xs, of_ys))
        last, ys = _run(back.body(back.closed), *back.operands, loop.length, reverse=True)
        of_init, of_carries = back.result(last, ys)

        def all_steps(closed_floats, xs_floats):
            at = lambda carry, x, floats: real(_merge(closed, closed_floats), carry, _merge(x, floats))
            return jax.vmap(at)(carries, xs, xs_floats)

        _, pull = jax.vjp(all_steps, _real(closed), _real(xs))
        of_closed, of_xs = pull((of_carries, of_ys))
        nothing = lambda leaves: [None] * len(leaves)
        return (
            _merge(nothing(closed), of_closed, closed),
            _merge(nothing(carries), of_init, carries),
            _merge(nothing(xs), of_xs, xs),
        )

    run.defvjp(forward, backward)
    return run


def _run(body: Callable, init: list[Array], xs: list[Array], length: int, reverse: bool = False) -> tuple:
    """`lax.scan` over as few arrays as there are dtypes, in and out: each is a kernel in the loop."""
    pack_x, unpack_x = _packing([x[0] for x in xs])
    given = jax.eval_shape(lambda: body(init, [x[0] for x in xs])[1])
    pack_y, unpack_y = _packing(given)

    over_time = lambda function, arrays: jax.vmap(function)(arrays) if arrays else function(arrays)

    def packed(carry, x):
        carry, ys = body(carry, unpack_x(x))
        return carry, pack_y(ys)

    last, stacks = jax.lax.scan(packed, init, over_time(pack_x, xs), length, reverse, unroll=UNROLL)
    return last, over_time(unpack_y, stacks)


def _packing(like: PyTree) -> tuple[Callable, Callable]:
    """Functions that lay the leaves of a tree end to end, one vector for each dtype, and that take them apart."""
    leaves, structure = jax.tree.flatten(like)
    groups = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(i)
    ends = [np.cumsum([math.prod(leaves[i].shape) for i in group])[:-1].tolist() for group in groups.values()]

    def pack(tree):
        flat = jax.tree.leaves(tree)
        return [jnp.concatenate([flat[i].ravel() for i in group]) for group in groups.values()]

    def unpack(vectors):
        found = {}
        for vector, group, end in zip(vectors, groups.values(), ends, strict=True):
            found |= {i: part.reshape(leaves[i].shape) for i, part in zip(group, jnp.split(vector, end), strict=True)}
        return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])

    return pack, unpack


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _real(leaves: list) -> list:
    """Those that have gradients."""
    return [x for x in leaves if _is_float(x)]


def _merge(leaves: list, floats: list, like: list | None = None) -> list:
    """The leaves with others in the places of those that have gradients."""
    floats = iter(floats)
    return [next(floats) if _is_float(x) else old for old, x in zip(leaves, like or leaves, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Traces


def _is_literal(v: Any) -> bool:
    return hasattr(v, "val")


def _grows(eqn: Any) -> bool:
    """Whether it only repeats numbers: cheaper in the loop than to keep for all steps."""
    size = lambda values: sum(math.prod(v.aval.shape) for v in values)
    return eqn.primitive.name == "broadcast_in_dim" and size(eqn.outvars) > size(eqn.invars)


def _needed(eqns: list, outputs: list, keep: Callable) -> tuple[list, list]:
    """The equations, of those to keep, that outputs need, and the variables that these need of elsewhere.

    An equation that gives nothing, such as one that prints, is needed too.
    """
    needed = dict.fromkeys(v for v in outputs if not _is_literal(v))
    kept = []
    for eqn in reversed(eqns):
        if keep(eqn) and (not eqn.outvars or any(v in needed for v in eqn.outvars)):
            kept.append(eqn)
            needed |= dict.fromkeys(v for v in eqn.invars if not _is_literal(v))
    made = {v for eqn in kept for v in eqn.outvars}
    return kept[::-1], [v for v in needed if v not in made]


def _compute(jaxpr: Any, eqns: list, inputs: list, values: list[Array], outputs: list) -> list[Array]:
    """Outputs of some equations of a trace. Errors and profiles name the lines of the step that they are for."""
    program = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns)
    return jax.core.eval_jaxpr(program, [], *values)
