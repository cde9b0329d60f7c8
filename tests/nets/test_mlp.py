"""Initial weights of dense, block-diagonal and convolution layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.nets.mlp import BlockLinear, Linear, dense_init, truncated_normal_in

KEY = jax.random.key(0)


@pytest.mark.parametrize("fan_in", [64, 1024])
def test_truncated_normal_weights_have_the_standard_deviation_of_their_fan_in_after_the_cut(fan_in):
    for outscale in (1.0, 0.01):
        weights = truncated_normal_in(fan_in, outscale)(KEY, (1000, 1000), jnp.float32)
        np.testing.assert_allclose(weights.std(), outscale / fan_in**0.5, rtol=0.02)
        # The cut is at two standard deviations of the normal that is cut, which is wider by 1.1368.
        np.testing.assert_allclose(jnp.abs(weights).max(), 2 * 1.1368 * outscale / fan_in**0.5, rtol=0.01)
    assert not truncated_normal_in(fan_in, 0.0)(KEY, (10, 10), jnp.float32).any()


def test_a_block_diagonal_layer_counts_the_inputs_of_all_blocks_as_fan_in():
    kernel = BlockLinear(8, 96).init(KEY, jnp.zeros((1, 8, 98)))["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 1 / 784**0.5, rtol=0.02)
    shared = BlockLinear(8, 96).init(KEY, jnp.zeros((1, 8, 48)), jnp.zeros((1, 50)))["params"]["kernel"]
    np.testing.assert_allclose(shared.std(), 1 / 784**0.5, rtol=0.02)


def test_dense_layers_begin_as_their_papers_say_with_biases_of_zero():
    params = Linear(400).init(KEY, jnp.zeros((1, 600)))["params"]
    np.testing.assert_allclose(params["kernel"].std(), 1 / 600**0.5, rtol=0.02)
    assert not params["bias"].any()
    glorot = dense_init("glorot", 600)(KEY, (600, 400), jnp.float32)
    np.testing.assert_allclose(jnp.abs(glorot).max(), (6 / 1000) ** 0.5, rtol=0.01)
    np.testing.assert_allclose(glorot.std(), (6 / 1000 / 3) ** 0.5, rtol=0.02)
