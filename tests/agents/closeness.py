"""How near numbers have to be to those recorded from the authors' code."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import Fixture


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


def whole(file, section):
    return file


def fewer_rows_and_steps(file, section):
    """A recording of other sizes: the first row of `section`, and its first steps; states have no time."""
    part = Fixture(file)
    part.config = file.config
    for name, value in file.items():
        if name.startswith((f"in/{section}/", f"out/{section}/")):
            part[name] = value[:1] if "/state/" in name else value[:1, :3]
    return part


# A test that has a size of the recording written into it passes with the first only.
CUTS = [whole, pytest.param(fewer_rows_and_steps, marks=pytest.mark.slow)]


def stepped(ours, theirs, start, rate, steps, tolerance=2e-3):
    """Parameters after some steps of Adam, each of about `rate`: against what the steps did, not the size of a weight.

    A step rounds twice, in either program: when the weight decays and when the step is added.
    """
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape, (np.shape(ours), theirs.shape)
    rounding = 2 * np.spacing(np.float32(np.abs(theirs) + steps * rate))
    bound = steps * (tolerance * rate + rounding)
    error = np.abs(np.asarray(ours, np.float64) - theirs)
    assert (error <= bound).all(), f"off by {np.max(error)}, {np.max(error / bound)} of what is allowed"
    return float(np.max(np.abs(np.asarray(start, np.float64) - theirs) / bound))


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
