"""A step of a dream in StableHLO, which JAX reads and runs without the code that it is of."""

from __future__ import annotations

import jax
import jax.export

from wmjax.dream_step.comparing import compare
from wmjax.dream_step.step import DreamStep

PLATFORMS = ("cpu", "cuda")


def serialize(step: DreamStep) -> tuple[bytes, float]:
    """What `jax.export.deserialize` reads, for `PLATFORMS`; and the largest difference from JAX (`compare`).

    Its `call` takes one dictionary of arrays and gives another, as `step.inputs` and `step.outputs` say.

    Raises:
      RunError: read again, it does not compute what the step does.
    """
    with jax.default_matmul_precision("highest"):  # products of float32 on a GPU too, which has shorter ones
        data = bytes(jax.export.export(jax.jit(step.function), platforms=PLATFORMS)(dict(step.inputs)).serialize())
    run = jax.jit(jax.export.deserialize(bytearray(data)).call)

    def other(given):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.device_get(run(dict(given)))

    return data, compare(step, other, "stablehlo")
