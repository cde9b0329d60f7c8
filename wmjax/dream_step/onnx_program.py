"""A step of a dream in ONNX, converted by jax2onnx and compared with JAX by ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from wmjax.dream_step.comparing import Arrays, compare
from wmjax.dream_step.plain import module_of, needed, plain, single
from wmjax.dream_step.step import DreamStep
from wmjax.loops.memory import amount
from wmjax.replay.host import tree_bytes
from wmjax.types import RunError, UsageError

OPSET = 21  # of ONNX 1.16
MOST = 2**31 - 2**24  # bytes of parameters: one file of protobuf, with its operations, has less than 2 GiB
# jax2onnx asks for an orbax-checkpoint that is older than ours, and imports none of it.
INSTALL = 'pip install "wmjax[onnx]" and then pip install --no-deps jax2onnx==0.17.1'


def check_installed() -> None:
    """Raises `UsageError` where what converts and compares is missing."""
    for name in ("onnx", "onnxruntime", "onnx_ir", "jax2onnx"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"onnx: {name} is not installed; {INSTALL}")


def serialize(step: DreamStep) -> tuple[bytes, float]:
    """The step as an ONNX model, and its largest difference from JAX (`compare`).

    Inputs and outputs have the names of `step.inputs` and `step.outputs`; what is known of them is also in the model's
    metadata, as JSON under "wmjax".

    Raises:
      UsageError: what converts is missing, or lacks an operation, which is named with its module; parameters are more
        than one file may have.
      RunError: ONNX Runtime computes something else, or cannot run it.
    """
    from wmjax.dream_step.writing import description

    check_installed()
    program = needed(plain(step.function, dict(step.inputs)))  # in the order of sorted names
    if (size := tree_bytes(program.consts)) > MOST:
        raise UsageError(f"onnx: parameters of {amount(size)} do not fit in one file, of at most {amount(MOST)}; "
                         "stablehlo is valid")  # fmt: skip
    try:
        model = _converted(program, sorted(step.inputs), sorted(step.outputs))
    except Exception as error:  # of whatever kind, by whichever of its hundreds of parts
        raise UsageError(f"onnx: {_culprit(program, error)}") from None
    entry = model.metadata_props.add()
    entry.key, entry.value = "wmjax", json.dumps(description(step, starts=False))
    data = model.SerializeToString()
    return data, compare(step, run_by_onnx(data), "onnx")


def run_by_onnx(data: bytes) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """The program of a model, by ONNX Runtime on the CPU: `{name: array} -> {name: array}`.

    Raises `RunError` where that cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with _runtime():
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([x.name for x in found] for found in (session.get_inputs(), session.get_outputs()))
    as_given = lambda given: {name: np.asarray(given[name]) for name in inputs}
    run = _runtime()(session.run)
    return lambda given: dict(zip(outputs, run(outputs, as_given(given)), strict=True))


@contextlib.contextmanager
def _runtime() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of failure is a class of its own there
        raise RunError(f"onnx: ONNX Runtime cannot run it: {_line(error)}; nothing is written") from None


def _converted(program: ClosedJaxpr, inputs: list[str] | None = None, outputs: list[str] | None = None) -> Any:
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars]
    function = jaxpr_as_fun(program)
    names = {"input_names": inputs, "output_names": outputs, "model_name": "dream_step"} if inputs else {}
    with _alone():
        import jax2onnx

        model = jax2onnx.to_onnx(lambda *values: tuple(function(*values)), shapes, opset=OPSET, **names)
    read = {name for node in _nodes(model.graph) for name in node.input} | {x.name for x in model.graph.output}
    kept = [x for x in model.graph.initializer if x.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The converter puts functions of its own into JAX while it works, and leaves one there; all are taken out again.

    What it says of its own parts is not for the user.
    """
    before = {module: dict(vars(module)) for module in (jax.numpy, jax.lax, jax.nn)}
    level, aside = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for module, names in before.items():
            for name, value in names.items():
                if vars(module).get(name) is not value:
                    setattr(module, name, value)


def _culprit(program: ClosedJaxpr, error: Exception) -> str:
    """Which operation cannot be converted, and of which module it is: each is tried alone."""
    for eqn in program.jaxpr.eqns:
        try:
            _converted(single(program, eqn))
        except Exception as alone:
            where = module_of(eqn) or "the step itself"
            return f"the operation {eqn.primitive.name!r} in {where} has none in ONNX: {_line(alone)}"
    return f"the step cannot be converted: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
