"""Checks of configurations: errors of one line that name the field, its value and what is valid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from wmjax.types import UsageError

Rule = tuple[Callable[[Any], bool], str]  # what is valid, as a function and in words

POSITIVE: Rule = (lambda x: x > 0, "positive")
NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")
FRACTION: Rule = (lambda x: 0 <= x <= 1, "in [0, 1]")
PERCENTILE: Rule = (lambda x: 0 <= x <= 100, "in [0, 100]")


def rules(rule: Rule, fields: str) -> dict[str, Rule]:
    """One rule for several fields, whose names are separated by spaces."""
    return dict.fromkeys(fields.split(), rule)


def check_ranges(config: Any, table: Mapping[str, Rule]) -> None:
    """Raises `UsageError` on the first field of a dataclass that breaks its rule, is infinite or not a number.

    None is always valid. Each entry of a tuple must be.
    """
    values = dataclasses.asdict(config)
    for name, (valid, text) in table.items():
        for value in values[name] if isinstance(values[name], tuple) else (values[name],):
            # `not valid` rather than the reverse comparison: NaN is refused too.
            if value is not None and not (valid(value) and abs(value) < float("inf")):
                raise UsageError(f"{name} must be {text}, got {values[name]}")


def check_episodes(length: int, max_episode_steps: int | None) -> None:
    """Raises `UsageError` where no episode of an environment could hold a training sequence of `length` steps."""
    if max_episode_steps is not None and length > max_episode_steps + 1:
        raise UsageError(
            f"within_episode needs episodes of at least length={length} steps, but the environment's have at most "
            f"{max_episode_steps + 1} with the first; a shorter length or within_episode=False is valid"
        )


def check_integer(field: str, value: Any, low: int) -> None:
    """Raises `UsageError` unless `value` is an integer in [low, 2**31)."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
        raise UsageError(f"{field}: {value!r} is not valid; an integer in [{low}, 2**31) is")


def check_number(field: str, value: Any, *, positive: bool = False) -> None:
    """Raises `UsageError` unless `value` is a number of at least 0, or with `positive` above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or (positive and value == 0):
        raise UsageError(f"{field}: {value!r} is not valid; a number {'above' if positive else 'of at least'} 0 is")
