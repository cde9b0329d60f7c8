"""Metrics of a run to Weights & Biases, which needs the extra `wandb` and is off unless asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wmjax.types import UsageError


def check() -> None:
    """Raises `UsageError` where the library is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError('wandb: is not installed; pip install "wmjax[wandb]"')


class WandbLog:
    """Sends what a run reports. Whatever goes wrong is said once, and the run goes on.

    Args:
      folder: of the run, whose `config.json` is sent too; a run that is resumed in it goes on there.
      project: its name.
      say: is told what went wrong.
    """

    def __init__(self, folder: Path, project: str, say: Callable[[str], None]) -> None:
        self._say, self._run = say, None
        config = folder / "config.json"
        identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        self._run = self._guard(
            lambda: importlib.import_module("wandb").init(
                project=project,
                dir=str(folder),
                name=folder.name,
                id=identity,
                resume="allow",
                config=json.loads(config.read_text()) if config.exists() else {},
            )
        )
        if self._run is not None:  # drawn over env steps, of which some stages take none
            self._guard(lambda: self._run.define_metric("*", step_metric="step"))

    def _guard(self, call: Callable) -> Any:
        try:
            return call()
        except Exception as error:  # the library raises whatever its server does
            self._say(f"warning: wandb: {str(error).partition(chr(10))[0][:200]}; training goes on without it")
            self._run = None
            return None

    def write(self, head: dict[str, Any], numbers: dict[str, float | None]) -> None:
        """Sends the numbers that there are, "step" among them."""
        if self._run is not None:
            found = {name: x for name, x in (head | numbers).items() if x is not None and name != "stage"}
            self._guard(lambda: self._run.log(found))

    def close(self) -> None:
        """Waits until all is sent."""
        if self._run is not None:
            self._guard(self._run.finish)
