"""What a run tells: `metrics.jsonl`, TensorBoard events and one line of progress."""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from wmjax import files
from wmjax.folder import METRICS, warn
from wmjax.loops.wandb_log import WandbLog
from wmjax.types import UsageError

LINE_BYTES = 2**20
FILE_BYTES = 2**32
TEXT = {"stage"}  # names whose values are text; all others are numbers, or null


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


def _number(value: Any) -> float | None:
    """A float, or None where JSON has no word for it (NaN, infinities)."""
    value = float(value)
    return value if math.isfinite(value) else None


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

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        for name, value in numbers.items():
            if value is not None:
                self._add(step, summary=self._summary.scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Appender:
    """Lines at the end of a file. One that does not fit on the disk is taken back, so that it spoils none after it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = files.open_to_append(path)

    def write(self, line: str) -> None:
        end, left = os.fstat(self._descriptor).st_size, line.encode()
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


class Report:
    """Writes a run's metrics to its folder, and one line of progress to a stream.

    On a terminal the line is redrawn in place; elsewhere every report is a line of its own. To be used as a context
    manager. Nothing is read from the device but the metrics that are given.

    Args:
      folder: of the run; made if absent.
      total_steps: env steps that the run is to do, for the time that is left; None if unknown.
      resume_step: env steps already done; later lines of an earlier attempt are dropped. 0 starts afresh.
      resume_iteration: iterations already done, for stages that take no env steps.
      stream: where progress goes; None for nowhere.
      tensorboard: whether to write TensorBoard events too.
      wandb: the project of Weights & Biases to send them to; None for none.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int | None = None,
        resume_step: int = 0,
        resume_iteration: int = 2**31,
        stream: TextIO | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._total, self._tensorboard, self._wandb = total_steps, tensorboard, wandb
        self._stream = stream
        self._file = self._events = self._live = self._remote = None
        self._warned, lines = False, []
        self._guard(lambda: lines.extend(_rewind(self._folder, resume_step or -1, resume_iteration, self.say)))
        last = lines[-1] if lines else {}
        self._before = last.get("time") or 0.0  # seconds that earlier attempts took
        self._start = self._last_time = time.monotonic()
        self._last_step, self._return = resume_step, None
        self._last_updates = last.get("updates") if lines or resume_step else 0
        self._resume_step = resume_step

    def __enter__(self) -> Self:
        self._guard(self._open)
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()
        if self._wandb is not None:
            self._remote = WandbLog(self._folder, self._wandb, self.say)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self._file, self._events, self._remote):
            if part is not None:
                self._guard(part.close)
        if self._live is not None:
            self._live.stop()

    def _open(self) -> None:
        self._file = _Appender(self._folder / METRICS)
        if self._tensorboard:
            self._events = _Events(self._folder, self._resume_step)

    def _guard(self, write: Callable[[], object]) -> None:
        """Training is worth more than its record: where a disk is full, it says so once and goes on."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                self.say(f"warning: metrics in {self._folder} cannot be written ({error.strerror}); training goes on")
            self._warned = True

    def log(
        self,
        stage: str,
        step: int,
        updates: int,
        metrics: Mapping[str, Any],
        replay_ratio: float = 0.0,
        *,
        iteration: int = 0,
        done: str = "",
    ) -> str:
        """Writes one line of metrics and shows progress.

        Args:
          stage: its name.
          step: env steps (frames) so far.
          updates: gradient updates so far.
          metrics: scalars by name; those that are not finite become null.
          replay_ratio: trained steps per collected step so far.
          iteration: iterations of all stages so far.
          done: how far the stage is, shown after its name.

        Returns:
          The line of progress.
        """
        now = time.monotonic()
        seconds = max(now - self._last_time, 1e-9)
        speed = (step - self._last_step) / seconds
        numbers = {name: _number(value) for name, value in metrics.items()}
        head = {"step": step, "updates": updates, "time": round(self._before + now - self._start, 3), "stage": stage}
        if self._last_updates is not None:  # unknown where an earlier attempt is resumed
            head["updates_per_second"] = round((updates - self._last_updates) / seconds, 3)
        head |= {"steps_per_second": round(speed, 2), "replay_ratio": round(replay_ratio, 4), "iteration": iteration}
        self._guard(lambda: self._write(step, head, numbers))
        self._last_time, self._last_step, self._last_updates = now, step, updates
        returns = [x for name, x in numbers.items() if name == "episode/return" or name.endswith("/mean_return")]
        self._return = next((x for x in returns if x is not None), self._return)
        line = self._progress(f"{stage} {done}".strip(), step, updates, speed, replay_ratio, numbers.get("skipped"))
        self._show(line)
        return line

    def _write(self, step: int, head: dict[str, Any], numbers: dict[str, float | None]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(head | numbers) + "\n")
        if self._events is not None:
            self._events.write(step, numbers)
        if self._remote is not None:
            self._remote.write({name: x for name, x in head.items() if name != "stage"} | numbers)

    def _progress(
        self, stage: str, step: int, updates: int, speed: float, replay_ratio: float, skipped: float | None
    ) -> str:
        total = f"/{self._total:,}" if self._total else ""
        parts = [f"{stage}", f"{step:,}{total} env steps", f"{updates:,} updates", f"{speed:,.0f} steps/s"]
        parts += [f"replay ratio {replay_ratio:.3g}"]
        parts += [f"return {self._return:.3f}"] if self._return is not None else []
        parts += [f"skipped {skipped:g}"] if skipped else []
        if self._total and speed > 0:
            left = datetime.timedelta(seconds=round(max(self._total - step, 0) / speed))
            parts += [f"ETA {left}"]
        return "  ".join(parts)

    def _show(self, line: str) -> None:
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)
        elif self._stream is not None:
            print(line, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Prints one line of text above the progress line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)
