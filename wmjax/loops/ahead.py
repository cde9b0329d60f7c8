"""Compiling a program beside those that are needed before it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import Any

import jax

_NAME = "compiling-ahead"


def compiler_thread() -> Executor:
    """A thread that compiles one program after the other."""
    return ThreadPoolExecutor(1, _NAME)


def in_compiler_thread() -> bool:
    """Whether this is the thread of a `compiler_thread`, where compiling keeps nobody waiting."""
    return threading.current_thread().name.startswith(_NAME)


class Ahead:
    """A program that is compiled in another thread, while this one computes or compiles.

    A call waits until it is compiled, which JAX hears as time spent compiling, and compiles it itself where that has
    not begun. What cannot be compiled is an error of the call.

    Args:
      pool: a `compiler_thread`. What it has not begun when it is shut down is compiled by its first call.
      program: of `jax.jit`.
      args: as it will be called with, or their shapes and dtypes.
    """

    def __init__(self, pool: Executor, program: Any, *args: Any) -> None:
        self._program, self._args = program, args
        self._compiling = pool.submit(lambda: program.lower(*args).compile())  # JAX keeps it for calls of these shapes

    def _wait(self) -> None:
        if not (self._compiling.done() or self._compiling.cancel()):
            start = time.monotonic()
            wait([self._compiling])
            jax.monitoring.record_event_duration_secs("/jax/core/compile/waited", time.monotonic() - start)

    def compiled(self) -> jax.stages.Compiled:
        """The program for its arguments."""
        self._wait()
        if self._compiling.cancelled():
            return self._program.lower(*self._args).compile()
        return self._compiling.result()

    def __call__(self, *args: Any) -> Any:
        self._wait()
        return self._program(*args)
