import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops.kl import balanced_kl, categorical_kl


def pair(*shape):
    return 3 * jax.random.normal(jax.random.key(0), (2, *shape))


def mixed_kl(post, prior):
    """The KL by its definition, of distributions with 1 % of the uniform one."""
    mix = lambda logits: 0.99 * jax.nn.softmax(logits) + 0.01 / logits.shape[-1]
    p, q = mix(post), mix(prior)
    return (p * jnp.log(p / q)).sum((-2, -1))


def test_kl_of_hand_values_is_summed_over_latents():
    post = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
    prior = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(categorical_kl(post, prior), expected, rtol=1e-6)


def test_kl_does_not_depend_on_a_shift_of_the_logits():
    post, prior = pair(3, 4, 5)
    np.testing.assert_allclose(categorical_kl(post + 50, prior - 7), categorical_kl(post, prior), rtol=1e-5)


def test_free_nats_apply_per_entry_after_the_sum_over_latents_and_before_the_mean():
    # Entry 0 is far above the free nats, entry 1 has 4 latents of 0.4 nats each, entry 2 has none.
    weak = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.129, 0.871]))
    strong = jnp.log(jnp.array([1 - 1e-6, 1e-6])), jnp.log(jnp.array([1e-6, 1 - 1e-6]))
    same = weak[0], weak[0]
    post, prior = (jnp.stack([jnp.tile(x[i], (4, 1)) for x in (strong, weak, same)]) for i in range(2))
    raw = categorical_kl(post, prior)
    assert raw[0] > 50 and 1.5 < raw[1] < 1.7 and raw[2] == 0
    for loss in balanced_kl(post, prior, 1.0, 0.0):
        np.testing.assert_allclose(loss, [raw[0], raw[1], 1.0], rtol=1e-6)


def test_dyn_trains_the_prior_and_rep_trains_the_posterior():
    post, prior = pair(3, 4, 5)
    dyn, rep = (
        jax.grad(lambda p, q, i=i: balanced_kl(p, q, 0.0, 0.01)[i].sum(), (0, 1))(post, prior) for i in range(2)
    )
    assert not dyn[0].any() and not rep[1].any()
    # Each is the whole gradient of the plain KL in its own argument.
    whole = jax.grad(lambda p, q: mixed_kl(p, q).sum(), (0, 1))(post, prior)
    np.testing.assert_allclose(rep[0], whole[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dyn[1], whole[1], rtol=1e-4, atol=1e-6)


def test_below_the_free_nats_there_is_no_gradient():
    post, prior = pair(3, 4, 5)
    gradient = jax.grad(lambda p, q: sum(x.sum() for x in balanced_kl(p, q, 1e3, 0.01)), (0, 1))(post, prior)
    assert not gradient[0].any() and not gradient[1].any()


def test_the_uniform_mix_keeps_the_kl_of_opposite_certainties_finite():
    post = jnp.array([[1e4, 0.0]])
    dyn, _ = balanced_kl(post, -post, 0.0, 0.01)
    expected = 0.995 * np.log(0.995 / 0.005) + 0.005 * np.log(0.005 / 0.995)
    np.testing.assert_allclose(dyn, expected, rtol=1e-4)


def test_is_float32_under_bfloat16_logits():
    post, prior = pair(3, 4, 5).astype(jnp.bfloat16)
    low, _ = balanced_kl(post, prior, 0.0, 0.01)
    high, _ = balanced_kl(post.astype(jnp.float32), prior.astype(jnp.float32), 0.0, 0.01)
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, high)


@pytest.mark.parity
def test_values_and_gradients_agree_with_the_official_code():
    f = load("dreamer_v3_losses")
    post, prior = jnp.array(f["in/kl/post_logit"]), jnp.array(f["in/kl/prior_logit"])
    dyn, rep = balanced_kl(post, prior, 1.0, 0.01)
    np.testing.assert_allclose(dyn, f["out/kl/dyn"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rep, f["out/kl/rep"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(balanced_kl(post, prior, 0.0, 0.01)[0], f["out/kl/unclipped"], rtol=1e-5, atol=1e-5)

    def loss(post, prior):
        dyn, rep = balanced_kl(post, prior, 1.0, 0.01)
        return dyn.mean() + 0.1 * rep.mean()

    for gradient, name in zip(jax.grad(loss, (0, 1))(post, prior), ("post_logit", "prior_logit"), strict=True):
        expected = f[f"grad/kl/{name}"]
        assert np.linalg.norm(gradient - expected) < 1e-4 * np.linalg.norm(expected)
