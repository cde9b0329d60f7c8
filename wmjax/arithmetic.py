"""What a traced program computes: its matrix products and convolutions, however deep they are in it.

A traced program (`jax.make_jaxpr`) has the gradients in it, so what is counted is a whole update. Everything else in
it, such as sums, noise and activations, is counted neither as arithmetic nor as memory traffic.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import jax


class Product(NamedTuple):
    """A matrix product or a convolution, of its operands' dtype."""

    kind: str  # dtype of the operands, "float32 highest" where all digits of float32 were asked for
    multiply_adds: int
    bytes: int  # of its operands and its result


def products(jaxpr: Any, platform: str | None = None) -> Counter[Product]:
    """The matrix products and convolutions of a traced program, and how often each is computed.

    What a scan does counts as often as it runs; a loop that counts up to a number, as often as that number allows; any
    other loop once. Of the branches of a condition the one with the most multiply-adds counts, of lowerings for several
    platforms that of `platform`.

    Args:
      jaxpr: as `jax.make_jaxpr` gives it.
      platform: such as "cpu", "cuda", "tpu"; None for JAX's own.
    """
    platform = platform or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    total: Counter[Product] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            # Zeros that a transposed convolution inserts are not multiplied by.
            terms = math.prod(kernel) / kernel[spec[0]] / math.prod(eqn.params["lhs_dilation"])
        else:
            inner = [products(program, platform) for program in programs_in(eqn.params)]
            if name == "cond":
                inner = [inner[branch(eqn, inner, platform)]]
            for counted in inner:
                times = eqn.params["length"] if name == "scan" else _trips(eqn) if name == "while" else 1
                total.update({product: times * count for product, count in counted.items()})
            continue
        out = eqn.outvars[0].aval
        size = sum(x.aval.size * x.aval.dtype.itemsize for x in (*eqn.invars[:2], eqn.outvars[0]))
        total[Product(_kind(eqn), round(out.size * terms), size)] += 1
    return total


def multiply_adds(counted: Counter[Product]) -> int:
    """Of all of them; a multiply-add is two floating-point operations.

    >>> import jax.numpy as jnp
    >>> multiply_adds(products(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((4, 4)))))
    64
    """
    return sum(product.multiply_adds * count for product, count in counted.items())


def _kind(eqn: Any) -> str:
    dtype, precision = eqn.invars[0].aval.dtype.name, eqn.params["precision"]
    precisions = precision if isinstance(precision, tuple) else (precision,)
    exact = dtype == "float32" and any(each == jax.lax.Precision.HIGHEST for each in precisions)
    return "float32 highest" if exact else dtype


def programs_in(params: dict[str, Any]) -> list[Any]:
    """The traced programs among the parameters of an equation: bodies of loops, branches, what is called."""
    inner = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # of a closed one
            if hasattr(item, "eqns"):
                inner.append(item)
    return inner


def branch(eqn: Any, counted: list[Counter[Product]], platform: str) -> int:
    """The branch of a condition that counts."""
    for index, platforms in enumerate(eqn.params.get("branches_platforms") or ()):
        if platforms is None or platform in platforms:
            return index
    return max(range(len(counted)), key=lambda index: multiply_adds(counted[index]))


def _trips(eqn: Any) -> int:
    """How often a loop runs at most whose condition has `counter < number`; 1 where it has not."""
    condition = getattr(eqn.params["cond_jaxpr"], "jaxpr", eqn.params["cond_jaxpr"])
    constants = eqn.params["cond_nconsts"]
    outer = eqn.invars[:constants] + eqn.invars[constants + eqn.params["body_nconsts"] :]
    values = dict(zip(condition.invars, outer, strict=True))
    known = lambda var: getattr(var, "val", None) if hasattr(var, "val") else getattr(values.get(var), "val", None)
    for test in condition.eqns:
        if test.primitive.name == "lt" and test.invars[0] in condition.invars and known(test.invars[1]) is not None:
            return max(0, int(known(test.invars[1])) - int(known(test.invars[0]) or 0))
    return 1
