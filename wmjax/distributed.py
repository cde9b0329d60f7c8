"""Several processes that train one run together: how they find each other, agree, and end.

Each owns its devices, with their share of environments, replay and keys. JAX's own runtime connects them. What they
tell each other between programs goes through its store of keys and values, which waits for a process that is slow, as
collectives do not; so all have to ask in the same order. The first one, of index 0, writes the run folder and says how
far it is.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store that `jax.distributed` keeps; Orbax takes it from there, too

from wmjax import checks, files
from wmjax.types import RunError, UsageError

DETECTED = ("auto", "slurm", "ompi", "mpi4py", "k8s")  # "auto", or the launcher alone that JAX is to ask
COORDINATOR_TIMEOUT, HEARTBEAT_TIMEOUT = 300, 30  # seconds
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a machine that is gone is missed in 30 s
GRACE = 20.0  # seconds in which connections come, and in which the watch says why a program of all processes failed
PATIENCE = 3.0  # seconds that this process has to end by itself, with words of its own, where another one has ended
LAST_STEP = 1.0  # seconds between the word of a process that it goes and its end, at most
SHARED_SECONDS = 20.0  # in which a file of one machine has to be seen on the others
PROBE = "processes"  # the name of that file
WAIT_MILLISECONDS = 2**31 - 1  # for a process that is slow; one that has ended is noticed elsewhere
BYE, FAILED, TOKEN_BYTES, WORD_BYTES = b"bye", b"failed", 16, 8

_calls = itertools.count()


# ---------------------------------------------------------------------------------------------------------------------
# Find each other


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: str | None = None,
    coordinator_timeout: int = COORDINATOR_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins the processes of a run. Before anything else is asked of JAX; nothing happens where nothing is given.

    A program that has called `jax.distributed.initialize` by itself need not.

    Args:
      coordinator: "HOST:PORT" of the first process, free there and to be reached from the others.
      num_processes, process_id: how many there are, and which of them this one is, from 0.
      distributed: one of `DETECTED`, in the place of the three: what started the processes says them (Slurm, Open MPI,
        a TPU pod).
      coordinator_timeout: seconds in which all have to be there.
      heartbeat_timeout: seconds after which a process that is not heard of counts as gone.

    Raises:
      UsageError: an argument is not valid, or the processes do not come together in time; it names the address.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    limits = {"coordinator_timeout": coordinator_timeout, "heartbeat_timeout": heartbeat_timeout}
    for name, value in limits.items():
        checks.number(name, value)
    if distributed is not None:
        checks.choice("distributed", distributed, DETECTED)
        if named := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"distributed: {distributed!r} finds {', '.join(given)} by itself; leave {named[0]} out")
        method = None if distributed == "auto" else distributed
        return _initialize(None, dict(cluster_detection_method=method), **limits)
    if all(value is None for value in given.values()):
        return None
    if missing := [name for name, value in given.items() if value is None]:
        raise UsageError(f"{missing[0]}: missing; {', '.join(given)} are valid together")
    host, port = _address(coordinator)
    count, index = checks.number("num_processes", num_processes), checks.number("process_id", process_id)
    if index >= count:
        raise UsageError(f"process_id: {index} is not valid with {count} processes; 0 to {count - 1} are")
    _reach(host, port, index, count, coordinator_timeout)
    how = dict(coordinator_address=coordinator, num_processes=count, process_id=index)
    return _initialize(coordinator, how | {"cluster_detection_method": "deactivate"}, **limits)


def _address(coordinator: Any) -> tuple[str, int]:
    """Host and port. Raises `UsageError`."""
    host, colon, port = checks.text("coordinator", coordinator).rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise checks.invalid("coordinator", coordinator, "HOST:PORT, with a port from 1 to 65535,")
    return host.strip("[]"), int(port)


def _reach(host: str, port: int, index: int, count: int, seconds: float) -> None:
    """Waits for the coordinator, which the first process is to start; JAX would end the process with a stack trace.

    Raises `UsageError`: it does not answer, or for the first process, its port is not free.
    """
    address = f"coordinator: {host}:{port}"
    if index == 0:
        try:
            with socket.create_server(("", port)):
                return
        except OSError as error:
            raise UsageError(f"{address} cannot be opened here ({error.strerror}); a port that is free is") from None
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, end - time.monotonic()))):
                return
        except OSError as error:
            reason = error.strerror or error
        if time.monotonic() > end:
            raise UsageError(f"{address} did not answer process {index} of {count} in {seconds} s ({reason})") from None
        time.sleep(0.2)


def _initialize(coordinator: str | None, how: dict[str, Any], coordinator_timeout: int, heartbeat_timeout: int) -> None:
    how = how | {"initialization_timeout": coordinator_timeout, "heartbeat_timeout_seconds": heartbeat_timeout}
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        where = f"coordinator: {coordinator}: the" if coordinator else "distributed: the"
        raise UsageError(f"{where} processes did not come together ({reason})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Agree


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def index() -> int:
    """Which one this is, from 0."""
    return jax.process_index()


def leads() -> bool:
    """Whether this is the first process, which writes the run folder."""
    return index() == 0


def exchange(value: Any) -> list[Any]:
    """What each process gives, of what JSON can say. All have to ask; each waits until all have."""
    if count() == 1:
        return [value]
    call, client = next(_calls), distributed.global_state.client
    client.key_value_set(f"wmjax/{call}/{index()}", json.dumps(value))
    said = [client.blocking_key_value_get(f"wmjax/{call}/{i}", WAIT_MILLISECONDS) for i in range(count())]
    if call:  # all have asked for this one, so all have read the one before
        client.key_value_delete(f"wmjax/{call - 1}/{index()}")
    return [json.loads(each) for each in said]


def gather(numbers: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 `[processes, ...]`: the numbers of each process. All have to ask, with arrays of one shape."""
    return np.array(exchange(np.asarray(numbers, np.float64).tolist()))


