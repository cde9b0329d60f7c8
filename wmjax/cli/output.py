"""What commands print while there is more to do."""

from __future__ import annotations

import contextlib


def say(text: str) -> None:
    """A line on standard output. A stream that is full or gone costs what it would have said, and nothing else."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, flush=True)
