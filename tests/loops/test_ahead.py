"""Programs that are compiled beside others."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from wmjax.loops.ahead import Ahead, compiler_thread
from wmjax.loops.display import Clock

X = jax.ShapeDtypeStruct((3,), jnp.float32)


def traced(work=lambda: None):
    """A program, and the names of the threads that traced it."""
    threads = []

    def double(x):
        work()
        threads.append(threading.current_thread().name)
        return 2 * x

    return jax.jit(double), threads


def test_a_program_is_traced_in_the_other_thread_alone_and_computes_as_ever():
    program, threads = traced()
    with compiler_thread() as pool:
        program = Ahead(pool, program, X)
        assert program(jnp.ones(3)).tolist() == program(jnp.ones(3)).tolist() == [2, 2, 2]
    assert len(threads) == 1


def test_what_the_other_thread_has_not_begun_is_compiled_by_the_call_which_does_not_wait():
    program, threads = traced()
    busy = threading.Event()
    with compiler_thread() as pool:
        pool.submit(busy.wait)
        program = Ahead(pool, program, X)
        assert program(jnp.ones(3)).tolist() == [2, 2, 2]
        busy.set()
    assert threads == [threading.current_thread().name]


def test_what_cannot_be_compiled_is_an_error_of_the_call():
    def fails(x):
        raise ValueError("no")

    with compiler_thread() as pool:
        program = Ahead(pool, jax.jit(fails), X)
        with pytest.raises(ValueError, match="no"):
            program(jnp.ones(3))


def test_only_time_spent_waiting_for_it_counts_as_compiling():
    clock, wall = Clock(), time.monotonic()
    start = clock.seconds()
    with compiler_thread() as pool:
        slow, _ = traced(lambda: time.sleep(0.3))
        slow = Ahead(pool, slow, X)
        time.sleep(0.15)  # the other thread compiles
        slow(jnp.ones(3))
    spent, passed = clock.seconds() - start, time.monotonic() - wall
    assert 0.15 <= spent < passed - 0.1
