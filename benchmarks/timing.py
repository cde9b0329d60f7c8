"""What benchmarks have in common: how a call is timed, a table of rows, and what they were measured on."""

from __future__ import annotations

import importlib
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

VERSIONS = ("jax", "jaxlib", "flax", "optax", "wmjax")


class Table:
    """Rows of measurements, printed as they come."""

    def __init__(self, only: str) -> None:
        self.only, self.rows, self.rate = only, [], math.nan

    def wants(self, name: str) -> bool:
        return self.only in name

    def add(self, name: str, value: float, unit: str, **more) -> None:
        self.rows.append({"name": name, "value": value, "unit": unit, **more})
        extra = "  ".join(f"{key} {number:.1f}" for key, number in more.items())
        print(f"{name:52s} {value:12.2f} {unit:14s} {extra}", flush=True)


def times(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of some calls, until what they return is there."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return found


def median_time(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of one call, after one that is not counted."""
    return statistics.median(times(run, repeats + 1)[1:])


def compiled(function: Callable, *args, **options) -> tuple[Callable, float]:
    """The compiled function and the seconds that compiling took."""
    start = time.perf_counter()
    result = jax.jit(function, **options).lower(*args).compile()
    return result, time.perf_counter() - start


def cpu_seconds() -> float:
    """Processor time so far, of this process and of those it has waited for."""
    return sum(os.times()[:4])


def machine() -> dict:
    """Where and with what this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    versions = {name: importlib.import_module(name).__version__ for name in VERSIONS}  # also of what is not installed
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "driver": driver(),
        "python": platform.python_version(),
        "versions": versions,
        "command": typed_command(),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def typed_command() -> str:
    """What was typed to begin this process."""
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def driver() -> str | None:
    """NVIDIA's driver, and how much of the first card others have taken; None where there is none."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,memory.used,utilization.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
