"""What a function demands of its arguments: ranks, shapes and dtypes, with chex.

Arguments are given by name, and an `AssertionError` names the one that breaks a contract. All is checked while a
function is traced: compiled programs are the same with and without.
"""

from __future__ import annotations

import chex
import jax

from wmjax.types import Array, PyTree


def shaped(*shape: int | None, **arrays: Array) -> None:
    """The last axes have this shape, `None` any size; before them there may be others."""
    for name, x in arrays.items():
        chex.assert_shape(x, (..., *shape), custom_message=name)


def exactly(*shape: int | None, **arrays: Array) -> None:
    """All axes have this shape, `None` any size."""
    for name, x in arrays.items():
        chex.assert_rank(x, len(shape), custom_message=name)
        chex.assert_shape(x, shape, custom_message=name)


def alike(*shape: int | None, **arrays: Array) -> None:
    """Real numbers, all of one shape; where a shape is given, the last axes have it."""
    floating(*shape, **arrays)
    chex.assert_equal_shape(list(arrays.values()), custom_message=", ".join(arrays))


def leading(axes: int, **trees: PyTree) -> None:
    """All, and all leaves of those that are trees, have the first axes in common."""
    arrays = {_path(path): x for path, x in jax.tree_util.tree_leaves_with_path(trees)}
    for name, x in arrays.items():
        chex.assert_shape(x, (*[None] * axes, ...), custom_message=name)
    chex.assert_equal_shape_prefix(list(arrays.values()), axes, custom_message=", ".join(arrays))


def floating(*shape: int | None, **arrays: Array) -> None:
    """Real numbers, of any precision; where a shape is given, the last axes have it."""
    _typed(float, shape, arrays)


def integers(*shape: int | None, **arrays: Array) -> None:
    """Whole numbers, of any precision; where a shape is given, the last axes have it."""
    _typed(int, shape, arrays)


def booleans(*shape: int | None, **arrays: Array) -> None:
    """True or False; where a shape is given, the last axes have it."""
    _typed(bool, shape, arrays)


def _typed(kind: type, shape: tuple[int | None, ...], arrays: dict[str, Array]) -> None:
    if shape:
        shaped(*shape, **arrays)
    for name, x in arrays.items():
        chex.assert_type(x, kind, custom_message=name)


def broadcasts(**arrays: Array) -> None:
    """Can be broadcast to the shape of the first, which stays what it is."""
    first = next(iter(arrays.values()))
    for x in arrays.values():
        chex.assert_is_broadcastable(x.shape, first.shape, custom_message=", ".join(arrays))


def fits(example: PyTree, tree: PyTree) -> None:
    """The tree has the structure of the example, its leaves their shapes and dtypes; the path of a leaf is named."""
    chex.assert_trees_all_equal_structs(example, tree)
    for (path, x), wanted in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(example), strict=True):
        chex.assert_shape(x, wanted.shape, custom_message=_path(path))
        chex.assert_type(x, wanted.dtype, custom_message=_path(path))


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def keys(*shape: int, **arrays: Array) -> None:
    """Keys of `jax.random.key`: one, or an array of them with some first axes of `shape`."""
    for name, x in arrays.items():
        if not jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            raise AssertionError(f"{name}: expected keys of jax.random.key, not {jax.typeof(x)}")
        chex.assert_shape(x, shape[: x.ndim], custom_message=name)
