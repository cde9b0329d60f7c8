"""What heads give beside what their distributions are tested for."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from wmjax.nets.heads import number_head
from wmjax.ops.distributions import number

MIRRORED = """
import jax, numpy as np
from wmjax.nets.heads import number_head

for size in (41, 255):
    for rows in ((), (16,)):
        head = number_head("two_hot", size, (64,))
        x = jax.random.normal(jax.random.key(0), (20, *rows, 64))
        params = head.init(jax.random.key(1), x)
        kernel = jax.random.normal(jax.random.key(2), (64, size))
        params["params"]["logits"]["kernel"] = kernel + kernel[:, ::-1]
        found = [jax.jit(head.apply)(params, row)["logits"] for row in x]
        np.testing.assert_array_equal(found, np.flip(found, -1))
        plain = head.clone(multiple=1).apply(params, x)["logits"]
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.slow
def test_bins_of_equal_weights_have_logits_equal_to_the_bit_and_those_of_a_linear_layer():
    # As XLA compiles it by itself; the tests' own flags have no rounding of the kind.
    subprocess.run([sys.executable, "-c", MIRRORED], env=os.environ | {"XLA_FLAGS": ""}, check=True)


@pytest.mark.parametrize("kind", ["two_hot", "symlog_mse", "normal"])
def test_a_head_of_a_number_starts_at_zero(kind):
    head, x = number_head(kind, 5, (8,)), jax.random.normal(jax.random.key(0), (3, 4))
    assert (number(head.apply(head.init(jax.random.key(1), x), x), kind).mean() == jnp.zeros(3)).all()
