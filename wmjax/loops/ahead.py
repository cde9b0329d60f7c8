"""Compiling a program beside those that are needed before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import Any

import jax

_NAME = "compiling-ahead"


def compiler() -> Executor:
    """A thread that compiles one program after the other."""
    return ThreadPoolExecutor(1, _NAME)


def in_compiler() -> bool:
    """Whether this is the thread of a `compiler`, where compiling keeps nobody waiting."""
    return threading.current_thread().name.startswith(_NAME)


def compile_ahead(pool: Executor, program: Any, *args: Any) -> Callable:
    """Begins to compile a program in another thread, while this one computes or compiles.

    Args:
      pool: a `compiler`. What it has not begun when it is shut down is compiled by its first call.
      program: of `jax.jit`.
      args: as it will be called with, or their shapes and dtypes.

    Returns:
      The program. A call waits until it is compiled, which JAX hears as time spent compiling, and compiles it itself
      where that has not begun. What cannot be compiled is an error of the call.
    """
    compiled = pool.submit(lambda: program.lower(*args).compile())  # JAX keeps it for calls of the same shapes

    def call(*args: Any) -> Any:
        if not (compiled.done() or compiled.cancel()):
            start = time.monotonic()
            wait([compiled])
            jax.monitoring.record_event_duration_secs("/jax/core/compile/waited", time.monotonic() - start)
        return program(*args)

    return call
