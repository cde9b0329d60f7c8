"""The `wmjax` command. It reads arguments, calls `wmjax.run` and `wmjax.figures`, and says what was written where.

Whatever a user gets wrong is a `UsageError`, shown as one line on standard error; the exit code is then 2.
"""

from __future__ import annotations

import _thread
import contextlib
import difflib
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import wmjax
from wmjax.cli import compare, lists, plan, play, results, train
from wmjax.types import RunError, UntrustedError, UsageError

HELP = """\
World models in JAX: train agents, evaluate them, look at their dreams.

wmjax train AGENT [--env NAME] [--preset NAME] [--seed N] [--seeds N] [--steps N] [--seconds S]
                  [--devices N] [--shard-params N] [--parallel shard_map|pmap] [--image-size N] [--action-repeat N]
                  [--eval-every N] [--eval-envs N] [--env-arg NAME VALUE ...] [--start-timeout S] [--trust-env]
                  [--checkpoint-seconds S] [--max-skipped N] [--workers N] [--worker-timeout S] [--max-restarts N]
                  [--data FOLDER] [--skip-damaged] [--memory-map] [--wandb PROJECT]
                  [--out DIR] [--no-lock] [--deterministic] [--resume]
                  [--coordinator HOST:PORT --num-processes N --process-id I | --distributed auto]
                  [--coordinator-timeout S] [--heartbeat-timeout S]
                  [--agent.FIELD VALUE ...] [--config FILE] [--print-config] [--dry-run]
wmjax train --resume --out RUN
wmjax plan  AGENT [--env NAME] [--preset NAME] [--seeds N] [--steps N] [--devices N]
                  [--shard-params N] [--image-size N] [--action-repeat N] [--env-arg NAME VALUE ...]
                  [--start-timeout S] [--agent.FIELD VALUE ...]
                  [--card NAME] [--peak-tflops X] [--memory-gb X] [--bandwidth X] [--share X] [--json]
wmjax eval  RUN   [--episodes N] [--seed N] [--env NAME] [--env-arg NAME VALUE ...] [--start-timeout S] [--trust-env]
                  [--action sample|mode] [--policy cem|icem|mppi|gradient] [--planner.FIELD VALUE ...]
                  [--which latest|best] [--max-steps N] [--eval-envs N] [--json] [--video]
wmjax dream RUN   [--context N] [--horizon N] [--env NAME] [--env-arg NAME VALUE ...] [--which latest|best]
                  [--start-timeout S] [--trust-env]
wmjax play  RUN   [--seed N] [--env NAME] [--env-arg NAME VALUE ...] [--which latest|best] [--start-timeout S]
                  [--trust-env] [--policy cem|icem|mppi|gradient] [--planner.FIELD VALUE ...] [--port N] [--open]
                  [--host ADDRESS --open-to-network]
wmjax record [RUN] --out FOLDER [--env NAME] [--steps N | --episodes N] [--policy agent|random] [--seed N]
                  [--action sample|mode] [--which latest|best] [--num-envs N] [--image-size N] [--action-repeat N]
                  [--env-arg NAME VALUE ...] [--start-timeout S] [--workers N] [--trust-env]
wmjax plot  RUN...  [--out FILE.png]
wmjax compare --out DIR [--agents all|NAME,...] [--env NAME ...] [--seeds N] [--first-seed N]
                  [--steps N | --seconds S] [--preset NAME] [--image-size N] [--action-repeat N]
                  [--env-arg NAME VALUE ...] [--eval-every N] [--jobs N] [--context N] [--horizon N] [--threshold X]
                  [--strict] [--runs RUN...] [--trust-env]
wmjax ablate AGENT --out DIR [--env NAME] [--only NAME,...] and options of compare
wmjax export RUN [FILE.safetensors] [--dtype float32|float16] [--seed N] [--action sample|mode] [--episodes N]
                  [--onnx FILE.onnx] [--stablehlo FILE.stablehlo]
                  [--env NAME] [--env-arg NAME VALUE ...] [--which latest|best] [--start-timeout S] [--trust-env]
wmjax import AGENT PATH --out RUN [--env NAME] [--preset NAME] [--steps N] [--image-size N] [--action-repeat N]
                  [--env-arg NAME VALUE ...] [--start-timeout S] [--agent.FIELD VALUE ...]
wmjax list  agents|envs|presets|pretrained [PATTERN]
wmjax --version

RUN is a run folder; of eval, dream, play, record and export also a file of `wmjax export`, or pretrained:NAME, of those
that `wmjax list pretrained` shows.
`wmjax COMMAND --help` explains a command, `wmjax train AGENT --help` the fields of an agent with the preset's values.
Compiled programs are kept in the user's cache folder; the variable WMJAX_CACHE names another, or turns that `off`."""


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train.train,
    "plan": plan.plan,
    "eval": results.evaluate,
    "dream": results.dream,
    "play": play.play,
    "record": results.record,
    "plot": results.plot,
    "compare": compare.compare,
    "ablate": compare.ablate,
    "export": results.export,
    "import": results.import_weights,
    "list": lists.list_names,
}


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] == "--version":
        print(f"wmjax {wmjax.__version__}")
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        # Of those left out what is printed is not what they are for.
        if argv[0] not in ("train", "compare", "ablate") and sys.stdout is not None:
            sys.stdout.flush()
    else:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"command: unknown {argv[0]!r}; {hint}valid are {', '.join(COMMANDS)}")


def _complain(text: object) -> None:
    """One line on standard error, where there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"wmjax: {' '.join(str(text).split())}\n")
        sys.stderr.flush()


def _let_go(stream: Any) -> None:
    """Drops what a stream still holds and cannot write; the interpreter would fail on it when it ends."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unraisable(found: Any) -> None:
    """What Python has no place to raise at, as while garbage is collected.

    An interrupt there is not lost but comes again. Of a damaged checkpoint the first array that cannot be read is told
    of; the storage complains of the others, which is left out.
    """
    if issubclass(found.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    elif str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0; 1 a run that cannot go on; 2 a user's error; 128 + N signal N.

    A run that is whole gives 0, also where what it said could not be written.
    """
    if argv is None:
        for number in range(3):  # a standard stream that is closed; no file of a run is to be one
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        sys.unraisablehook = _unraisable
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        joined = sys.modules.get("wmjax.distributed")  # which is slow to import
        return joined.leave(code) if joined else code
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)


def _main(argv: Sequence[str]) -> int:
    # Orbax warns of what is as it should be, and has tracebacks shown of what it raises and a run says in one line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        _dispatch(argv)
    except UntrustedError as error:
        _complain(f"error: {error}: wmjax {shlex.join([*argv, '--trust-env'])}")
        return 2
    except UsageError as error:
        _complain(f"error: {error}")
        return 2
    except SystemExit as end:  # help was asked for
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted")
        return 128 + getattr(stop, "signum", 2)
    except BrokenPipeError:  # as in `wmjax list envs | head`
        return 0
    except (RunError, OSError) as error:  # OSError: a disk that is full or gone
        _complain(f"error: {error}")
        return 1
    return 0