def every(said: bool) -> bool:
    """Whether all processes say so. All have to ask."""
    return all(exchange(bool(said)))


def wait() -> None:
    """Waits until all processes are here, such as before a program that has to begin everywhere at once."""
    exchange(None)


def agree(what: dict[str, Any]) -> None:
    """Raises `UsageError`, in all processes, at the first name under which they do not give one value."""
    found = exchange(what)
    for name in dict.fromkeys(name for each in found for name in each):
        for i, each in enumerate(found):
            if each.get(name) != found[0].get(name):
                said = (
                    f"{checks.show(found[0].get(name))} in process 0 and {checks.show(each.get(name))} in process {i}"
                )
                raise UsageError(f"{name}: is {said}; all processes have to be given the same")


def in_turn(call: Callable[[], Any]) -> Any:
    """Calls it in the first process, then in the others. What is raised in one of them is raised in all.

    Returns what it gave in this one.
    """
    result = None
    for lead in (True, False):
        mine = at_once(call if leads() == lead else lambda: None)
        result = mine if leads() == lead else result
    return result


def at_once(call: Callable[[], Any]) -> Any:
    """Calls it in every process. What is raised in one of them is raised in all. Returns what it gave in this one."""
    result, error, mine = None, None, ""
    try:
        result = call()
    except (UsageError, RunError) as caught:
        error, mine = caught, f"{type(caught).__name__} {caught}"
    told = exchange(mine)
    if error is not None:
        raise error
    for i, said in enumerate(told):
        if said:
            kind, _, text = said.partition(" ")
            raise (UsageError if kind == "UsageError" else RunError)(f"process {i}: {text}")
    return result


def check_shared(folder: Path) -> None:
    """Raises `UsageError`, in all processes, unless all of them see what the first one writes to a folder."""
    token, place = exchange(secrets.token_hex(8))[0], folder / f".{PROBE}"
    if leads():
        files.write(place, token.encode())
    wait()
    end, seen = time.monotonic() + SHARED_SECONDS, False
    while not seen and time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = place.read_bytes() == token.encode()
        time.sleep(0 if seen else 0.2)
    blind = [i for i, (found,) in enumerate(gather([seen])) if not found]
    if leads():
        files.remove(place)
    if blind:
        raise UsageError(
            f"out: {str(folder)!r} is not one folder for all: process {blind[0]} does not see what process 0 writes "
            "there; a folder that all share is valid"
        )


# ---------------------------------------------------------------------------------------------------------------------
# End


def leave(code: int) -> int:
    """The exit code; one of several processes that does not end well ends here: JAX would wait for the others."""
    if code and distributed.global_state.client is not None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        _first_goes_last(GRACE)
        os._exit(code)
    return code


