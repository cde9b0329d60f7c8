"""Every environment of Gymnasium, by its id, its class or a function that makes it; the one module that imports it.

A name is "ID", or "SOURCE:NAME": a module or a Python file, which is imported first, and an id that is registered then
or a class or function of it. What a user's own script defines goes to workers by value, as does what a file defines.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

from wmjax.suites import Argument, SuiteError, check_arguments, check_names, unknown, whole

TITLE = "Gymnasium"
# What an environment of Gymnasium needs besides that library, by the module that it fails to import.
EXTRAS = dict.fromkeys(("Box2D", "pygame", "swig"), "box2d")
EXTRAS |= {"mujoco": "mujoco", "ale_py": "atari", "vizdoom": "vizdoom"}
LIMIT, NO_LIMIT = "max_episode_steps", -1  # the argument that every environment has: as of `gymnasium.make`
STEPS = Argument(lambda x: x == NO_LIMIT or whole(1).valid(x), f"a positive integer, or {NO_LIMIT} for no limit,")
_importing: list[str] = []  # sources that are being imported now


class Maker(NamedTuple):
    """What a worker needs to make an environment."""

    name: str  # as messages have it
    make: Any  # a specification of Gymnasium's registry, a class or a function
    args: dict[str, Any]
    wrappers: tuple[tuple[Callable, dict[str, Any]], ...] = ()  # around it, the innermost first


def gymnasium() -> Any:
    """The library, which then says nothing but errors."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
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


# ---------------------------------------------------------------------------------------------------------------------
# In the main process


def find(task: str, suite_name: str = "gym", args: Mapping[str, Any] = {}) -> Any:
    """What a worker needs to make the environment `task`, "ID" or "SOURCE:NAME", to be pickled."""
    source, _, name = task.rpartition(":")
    module = import_source(source) if source else None
    made = gymnasium().registry.get(name) or (module and attribute(module, name))
    if made is None:
        raise _unknown(task, source, name)
    if not callable(made) and not _is_spec(made):
        raise SuiteError(f"env: 'gym:{task}' is {made!r}, neither a registered id nor a class or function")
    return found(task, made, args, module)


def found(task: str, made: Any, args: Mapping[str, Any] = {}, module: ModuleType | None = None) -> Any:
    """The same of what makes it: a specification, a class or a function.

    Strings in a specification that name what `module` or the user's script defines are replaced by that: a worker has
    another `__main__`, and no such module.
    """
    wrappers: tuple = ()
    if _is_spec(made):
        made, here = copy.copy(made), {"__main__": module or sys.modules["__main__"]}
        here |= {module.__name__: module} if module is not None else {}
        if isinstance(made.entry_point, str):
            made.entry_point = _defined(task, made.entry_point, here) or made.entry_point
        wrappers = tuple((_creator(task, x.entry_point, here), x.kwargs or {}) for x in made.additional_wrappers)
        made.additional_wrappers = ()
    return gymnasium().vector.utils.CloudpickleWrapper(Maker(f"gym:{task}", made, dict(args), wrappers))


def _is_spec(value: Any) -> bool:
    return isinstance(value, gymnasium().envs.registration.EnvSpec)


def _unknown(task: str, source: str, name: str) -> SuiteError:
    if source:
        return SuiteError(
            f"env: {source!r} neither registers {name!r} nor has a class or function of that name; gym:MODULE:NAME and "
            'gym:FILE.py:NAME are valid for what stands at its top level, outside of `if __name__ == "__main__":`'
        )
    more = (
        "valid are the ids of Gymnasium's registry (see wmjax list envs); gym:MODULE:NAME and gym:FILE.py:NAME import "
        "what registers more, or have the class or function NAME"
    )
    return unknown("gym", task, names(), more)


def attribute(module: Any, name: str) -> Any:
    """`module.name`, where names may have dots; None where there is none."""
    return functools.reduce(lambda value, part: getattr(value, part, None), name.split("."), module)


