import jax
import jax.numpy as jnp
import numpy as np

from wmjax.nets.gru import GRU, LayerNormGRU
from wmjax.nets.mlp import Norm

H, X = jax.random.normal(jax.random.key(0), (2, 3)), jax.random.normal(jax.random.key(1), (2, 4))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def made(cell):
    params = cell.init(jax.random.key(2), H, X)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_the_gru_is_that_of_keras_its_update_gate_keeps_and_its_candidate_has_two_biases():
    cell = GRU(3)
    params = made(cell)
    p = {name: np.asarray(value) for name, value in params["params"].items()}
    x, h = X @ p["kernel"] + p["bias"][0], H @ p["recurrent_kernel"] + p["bias"][1]
    (ux, rx, cx), (uh, rh, ch) = np.split(x, 3, -1), np.split(h, 3, -1)
    u, r = sigmoid(ux + uh), sigmoid(rx + rh)
    expected = u * np.asarray(H) + (1 - u) * np.tanh(cx + r * ch)
    np.testing.assert_allclose(cell.apply(params, H, X), expected, atol=1e-5)
    assert {name: value.shape for name, value in p.items()} == {
        "kernel": (4, 9), "recurrent_kernel": (3, 9), "bias": (2, 9)
    }  # fmt: skip


def test_the_update_gate_of_the_layer_normed_gru_admits_and_starts_nearly_closed():
    cell = LayerNormGRU(3)
    params = made(cell)
    dense, norm = params["params"]["dense"], params["params"]["norm"]
    raw = np.concatenate([X, H], -1) @ dense["kernel"] + dense["bias"]
    gates = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-3)
    reset, cand, update = np.split(gates * norm["scale"] + norm["bias"], 3, -1)
    u = sigmoid(update - 1)
    expected = u * np.tanh(sigmoid(reset) * cand) + (1 - u) * np.asarray(H)
    np.testing.assert_allclose(cell.apply(params, H, X), expected, atol=1e-5)
    # At its initial scale and shift the gate is σ(-1) on average, so that most of the old state stays.
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(cell.apply(zero, H, X), (1 - sigmoid(-1.0)) * np.asarray(H), rtol=1e-5)


def test_layer_norm_adds_a_thousandth_to_the_variance():
    x = jnp.array([[1e-3, -1e-3, 2e-3, -2e-3]])
    params = Norm("layer").init(jax.random.key(0), x)
    expected = np.asarray(x) / np.sqrt(2.5e-6 + 1e-3)
    np.testing.assert_allclose(Norm("layer").apply(params, x), expected, rtol=1e-5)
    assert np.abs(expected).max() < 0.07  # with 1e-6 it would be 1.07
