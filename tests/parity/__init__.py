"""Reads the reference numbers that were recorded while the authors' own code ran: what they are is in `README.md`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("WMJAX_PARITY", HERE))


class Fixture(dict):
    """Arrays by name; `config` holds the sizes and constants of the recording."""

    config: dict

    def tree(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose names start with `prefix` and a slash, without it."""
        return {name[len(prefix) + 1 :]: array for name, array in self.items() if name.startswith(prefix + "/")}


def load(name: str) -> Fixture:
    """Arrays of `name`.npz. Another folder may hold some of the recordings only: tests of the others are skipped."""
    path = FOLDER / f"{name}.npz"
    if FOLDER != HERE and not path.exists():
        pytest.skip(f"no such recording in WMJAX_PARITY={FOLDER}: {path.name}")
    with np.load(path) as file:
        fixture = Fixture({key: file[key] for key in file.files})
    fixture.config = json.loads(bytes(fixture["meta/config"])) if "meta/config" in fixture else {}
    return fixture
