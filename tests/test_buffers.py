"""What programs hold at once, by programs whose buffers are known."""

import jax
import jax.numpy as jnp
import pytest

from wmjax.buffers import WORKSPACE, peak_bytes

X = jnp.ones((8, 8, 4, 4))
KERNEL = jnp.ones((8, 8, 1, 1))
SIZE = X.nbytes


def conv(x):
    return jax.lax.conv(x, KERNEL, (1, 1), "SAME")


def chain(x):  # of convolutions: two at a time, and the last is the result
    return conv(conv(conv(conv(x))))


def saved(x):  # each activation is kept until its gradient
    return jax.grad(lambda x: jnp.tanh(conv(jnp.tanh(conv(jnp.tanh(conv(x)))))).sum())(x)


@pytest.mark.parametrize(
    "function, held",
    [
        (lambda x: jnp.tanh(x) * 2 + 1, 0),
        (lambda x: conv(x) + 1, SIZE),
        (lambda x: conv(jnp.tanh(x).reshape(8, 8, 2, 8)), SIZE),
        (chain, 2 * SIZE),
        (jax.jit(chain), 2 * SIZE),
        (jax.checkpoint(chain), 2 * SIZE),
        (lambda x: conv(conv(x)) + conv(x), 2 * SIZE),
        (lambda x: jax.lax.scan(lambda x, _: (conv(x), x), x, length=5)[1].sum(), 6 * SIZE),
        (lambda x: jax.lax.cond(x[0, 0, 0, 0] > 0, chain, conv, x).sum(), 3 * SIZE + 4),
    ],
)
def test_what_is_fused_takes_nothing_and_what_is_read_later_is_kept(function, held):
    assert peak_bytes(jax.make_jaxpr(function)(X), "tpu") == held


def test_kernels_run_in_an_order_that_frees_memory_early():
    both = lambda x: tuple(conv(conv(a)).sum() for a in [conv(x + i) for i in range(4)])
    # All four first would be 4 and more; one after the other it is the operand, and what is made of it.
    assert peak_bytes(jax.make_jaxpr(both)(X), "tpu") < 3.1 * SIZE


def test_gradients_keep_activations_and_products_on_a_gpu_have_a_workspace():
    assert peak_bytes(jax.make_jaxpr(saved)(X), "tpu") >= 3 * SIZE
    x = jnp.ones((8, 8))
    assert peak_bytes(jax.make_jaxpr(lambda x: x @ x + 1)(x), "cuda") == x.nbytes + WORKSPACE["cuda"]
    assert peak_bytes(jax.make_jaxpr(lambda x: x @ x + 1)(x), "tpu") == x.nbytes
