"""The `wmjax` command. It reads arguments, calls `wmjax.run` and `wmjax.figures`, and says what was written where.

Whatever a user gets wrong is a `UsageError`, shown as one line on standard error; the exit code is then 2.
"""

from __future__ import annotations

import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence

import wmjax
from wmjax.cli import lists, results, train
from wmjax.types import RunError, UntrustedError, UsageError

HELP = """\
World models in JAX: train agents, evaluate them, look at their dreams.

wmjax train AGENT [--env NAME] [--preset NAME] [--seed N] [--seeds N] [--steps N] [--devices N]
                  [--parallel shard_map|pmap] [--image-size N] [--action-repeat N] [--eval-every N]
                  [--env-arg NAME VALUE ...] [--start-timeout S] [--trust-env]
                  [--checkpoint-seconds S] [--max-skipped N] [--workers N] [--worker-timeout S] [--max-restarts N]
                  [--memory-map] [--wandb PROJECT] [--out DIR] [--no-lock] [--resume] [--agent.FIELD VALUE ...]
wmjax eval  RUN   [--episodes N] [--seed N] [--env NAME] [--env-arg NAME VALUE ...] [--start-timeout S] [--trust-env]
                  [--action sample|mode] [--which latest|best] [--json] [--video]
wmjax dream RUN   [--context N] [--horizon N] [--which latest|best] [--start-timeout S] [--trust-env]
wmjax plot  RUN...  [--out FILE.png]
wmjax list  agents|envs|presets
wmjax --version

`wmjax COMMAND --help` explains a command, `wmjax train AGENT --help` the fields of an agent with the preset's values.
Compiled programs are kept in the user's cache folder; the variable WMJAX_CACHE names another, or turns that `off`."""


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train.train,
    "eval": results.evaluate,
    "dream": results.dream,
    "plot": results.plot,
    "list": lists.list_names,
}


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] == "--version":
        print(f"wmjax {wmjax.__version__}")
    elif argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
    else:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"command: unknown {argv[0]!r}; {hint}valid are {', '.join(COMMANDS)}")


def _fail(text: object) -> None:
    print("wmjax: error: " + " ".join(str(text).split()), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0; 1 a run that cannot go on; 2 a user's error; 130, 143 interrupted."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is as it should be
    try:
        _dispatch(sys.argv[1:] if argv is None else argv)
    except UntrustedError as error:
        _fail(f"{error}: wmjax {shlex.join([*(sys.argv[1:] if argv is None else argv), '--trust-env'])}")
        return 2
    except UsageError as error:
        _fail(error)
        return 2
    except SystemExit as end:  # help was asked for
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt as stop:
        print(f"wmjax: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "signum", 2)
    except BrokenPipeError:  # as in `wmjax list envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RunError, OSError) as error:  # OSError: a disk that is full or gone
        _fail(error)
        return 1
    return 0
