"""Determinism on a GPU: settings of XLA under which equal runs are equal there, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax._src import xla_bridge  # JAX has no public way to ask whether it has started

from wmjax.types import UsageError

# Only operations that add in a fixed order, and kernels chosen by rule, not by which was the fastest this time. Where
# there is no GPU they mean nothing.
FLAGS = {"--xla_gpu_deterministic_ops": "true", "--xla_gpu_autotune_level": "0"}


def _given() -> dict[str, str]:
    """The flags of XLA that the process has, by name; of a switch without a value "true"."""
    pairs = (word.partition("=") for word in os.environ.get("XLA_FLAGS", "").split())
    return {name: value.lower() if mark else "true" for name, mark, value in pairs}


def is_on() -> bool:
    """Whether all of `FLAGS` are given."""
    return FLAGS.items() <= _given().items()


def turn_on() -> None:
    """Adds `FLAGS` to `XLA_FLAGS` of this process, whose other flags stay. Does nothing where they are given.

    Raises:
      UsageError: they cannot come into force: JAX has started, or `XLA_FLAGS` says the contrary.
    """
    given = _given()
    missing = " ".join(f"{name}={value}" for name, value in FLAGS.items() if name not in given)
    for name, value in FLAGS.items():
        if given.get(name, value) != value:
            raise UsageError(
                f"deterministic: XLA_FLAGS has {name}={given[name]}; {name}={value} is valid, or no such flag"
            )
    if missing and xla_bridge.backends_are_initialized():
        raise UsageError(
            f"deterministic: JAX has started, and its settings can no longer change; set XLA_FLAGS='{missing}' before "
            "Python starts, or ask before anything is computed"
        )
    if missing:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {missing}".strip()


def turn_on_again(description: dict[str, Any], say: Callable[[str], None]) -> None:
    """`turn_on`, where `config.json` says that a run was trained so. Says where that is no longer possible."""
    if (description.get("about") or {}).get("deterministic") is not True:
        return
    try:
        turn_on()
    except UsageError as error:
        if jax.default_backend() != "cpu":  # there it makes no difference
            say(f"warning: the run was trained with deterministic operations, which are off now; {error}")
