"""What a run tells: `metrics.jsonl`, TensorBoard events and one line of progress."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from wmjax import files
from wmjax.loops.display import Clock, Display, duration
from wmjax.loops.wandb_log import WandbLog
from wmjax.run_folder import METRICS, warn
from wmjax.types import UsageError

LINE_BYTES = 2**20
FILE_BYTES = 2**32
TEXT = {"stage"}  # names whose values are text; all others are numbers, or null
PACE_SECONDS = 60.0  # over which the pace of a stage is averaged


def read_metrics(folder: str | Path, say: Callable[[str], None] = warn) -> list[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`, oldest first.

    A line is an object with a `step`; all else in it but `TEXT` is a number or null. Others are left out, and `say` is
    told how many there are; not so a last line that was cut short.

    Raises `UsageError` where the file is not one that can be read.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    try:
        found = [(line, begins) for _, line, begins in _read_lines(path)]
    except OSError as error:
        raise UsageError(f"run: {str(path)!r} cannot be read: {error.strerror}") from None
    _say_bad(path, sum(begins for line, begins in found if line is None), say)
    return [line for line, _ in found if line is not None]


def _say_bad(path: Path, count: int, say: Callable[[str], None]) -> None:
    if count:
        what = "1 line is" if count == 1 else f"{count} lines are"
        say(f"warning: {path}: {what} not of metrics; left out here, and left in the file")


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None, bool]]:
    """Lines as they are and what they say, None where that is not of metrics; the parts of a huge one are several.

    The last value is whether a line begins there, that should be told of if it is not of metrics.
    """
    with files.open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > FILE_BYTES:
            raise OSError(errno.EFBIG, f"larger than {FILE_BYTES:,} bytes", str(path))
        begins = True
        while raw := file.readline(LINE_BYTES):
            ends = raw.endswith(b"\n")
            line = _parse_line(raw) if begins and (ends or len(raw) < LINE_BYTES) else None
            cut = begins and not ends and len(raw) < LINE_BYTES and raw.startswith(b"{")
            if line is not None or not cut:  # else a process was killed while it wrote it
                yield raw, line, begins and bool(raw.strip())
            begins = ends


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    try:
        line = files.parse_json(raw)
    except ValueError:
        return None
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2**63
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    good = all(isinstance(x, str) if name in TEXT else x is None or is_number(x) for name, x in line.items())
    return line if good and line["step"] >= 0 and isinstance(line.get("iteration", 0), int) else None


def _rewind(folder: Path, step: int, iteration: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Drops the lines beyond a step and an iteration, which a resumed run writes again; atomic.

    Lines that are not of metrics stay where they are. Returns the others.
    """
    path = folder / METRICS
    lines, bad = [], 0
    if not os.path.lexists(path):
        return lines
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        for raw, line, begins in _read_lines(path):
            bad += begins and line is None
            if line is None or (line["step"] <= step and line.get("iteration", 0) <= iteration):
                file.write(raw)
                lines += [line] if line is not None else []
                ended = raw.endswith(b"\n")
        if file.tell() and not ended:
            file.write(b"\n")
    _say_bad(path, bad, say)
    return lines


