"""What accelerators can do at most, as their makers say, and how long products of a program take at a share of that."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from wmjax import checks
from wmjax.arithmetic import Product
from wmjax.types import UsageError

SHARE = 0.3  # of a card's peak: what well-made programs of large products reach
LAUNCH = 2.5e-6  # seconds that a kernel takes on a GPU if it computes nothing: assumed, not measured


class Card(NamedTuple):
    """One accelerator. Peaks are of products of dense matrices, in 1e12 floating-point operations per second."""

    name: str
    platform: str  # "cuda" or "tpu", as lowerings name it
    float32: float  # all digits of float32 (`precision="highest"`)
    default: float  # of float32 operands by JAX's default: TF32 where there is that, on a TPU one pass in bfloat16
    bfloat16: float  # where it has no such units, as float32
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes/s
    launch: float = LAUNCH


def _gpu(name: str, float32: float, default: float, bfloat16: float, gigabytes: float, bandwidth: float) -> Card:
    return Card(name, "cuda", float32, default, bfloat16, gigabytes * 1e9, bandwidth * 1e9)


def _tpu(name: str, bfloat16: float, gigabytes: float, bandwidth: float) -> Card:
    # A float32 product of all digits is six passes in bfloat16. A program is one launch, loops included.
    return Card(name, "tpu", bfloat16 / 6, bfloat16, bfloat16, gigabytes * 1e9, bandwidth * 1e9, 0.0)


# Without sparsity. NVIDIA's data sheets: H100 (SXM5, 80 GB), H200 (SXM), A100 (SXM4, 40 and 80 GB), L4, T4, V100
# (SXM2, 16 and 32 GB); for the RTX 3090 and 4090 the white papers of GA102 and Ada, with sums in float32. T4 and V100
# have units for float16, but none for TF32 or bfloat16. TPUs: "System architecture" of Google Cloud's documentation,
# for one chip (v4 has two cores, which JAX shows as one device).
CARDS = {
    card.name: card
    for card in (
        _gpu("h100", 67, 494.7, 989.4, 80, 3350),
        _gpu("h200", 67, 494.7, 989.4, 141, 4800),
        _gpu("a100", 19.5, 156, 312, 40, 1555),
        _gpu("a100-80", 19.5, 156, 312, 80, 2039),
        _gpu("l4", 30.3, 60, 121, 24, 300),
        _gpu("t4", 8.1, 8.1, 8.1, 16, 320),
        _gpu("rtx3090", 35.6, 35.6, 71, 24, 936),
        _gpu("rtx4090", 82.6, 82.6, 165.2, 24, 1008),
        _gpu("v100", 15.7, 15.7, 15.7, 16, 900),
        _gpu("v100-32", 15.7, 15.7, 15.7, 32, 900),
        _tpu("tpu-v4", 275, 32, 1228),
        _tpu("tpu-v5e", 197, 16, 819),
        _tpu("tpu-v5p", 459, 95, 2765),
    )
}


def card(
    name: str | None = None,
    peak_tflops: float | None = None,
    memory_gb: float | None = None,
    bandwidth: float | None = None,
) -> Card | None:
    """A card by its name, with other numbers where they are given; None where nothing is asked for.

    Args:
      name: one of `CARDS`; None for one that is not in it, of which all numbers are needed.
      peak_tflops: 1e12 floating-point operations per second, of products of any dtype.
      memory_gb: 1e9 bytes.
      bandwidth: of its memory, 1e9 bytes per second.

    Raises:
      UsageError: a name that is not known, and a card without a name that lacks a number.
    """
    given = {"peak_tflops": peak_tflops, "memory_gb": memory_gb, "bandwidth": bandwidth}
    if name is None and not any(value is not None for value in given.values()):
        return None
    known = None if name is None else CARDS.get(checks.text("card", name).lower())
    if name is not None and known is None:
        raise UsageError(
            f"card: unknown name {name!r:.80}; known are {', '.join(CARDS)}; of another one --peak-tflops, --memory-gb "
            "and --bandwidth (GB/s) say what it can do at most"
        )
    missing = [f"--{field.replace('_', '-')}" for field, value in given.items() if value is None]
    if name is None and missing:
        raise UsageError(f"card: none is named, so {', '.join(missing)} must be given; known are {', '.join(CARDS)}")
    found = known or _gpu("card", 0, 0, 0, 0, 0)
    changes = {} if peak_tflops is None else dict.fromkeys(("float32", "default", "bfloat16"), peak_tflops)
    changes |= {} if memory_gb is None else {"memory": memory_gb * 1e9}
    changes |= {} if bandwidth is None else {"bandwidth": bandwidth * 1e9}
    return found._replace(**changes)


def seconds(counted: Counter[Product], card: Card, share: float, seeds: int = 1) -> float:
    """How long products take one after the other, those of several seeds at once.

    Each as long as the longest of three: its arithmetic and the traffic of its operands and result, both at `share` (in
    (0, 1]) of the card's peak, and one launch. What a program computes besides products comes on top.
    """

    def each(product: Product) -> float:
        peak = {"float32 highest": card.float32, "float32": card.default}.get(product.kind, card.bfloat16)
        arithmetic = 2 * seeds * product.multiply_adds / (share * peak * 1e12)
        return max(arithmetic, seeds * product.bytes / (share * card.bandwidth), card.launch)

    return math.fsum(count * each(product) for product, count in counted.items())
