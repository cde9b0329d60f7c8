"""Fields of a configuration from values that were read: their names and types, and parts within parts."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from wmjax import checks
from wmjax.names import nearest


def replace(config: Any, values: Mapping[str, Any]) -> Any:
    """The configuration with other values; a mapping changes fields of a part. Raises as `check_fields`."""
    parts = {
        name: replace(getattr(config, name), value)
        for name, value in values.items()
        if isinstance(value, Mapping) and dataclasses.is_dataclass(getattr(config, name, None))
    }
    return dataclasses.replace(config, **check_fields(type(config), {**values, **parts}))


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `replace` takes, by name; fields of a part with a dot.

    >>> dotted({"horizon": 5, "evolve": {"rollouts": 4}})
    {'horizon': 5, 'evolve.rollouts': 4}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def check_fields(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values whose names and types are those of the fields; ints become floats where the field is one, lists tuples.

    Raises `UsageError` naming the field.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in names:
            raise nearest("field", name, names)
    return {name: _check_type(name, value, hints[name]) for name, value in values.items()}


def _check_type(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    choices = checks.alternatives(hint)
    for choice in choices:
        if choice is float and isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return float(value)
        if typing.get_origin(choice) is Literal:
            if isinstance(value, str) and value in choice.__args__:
                return value
        elif typing.get_origin(choice) is tuple:
            inner = choice.__args__[0]
            if isinstance(value, (tuple, list)):
                items = tuple(item.item() if isinstance(item, np.generic) else item for item in value)
                if all(type(item) is inner for item in items):
                    return items
        elif type(value) is choice and (choice is not str or value.isprintable()):
            return value
        elif dataclasses.is_dataclass(choice) and isinstance(value, Mapping):
            return choice(**check_fields(choice, value))
    raise checks.invalid(name, value, _describe(choices))


def _describe(choices: Iterable[Any]) -> str:
    def one(choice: Any) -> str:
        if typing.get_origin(choice) is Literal:
            return "one of " + ", ".join(map(str, choice.__args__))
        if typing.get_origin(choice) is tuple:
            return f"a tuple of {choice.__args__[0].__name__}"
        if dataclasses.is_dataclass(choice):
            return f"a mapping with fields of {choice.__name__}"
        return {
            type(None): "None",
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "text in printable characters",
        }.get(choice, str(choice))

    return " or ".join(one(choice) for choice in choices)
