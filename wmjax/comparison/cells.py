"""Runs side by side: each cell of a comparison is `wmjax train` in a process of its own, resumed where it was left.

So a crash, a kill, or memory that is full is an outcome like others, and peak memory is a run's own. Beside the folder
of a run lie the record of its last attempt, `NAME.json`, and what it printed, `NAME.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wmjax import files, processes
from wmjax.run_folder import CHECKPOINTS, CONFIG, METRICS, write_json

POLL_SECONDS = 0.2
TOLD_EVERY = 60.0  # seconds between two lines about runs that go on
RECORD_BYTES, LOG_TAIL = 2**20, 2**16
RESUME = "--resume"


class Cell(NamedTuple):
    """One run: an agent, an environment, settings, and one seed or several in one program."""

    agent: str
    env: str
    name: str  # of an ablation; "" for the agent as it is
    seeds: tuple[int, ...]
    path: Path  # the run folder
    arguments: tuple[str, ...]  # of `wmjax train`

    @property
    def words(self) -> str:
        seeds = f"seed {self.seeds[0]}" if len(self.seeds) == 1 else f"seeds {self.seeds[0]} to {self.seeds[-1]}"
        return f"{self.agent}{f' {self.name}' if self.name else ''} on {self.env}, {seeds}"


class Outcome(NamedTuple):
    """How the last attempt at a cell ended."""

    arguments: list[str]
    code: int | None  # exit code; negative: the signal that killed it; None: it has not ended
    seconds: float = 0.0  # of all attempts
    peak_memory_bytes: int = 0  # of the process
    reason: str = ""  # why it failed

    @property
    def done(self) -> bool:
        return self.code == 0


def record_path(cell: Cell) -> Path:
    return cell.path.with_name(f"{cell.path.name}.json")


def log_path(cell: Cell) -> Path:
    return cell.path.with_name(f"{cell.path.name}.log")


def read_outcome(cell: Cell) -> Outcome | None:
    """Of the last attempt at it with these arguments; None: there was none."""
    outcome = _read(cell)
    same = outcome is not None and outcome.arguments == list(cell.arguments) and (cell.path / CONFIG).exists()
    return outcome if same else None


def _read(cell: Cell) -> Outcome | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = Outcome(**files.parse_json(files.read(record_path(cell), RECORD_BYTES)))
        whole = lambda number: type(number) is int
        spent = type(found.seconds) in (int, float) and whole(found.peak_memory_bytes)
        if spent and (found.code is None or whole(found.code)) and isinstance(found.reason, str):
            return found
    return None


def folder_name(*parts: str) -> str:
    """Parts of a name, as that of a folder."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") for part in parts if part)[:120]


def run_cells(
    cells: Sequence[Cell], *, jobs: int = 1, command: Sequence[str] | None = None, say: Callable[[str], None] = print
) -> dict[Cell, Outcome]:
    """Trains all cells that are not done, some at once, in their order; those that failed before are tried again.

    Ctrl-C and SIGTERM are passed on: runs are saved, and `KeyboardInterrupt` is raised with its `signum`.

    Args:
      cells: what to train.
      jobs: how many at once, at least 1.
      command: what is called with the arguments of `wmjax train`; by default this Python's `wmjax`.
      say: is told what goes on.
    """
    command = processes.python("-m", "wmjax", "train") if command is None else list(command)
    outcomes = {cell: outcome for cell in cells if (outcome := read_outcome(cell)) is not None and outcome.done}
    queue = [cell for cell in cells if cell not in outcomes]
    for cell in outcomes:
        say(f"{cell.words}: finished before, in {cell.path}")
    running: dict[Cell, _Attempt] = {}
    with _signals() as caught:
        passed = 0
        try:
            while running or (queue and not caught):
                while queue and len(running) < jobs and not caught:
                    cell = queue.pop(0)
                    number = len(cells) - len(queue)
                    say(f"[{number}/{len(cells)}] {cell.words}: training, see {log_path(cell)}")
                    running[cell] = _Attempt(cell, command)
                for signum in caught[passed:]:
                    for attempt in running.values():
                        attempt.pass_on(signum)
                    say(f"{signal.Signals(signum).name}: {len(running)} runs are saved and stop")
                passed = len(caught)
                for cell, attempt in list(running.items()):
                    outcome = attempt.poll(say)
                    if outcome is not None:
                        outcomes[cell] = outcome
                        del running[cell]
                        say(f"{cell.words}: {'finished' if outcome.done else outcome.reason}")
                time.sleep(POLL_SECONDS)
        except BaseException:  # as where the disk is full: nobody would be told of what goes on
            for attempt in running.values():
                attempt.process.terminate()
            raise
    if caught:
        from wmjax.loops.driver import Interrupted

        raise Interrupted(caught[0], cells[0].path.parent)
    return {cell: outcomes[cell] for cell in cells}


