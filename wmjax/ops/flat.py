"""A tree of arrays as one array of rows: what is done to all of them at once takes one kernel instead of many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import contracts
from wmjax.types import Array, Axes, PyTree

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


def norm(rows: Array, parts: str | None = None) -> Array:
    """The norm of all rows together, a scalar. `parts`: the named axis of devices, each with columns of its own."""
    contracts.floating(None, rows=rows)
    return jnp.sqrt(over(jnp.sum(_row_sums(jnp.square(rows))), parts))


def over(sums: Array, parts: str | None) -> Array:
    """Sums over the columns that each device has, over all columns; `parts` None: each device has all."""
    contracts.floating(sums=sums)
    return sums if parts is None else jax.lax.psum(sums, parts)


def _row_sums(rows: Array) -> Array:
    # By a matrix product, which needs its rows in memory: a GPU's kernel of any other sum would make them out of all
    # leaves on its way, and take as long to compile as half of the others together. XLA turns a product with a single
    # column back into a sum.
    return jnp.dot(rows, jnp.ones((rows.shape[1], 2), rows.dtype), precision="highest")[:, 0]


def tensor_norms(rows: Array, like: PyTree, parts: str | None = None) -> Array:
    """The norm of each leaf of `like`, `[leaves]`, from its rows. By gathers, for they add in the same order always.

    `parts` as in `norm`.
    """
    first = _first_rows(like)
    contracts.exactly(int(first[-1]), _width(parts), rows=rows)
    contracts.floating(rows=rows)
    sums = over(_row_sums(jnp.square(rows)), parts)
    counts = np.diff(first)[:, None]
    place = jnp.arange(counts.max())  # in each leaf
    own = jnp.where(place < counts, sums[jnp.minimum(first[:-1, None] + place, len(sums) - 1)], 0)
    return jnp.sqrt(jnp.sum(own, 1))


def _width(parts: str | None) -> int:
    """The columns that each device has."""
    return WIDTH if parts is None else WIDTH // jax.lax.axis_size(parts)


def own_columns(rows: Array, parts: str) -> Array:
    """Of rows that all devices have, the columns of this one: `[rows, WIDTH / devices]`.

    Every device so has a part of every leaf, and what is done to whole rows is done to its part by the same code. The
    number of devices along the named axis `parts` divides `WIDTH`.
    """
    contracts.exactly(None, WIDTH, rows=rows)
    contracts.floating(rows=rows)
    width = _width(parts)
    return jax.lax.dynamic_slice_in_dim(rows, width * jax.lax.axis_index(parts), width, axis=1)


def own_means(rows: Array, axes: Axes) -> Array:
    """`own_columns` of the mean over devices along both axes, each of which brings `[rows, WIDTH]` of its own."""
    contracts.exactly(None, WIDTH, rows=rows)
    contracts.floating(rows=rows)
    own = jax.lax.psum_scatter(rows, axes.parts, scatter_dimension=1, tiled=True)
    return jax.lax.psum(own, axes.copies) / jax.lax.axis_size(tuple(axes))


def all_columns(own: Array, parts: str) -> Array:
    """The rows that each device has its columns of: `[rows, WIDTH]`."""
    contracts.exactly(None, _width(parts), own=own)
    contracts.floating(own=own)
    return jax.lax.all_gather(own, parts, axis=1, tiled=True)


def spread(values: Array | np.ndarray, like: PyTree) -> Array:
    """One value for each leaf of `like`, `[leaves]`, at each of its rows: `[rows, 1]`."""
    counts = np.diff(_first_rows(like))
    contracts.exactly(len(counts), values=values)
    return values[np.repeat(np.arange(len(counts)), counts)][:, None]
