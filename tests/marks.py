"""Marks of tests that are run for many values."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def partly_long(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Values to parametrize a slow test with: CI runs those that are kept, `pytest -m slow` all."""
    values = list(values)
    assert set(kept) < set(values), sorted(set(kept) - set(values))
    several = lambda value: value if isinstance(value, tuple) else (value,)
    return [value if value in kept else pytest.param(*several(value), marks=pytest.mark.long) for value in values]
