"""One open page: its session is stepped in a thread of its own, and it is sent what it can take.

Events come as JSON, moments go as bytes (`wire`). A page says which moments it has received; at most `CREDITS` are on
their way to it, and where it is slow it gets the newest one next, so that nothing queues up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from wmjax.play import session as sessions
from wmjax.play.game import Game
from wmjax.play.recording import write_recording
from wmjax.play.wire import FLAGS, HEADER, pack
from wmjax.types import RunError, UsageError

SEATS = 4  # pages at once
CREDITS = 3  # moments on their way to a page
EVENTS = 64  # of a page that wait for a step to end; then it has to wait
MESSAGE = 16_384  # bytes of an event
IDLE = 10.0  # seconds without a word of a page that is sent moments, after which its session waits
RECORDINGS = 3  # of a page, that are kept for download


class Lobby:
    """What all pages share: the game, so many seats, and a folder for recordings."""

    def __init__(self, game: Game, seats: int = SEATS) -> None:
        self.game, self.free = game, seats
        self.folder = Path(tempfile.mkdtemp(prefix="wmjax-play-"))
        self.encoding = asyncio.Semaphore(1)  # of recordings

    @contextlib.contextmanager
    def seat(self) -> Iterator[bool]:
        """Whether there was room for one more page, which has it until the end of the context."""
        found = self.free > 0
        self.free -= found
        try:
            yield found
        finally:
            self.free += found

    def close(self) -> None:
        """Removes all recordings."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """One open page: what it asks for, where it stands, and what it is sent."""

    def __init__(self, lobby: Lobby, socket: Any, session: sessions.Session, run: Callable) -> None:
        self.lobby, self.game, self.socket = lobby, lobby.game, socket
        self.session, self._run = session, run  # `await run(function, *args)`, in the page's own thread
        self.events: asyncio.Queue = asyncio.Queue(EVENTS)
        self.notes: deque[dict[str, Any]] = deque(maxlen=16)
        self.newest: bytes | None = None  # not sent yet
        self.in_flight, self.heard = 0, 0.0
        self.fresh = asyncio.Event()  # something may be sent
        self.recordings: deque[list[Path]] = deque()
        self.tasks: set[asyncio.Task] = set()

    def tell(self, **note: Any) -> None:
        """Sends a note; of many that wait the newest."""
        self.notes.append(note)
        self.fresh.set()

    def show(self) -> None:
        """Sends the moment that is seen now, once the page has room for it; one that still waits is left out."""
        self.newest = pack(self.session)
        self.fresh.set()

    async def read(self) -> None:
        """Takes what the page says, until it is closed."""
        while True:
            text = await self.socket.receive_text()  # raises where it is
            self.heard = asyncio.get_running_loop().time()
            try:
                event = json.loads(text) if len(text) <= MESSAGE else None
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict):
                self.tell(error="event: what came is not valid; an object in JSON is")
            elif event.get("do") == "seen":
                self.in_flight = max(0, self.in_flight - 1)
                self.fresh.set()
            else:
                await self.events.put(event)  # where many wait, the page has to

    async def send(self) -> None:
        """Sends notes, and the newest moment where the page has received those before."""
        while True:
            await self.fresh.wait()
            self.fresh.clear()
            while self.notes:
                await self.socket.send_text(json.dumps(self.notes.popleft()))
            if self.newest is not None and self.in_flight < CREDITS:
                data, self.newest = self.newest, None
                self.in_flight += 1
                await self.socket.send_bytes(data)

    async def play(self) -> None:
        """Steps the session at its pace, and does what is asked for between steps."""
        clock = asyncio.get_running_loop().time
        due = self.heard = clock()
        while True:
            settings = self.session.settings
            gone = self.in_flight >= CREDITS and clock() - self.heard > IDLE
            wait = (1.0 if gone else max(0.0, due - clock())) if settings.playing else None
            event = await self._event(wait)
            if event is not None:
                await self.ask(event)
                if not settings.playing:
                    due = clock()
            elif not gone and clock() >= due:
                due = max(due + 1 / settings.speed, clock())  # what is late is not caught up with
                self.session = await self._run(sessions.advance, self.game, self.session)
                self.show()

    async def _event(self, seconds: float | None) -> dict[str, Any] | None:
        with contextlib.suppress(asyncio.QueueEmpty):
            return self.events.get_nowait()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.events.get(), seconds)
        return None

    async def ask(self, event: dict[str, Any]) -> None:
        """Does what an event says."""
        before = self.session
        if event.get("do") == "drive" and event.get("who") == "planner":
            self.tell(note="The planner is compiled when it drives for the first time, which may take a minute.")
        try:
            self.session = await self._run(sessions.handle, self.game, before, event)
        except UsageError as error:
            self.tell(error=str(error))
            return
        if event.get("do") == "record" and before.recording is not None and self.session.recording is None:
            task = asyncio.create_task(self.encode(before.recording, before.settings.speed))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self.show()

    async def encode(self, moments: tuple[sessions.Moment, ...], speed: float) -> None:
        """Writes a recording, and tells the page where it is."""
        name = secrets.token_hex(8)
        path = self.lobby.folder / f"{name}.gif"
        async with self.lobby.encoding:
            try:
                title = self.game.about["title"]
                files = await asyncio.to_thread(write_recording, path, moments, speed, title)
            except OSError as error:
                self.tell(error=f"recording: it cannot be written ({error.strerror})")
                return
        self.recordings.append(files)
        if len(self.recordings) > RECORDINGS:
            _remove(self.recordings.popleft())
        found = {file.suffix[1:]: [f"recordings/{file.name}", file.stat().st_size] for file in files}
        self.tell(recording=found, frames=len(moments))

    def close(self) -> None:
        """Frees what the page has, but for its thread and its real environment."""
        for task in self.tasks:
            task.cancel()
        for files in self.recordings:
            _remove(files)


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


async def serve_page(lobby: Lobby, socket: Any, disconnected: type[Exception]) -> None:
    """One page from its first word to its last. `disconnected` is what `socket` raises where it has gone."""
    with lobby.seat() as found, contextlib.suppress(disconnected):
        await socket.accept()
        if not found:
            await socket.send_text(json.dumps({"closed": f"{SEATS} pages are open already; close one, and reload."}))
            await socket.close(1013)
            return
        executor = ThreadPoolExecutor(1, "play")
        run = functools.partial(asyncio.get_running_loop().run_in_executor, executor)
        side, page = None, None
        try:
            side = await run(lobby.game.side)
            session = await run(sessions.begin, lobby.game, side, jax.random.key(0))
            page = Page(lobby, socket, session, run)
            page.tell(hello=lobby.game.about | _about(session))
            page.show()
            await _first_to_end(page.read(), page.send(), page.play())
        except (RunError, UsageError, MemoryError, jax.errors.JaxRuntimeError) as error:
            told = " ".join(str(error).split())[:400] or "memory ran out"
            await socket.send_text(json.dumps({"closed": told}))
            await socket.close(1011)
        finally:
            if page is not None:
                page.close()
            if side is not None:
                executor.submit(side.close)  # after the step that may be under way
            executor.shutdown(wait=False)


def _about(session: sessions.Session) -> dict[str, Any]:
    return {
        "drivers": sessions.DRIVERS, "flags": FLAGS, "header": HEADER.size, "kept": session.kept,
        "speeds": sessions.SPEEDS, "temperatures": sessions.TEMPERATURES,
        "most_recorded": sessions.most_recorded(session.now), "ffmpeg": shutil.which("ffmpeg") is not None,
    }  # fmt: skip


async def _first_to_end(*coroutines: Any) -> None:
    """Runs all until one ends, by an error, which is raised; of several, that of the first."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:  # what the others raise is of no interest any more
            _ = task.cancelled() or task.exception()
