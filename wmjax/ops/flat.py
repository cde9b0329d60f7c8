"""A tree of arrays as one array of rows: what is done to all of them at once takes one kernel instead of many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts
from wmjax.types import Array, PyTree

WIDTH = 256  # entries of a row


def flatten(tree: PyTree) -> Array:
    """All leaves one after the other as one array `[rows, WIDTH]`; each is filled up with zeros to whole rows.

    What is done to whole rows is done to each leaf on its own.

    Args:
      tree: arrays of one dtype and any shapes.

    >>> flatten({"a": jnp.ones((2, 3)), "b": jnp.zeros(300)}).shape
    (3, 256)
    """
    leaves = jax.tree.leaves(tree)
    dtypes = {str(leaf.dtype) for leaf in leaves}
    assert len(dtypes) == 1, f"tree: arrays of {sorted(dtypes)}; must be of one dtype"
    # Zeros are parts of their own: a pad for each leaf would be a kernel for each.
    parts = [part for leaf in leaves for part in (leaf.ravel(), jnp.zeros(-leaf.size % WIDTH, leaf.dtype))]
    return jnp.concatenate(parts).reshape(-1, WIDTH)


def unflatten(rows: Array, like: PyTree) -> PyTree:
    """The tree that `flatten` made rows of: `rows` with the structure and the shapes of `like`."""
    (leaves, structure), first = jax.tree.flatten(like), _first_rows(like)
    contracts.exactly(int(first[-1]), WIDTH, rows=rows)
    starts, vector = WIDTH * first[:-1], rows.ravel()
    cut = lambda start, leaf: vector[start : start + leaf.size].reshape(leaf.shape)
    return structure.unflatten([cut(*pair) for pair in zip(starts, leaves, strict=True)])


def _first_rows(like: PyTree) -> np.ndarray:
    """Where each leaf begins in `flatten`, and where the last one ends: ints `[leaves + 1]`."""
    return np.cumsum([0, *(-(-leaf.size // WIDTH) for leaf in jax.tree.leaves(like))])


def norm(rows: Array) -> Array:
    """The norm of all rows together, a scalar."""
    contracts.floating(None, rows=rows)
    return jnp.sqrt(jnp.sum(_row_sums(jnp.square(rows))))


def _row_sums(rows: Array) -> Array:
    # By a matrix product, which needs its rows in memory: a GPU's kernel of any other sum would make them out of all
    # leaves on its way, and take as long to compile as half of the others together. XLA turns a product with a single
    # column back into a sum.
    return jnp.dot(rows, jnp.ones((WIDTH, 2), rows.dtype), precision="highest")[:, 0]


def tensor_norms(rows: Array, like: PyTree) -> Array:
    """The norm of each leaf of `like`, `[leaves]`, from its rows. By gathers, for they add in the same order always."""
    first = _first_rows(like)
    contracts.exactly(int(first[-1]), WIDTH, rows=rows)
    contracts.floating(rows=rows)
    sums = _row_sums(jnp.square(rows))
    counts = np.diff(first)[:, None]
    place = jnp.arange(counts.max())  # in each leaf
    own = jnp.where(place < counts, sums[jnp.minimum(first[:-1, None] + place, len(sums) - 1)], 0)
    return jnp.sqrt(jnp.sum(own, 1))


def spread(values: Array | np.ndarray, like: PyTree) -> Array:
    """One value for each leaf of `like`, `[leaves]`, at each of its rows: `[rows, 1]`."""
    counts = np.diff(_first_rows(like))
    contracts.exactly(len(counts), values=values)
    return values[np.repeat(np.arange(len(counts)), counts)][:, None]