def _defined(task: str, entry_point: str, here: Mapping[str, Any]) -> Any:
    """What the string "MODULE:NAME" stands for where that module is in `here`, or None."""
    module, _, name = entry_point.partition(":")
    if module not in here:
        return None
    value = attribute(here[module], name)
    if value is None:
        raise SuiteError(f"env: 'gym:{task}' is registered with the entry point {entry_point!r}, which does not exist")
    return value


def _creator(task: str, entry_point: str, here: Mapping[str, Any]) -> Any:
    try:
        return _defined(task, entry_point, here) or gymnasium().envs.registration.load_env_creator(entry_point)
    except (ImportError, AttributeError, ValueError) as error:
        raise SuiteError(f"env: the wrapper {entry_point!r} of 'gym:{task}' cannot be imported: {error}") from None


def drawn(found: Any) -> Any:
    """The same, for environments that render themselves as "rgb_array", where what makes them can be told to."""
    maker = found.fn
    takes = _parameters(_creator_of(maker))
    args = maker.args | ({"render_mode": "rgb_array"} if takes is None or "render_mode" in takes else {})
    return type(found)(maker._replace(args=args))


# ---------------------------------------------------------------------------------------------------------------------
# Modules and files


def is_file(source: str) -> bool:
    """Whether a source is a Python file rather than a module."""
    return source.endswith(".py") or os.sep in source


def script() -> str:
    """Where the user's program comes from: the module of `python -m`, or a file; "__main__" if it has neither."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name not in (None, "__main__"):
        return name
    path = getattr(main, "__file__", None)
    return os.path.abspath(path) if path and os.path.isfile(path) else "__main__"


def imported(source: str) -> ModuleType | None:
    """The module of a source if it is imported already; nothing is imported."""
    source = os.path.abspath(source) if is_file(source) else source
    if source == script():
        return sys.modules["__main__"]
    return _files.get(source) if is_file(source) else sys.modules.get(source)


def import_source(source: str) -> ModuleType:
    """Imports the module or file that a name of an environment begins with; modules from the current folder too."""
    if source == "__main__" and script() == "__main__":
        raise SuiteError(
            "env: it was defined in a session that has no file, so that only that session has it; from Python, load "
            "the run with env=..., such as wmjax.load(path, env=Mine)"
        )
    module = imported(source)
    if module is not None:
        return module
    _importing.append(source)
    try:
        if is_file(source):
            return _import_file(os.path.abspath(source))
        if os.getcwd() not in sys.path and importlib.util.find_spec(source.partition(".")[0]) is None:
            sys.path.append(os.getcwd())
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:  # whatever the module raises while it is imported
        what = "file" if is_file(source) else "module"
        absent = isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}.")
        hint = "; start where it lies, or name its file, gym:FILE.py:NAME" if absent else ""
        raise SuiteError(f"env: {what} {source!r} cannot be imported: {error}{hint}") from None
    finally:
        _importing.pop()


def importing() -> str | None:
    """The source that is being imported for its environment, if one is."""
    return _importing[-1] if _importing else None


_files: dict[str, ModuleType] = {}


def _import_file(path: str) -> ModuleType:
    """As a module of the file's name, which is not left in `sys.modules`: what is not there is pickled by value."""
    name = os.path.basename(path).removesuffix(".py")
    loader = SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    if os.path.dirname(path) not in sys.path:
        sys.path.append(os.path.dirname(path))
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    finally:
        sys.modules.pop(name)
        sys.modules |= {} if before is None else {name: before}
    _files[path] = module
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Names for what has none


def name_of(made: Any) -> str:
    """A task by which a new process finds a class or function; one with "<" where none can, such as of a lambda."""
    module, name = getattr(made, "__module__", None), getattr(made, "__qualname__", None)
    if not module or not name:
        return f"{type(made).__module__}:<{type(made).__qualname__}>"
    here = {script() if module == "__main__" else module: sys.modules.get(module)}
    here |= {path: found for path, found in _files.items() if found.__name__ == module}
    for source, found in here.items():
        if attribute(found, name) is made:
            return f"{source}:{name}"
    return f"{next(iter(here))}:<{name.rpartition('<locals>.')[2].strip('<>')}>"


