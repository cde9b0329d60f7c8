"""Times everything that matters on an accelerator, in about ten minutes:

    python -m benchmarks.accelerator --out benchmarks/results/accelerator.json
    python -m benchmarks.accelerator --only dreamer_v3 "iris*" --skip "*seeds*" --budget 300
    python -m benchmarks.accelerator --reduced      # tiny sizes, on a CPU: that it works, not how fast it is

Let nothing else run on the card. First all programs are compiled, by several processes, into a cache; then, when none
compiles or tunes any more, one process times one after the other. Rows are printed as they come and written at once,
the most valuable first; what there was no time for is named. A row that fails, or ends its process, is recorded, and
the next one goes on. No network is needed. `benchmarks.work.ROWS` has the rows; whole runs are the last, for which
there is time in a call of their own: `--only whole`.

A value is the median of some measurements, beside the lowest and the highest; launches are those of one update, or of
one call; compile seconds are of a process beside the others (`--processes 1` for those of one alone).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from benchmarks.timing import typed_command
from benchmarks.work import ROWS, Row

COMPILING = 0.55  # at most this share of the time is for compiling
SECONDS = 4.0  # of measuring, for each row


@dataclasses.dataclass(frozen=True)
class Args:
    """Command line of the benchmark."""

    only: tuple[str, ...] = ()
    """Rows whose name contains one of these, or fits it as a pattern; all by default."""
    skip: tuple[str, ...] = ()
    """Rows that are left out."""
    budget: float = 600.0
    """Seconds for all."""
    processes: int = max(1, min(4, (os.cpu_count() or 1) // 2))
    """That compile at the same time."""
    reduced: bool = False
    """Tiny sizes, on a CPU too."""
    cache: Path | None = None
    """Folder for compiled programs; with one that is kept, the next call compiles nothing anew."""
    out: Path | None = None
    """Write rows and machine here, as JSON."""


class Worker:
    """A process of `benchmarks.measure`, started when it is first asked; a new one after one that has ended."""

    def __init__(self, cache: Path, command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.measure")) -> None:
        self._command, self._process = command, None
        # Every program is kept; and memory is taken as it is needed, for several processes share it.
        self._env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }  # fmt: skip
        self._log = tempfile.TemporaryFile("w+")  # what it says besides

    def ask(self, seconds: float, /, **request: Any) -> dict[str, Any]:
        """The answer to a request; {"error": text} where the process ended, or took longer than so many seconds."""
        if self._process is None:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
            self._process = subprocess.Popen(self._command, env=self._env, **pipes)
            self._answers: queue.Queue[str] = queue.Queue()
            threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=max(1.0, seconds))
        except queue.Empty:
            self.end()
            return {"error": f"took more than {max(1.0, seconds):.0f} s"}
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._process = None
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        return {"error": f"its process ended with {code}: {self._log.read()}"}

    @staticmethod
    def _read(process: subprocess.Popen, answers: queue.Queue[str]) -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def end(self) -> None:
        """Ends the process, which frees what it has on the card."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def chosen(args: Args) -> list[Row]:
    """The rows that are asked for. Raises `SystemExit` where a word fits none, or none is left."""
    fits = lambda word, row: word in row.name or fnmatch.fnmatchcase(row.name, word)
    for word in (*args.only, *args.skip):
        if not any(fits(word, row) for row in ROWS):
            raise SystemExit(f"no row fits {word!r}; there are:\n" + "\n".join(f"  {row.name}" for row in ROWS))
    wanted = [row for row in ROWS if not args.only or any(fits(word, row) for word in args.only)]
    rows = [row for row in wanted if not any(fits(word, row) for word in args.skip)]
    if not rows:
        raise SystemExit("--only and --skip leave no row")
    return rows


def compile_all(args: Args, rows: list[Row], cache: Path, until: float) -> dict[str, dict[str, Any]]:
    """What compiling each row took; rows that were not begun by then are not in it."""
    found: dict[str, dict[str, Any]] = {}
    waiting = queue.SimpleQueue()
    for row in rows:
        waiting.put(row)

    def work() -> None:
        worker = Worker(cache)
        while time.monotonic() < until:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                break
            answer = worker.ask(until - time.monotonic(), do="compile", row=row.name, reduced=args.reduced)
            found[row.name] = answer
            print(f"compiled {row.name}: {answer.get('error') or seconds_of(answer)}", flush=True)
        worker.end()

    with ThreadPoolExecutor(args.processes) as pool:
        for future in [pool.submit(work) for _ in range(args.processes)]:
            future.result()
    return found


def seconds_of(answer: dict[str, Any]) -> str:
    """What compiling took, in words."""
    kept = ", from the cache" if answer["compiled_before"] else ""
    return f"trace {answer['trace_s']:.1f} s, compile {answer['compile_s']:.1f} s{kept}"


