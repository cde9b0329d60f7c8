"""How near numbers have to be to those recorded from the authors' code."""

from __future__ import annotations

import numpy as np


def close(ours, theirs, tolerance):
    """Largest difference, relative to the largest entry where that is above 1."""
    theirs = np.asarray(theirs, np.float64)
    assert np.shape(ours) == theirs.shape, (np.shape(ours), theirs.shape)
    error = np.max(np.abs(np.asarray(ours, np.float64) - theirs))
    assert error <= tolerance * max(1.0, np.max(np.abs(theirs))), f"off by {error}"


def relative(ours, theirs, tolerance=1e-4):
    """Difference of a gradient tensor against its norm."""
    assert np.shape(ours) == np.shape(theirs)
    difference = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
    assert difference <= tolerance * np.linalg.norm(theirs) + 1e-9, (difference, np.linalg.norm(theirs))


def swap(x):
    """Batch first <-> time first."""
    return np.swapaxes(x, 0, 1)


def flatten(params: dict, prefix: str = "") -> dict:
    """Nested parameters by their paths."""
    if not isinstance(params, dict):
        return {prefix: params}
    return {
        path: leaf
        for key, value in params.items()
        for path, leaf in flatten(value, f"{prefix}/{key}" if prefix else key).items()
    }