class _Attempt:
    """A process that trains a cell."""

    def __init__(self, cell: Cell, command: Sequence[str]) -> None:
        self.cell, self._began, self._told = cell, time.monotonic(), time.monotonic()
        self._before = _read(cell) or Outcome([], None)
        if cell.path.exists() and not (cell.path / CONFIG).exists() and not (cell.path / CHECKPOINTS).exists():
            shutil.rmtree(cell.path)  # it ended before it was a run folder
        arguments = [*cell.arguments, "--out", str(cell.path)]
        if (cell.path / CONFIG).exists():
            arguments.append(RESUME)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(record_path(cell), Outcome(list(cell.arguments), None, self._before.seconds)._asdict())
        with os.fdopen(files.open_to_append(log_path(cell)), "ab") as log:
            log.write(f"$ wmjax train {shlex.join(arguments)}\n".encode())
            log.flush()
            self._from = log.tell()
            # A session of its own: Ctrl-C in a terminal comes to this process alone, which passes it on once.
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=processes.environment(),
                start_new_session=True,
            )

    def pass_on(self, signum: int) -> None:
        """Sends a signal. `Popen.send_signal` would reap a process that has just ended, and `poll` would find none."""
        os.kill(self.process.pid, signum)

    def poll(self, say: Callable[[str], None]) -> Outcome | None:
        """How it ended, once it has; until then says now and then how far it is."""
        if not hasattr(os, "wait4"):
            code, peak = self.process.poll(), 0
            if code is None:
                return None
        else:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if not pid:
                if time.monotonic() - self._told > TOLD_EVERY:
                    self._told = time.monotonic()
                    say(f"{self.cell.words}: {_progress(self.cell.path)}")
                return None
            code = self.process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        outcome = Outcome(
            list(self.cell.arguments), code, round(self._before.seconds + time.monotonic() - self._began, 1), peak,
            "" if code == 0 else self._reason(code),
        )  # fmt: skip
        write_json(record_path(self.cell), outcome._asdict())
        return outcome

    def _reason(self, code: int) -> str:
        if code < 0:
            hint = ", as where memory is full" if -code == getattr(signal, "SIGKILL", 9) else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        with log_path(self.cell).open("rb") as log:
            log.seek(max(self._from, log.seek(0, os.SEEK_END) - LOG_TAIL))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("wmjax: ")), lines[-1] if lines else "")
        return f"failed with exit code {code}: {said.removeprefix('wmjax: ').removeprefix('error: ')[:500]}"


def _progress(path: Path) -> str:
    """The end of a run's metrics in words."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        with (path / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
            line: Mapping[str, Any] = json.loads(file.read().splitlines()[-1])
        return f"{line['stage']}, {line['step']:,} env steps, {line['updates']:,} updates, {line['time']:,.0f} s"
    return "starting"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals that ask to stop; nothing is collected outside of the main thread."""
    caught: list[int] = []
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        with contextlib.suppress(ValueError):
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda signum, frame: caught.append(signum))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
