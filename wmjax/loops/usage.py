"""What a run has taken besides steps: memory at its peak and time spent compiling, in `usage.json`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from wmjax import files
from wmjax.loops.display import Clock
from wmjax.run_folder import write_json
from wmjax.types import UsageError

USAGE = "usage.json"
USAGE_BYTES = 2**16
NUMBERS = ("compile_seconds", "compile_seconds_saved", "peak_memory_bytes", "peak_device_bytes")


def read_usage(folder: Path) -> dict[str, Any]:
    """What `usage.json` of a run says, as numbers by name; {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = files.parse_json(files.read(folder / USAGE, USAGE_BYTES))
        number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
        return {name: found[name] for name in NUMBERS if number(found.get(name))} if isinstance(found, dict) else {}
    return {}


@contextlib.contextmanager
def noting_usage(folder: Path) -> Iterator[None]:
    """Writes `usage.json` at the end: of what is done within, or of an earlier attempt at the run that took more.

    `compile_seconds` are those that were waited for; `compile_seconds_saved` what the cache of compiled programs saved
    of them. `peak_memory_bytes` is of the process, `peak_device_bytes` of the accelerator with the most; null where
    nobody says. A disk that is full costs the file alone. A run that is refused leaves nothing.
    """
    compiling = Clock.compiling()
    seconds, saved = compiling.seconds, compiling.saved
    refused = False
    try:
        yield
    except UsageError:
        refused = True
        raise
    finally:
        if not refused:
            _write(folder, compiling.seconds - seconds, compiling.saved - saved)


def _write(folder: Path, seconds: float, saved: float) -> None:
    before = read_usage(folder)
    now = {
        "compile_seconds": round(seconds, 3),
        "compile_seconds_saved": round(saved, 3),
        "peak_memory_bytes": _peak_memory(),
        "peak_device_bytes": _peak_device(),
    }
    if sum(before.get(name, 0) for name in NUMBERS[:2]) > sum(now[name] for name in NUMBERS[:2]):
        now |= {name: before.get(name, 0) for name in NUMBERS[:2]}
    for name in NUMBERS[2:]:
        now[name] = max((x for x in (now[name], before.get(name)) if x is not None), default=None)
    with contextlib.suppress(OSError):
        write_json(folder / USAGE, now)


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_device() -> int | None:
    if jax.default_backend() == "cpu":
        return None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)
