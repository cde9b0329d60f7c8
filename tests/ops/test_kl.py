import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops.kl import above_free_nats, balanced_kl, kl_loss
from wmjax.ops.latents import Categorical, Gaussian


def pair(*shape):
    return 3 * jax.random.normal(jax.random.key(0), (2, *shape))


def categorical_kl(post, prior):
    return Categorical(post).kl(Categorical(prior)).sum(-1)


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
    free, unimix = f.config["free_nats"], f.config["unimix"]
    dyn, rep = balanced_kl(post, prior, free, unimix)
    np.testing.assert_allclose(dyn, f["out/kl/dyn"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rep, f["out/kl/rep"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(balanced_kl(post, prior, 0.0, unimix)[0], f["out/kl/unclipped"], rtol=1e-5, atol=1e-5)

    def loss(post, prior):
        dyn, rep = balanced_kl(post, prior, free, unimix)
        return dyn.mean() + 0.1 * rep.mean()

    for gradient, name in zip(jax.grad(loss, (0, 1))(post, prior), ("post_logit", "prior_logit"), strict=True):
        expected = f[f"grad/kl/{name}"]
        assert np.linalg.norm(gradient - expected) < 1e-4 * np.linalg.norm(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The losses of DreamerV1 and DreamerV2


def test_free_nats_on_the_mean_on_each_step_and_on_each_latent_are_three_numbers():
    value = jnp.array([[10.0, 0.0], [0.1, 0.1], [0.2, 0.2], [0.1, 0.1]])  # one large KL, many tiny ones
    assert float(above_free_nats(value, 1.0, "avg")) == pytest.approx((10 + 0.2 + 0.4 + 0.2) / 4)
    assert float(above_free_nats(value, 1.0, "step")) == pytest.approx((10 + 1 + 1 + 1) / 4)
    assert float(above_free_nats(value, 1.0, "latent")) == pytest.approx((10 + 7 * 1) / 8)
    assert float(above_free_nats(value, 3.0, "avg")) == 3.0
    grads = [jax.grad(lambda x, f=free: above_free_nats(x, f, "avg"))(value) for free in (1.0, 3.0)]
    np.testing.assert_allclose(grads[0], 0.25)
    assert not np.any(grads[1])


def test_free_nats_on_the_mean_are_decided_by_all_devices_together():
    value = jnp.array([[[4.0]], [[0.5]]])  # means 4 and 0.5 on two devices, 2.25 on both
    per_device = jax.vmap(lambda x: above_free_nats(x, 2.0, "avg", "devices"), axis_name="devices")
    assert per_device(value).tolist() == [4.0, 0.5]
    slope = jax.vmap(jax.grad(lambda x: above_free_nats(x, 2.0, "avg", "devices")), axis_name="devices")
    np.testing.assert_allclose(slope(value), 1.0)
    below = jax.vmap(lambda x: above_free_nats(x, 3.0, "avg", "devices"), axis_name="devices")
    assert below(value).tolist() == [3.0, 3.0]


def gradients(**options):
    """Sizes of the gradients of posterior and prior, in a KL whose two terms have equal logits."""
    post, prior = pair(6, 2, 4)
    loss = lambda post, prior: kl_loss(Categorical(post), Categorical(prior), **options)[0]
    return jax.grad(loss, (0, 1))(post, prior)


def test_the_balance_is_the_share_of_the_prior():
    plain_post, plain_prior = gradients(mode="plain")
    post, prior = gradients(mode="balanced", balance=0.8)
    np.testing.assert_allclose(prior, 0.8 * plain_prior, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(post, 0.2 * plain_post, rtol=1e-5, atol=1e-9)
    post, prior = gradients(mode="balanced", balance=0.5)  # the text of the implementation guide
    np.testing.assert_allclose(prior, 0.5 * plain_prior, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(post, 0.5 * plain_post, rtol=1e-5, atol=1e-9)


def test_the_guides_code_trains_the_prior_with_all_and_the_posterior_with_the_balance():
    plain_post, plain_prior = gradients(mode="plain")
    post, prior = gradients(mode="guide_code", balance=0.8)
    np.testing.assert_allclose(prior, plain_prior, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(post, 0.8 * plain_post, rtol=1e-5, atol=1e-8)
    # Literally: the mix of both terms, at least one nat for each latent, and the mean over everything.
    post, prior = pair(6, 2, 4)
    log_post, log_prior = jax.nn.log_softmax(post), jax.nn.log_softmax(prior)
    each = (jnp.exp(log_post) * (log_post - log_prior)).sum(-1)
    found, _ = kl_loss(Categorical(post), Categorical(prior), mode="guide_code", free_nats=1.0, free_mode="latent")
    assert float(found) == pytest.approx(float(jnp.maximum(0.8 * each + 0.2 * each, 1.0).mean()), rel=1e-6)


def test_the_losses_take_gaussian_latents_too():
    post, prior = Gaussian(jnp.ones((3, 2)), jnp.ones((3, 2))), Gaussian(jnp.zeros((3, 2)), jnp.ones((3, 2)))
    loss, value = kl_loss(post, prior, mode="plain", free_nats=0.5)
    assert float(loss) == 1.0 and value.tolist() == [1.0] * 3
    assert float(kl_loss(post, prior, mode="balanced", balance=0.8)[0]) == pytest.approx(1.0)
