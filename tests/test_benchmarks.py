"""What benchmarks count, by programs whose arithmetic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.speed import arithmetic

X = jnp.ones((4, 8))
SQUARE = jnp.ones((8, 8))
PRODUCT = 2 * 4 * 8 * 8  # floating-point operations of X @ SQUARE


@jax.custom_vjp
def product(x):
    return x @ SQUARE


product.defvjp(lambda x: (product(x), ()), lambda _, g: (g @ SQUARE.T,))


@pytest.mark.parametrize(
    "function, operations",
    [
        (lambda x: x + 1, 0),
        (lambda x: x @ SQUARE, PRODUCT),
        (jax.jit(lambda x: x @ SQUARE), PRODUCT),
        (jax.checkpoint(lambda x: x @ SQUARE), PRODUCT),
        (product, PRODUCT),
        (lambda x: lax.scan(lambda x, _: (x @ SQUARE, x), x, length=5), 5 * PRODUCT),
        (lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ SQUARE @ SQUARE, lambda x: x @ SQUARE, x), PRODUCT),
        (lambda x: lax.conv(x[None, None], jnp.ones((3, 1, 2, 2)), (1, 1), "VALID"), 2 * 3 * (3 * 7) * (2 * 2)),
    ],
)
def test_arithmetic_counts_matrix_products_and_convolutions_wherever_they_are(function, operations):
    assert arithmetic(jax.make_jaxpr(function)(X).jaxpr) == operations
