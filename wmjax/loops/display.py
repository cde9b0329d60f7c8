"""Where a run speaks: a stream that cannot end it, a bar on a terminal, and the time that is not spent training."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TextIO

import jax

from wmjax.loops.ahead import in_compiler_thread

TICKS = (10.0, 30.0, 60.0)  # seconds after which a plain stream is told that something still goes on; then each minute
REDRAW_SECONDS = 1.0  # on a terminal
BAR_CELLS, LEAST_CELLS = 10, 4  # of a bar: beside more than the first words, and at all


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class SafeStream:
    """A text stream that may fail without ending who writes to it: what cannot be written is lost.

    That is said once, on standard error: of a pipe that nobody reads, a full disk, a closed file, or a stream of the
    caller's own that raises. Later writes are tried again, for a disk may have room again. Characters that the stream
    has no code for become question marks.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._warned = stream, False

    def __getattr__(self, name: str) -> Any:  # what else a stream has, such as `encoding`
        return getattr(self._stream, name)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if self._warned:
                return
            self._warned = True
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            text = f"wmjax: warning: output is lost ({reason}); training goes on without it"
            with contextlib.suppress(Exception):
                if sys.stderr is not None:
                    print(text, file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))

    def write(self, text: str) -> int:
        self._try(lambda: self._write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: getattr(self._stream, "flush", lambda: None)())

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except Exception:  # closed, or one that has no such method
            return False


# ---------------------------------------------------------------------------------------------------------------------
# Time


class _Compiling:
    """Seconds in which this process traced and compiled programs, those of all threads together that it waits for."""

    def __init__(self) -> None:
        self._lock, self._spans, self.seconds = threading.Lock(), [], 0.0  # spans are disjoint, the newest last
        self.saved = 0.0  # seconds that the cache of compiled programs saved, in all threads
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **about: Any) -> None:
        if event == "/jax/compilation_cache/compile_time_saved_sec":
            self.saved += max(seconds, 0.0)
        if not event.startswith("/jax/core/compile/") or in_compiler_thread():
            return
        end = time.monotonic()
        start = end - seconds
        with self._lock:
            while self._spans and self._spans[-1][0] >= start:  # within this one, as a program that calls others
                first, last = self._spans.pop()
                self.seconds -= last - first
            start = max(start, self._spans[-1][1]) if self._spans else start
            self._spans.append((start, end))
            self.seconds += end - start


@functools.cache
def _compiling() -> _Compiling:
    """One listener for the process, made when it is first needed."""
    return _Compiling()


class Clock:
    """Seconds spent training: neither those in which JAX compiled, nor those within `pause`."""

    compiling = staticmethod(_compiling)  # its `seconds` and `saved` are of the whole process

    def __init__(self) -> None:
        self._compiling, self._paused = _compiling(), 0.0

    def seconds(self) -> float:
        """From some moment on; differences have a meaning."""
        return time.monotonic() - self._compiling.seconds - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done within does not count: evaluation, saving."""
        start = self.seconds()
        try:
            yield
        finally:
            self._paused += self.seconds() - start


def duration(seconds: float) -> str:
    """As "1:02:03"."""
    return str(datetime.timedelta(seconds=round(seconds)))


# ---------------------------------------------------------------------------------------------------------------------
# Display


class Display:
    """What a run says, and one line of progress: redrawn in place on a terminal, elsewhere a line for each report.

    To be used as a context manager.

    Args:
      stream: where to; None for nowhere. It cannot end the run (`SafeStream`).
      warnings: where warnings go where nothing else is said.
    """

    def __init__(self, stream: TextIO | None, warnings: TextIO | None = None) -> None:
        self._stream, self._warnings = (None if each is None else SafeStream(each) for each in (stream, warnings))
        self._live: Any = None
        self._progress: tuple[float, str, Sequence[str]] | None = None  # share done, first words, the rest

    def __enter__(self) -> Self:
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._live = Live(console=console, auto_refresh=False, transient=True)
                self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Prints text, on a terminal above the progress line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)
        elif self._warnings is not None and text.startswith("warning"):
            print(text, file=self._warnings, flush=True)

    def show(self, share: float, first: Sequence[str], rest: Sequence[str]) -> None:
        """Shows progress.

        Args:
          share: of the stage that is done, in [0, 1].
          first: what a narrow terminal has room for too.
          rest: in the order of its worth.
        """
        self._progress = share, "  ".join(first), rest
        if self._live is not None:
            self._redraw()
        elif self._stream is not None:
            print("  ".join([*first, *rest]), file=self._stream, flush=True)

    def _redraw(self, note: str = "") -> None:
        from rich.text import Text

        one_line = dict(overflow="ellipsis", no_wrap=True)
        self._live.update(Text(note, **one_line) if note else self._bar(), refresh=True)

    def _bar(self) -> Any:
        """The line of progress, as long as the terminal is wide."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._progress is None:
            return Text("")
        share, first, rest = self._progress
        first = f"{first}  {share:.0%}" if first else f"{share:.0%}"
        width = self._live.console.width - 1  # some terminals wrap what fills a line
        room = width - len(first) - BAR_CELLS - 2
        if width - len(first) - 2 < LEAST_CELLS:
            return Text(first[: max(width, 0)], no_wrap=True, overflow="crop")
        shown: list[str] = []
        for part in rest:
            if len("  ".join([*shown, part])) + 2 > room:
                break
            shown.append(part)
        tail = "  ".join(shown)
        line = Table.grid(padding=0)
        bar = width - len(first) - 2 - (len(tail) + 2 if tail else 0)
        cells = [Text(first + "  "), ProgressBar(1.0, share, width=bar)]
        for width in (len(first) + 2, bar):
            line.add_column(width=width, no_wrap=True)
        if tail:
            line.add_column(width=len(tail) + 2, no_wrap=True)
            cells.append(Text("  " + tail))
        line.add_row(*cells)
        return line

    @contextlib.contextmanager
    def working(self, what: str, *, say: bool = True) -> Iterator[None]:
        """Tells that something takes long while it does, and how long it has taken so far.

        Args:
          what: it is.
          say: whether a plain stream is told at once, and not only after the first of `TICKS`.
        """
        if self._stream is None:
            yield
            return
        if say and self._live is None:
            self.say(what)
        ended, start = threading.Event(), time.monotonic()
        thread = threading.Thread(target=self._tick, args=(what, start, ended), daemon=True)
        if self._live is not None:
            self._redraw(what)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if self._live is not None:
                self._redraw()

    def _tick(self, what: str, start: float, ended: threading.Event) -> None:
        minutes = itertools.count(2)
        for due in itertools.chain(TICKS, (60.0 * minute for minute in minutes)):
            while (left := start + due - time.monotonic()) > 0:
                if ended.wait(left if self._live is None else min(left, REDRAW_SECONDS)):
                    return
                if self._live is not None:
                    self._redraw(f"{what} {duration(time.monotonic() - start)}")
            if self._live is None:
                self.say(f"{what}: {duration(time.monotonic() - start)} so far")
