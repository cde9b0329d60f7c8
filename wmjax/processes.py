"""This Python once more, in another process that imports from where this one does.

`python -m` and `python -c` would look into the working folder first, where files that are nobody's may lie.
"""

from __future__ import annotations

import os
import sys


def python(*words: str) -> list[str]:
    """The command, for `environment`."""
    return [sys.executable, "-P", *words]


def environment(**more: str) -> dict[str, str]:
    """Variables of this process, with the folders that it imports from, and more."""
    entries = (entry or os.getcwd() for entry in sys.path if isinstance(entry, str))  # Python reads no others
    return os.environ | {"PYTHONPATH": os.pathsep.join(entries)} | more
