import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops.symlog import symexp, symlog


def test_symlog_of_hand_values():
    x = np.array([0.0, np.e - 1, 1 - np.e, 1e-6, 1e30])
    expected = [0.0, 1.0, -1.0, 1e-6, 69.07755]
    np.testing.assert_allclose(symlog(jnp.array(x)), expected, rtol=1e-6)


def test_symexp_undoes_symlog_over_the_whole_range_of_the_bins():
    x = jnp.array([-4.8e8, -3.0, -1e-5, 0.0, 1e-5, 2.5, 4.8e8])
    np.testing.assert_allclose(symexp(symlog(x)), x, rtol=5e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name, function", [("symlog", symlog), ("symexp", symexp)])
def test_agrees_with_the_official_code(name, function):
    f = load("dreamer_v3_heads")
    np.testing.assert_allclose(function(jnp.array(f[f"in/{name}/x"])), f[f"out/{name}/y"], rtol=1e-5, atol=1e-6)
