"""A local server of one page (`page`), behind a token (`gate`)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from wmjax.play.gate import gate
from wmjax.play.page import MESSAGE, Lobby, serve_page
from wmjax.types import UsageError

PORTS = 50  # that are tried, where some are in use
IN_USE = (errno.EADDRINUSE, errno.EACCES)  # below 1024 a port may be kept for the system
STATIC = {"index.html": "text/html", "play.js": "text/javascript", "play.css": "text/css", "icon.svg": "image/svg+xml"}
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def application(lobby: Lobby, token: str, host: str = "127.0.0.1") -> Callable:
    """The ASGI application: the page, its socket and its recordings, behind a `gate` with that token.

    Args:
      lobby: has the game.
      token: the first part of each path.
      host: what the server listens on.
    """
    from starlette.applications import Starlette
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocketDisconnect

    static = resources.files("wmjax.play") / "static"
    contents = {name: (static / name).read_bytes() for name in STATIC}

    async def page(request: Any) -> Any:
        name = request.path_params.get("name", "index.html")
        if name not in contents:
            return Response("404 Not Found\n", 404, HEADERS, "text/plain")
        return Response(contents[name], 200, HEADERS, f"{STATIC[name]}; charset=utf-8")

    async def recording(request: Any) -> Any:
        name = request.path_params["name"]
        if not any(name == file.name for file in lobby.folder.iterdir()):
            return Response("404 Not Found\n", 404, HEADERS, "text/plain")
        kind = "image/gif" if name.endswith(".gif") else "video/mp4"
        return FileResponse(lobby.folder / name, 200, HEADERS, kind, filename=f"dream{Path(name).suffix}")

    async def live(websocket: Any) -> None:
        await serve_page(lobby, websocket, WebSocketDisconnect)

    routes = [Route("/", page), WebSocketRoute("/live", live)]
    routes += [Route("/recordings/{name}", recording), Route("/{name}", page)]
    return gate(Starlette(routes=routes), token, host)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the first port from `port` on that is free; 0 is any.

    Raises `UsageError` where none is, or the address is not of this machine.
    """
    error = None
    for candidate in range(port, min(port + PORTS, 2**16)) if port else (0,):
        try:
            family, *_, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            found = socket.socket(family, socket.SOCK_STREAM)
        except OSError as failure:
            raise UsageError(f"host: {host!r} is not valid ({failure.strerror}); localhost is") from None
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(64)
            return found
        except OSError as failure:
            found.close()
            error = failure
            if failure.errno not in IN_USE:
                break
    if error is not None and error.errno in IN_USE:
        raise UsageError(f"port: {port} to {port + PORTS - 1} are all in use; another number is valid")
    raise UsageError(f"host, port: cannot listen on {host!r}, {port} ({error.strerror}); localhost and 8765 are valid")


def make_server(lobby: Lobby, token: str, host: str) -> Any:
    """A `uvicorn.Server` of the application; what listens is handed to its `run`."""
    import uvicorn

    config = uvicorn.Config(
        application(lobby, token, host), lifespan="off", log_level="critical", access_log=False, server_header=False,
        ws="websockets-sansio", ws_max_size=MESSAGE, ws_max_queue=8, ws_per_message_deflate=False,
        limit_concurrency=64, timeout_graceful_shutdown=1,
    )  # fmt: skip
    return uvicorn.Server(config)
