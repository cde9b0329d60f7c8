"""Whether agents can take environments: a process of its own, so that the one that asks holds no accelerator.

Reads a list of arguments of `settings.setup` as JSON on standard input, and prints what it finds of each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wmjax import processes
from wmjax.types import RunError, UsageError


class Found(NamedTuple):
    """What `settings.setup` says of a run."""

    error: str | None  # why it cannot be; None: it can
    on_host: bool = False  # whether its environment is
    steps: int = 0  # env steps of its preset
    whole: bool = False  # whether its stages have lengths of their own, which `steps` cannot change


def check(asked: Sequence[Mapping[str, Any]]) -> list[Found]:
    """What there is to say of each run: keywords of `settings.setup`, and `overrides` of the agent's fields."""
    command = processes.python("-c", "from wmjax.comparison.check import main; main()")
    environment = processes.environment(JAX_PLATFORMS="cpu")
    # A session of its own: Ctrl-C comes to this process alone, which ends that one.
    ran = subprocess.run(
        command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    if ran.returncode:
        raise RunError(f"the agents could not be checked (exit code {ran.returncode})")
    return [Found(**found) for found in json.loads(ran.stdout.splitlines()[-1])]


def _check(agent: str, steps: int | None, **asked: Any) -> Found:
    from wmjax.loops.schedule import Schedule
    from wmjax.settings import setup
    from wmjax.types import HostEnv

    try:
        made = setup(agent, **asked)
        whole = Schedule(made.agent, made.env).whole() is not None
        if steps is not None and not whole:
            setup(agent, steps=steps, **asked)
    except UsageError as error:
        return Found(" ".join(str(error).split()))
    return Found(None, isinstance(made.env, HostEnv), made.steps, whole)


def main() -> None:
    warnings.simplefilter("ignore")  # the log of a run has them
    print(json.dumps([_check(**asked)._asdict() for asked in json.load(sys.stdin)]))
