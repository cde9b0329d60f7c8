"""What a user hands over as an environment, and how a run writes it down: a name and arguments, which find it again."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from wmjax import checks
from wmjax.raw_env import RawEnv
from wmjax.suites import SUITES, gym_suite
from wmjax.types import Env, HostEnv, UntrustedError, UsageError

GYM = "gym:"
VALID = "a name, a class or function that makes a gymnasium.Env, an Env, a RawEnv and a HostEnv are"
PLAIN = re.compile(r"[\w -]*", re.ASCII)  # text that names no module, file or address


class Handed(NamedTuple):
    """An environment before it is made."""

    value: Any  # a name, a class or function, or an `Env`, `RawEnv` or `HostEnv`
    name: str | None  # by which a new process finds it; with "<" in it none can; None for a value
    args: dict[str, Any]  # JSON


def handed(env: Any, args: Mapping[str, Any] | None = None) -> Handed:
    """Reads what a user handed over, and arguments for it.

    Raises:
      UsageError: it is not one of the ways to hand over an environment, or arguments cannot be kept as JSON.
    """
    args = check_args(args)
    if isinstance(env, str):
        checks.text("env", env)
        if env.startswith(GYM) and env.count(":") == 1:
            task, own = gym_suite.locate(env.removeprefix(GYM))
            return Handed(env, GYM + task, check_args(own) | args)
        source, task = source_of(env), env.rpartition(":")[2]
        if source is not None and gym_suite.is_file(source):  # from whichever folder a new process starts
            return Handed(env, f"{GYM}{os.path.abspath(source)}:{task}", args)
        return Handed(env, env, args)
    if isinstance(env, Env | RawEnv | HostEnv):
        if args:
            raise UsageError(f"env_args: {args} is not valid with an {type(env).__name__} value, which is made already")
        return Handed(env, None, {})
    if isinstance(env, functools.partial):
        return handed(env.func, _keywords(env) | args)
    library = sys.modules.get("gymnasium")
    if library is not None and env is library.make and isinstance(args.get("id"), str):
        return handed(GYM + args.pop("id"), args)
    _refuse_made(env)
    if not callable(env):
        raise UsageError(f"env: {checks.show(env)} is not valid; {VALID}")
    return Handed(env, GYM + gym_suite.name_of(env), args)


def _keywords(env: functools.partial) -> dict[str, Any]:
    try:
        return dict(inspect.signature(env.func).bind_partial(*env.args).arguments) | env.keywords
    except (TypeError, ValueError) as error:
        raise UsageError(f"env: {checks.show(env)} is not valid ({error}); give arguments by their names") from None


def _refuse_made(env: Any) -> None:
    """Raises `UsageError` for a Gymnasium environment that is made already, or a vector of them."""
    if isinstance(env, type) or not hasattr(env, "action_space") or not hasattr(env, "observation_space"):
        return
    if hasattr(env, "single_observation_space") or hasattr(env, "num_envs"):
        raise UsageError(
            f"env: {type(env).__name__} is a vector environment, and training makes many of one by itself; give that "
            "one's name, class, or a function that makes it"
        )
    made = getattr(getattr(env, "spec", None), "id", None)
    way = f"its name, 'gym:{made}', " if made else ""
    raise UsageError(
        f"env: {type(env).__name__} is an environment that is made already, and training makes several, in processes "
        f"of their own; give {way}its class, or a function that makes it"
    )


def check_args(args: Any) -> dict[str, Any]:
    """Arguments as JSON keeps them. Raises `UsageError` where it cannot."""
    if args is None:
        return {}
    if not isinstance(args, Mapping) or not all(isinstance(name, str) for name in args):
        raise UsageError(f"env_args: {checks.show(args)} is not valid; names with values are, such as {{'size': 8}}")
    for name, value in args.items():
        try:
            if checks.is_deep({name: value}):
                raise ValueError
            json.dumps(value, default=_number, allow_nan=False)
        except (TypeError, ValueError):
            raise UsageError(
                f"env_args: {name} is {checks.show(value)}, which is not valid: config.json keeps it, so numbers, "
                "text, booleans, None, and lists of these are; put others into a function that makes the environment"
            ) from None
    return json.loads(json.dumps(dict(args), default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


# ---------------------------------------------------------------------------------------------------------------------
# What a file names


def check_trust(name: str | None, args: Mapping[str, Any], trust: bool, given: Iterable[str] = ()) -> None:
    """Raises `UntrustedError` where a file's name or arguments of an environment would have code run that is its own.

    What is installed with the package or with Gymnasium is made without a word. A module, or a file, is imported only
    where the user agrees; nothing is imported to find that out. A class of an environment that this process has
    imported already is taken.

    Args:
      name: of an environment, as `config.json` says it; None where the user has named it.
      args: its arguments, as `config.json` says them.
      trust: whether the user agrees.
      given: names of arguments that the user has given, which stand for those of the file.
    """
    if trust:
        return
    source = source_of(name)
    if source is not None and "<" in name:
        raise UsageError(
            f"env: it was trained on {name!r}, which no new process can find; from Python, load the run with env=..."
        )
    if source is not None and not _is_here(name):
        raise UntrustedError(
            f"env: config.json says that the environment is {name!r}, which would run the code of {source!r}; name it "
            "yourself with --env (env=), or if you trust that code add --trust-env (trust_env=True)"
        )
    own = {name: value for name, value in args.items() if name not in given}
    odd = next((text for text in _texts(own) if not PLAIN.fullmatch(text)), None)
    if odd is not None:
        raise UntrustedError(
            f"env_args: config.json says {odd!r:.80}, which may name code or a file; give it yourself with --env-arg "
            "(env_args=), or if you trust it add --trust-env (trust_env=True)"
        )


def source_of(name: str | None) -> str | None:
    """The module or file that is imported to make an environment of that name; None where it is installed."""
    if name is None or not name.startswith(GYM):
        return None
    return name.removeprefix(GYM).rpartition(":")[0] or None


def _is_here(name: str) -> bool:
    """Whether it names a class of an environment that is imported already."""
    source, _, name = name.removeprefix(GYM).rpartition(":")
    module, library = gym_suite.imported(source), sys.modules.get("gymnasium")
    if module is None or library is None:
        return False
    value = gym_suite.attribute(module, name)
    return isinstance(value, type) and issubclass(value, library.Env)


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def is_host(name: str) -> bool:
    """Whether an environment of that name would run in worker processes."""
    return name.partition(":")[0] in SUITES
