"""Signals that ask a run to stop: it is saved first."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, `kill` and batch systems, a terminal that is closed
PATIENCE = 5.0  # seconds that a second signal gives Python to stop by itself


@contextlib.contextmanager
def catch_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Collects the signals of `NAMES` in a list instead of stopping; the second one stops. Only in the main thread.

    Python hears of a signal when the compiler or a compiled program returns, which may take minutes. So a thread is
    told of it at once: it says that the run is going to stop, and after a second signal ends a process that is still
    there after `PATIENCE` seconds. A hangup that is ignored, as under `nohup`, stays so.
    """
    caught: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    numbers = [x for x in numbers if not (signal.getsignal(x) is signal.SIG_IGN and x != signal.SIGINT)]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ours, set(numbers), ended, say), name="signals", daemon=True)
    watcher.start()
    before = {signum: signal.signal(signum, handle) for signum in numbers}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield caught
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        theirs.close()  # upon which the thread ends
        watcher.join()
        ours.close()


@contextlib.contextmanager
def as_interrupts() -> Iterator[None]:
    """Makes a `KeyboardInterrupt`, whose `signum` says of what, of the signals of `NAMES`, so that all is cleaned up.

    Only in the main thread. What is ignored stays so.
    """

    def handle(signum: int, frame: Any) -> None:
        stop = KeyboardInterrupt()
        stop.signum = signum
        raise stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {x: signal.signal(x, handle) for x in numbers if signal.getsignal(x) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _tell(say: Callable[[str], None], signum: int) -> None:
    name = signal.Signals(signum).name
    with contextlib.suppress(OSError, ValueError):  # where it is said may have gone with the terminal
        say(f"{name}: the run is saved and stops after what is compiled or computed now; another ends it")


def _watch(source: socket.socket, numbers: set[int], ended: threading.Event, say: Callable[[str], None]) -> None:
    count = 0
    while received := source.recv(1):  # a byte for each signal, its number
        if received[0] not in numbers:
            continue
        count += 1
        if count == 1:
            # By a thread of its own: a full pipe that nobody reads would keep a second signal from being heard.
            threading.Thread(target=_tell, args=(say, received[0]), daemon=True).start()
        elif not ended.wait(PATIENCE):
            os._exit(128 + received[0])
