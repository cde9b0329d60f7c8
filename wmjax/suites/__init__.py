"""Environments of other libraries, as they run in worker processes.

A suite is a module with `TITLE`, `names() -> list[str]`, `find(task, suite_name, args)`, which says in the main process
what a worker needs to know, and `make(found, training) -> gymnasium.Env`, which is called in the worker. `args` are the
arguments that a user or a preset gives an environment, by name. Where environments observe no pictures the module may
have `drawn(found)`: the same, for environments whose `render()` then gives one, uint8 `[H, W, 3]`. What `make` makes
may have `frames` (that a step takes), `image_size`, `max_episode_steps` (in steps), and `observe()`, which is asked for
what `step` then leaves out (None). Nothing here imports JAX or the rest of wmjax: a worker starts in half a second and
stays small. Each library is imported in one module, lazily.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module, util
from types import ModuleType
from typing import Any, NamedTuple

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


def installed(name: str) -> bool:
    """Whether a library is there; it is not imported."""
    return util.find_spec(name) is not None


def absent(name: str, extra: str) -> SuiteError:
    """The error for a library that is not there."""
    return SuiteError(f'env: {name} is not installed; pip install "wmjax[{extra}]"')


def library(module: str, extra: str, name: str | None = None) -> ModuleType:
    """Imports a module of a library; raises `absent` where it is not there."""
    try:
        return import_module(module)
    except ImportError:
        raise absent(name or module, extra) from None


def near(name: str, valid: Iterable[str], cutoff: float) -> str | None:
    """The valid name that is spelled most like `name`, in any case."""
    spellings = {x.lower(): x for x in valid}
    found = difflib.get_close_matches(name.lower(), spellings, 1, cutoff=cutoff)
    return spellings[found[0]] if found else None


def unknown(suite_name: str, task: str, valid: Iterable[str], more: str = "(see wmjax list envs)") -> SuiteError:
    """The error for a task that a suite does not have: its name, the nearest of the valid ones, and `more`."""
    found = near(task.rpartition(":")[2], valid, 0.5)
    hint = f"did you mean {f'{suite_name}:{found}'!r}? " if found else ""
    return SuiteError(f"env: unknown name {f'{suite_name}:{task}'!r}; {hint}{more}")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of an environment


class Argument(NamedTuple):
    """What an argument of an environment may be."""

    valid: Callable[[Any], bool]
    text: str  # the same in words


def _is(x: Any, *types: type) -> bool:
    return isinstance(x, types) and not isinstance(x, bool)


def whole(low: int) -> Argument:
    """An integer of at least `low`."""
    return Argument(lambda x: _is(x, int) and low <= x < 2**31, f"an integer of at least {low}")


def choice(*names: str) -> Argument:
    """One of some names."""
    return Argument(lambda x: x in names, f"one of {', '.join(names)}")


SWITCH = Argument(lambda x: isinstance(x, bool), "true or false")
FRACTION = Argument(lambda x: _is(x, int, float) and 0 <= x <= 1, "a number in [0, 1]")


def check_arguments(name: str, valid: Mapping[str, Argument], given: Mapping[str, Any]) -> None:
    """Raises `SuiteError` for an argument that the environment `name` does not have, or for what is not valid there."""
    check_names(name, valid, given)
    for key, value in given.items():
        if not valid[key].valid(value):
            raise SuiteError(f"env_args: {key} of {name!r} is {value!r}, which is not valid; {valid[key].text} is")


def check_names(name: str, valid: Iterable[str], given: Iterable[str]) -> None:
    """Raises `SuiteError` for an argument that the environment `name` does not have."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            found = difflib.get_close_matches(key, valid, 1, cutoff=0.6)
            hint = f"did you mean {found[0]!r}? " if found else ""
            have = f"valid are {', '.join(valid)}" if valid else "it has none"
            raise SuiteError(f"env_args: {key!r} is not an argument of {name!r}; {hint}{have}")
