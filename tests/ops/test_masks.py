import jax
import jax.numpy as jnp
import numpy as np

from wmjax.ops.masks import masked_mean


def test_only_what_counts_is_averaged_and_nothing_gives_zero():
    x, mask = jnp.array([[1.0, 2.0], [3.0, 100.0]]), jnp.array([[True, True], [True, False]])
    assert masked_mean(x, mask) == 2.0
    assert masked_mean(x, jnp.zeros((2, 2), bool)) == 0.0


def test_gradients_averaged_over_devices_are_those_of_the_whole_batch_where_devices_count_differently():
    x, mask = jnp.arange(6.0).reshape(2, 3), jnp.array([[True, False, False], [True, True, True]])
    whole = jax.grad(lambda w: masked_mean(w * x, mask))(2.0)
    each = jax.vmap(jax.grad(lambda w, x, m: masked_mean(w * x, m, "devices")), (None, 0, 0), axis_name="devices")
    np.testing.assert_allclose(each(2.0, x, mask).mean(), whole, rtol=1e-6)
    shares = jax.vmap(lambda x, m: masked_mean(x, m, "devices"), axis_name="devices")(x, mask)
    np.testing.assert_allclose(shares.mean(), (0 + 3 + 4 + 5) / 4)
