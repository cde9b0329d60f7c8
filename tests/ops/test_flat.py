import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops import flat

TREE = {"b": jnp.arange(300.0).reshape(3, 100), "a": jnp.float32(7), "c": [jnp.ones((256,)), jnp.zeros((0,))]}


def test_rows_keep_every_entry_and_where_it_belongs():
    found = flat.flatten(TREE)
    assert found.shape == (4, 256) and float(found.sum()) == 7 + 300 * 299 / 2 + 256
    jax.tree.map(np.testing.assert_array_equal, flat.unflatten(found, TREE), TREE)


def test_the_norm_of_rows_is_that_of_all_entries_of_the_tree():
    tree = {"a": np.arange(7.0, dtype=np.float32), "b": np.full((300,), -2.0, np.float32)}
    expected = np.sqrt(sum(np.sum(np.square(x)) for x in tree.values()))
    np.testing.assert_allclose(flat.norm(flat.flatten(tree)), expected, rtol=1e-6)


def test_each_tensor_has_its_norm_and_its_value_at_all_of_its_rows():
    found = flat.tensor_norms(flat.flatten(TREE), TREE)  # in the order of leaves: a, b, and the two of c
    np.testing.assert_allclose(found, [7, np.sqrt(np.sum(np.arange(300.0) ** 2)), 16, 0], rtol=1e-6)
    assert flat.spread(jnp.array([1.0, 2.0, 3.0, 4.0]), TREE).ravel().tolist() == [1, 2, 2, 3]
