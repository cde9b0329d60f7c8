import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops import normalize


def test_range_starts_at_zero_and_is_not_debiased():
    x = jnp.arange(101.0)
    state = normalize.update(normalize.init(), x)
    np.testing.assert_allclose(state, [0.05, 0.95], rtol=1e-6)
    assert normalize.scale(state) == 1.0
    for _ in range(99):
        state = normalize.update(state, x)
    np.testing.assert_allclose(state.low, 3.1698368, rtol=1e-5)
    np.testing.assert_allclose(normalize.scale(state), 57.05715, rtol=1e-5)


def test_percentiles_are_interpolated_linearly_and_rate_1_takes_them_over():
    state = normalize.update(normalize.init(), jnp.array([[3.0, 0.0], [1.0, 2.0]]), rate=1.0, low=10.0, high=50.0)
    np.testing.assert_allclose(state, [0.3, 1.5], rtol=1e-6)


def test_large_returns_are_scaled_down_and_small_ones_are_not_scaled_up():
    state = normalize.ReturnRange(jnp.array(-1.0), jnp.array(4.0))
    assert normalize.scale(state) == 5.0
    assert normalize.scale(state, limit=8.0) == 8.0


def test_percentiles_over_devices_are_those_of_the_whole_batch():
    x = jnp.concatenate([jnp.linspace(0, 1, 10), jnp.linspace(50, 100, 10)]).reshape(2, 10)
    update = functools.partial(normalize.update, normalize.init(), rate=1.0)
    shards = jax.vmap(functools.partial(update, axis_name="devices"), axis_name="devices")(x)
    whole = update(x)
    for spread, single in zip(shards, whole, strict=True):
        np.testing.assert_array_equal(spread, [single, single])
    mean_of_percentiles = np.mean([update(row).high for row in x])
    assert abs(whole.high - mean_of_percentiles) > 10  # so the shortcut would have been noticed


def test_percentiles_are_float32_under_bfloat16_returns():
    x = jnp.arange(101.0).astype(jnp.bfloat16)
    state = normalize.update(normalize.init(), x, rate=1.0, low=0.5)
    assert state.low.dtype == state.high.dtype == jnp.float32
    np.testing.assert_allclose(state, [0.5, 95.0], rtol=1e-6)


def test_no_gradient_flows_through_the_range():
    gradient = jax.grad(lambda x: normalize.scale(normalize.update(normalize.init(), x, rate=1.0)))
    assert not gradient(jnp.arange(101.0)).any()


@pytest.mark.parity
def test_agrees_with_the_official_normalizer_update_by_update():
    f = load("dreamer_v3_losses")
    given = f.config["retnorm"]
    options = dict(rate=given["rate"], low=given["perclo"], high=given["perchi"])
    state, update = normalize.init(), jax.jit(functools.partial(normalize.update, **options))
    for i, x in enumerate(f["in/retnorm/x"]):
        state = update(state, jnp.array(x))
        np.testing.assert_allclose(state.low, f["out/retnorm_perc/state/lo"][i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.high, f["out/retnorm_perc/state/hi"][i], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(normalize.scale(state), f["out/retnorm_perc/scale"][i], rtol=1e-5)