def locate(task: str) -> tuple[str, dict[str, Any]]:
    """Where what is registered in this process comes from: a task and arguments by which a new one finds it.

    What Gymnasium itself registers is found by its id. Else it is the class or function, with the arguments and the
    time limit that it was registered with, for another process may not register it; where these cannot be written down,
    it is the source and the id.
    """
    spec = gymnasium().registry.get(task)
    if spec is None or spec.entry_point is None:
        return task, {}
    entry_point = spec.entry_point
    if isinstance(entry_point, str):
        module, _, name = entry_point.partition(":")
        named = f"{script() if module == '__main__' else module}:{name}"
    else:
        module, named = entry_point.__module__, name_of(entry_point)
    if module.partition(".")[0] == "gymnasium":
        return task, {}
    args = dict(spec.kwargs) | ({} if spec.max_episode_steps is None else {LIMIT: spec.max_episode_steps})
    if "<" in named or spec.additional_wrappers or not _is_json(args):
        return f"{named.rpartition(':')[0]}:{task}", {}
    return named, args


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# In a worker


def make(found: Any, training: bool) -> Any:
    """Makes what `find` gave."""
    library, maker = gymnasium(), found.fn
    warnings.simplefilter("ignore")
    try:
        env = _made(library, maker)
    except (ImportError, library.error.DependencyNotInstalled) as error:
        missing = next((extra for word, extra in EXTRAS.items() if word.lower() in str(error).lower()), None)
        how = f'pip install "wmjax[{missing}]"' if missing else str(error)
        raise SuiteError(f"env: {maker.name!r} needs a library that is not installed; {how}") from None
    except library.error.DeprecatedEnv as error:
        raise SuiteError(f"env: {maker.name!r}: {error}") from None
    for wrapper, kwargs in maker.wrappers:
        env = wrapper(env=env, **kwargs)
    return env


def _made(library: Any, maker: Maker) -> Any:
    registered, args, create = _is_spec(maker.make), dict(maker.args), _creator_of(maker)
    takes = _parameters(create)
    if takes is not None:
        check_names(maker.name, [*takes, *([] if LIMIT in takes else [LIMIT])], args)
    limit = args.pop(LIMIT, None) if registered or LIMIT not in (takes or []) else None
    if limit is not None:
        check_arguments(maker.name, {LIMIT: STEPS}, {LIMIT: limit})
    if registered:
        return library.make(maker.make, max_episode_steps=limit, disable_env_checker=True, **args)
    env = create(**args)
    _check_made(maker.name, env)
    if limit in (None, NO_LIMIT):
        return env
    env = library.wrappers.TimeLimit(env, limit)
    env.max_episode_steps = limit  # it has no specification to say so
    return env


def _creator_of(maker: Maker) -> Callable:
    """The class or function that makes it."""
    create = maker.make.entry_point if _is_spec(maker.make) else maker.make
    return gymnasium().envs.registration.load_env_creator(create) if isinstance(create, str) else create


def _check_made(name: str, env: Any) -> None:
    if hasattr(env, "single_observation_space"):
        raise SuiteError(
            f"env: {name!r} makes a vector environment; one environment is valid, of which training makes many"
        )
    if not all(callable(getattr(env, method, None)) for method in ("reset", "step")):
        raise SuiteError(f"env: {name!r} makes {env!r:.80}, which is not an environment")
    if type(env).__module__.startswith("wmjax."):
        raise SuiteError(f"env: {name!r} makes a {type(env).__name__} of JAX; hand over that itself, not its function")


def _parameters(create: Any) -> list[str] | None:
    """The names that a class or function takes; None where it takes any."""
    try:
        parameters = inspect.signature(create).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [x.name for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