class _Events:
    """TensorBoard events, written as they come. (The writer that tensorboardX offers queues them for a thread, and
    waits forever once that has met a full disk.)"""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboardX import event_file_writer, proto, summary

        self._proto, self._summary = proto, summary
        # A name that nobody could foresee, for the writer would follow a link.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")
        if resume_step:  # readers drop what an earlier attempt wrote beyond this step
            start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._add(resume_step + 1, session_log=start)

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._proto.event_pb2.Event(wall_time=time.time(), step=step, **content))

    def write(self, head: dict[str, Any], numbers: dict[str, float | None]) -> None:
        for name, value in numbers.items():
            if value is not None:
                self._add(head["step"], summary=self._summary.scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Appender:
    """Lines at the end of a file. One that does not fit on the disk is taken back, so that it spoils none after it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = files.open_to_append(path)

    def write(self, head: dict[str, Any], numbers: dict[str, float | None]) -> None:
        end, left = os.fstat(self._descriptor).st_size, f"{json.dumps(head | numbers)}\n".encode()
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


class Left(NamedTuple):
    """What a stage still has to do."""

    done: int  # iterations
    total: int
    last: bool = True  # whether the run ends with it
    evaluations: int = 0  # still to come
    collects: bool = True  # whether it takes env steps, which then tell how far it is


class _Pace:
    """Seconds that an iteration of a stage takes: a mean over its last minute or so.

    What is heard first holds until there is more: the first iteration of a program is slower than the others.
    """

    def __init__(self, stage: str = "", done: int = 0) -> None:
        self.stage, self._done, self.seconds, self._heard = stage, done, 0.0, None

    def add(self, done: int, seconds: float) -> None:
        """So many iterations are done now, the last ones in so many seconds."""
        iterations, self._done = done - self._done, done
        if iterations > 0:
            first, heard = self._heard is None, (self._heard or 0.0) + seconds
            weight = max(seconds / max(heard, 1e-9), 1 - math.exp(-seconds / PACE_SECONDS))
            self.seconds += weight * (seconds / iterations - self.seconds)
            self._heard = 0.0 if first else heard


class Report:
    """Writes a run's metrics to its folder, and one line of progress to a display.

    Speeds, and the time that is left, are of training: without compiling, and without what the clock was paused for.
    To be used as a context manager. Nothing is read from the device but the metrics that are given.

    Args:
      folder: of the run; made if absent. None: nothing is written.
      total_steps: env steps that the run is to do; None if unknown.
      resume_step: env steps already done; later lines of an earlier attempt are dropped. 0 starts afresh.
      resume_iteration: iterations already done, for stages that take no env steps.
      display: where progress goes.
      clock: of the time spent training; its own by default.
      wandb: the project of Weights & Biases to send them to; None for none.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        total_steps: int | None = None,
        resume_step: int = 0,
        resume_iteration: int = 2**31,
        display: Display | None = None,
        clock: Clock | None = None,
        wandb: str | None = None,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._total, self._wandb = total_steps, wandb
        self._display, self._clock = display or Display(None), clock or Clock()
        self._sinks, self._warned, lines, say = [], False, [], self._display.say
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._guard(lambda: lines.extend(_rewind(self._folder, resume_step or -1, resume_iteration, say)))
        last = lines[-1] if lines else {}
        self._before = last.get("time") or 0.0  # seconds that earlier attempts took
        self._start, self._last_time = time.monotonic(), self._clock.seconds()
        self._last_step = self._resume_step = resume_step
        self._last_updates = last.get("updates") if lines or resume_step else 0
        self._return, self._pace = None, _Pace()
        self._evaluation_seconds = 0.0  # of the last one

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._guard(self._open)
        if self._wandb is not None:
            self._sinks.append(WandbLog(self._folder, self._wandb, self._display.say))
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            self._guard(sink.close)

    def _open(self) -> None:
        self._sinks.append(_Appender(self._folder / METRICS))
        self._sinks.append(_Events(self._folder, self._resume_step))

    def _guard(self, write: Callable[[], object]) -> None:
        """Training is worth more than its record: where a disk is full, it says so once and goes on."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                text = f"warning: metrics in {self._folder} cannot be written ({error.strerror}); training goes on"
                self._display.say(text)
            self._warned = True

    def starts(self, stage: str, done: int) -> None:
        """A stage begins, or goes on after some of its iterations: time is counted from here."""
        self._pace, self._last_time = _Pace(stage, done), self._clock.seconds()

    @contextlib.contextmanager
    def evaluating(self, what: str) -> Iterator[None]:
        """An evaluation goes on within; its time counts for the time that is left, and for no speed."""
        start = self._clock.seconds()
        with self._clock.pause(), self._display.working(what, say=False):
            yield
            self._evaluation_seconds = self._clock.seconds() - start

    def log(
        self,
        stage: str,
        step: int,
        updates: int,
        metrics: Mapping[str, Any],
        replay_ratio: float = 0.0,
        *,
        iteration: int = 0,
        left: Left | None = None,
    ) -> dict[str, Any]:
        """Writes one line of metrics and shows progress.

        Args:
          stage: its name.
          step: env steps (frames) so far.
          updates: gradient updates so far.
          metrics: scalars by name; those that are not finite become null.
          replay_ratio: trained steps per collected step so far.
          iteration: iterations of all stages so far.
          left: how far the stage is; None if unknown.

        Returns:
          What was written, by name; None for what is not finite.
        """
        now = self._clock.seconds()
        seconds = max(now - self._last_time, 1e-9)
        speed, learned = (step - self._last_step) / seconds, updates - (self._last_updates or 0)
        numbers = {name: x if math.isfinite(x := float(value)) else None for name, value in metrics.items()}
        wall = time.monotonic() - self._start
        head = {"step": step, "updates": updates, "time": round(self._before + wall, 3), "stage": stage}
        if self._last_updates is not None:  # unknown where an earlier attempt is resumed
            head["updates_per_second"] = round(learned / seconds, 3)
        head |= {"steps_per_second": round(speed, 2), "replay_ratio": round(replay_ratio, 4), "iteration": iteration}
        self._guard(lambda: self._write(head, numbers))
        self._last_time, self._last_step, self._last_updates = now, step, updates
        returns = [x for name, x in numbers.items() if name == "episode/return" or name.endswith("/mean_return")]
        self._return = next((x for x in returns if x is not None), self._return)
        rates = [f"{_rate(speed)} steps/s"] if speed > 0 else [f"{_rate(learned / seconds)} updates/s"] * (learned > 0)
        self._progress(head, rates, numbers.get("skipped"), left, self._time_left(stage, left, seconds))
        return head | numbers

    def _time_left(self, stage: str, left: Left | None, seconds: float) -> float | None:
        """Seconds until the stage ends, after a report over so many; None if unknown."""
        if left is None:
            return None
        self._pace = self._pace if self._pace.stage == stage else _Pace(stage)
        self._pace.add(left.done, seconds)
        if not self._pace.seconds:
            return None
        return (left.total - left.done) * self._pace.seconds + left.evaluations * self._evaluation_seconds

    def _write(self, head: dict[str, Any], numbers: dict[str, float | None]) -> None:
        for sink in self._sinks:
            sink.write(head, numbers)

    def _progress(
        self, head: dict[str, Any], rates: list[str], skipped: float | None, left: Left | None, time_left: float | None
    ) -> None:
        """Shows the line: what one looks for first, then what a narrow terminal has no room for."""
        first = [f"return {self._return:.3f}"] if self._return is not None else []
        if time_left is not None:
            first.append(f"{'' if left.last else 'stage '}ETA {duration(time_left)}")
        total = f"/{self._total:,}" if self._total else ""
        done = f" {left.done:,}/{left.total:,}" if left and not left.collects else ""
        rest = [f"{head['stage']}{done}", f"{head['step']:,}{total} env steps", *rates, f"{head['updates']:,} updates"]
        rest += [f"replay ratio {head['replay_ratio']:.3g}"] + ([f"skipped {skipped:g}"] if skipped else [])
        self._display.show(left.done / max(left.total, 1) if left else 0.0, first, rest)


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
