"""Every registered environment of Gymnasium, by its id; the one module that imports that library.

An environment of one's own is one registered function, `gymnasium.register("Mine-v0", make_mine)`. From the command
line `gym:my_module:Mine-v0` imports `my_module` first, which registers it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from typing import Any

from wmjax.suites import SuiteError, unknown

TITLE = "Gymnasium"
# What an environment of Gymnasium needs besides that library, by the module that it fails to import.
EXTRAS = {
    "Box2D": "box2d",
    "pygame": "box2d",
    "swig": "box2d",
    "mujoco": "mujoco",
    "ale_py": "atari",
    "vizdoom": "vizdoom",
}


def gymnasium() -> Any:
    """The library, which then says nothing but errors."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    library = importlib.import_module("gymnasium")
    library.logger.min_level = library.logger.ERROR
    return library


def names() -> list[str]:
    """The ids that are registered, the newest version of each."""
    newest: dict[str, Any] = {}
    for spec in gymnasium().registry.values():
        name = f"{spec.namespace}/{spec.name}" if spec.namespace else spec.name
        if name not in newest or (spec.version or 0) > (newest[name].version or 0):
            newest[name] = spec
    return sorted(spec.id for spec in newest.values() if ":" not in spec.id)


def find(task: str, suite_name: str = "gym") -> Any:
    """What a worker needs to make the environment `task`, "ID" or "MODULE:ID": its specification, to be pickled."""
    library = gymnasium()
    module, _, name = task.rpartition(":")
    if module:
        _import(module)
    try:
        spec = library.spec(name)
    except library.error.Error:
        more = (
            "valid are the ids of Gymnasium's registry (see wmjax list envs); gym:MODULE:ID imports a module that "
            "registers more"
        )
        raise unknown("gym", task, names(), more) from None
    return library.vector.utils.CloudpickleWrapper(spec)


def _import(module: str) -> None:
    """Imports a module that registers environments, from the current folder too."""
    try:
        if os.getcwd() not in sys.path and importlib.util.find_spec(module.partition(".")[0]) is None:
            sys.path.append(os.getcwd())
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module raises while it is imported
        raise SuiteError(f"env: module {module!r} cannot be imported: {error}") from None


def make(found: Any, training: bool) -> Any:
    """Makes what `find` gave, in a worker."""
    library = gymnasium()
    warnings.simplefilter("ignore")
    spec = found.fn
    try:
        return library.make(spec, disable_env_checker=True)
    except (ImportError, library.error.DependencyNotInstalled) as error:
        missing = next((extra for word, extra in EXTRAS.items() if word.lower() in str(error).lower()), None)
        how = f'pip install "wmjax[{missing}]"' if missing else str(error)
        raise SuiteError(f"env: 'gym:{spec.id}' needs a library that is not installed; {how}") from None
    except library.error.DeprecatedEnv as error:
        raise SuiteError(f"env: 'gym:{spec.id}': {error}") from None
