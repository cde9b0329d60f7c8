"""What a traced program holds at once besides its arguments and results, as the compiler of an accelerator plans it.

For cards that are not there: nothing is compiled. The compiler is followed in three things. It fuses what is computed
element by element into what uses it, so such values take no memory unless a product, a loop or another call reads them.
It orders a program so that memory is freed early: here the next kernel is the one that frees most. And it computes in
place where it can. For fifteen programs this came within a fifth of XLA's own plans for an H100
(`python -m benchmarks.gpu_text all`).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from wmjax.arithmetic import branch

WORKSPACE = {"cuda": 32 * 2**20}  # of a matrix product, as XLA gives cuBLAS on Hopper; on older cards it is 4 MiB

FUSED = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil clamp clz concatenate
    convert_element_type cos cosh digamma div dynamic_slice empty2 eq erf erf_inv exp exp2 expm1 floor ge gt imag
    integer_pow iota is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pad population_count
    pow real reduce_precision rem rev round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sin sinh slice split sqrt square sub tan tanh transpose xor""".split()
)
REDUCED = frozenset("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split())
SAME = frozenset(  # the result is the operand
    "copy copy_p expand_dims name optimization_barrier random_unwrap random_wrap reshape squeeze stop_gradient".split()
)
IN_PLACE = FUSED | frozenset("dynamic_update_slice scan scatter scatter-add scatter_add while".split())
LOOPS = frozenset(("scan", "while"))


class Kernel(NamedTuple):
    """What is computed at once."""

    name: str  # of its primitive
    reads: frozenset[int]  # values, by number
    writes: list[int]
    extra: int  # bytes while it runs


class _Values:
    """The values of a program by number, what it calls inlined."""

    def __init__(self, platform: str) -> None:
        self.platform, self.sizes, self.given = platform, [], set()
        self.steps: list[tuple[Any, list[int], list[int]]] = []  # (equation, what it reads, what it writes)

    def new(self, var: Any) -> int:
        size = getattr(var.aval, "size", 0) * getattr(getattr(var.aval, "dtype", None), "itemsize", 0)
        self.sizes.append(size)
        return len(self.sizes) - 1

    def add(self, jaxpr: Any, given: list[int]) -> list[int]:
        """Follows a program that is given these values; what it gives."""
        values = dict(zip(jaxpr.invars, given, strict=True))
        values |= {var: self.new(var) for var in jaxpr.constvars}
        self.given |= {values[var] for var in jaxpr.constvars}
        number = lambda var: self.new(var) if hasattr(var, "val") else values[var]
        for eqn in jaxpr.eqns:
            called, operands = self._called(eqn)
            if called is not None:
                results = self.add(called, [number(var) for var in operands])
            else:
                reads = [values[var] for var in eqn.invars if not hasattr(var, "val")]
                if eqn.primitive.name in SAME and len(reads) == len(eqn.outvars):
                    results = reads
                else:
                    results = [self.new(var) for var in eqn.outvars]
                    self.steps.append((eqn, reads, results))
            values |= dict(zip(eqn.outvars, results, strict=True))
        return [number(var) for var in jaxpr.outvars]

    def _called(self, eqn: Any) -> tuple[Any, list[Any]]:
        """The program that an equation calls once, and its operands; None where it does something else."""
        name, params = eqn.primitive.name, eqn.params
        if name == "cond" and params.get("branches_platforms"):
            return params["branches"][branch(eqn, [], self.platform)].jaxpr, eqn.invars[1:]
        if name not in LOOPS and name != "cond":
            for field in ("jaxpr", "call_jaxpr", "call", "fun_jaxpr"):
                inner = getattr(params.get(field), "jaxpr", params.get(field))
                if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
                    return inner, eqn.invars
        return None, []

    def kernels(self, results: list[int]) -> list[Kernel]:
        """What is computed at once: an equation, with all that is fused into it."""
        kept = set(results)
        for eqn, reads, writes in self.steps:
            name = eqn.primitive.name
            kept |= set() if name in FUSED else set(writes)
            kept |= set() if name in FUSED | REDUCED else set(reads)
        found, sources = [], {}
        for eqn, reads, writes in self.steps:
            read = frozenset().union(*(sources.get(value, (value,)) for value in reads))
            if kept.isdisjoint(writes):
                sources |= dict.fromkeys(writes, read)
            else:
                found.append(Kernel(eqn.primitive.name, read, writes, self._extra(eqn)))
        return found

    def _extra(self, eqn: Any) -> int:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            return WORKSPACE.get(self.platform, 0)
        inner = {"scan": ("jaxpr",), "while": ("body_jaxpr",)}.get(name, ())
        programs = params["branches"] if name == "cond" else [params[field] for field in inner]
        return max((peak_bytes(program, self.platform) for program in programs), default=0)


def peak_bytes(program: Any, platform: str) -> int:
    """The most bytes that a program holds at a time besides its arguments and its results.

    Args:
      program: as `jax.make_jaxpr` gives it. Results are taken to lie where donated arguments did.
      platform: such as "cuda" or "tpu".
    """
    jaxpr, values = getattr(program, "jaxpr", program), _Values(platform)
    given = [values.new(var) for var in jaxpr.invars]
    results = values.add(jaxpr, given)
    for value in {*given, *results, *values.given}:
        values.sizes[value] = 0
    kernels = values.kernels(results)
    return min(_held(kernels, order, values.sizes) for order in (range(len(kernels)), _frugal(kernels, values.sizes)))


def _uses(kernels: list[Kernel]) -> Counter[int]:
    """How many kernels read each value."""
    return Counter(value for kernel in kernels for value in kernel.reads)


def _held(kernels: list[Kernel], order: Any, sizes: list[int]) -> int:
    """The most bytes at a time where kernels run in that order."""
    left, now, most = _uses(kernels), 0, 0
    for index in order:
        name, reads, writes, extra = kernels[index]
        now += sum(sizes[value] for value in writes)
        left.subtract(reads)
        freed = [sizes[value] for value in reads if not left[value]]
        # A result lies where an operand of its size did that nothing else reads.
        shared = Counter(freed) & Counter(sizes[value] for value in writes) if name in IN_PLACE else Counter()
        most = max(most, now + extra - sum(size * count for size, count in shared.items()))
        now -= sum(freed) + sum(sizes[value] for value in writes if not left[value])
    return most


def _frugal(kernels: list[Kernel], sizes: list[int]) -> list[int]:
    """An order in which, of the kernels that could run, that one does which frees most, less what it writes."""
    maker = {value: index for index, kernel in enumerate(kernels) for value in kernel.writes}
    before = [{maker[value] for value in kernel.reads if value in maker} for kernel in kernels]
    after: list[list[int]] = [[] for _ in kernels]
    for index, needed in enumerate(before):
        for other in needed:
            after[other].append(index)
    left, waits = _uses(kernels), list(map(len, before))
    ready, order = {index for index, number in enumerate(waits) if not number}, []

    def gain(index: int) -> tuple[int, int]:
        kernel = kernels[index]
        freed = sum(sizes[value] for value in kernel.reads if left[value] == 1)
        return freed - sum(sizes[value] for value in kernel.writes), -index

    while ready:
        index = max(ready, key=gain)
        ready.remove(index)
        order.append(index)
        left.subtract(kernels[index].reads)
        for other in after[index]:
            waits[other] -= 1
            ready |= set() if waits[other] else {other}
    return order
