"""Who may come in: who has the link, which holds a random token, and comes from the page itself. All others get 403."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable
from typing import Any


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _host_name(authority: str) -> str:
    """The name in a `Host` header, without its port and the brackets of an address."""
    name, _, port = authority.rpartition(":")
    return (name if name and port.isdigit() else authority).strip("[]").lower()


def _is_known(name: str, host: str) -> bool:
    """Whether a server that listens on `host` goes by this name.

    Where it listens on a network, addresses do, and the machine's own name: a page elsewhere can have its own name
    resolved to an address here, but not be known by the address.
    """
    if is_loopback(host):
        return is_loopback(name)
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in (host.lower(), "localhost", socket.gethostname().lower(), socket.getfqdn().lower())


def is_admitted(scope: dict[str, Any], token: str, host: str) -> bool:
    """Whether a request has the token in its path, and is from nowhere but the page itself.

    Args:
      scope: of ASGI.
      token: the first part of the path has to be it; compared in constant time.
      host: what the server listens on.
    """
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), []).append(value)
    given = scope["path"].partition("/")[2].partition("/")[0].encode("utf-8", "replace")
    fits = secrets.compare_digest(given, token.encode())
    hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
    if len(hosts) != 1 or len(origins) > 1 or not _is_known(_host_name(hosts[0].decode("latin-1")), host):
        return False
    if scope["type"] == "websocket" and not origins:  # browsers always say where a WebSocket is from
        return False
    return fits and all(origin == b"http://" + hosts[0] for origin in origins)


def gate(app: Callable, token: str, host: str) -> Callable:
    """An ASGI application behind a token: what is admitted reaches `app` without the token in its path."""

    async def gated(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
        elif is_admitted(scope, token, host):
            rest = "/" + scope["path"].partition("/")[2].partition("/")[2]
            await app(scope | {"path": rest, "raw_path": rest.encode()}, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind = [(b"content-type", b"text/plain"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": b"403 Forbidden\n"})

    return gated
