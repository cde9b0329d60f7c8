"""Products of traced programs, by programs whose arithmetic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from wmjax.arithmetic import Product, multiply_adds, products

X = jnp.ones((4, 8))
SQUARE = jnp.ones((8, 8))
PRODUCT = 4 * 8 * 8  # multiply-adds of X @ SQUARE
IMAGE, KERNEL = jnp.ones((2, 3, 4, 8)), jnp.ones((5, 3, 2, 2))
CONV = (2 * 5 * 3 * 7) * (3 * 2 * 2)  # places of the result, by terms of each


@jax.custom_vjp
def product(x):
    return x @ SQUARE


product.defvjp(lambda x: (product(x), ()), lambda _, g: (g @ SQUARE.T,))


def conv(kernel):
    return lax.conv(IMAGE, kernel, (1, 1), "VALID").sum()


def steps(x, length=5):
    return lax.scan(lambda x, _: (jnp.tanh(x @ SQUARE), None), x, length=length)[0]


def until(x):
    going = lambda loop: (loop[0] < 7) & (loop[1] > 0).any()
    return lax.while_loop(going, lambda loop: (loop[0] + 1, loop[1] @ SQUARE), (jnp.int32(0), x))[1]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x: x + 1, 0),
        (lambda x: x @ SQUARE, PRODUCT),
        (jax.jit(lambda x: x @ SQUARE), PRODUCT),
        (jax.vmap(lambda row: row @ SQUARE), PRODUCT),
        (product, PRODUCT),
        (jax.grad(lambda x: product(x).sum()), 2 * PRODUCT),
        (steps, 5 * PRODUCT),
        (lambda x: lax.fori_loop(0, 6, lambda _, x: x @ SQUARE, x), 6 * PRODUCT),
        (until, 7 * PRODUCT),
        (lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ SQUARE @ SQUARE, lambda x: x @ SQUARE, x), 2 * PRODUCT),
        (lambda x: lax.conv(x[None, None], jnp.ones((3, 1, 2, 2)), (1, 1), "VALID"), 3 * (3 * 7) * (2 * 2)),
    ],
)
def test_products_are_counted_wherever_they_are_and_as_often_as_they_are_computed(function, expected):
    assert multiply_adds(products(jax.make_jaxpr(function)(X))) == expected


def test_gradients_are_counted():
    def counted(loss, *at):
        return multiply_adds(products(jax.make_jaxpr(jax.grad(loss, tuple(range(len(at)))))(*at)))

    layer = lambda weights, x: jnp.tanh(x @ weights).sum()
    assert counted(layer, SQUARE, X) == 3 * PRODUCT  # forward, with respect to the weights, to the input
    assert counted(lambda w: layer(w, X), SQUARE) == 2 * PRODUCT
    assert counted(lambda x: steps(x).sum(), X) == 2 * 5 * PRODUCT
    assert counted(lambda x: jax.checkpoint(steps)(x).sum(), X) == 3 * 5 * PRODUCT  # forward a second time
    assert counted(conv, KERNEL) == 2 * CONV
    inner = (2 * 3 * 4 * 8) * (5 * 2 * 2)  # the input has more places, each of fewer terms
    assert counted(lambda image: lax.conv(image, KERNEL, (1, 1), "VALID").sum(), IMAGE) == CONV + inner


def test_zeros_between_pixels_are_not_multiplied():
    up = lambda x: lax.conv_transpose(x, jnp.ones((2, 2, 8, 3)), (2, 2), "SAME")
    assert multiply_adds(products(jax.make_jaxpr(up)(jnp.ones((1, 4, 4, 8))))) == (8 * 8 * 3) * (2 * 2 * 8) // 4


def test_a_product_says_its_precision_and_its_bytes():
    exact = lambda x: jnp.dot(x, SQUARE, precision="highest")
    half = lambda x: jnp.dot(x.astype(jnp.bfloat16), SQUARE.astype(jnp.bfloat16))
    usual = lambda x: jnp.dot(x, SQUARE, precision="default")
    size = X.size + SQUARE.size + X.size
    counted = products(jax.make_jaxpr(lambda x: (exact(x), half(x), half(x), usual(x)))(X))
    assert counted == {
        Product("float32 highest", PRODUCT, 4 * size): 1,
        Product("bfloat16", PRODUCT, 2 * size): 2,
        Product("float32", PRODUCT, 4 * size): 1,
    }


def test_of_several_lowerings_that_of_the_platform_counts():
    several = lambda x: lax.platform_dependent(x, cpu=lambda x: x @ SQUARE @ SQUARE, default=lambda x: -x)
    program = jax.make_jaxpr(jax.jit(several))(X)
    assert [multiply_adds(products(program, name)) for name in ("cpu", "cuda", "tpu")] == [2 * PRODUCT, 0, 0]
