"""Environments of other libraries, as they run in worker processes.

A suite is a module with `TITLE`, `names() -> list[str]`, `find(task, suite_name)`, which says in the main process what
a worker needs to know, and `make(found, training) -> gymnasium.Env`, which is called in the worker. What it makes may
have `frames` (that a step takes), `image_size`, `max_episode_steps` (in steps), and `observe()`, which is asked for
what `step` then leaves out (None). Nothing here imports JAX or the rest of wmjax: a worker starts in half a second and
stays small. Each library is imported in one module, lazily.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

# The module of each suite, without `_suite`; what a name begins with is the key.
SUITES = {
    "gym": "gym",
    "atari": "atari",
    "atari200m": "atari",
    "crafter": "crafter",
    "dmc": "dmc",
    "dmc_proprio": "dmc",
    "vizdoom": "vizdoom",
}


class SuiteError(Exception):
    """What was asked for cannot be made here; the message, of one line, says what is missing or valid."""


def suite(name: str) -> ModuleType:
    """The module of a suite in `SUITES`."""
    return import_module(f"wmjax.suites.{SUITES[name]}_suite")


def unknown(suite_name: str, task: str, valid: Iterable[str], more: str = "(see wmjax list envs)") -> SuiteError:
    """The error for a task that a suite does not have: its name, the nearest of the valid ones, and `more`."""
    spellings = {name.lower(): name for name in valid}
    near = difflib.get_close_matches(task.rpartition(":")[2].lower(), spellings, 1, cutoff=0.5)
    hint = f"did you mean {f'{suite_name}:{spellings[near[0]]}'!r}? " if near else ""
    return SuiteError(f"env: unknown name {f'{suite_name}:{task}'!r}; {hint}{more}")