def run_command(row: Row, args: Args, cache: Path, seconds: float) -> dict[str, Any]:
    """Seconds of a command of `wmjax` with a cache of its own, from its start to the evaluated result."""
    folder = cache / "commands" / re.sub(r"\W+", "-", " ".join(row.command))
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    env |= {"WMJAX_CACHE": str(folder)}
    deadline = time.monotonic() + seconds
    if not row.cached:
        shutil.rmtree(folder, ignore_errors=True)
    for last in (False, True) if row.cached and not folder.exists() else (True,):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "wmjax", *row.arguments(args.reduced), "--out", str(Path(out) / "run")]
            start = time.monotonic()
            try:
                done = subprocess.run(
                    command, env=env, capture_output=True, text=True, timeout=max(1.0, deadline - start)
                )
            except subprocess.TimeoutExpired:
                return {"error": f"took more than {max(1.0, deadline - start):.0f} s"}
            taken = time.monotonic() - start
        if done.returncode:
            return {"error": f"ended with {done.returncode}: {done.stderr[-2000:]}"}
        if last:
            score = re.search(r"^mean return (\S+)", done.stdout, re.MULTILINE)
            return {"value": taken, "unit": "s", "mean_return": float(score.group(1)) if score else None}
    return {}


def show(name: str, row: dict[str, Any]) -> None:
    """Prints a row."""
    if "error" in row:
        return print(f"{name:52s} failed: {row['error'][:300]}", flush=True)
    spread = f" ({row['low']:.4g} to {row['high']:.4g})" if "low" in row else ""
    more = f", {row['launches']:,.0f} launches" if "launches" in row else ""
    more += f", {100 * row['share_of_peak']:.1f} % of the peak" if "share_of_peak" in row else ""
    more += f", compile {row['cold']['compile_s']:.1f} s" if "compile_s" in row.get("cold", {}) else ""
    more += f", mean return {row['mean_return']}" if "mean_return" in row else ""
    print(f"{name:52s} {row['value']:12.4g} {row['unit']}{spread}{more}", flush=True)


def measure(args: Args, cache: Path) -> dict[str, Any]:
    """Everything that is asked for, as far as the time goes."""
    begin, rows = time.monotonic(), chosen(args)
    end = begin + args.budget
    timer = Worker(cache)
    where = timer.ask(args.budget, do="machine")
    timer.end()
    if "error" in where:
        raise SystemExit(f"JAX does not start here: {where['error']}")
    if where["backend"] == "cpu" and not args.reduced:
        raise SystemExit("JAX finds no accelerator, only a CPU; install JAX for it, or give --reduced for tiny sizes")
    where["command"] = typed_command()
    report = {"machine": where, "reduced": args.reduced, "processes": args.processes, "rows": {}, "left_out": []}
    print(f"{where['devices'][0]}, driver {where['driver']}; {where['versions']}; {len(rows)} rows", flush=True)
    cold = compile_all(args, [row for row in rows if row.make], cache, begin + COMPILING * args.budget)
    for row in rows:
        left = end - time.monotonic()
        if left < (args.reduced or row.seconds) or (row.make and row.name not in cold):
            report["left_out"].append(row.name)
            continue
        if row.make is None:
            timer.end()  # the run needs the card for itself
            found = run_command(row, args, cache, left)
        elif "error" in cold[row.name]:
            found = cold[row.name]
        else:
            found = timer.ask(left, do="time", row=row.name, reduced=args.reduced, seconds=SECONDS)
            found |= {"cold": {name: value for name, value in cold[row.name].items() if name.endswith("_s")}}
        report["rows"][row.name] = found
        show(row.name, found)
        write(args, report)
    timer.end()
    if report["left_out"]:
        print(f"no time for: {', '.join(report['left_out'])}")
    report["seconds"] = time.monotonic() - begin
    write(args, report)
    return report


def write(args: Args, report: dict[str, Any]) -> None:
    """Writes what is known so far."""
    if args.out is not None:
        rounded = lambda value: float(f"{value:.5g}") if isinstance(value, float) else value
        text = json.dumps(_map(rounded, report), indent=1)
        args.out.write_text(text + "\n")


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _map(function, inner) for name, inner in value.items()}
    return [_map(function, inner) for inner in value] if isinstance(value, list) else function(value)


def main(args: Args) -> None:
    for name in ("budget", "processes"):
        if not getattr(args, name) > 0:
            raise SystemExit(f"--{name}: {getattr(args, name)} is not valid; a number above 0 is")
    for name, folder in (("out", args.out and args.out.parent), ("cache", args.cache)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--{name}: {folder} cannot be made: {error.strerror}") from None
    if args.cache is not None:
        measure(args, args.cache.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="wmjax-accelerator-") as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Args))