def end_with(code: int, text: str, gone: int | None = None) -> None:
    """Ends this process at once, with one line: what it is in may wait for another one for ever."""
    with contextlib.suppress(Exception):
        print(f"wmjax: error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    _first_goes_last(PATIENCE, gone)
    os._exit(code)


def _first_goes_last(seconds: float, gone: int | None = None) -> None:
    """The others say that they go, and the first process waits for it: without its store, JAX would abort them."""
    state = distributed.global_state
    with contextlib.suppress(Exception):  # the store may be gone
        if state.process_id:
            state.client.key_value_set(f"wmjax/left/{state.process_id}", "")
            return
        end = time.monotonic() + seconds
        for process in set(range(1, state.num_processes)) - {gone}:
            left = max(1, int(1000 * (end - time.monotonic())))
            state.client.blocking_key_value_get(f"wmjax/left/{process}", left)
        time.sleep(LAST_STEP)


@contextlib.contextmanager
def watching(say: Callable[[str], None]) -> Iterator[None]:
    """Ends this process where another one ends within, other than by leaving it too.

    A connection between the first process and each other one tells: it is closed by the system with the process, and
    by its own probes where a machine is gone. Where it cannot be made, JAX's heartbeats are left.
    """
    if count() == 1:
        yield
        return
    links = _first() if leads() else _other()
    if any(link is None for link in links.values()):
        say("warning: no connection to watch the other processes by; the heartbeats of JAX tell where one ends")
    links = {process: link for process, link in links.items() if link is not None}
    left = threading.Event()
    wake, woken = socket.socketpair()
    thread = threading.Thread(target=_watch, args=(links, woken, left), name="processes", daemon=True)
    thread.start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        thread.join(GRACE)  # it ends this process where what failed is that another one has ended
        raise RunError(f"the processes cannot go on ({str(error).partition(chr(10))[0][:300]})") from error
    except BaseException:
        _tell_all(links, FAILED)
        raise
    else:
        _tell_all(links, BYE)
    finally:
        left.set()
        wake.close()
        thread.join()
        for link in (*links.values(), woken):
            link.close()


def _first() -> dict[int, socket.socket | None]:
    """Connections from the first process to all others, by their index; None where one did not come."""
    token = secrets.token_bytes(TOKEN_BYTES)
    with socket.create_server(("", 0), backlog=count()) as server:
        exchange({"hosts": _hosts(), "port": server.getsockname()[1], "token": token.hex()})
        links: dict[int, socket.socket | None] = dict.fromkeys(range(1, count()))
        server.settimeout(GRACE)
        with contextlib.suppress(OSError):
            while None in links.values():
                link, _ = server.accept()
                link.settimeout(GRACE)
                said = link.recv(TOKEN_BYTES + WORD_BYTES, socket.MSG_WAITALL)
                if hmac.compare_digest(said[:TOKEN_BYTES], token):
                    links[int.from_bytes(said[TOKEN_BYTES:])] = _kept_alive(link)
                else:
                    link.close()
    return links


def _other() -> dict[int, socket.socket | None]:
    """The connection to the first process; None where there is none."""
    told = exchange(None)[0]
    for host in told["hosts"]:
        with contextlib.suppress(OSError):
            link = socket.create_connection((host, told["port"]), timeout=GRACE / 4)
            link.sendall(bytes.fromhex(told["token"]) + index().to_bytes(WORD_BYTES))
            return {0: _kept_alive(link)}
    return {0: None}


def _hosts() -> list[str]:
    """Names and addresses that this machine may be reached by."""
    name = socket.gethostname()
    found = [name, socket.getfqdn()]
    with contextlib.suppress(OSError):
        found += [info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return [*dict.fromkeys(found), "127.0.0.1"]


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _tell_all(links: dict[int, socket.socket], word: bytes) -> None:
    for link in links.values():
        with contextlib.suppress(OSError):
            link.sendall(word.ljust(WORD_BYTES))


def _watch(links: dict[int, socket.socket], woken: socket.socket, left: threading.Event) -> None:
    """Waits for a word of another process, or for its end."""
    open_links = {link: process for process, link in links.items()}
    while open_links:
        ready, _, _ = select.select([*open_links, woken], [], [])
        if left.is_set():
            return
        for link in set(ready) - {woken}:
            said = b""
            with contextlib.suppress(OSError):
                said = link.recv(WORD_BYTES, socket.MSG_WAITALL)
            process = open_links.pop(link)
            if said.strip() == BYE:
                continue
            # What failed there may fail here too, with better words. With the first process that is gone, JAX would end
            # this one, in many words.
            if said.strip() == FAILED and left.wait(PATIENCE):
                return
            if said.strip().isdigit():  # the first one tells which
                process = int(said)
            _tell_all(links, str(process).encode())
            text = f"process {process} of {count()} has ended, so this one, {index()}, ends too; the newest checkpoint "
            end_with(1, text + "is whole, and the run may be resumed", gone=process)
