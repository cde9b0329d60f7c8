import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import load
from wmjax.ops import distributions, noise
from wmjax.ops.distributions import (
    OneHotCategorical,
    TwoHot,
    bernoulli_log_prob,
    bounded_normal,
    exponential_bins,
    straight_through_sample,
    unimix_logits,
)
from wmjax.types import UsageError

LOGITS = jnp.array([2.0, 0.0, -1.0, 0.5])
MIXED = [0.7054989, 0.0976406, 0.0375003, 0.1593603]  # 0.99 softmax + 0.01 / 4


def test_unimix_of_hand_values():
    np.testing.assert_allclose(jnp.exp(unimix_logits(LOGITS, 0.01)), MIXED, rtol=1e-5)
    np.testing.assert_allclose(OneHotCategorical(LOGITS, 0.01).entropy(), 0.8890781, rtol=1e-6)


def test_without_unimix_extreme_logits_stay_certain_and_finite():
    policy = OneHotCategorical(jnp.array([1e4, 0.0]))
    np.testing.assert_array_equal(policy.probs, [1, 0])
    assert policy.log_prob(jnp.array([1.0, 0.0])) == 0
    assert policy.entropy() == 0


def test_mode_is_the_likeliest_class_of_each_row_as_float32():
    mode = OneHotCategorical(jnp.array([[0.0, 1.0, 2.0], [5.0, 4.0, 0.0]]), 0.01).mode()
    assert mode.dtype == jnp.float32
    np.testing.assert_array_equal(mode, [[0, 0, 1], [1, 0, 0]])


def test_samples_are_exactly_one_hot():
    logits = 5 * jax.random.normal(jax.random.key(0), (50, 3, 7))
    sample = jax.jit(straight_through_sample)(jax.random.key(1), logits)
    assert sample.dtype == jnp.float32
    assert set(np.unique(sample)) == {0.0, 1.0}
    np.testing.assert_array_equal(sample.sum(-1), 1)


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
def test_samples_come_as_often_as_the_mixed_probabilities_say(unimix):
    draws = 100_000
    policy = OneHotCategorical(LOGITS, unimix)
    frequency = policy.sample(seed=jax.random.key(0), sample_shape=draws).mean(0)
    probs = (1 - unimix) * np.array(jax.nn.softmax(LOGITS)) + unimix / 4
    # Five standard errors: a wrong mix of 1 % would show in the smallest class.
    assert (np.abs(frequency - probs) < 5 * np.sqrt(probs * (1 - probs) / draws)).all()


def test_latents_of_one_row_are_drawn_independently():
    sample = straight_through_sample(jax.random.key(0), jnp.zeros((20_000, 2, 2)))
    agreement = (sample[:, 0] == sample[:, 1]).all(-1).mean()
    assert abs(agreement - 0.5) < 0.02


def test_one_key_for_each_row_draws_the_same_whatever_the_batch():
    logits = jax.random.normal(jax.random.key(1), (6, 3, 4))
    keys = noise.row_keys(jax.random.key(2), 6)
    whole = straight_through_sample(keys, logits)
    np.testing.assert_array_equal(whole[2:4], straight_through_sample(keys[2:4], logits[2:4]))
    np.testing.assert_array_equal(OneHotCategorical(logits).sample(seed=keys), whole)
    assert not (whole[0] == whole[1:]).all()


def test_the_gradient_of_a_sample_is_that_of_the_mixed_probabilities_and_not_of_the_logits():
    tangent = jnp.array([0.3, -1.0, 0.7, 0.2])
    sample = lambda logits: straight_through_sample(jax.random.key(0), unimix_logits(logits, 0.01))
    _, through_sample = jax.jvp(sample, (LOGITS,), (tangent,))
    _, through_probs = jax.jvp(lambda x: 0.99 * jax.nn.softmax(x) + 0.01 / 4, (LOGITS,), (tangent,))
    _, unmixed = jax.jvp(jax.nn.softmax, (LOGITS,), (tangent,))
    np.testing.assert_allclose(through_sample, through_probs, rtol=1e-5, atol=1e-7)
    assert np.abs(through_probs - unmixed).max() > 1e-3


@pytest.mark.slow
def test_several_choices_are_independent_and_their_numbers_add_up():
    logits = {
        "logits0": jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5]])),
        "logits1": jnp.log(jnp.array([[0.1, 0.3, 0.6]] * 2)),
    }
    dist = distributions.choices(logits)
    action = jnp.array([[0.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(dist.log_prob(action), np.log([0.8 * 0.1, 0.5 * 0.6]), rtol=1e-5)
    entropy = lambda p: -np.sum(p * np.log(p))
    rows = [entropy(np.array(p)) + entropy(np.array([0.1, 0.3, 0.6])) for p in ([0.2, 0.8], [0.5, 0.5])]
    np.testing.assert_allclose(dist.entropy(), rows, rtol=1e-5)
    assert dist.mode()[0].tolist() == [0, 1, 0, 0, 1]
    draws = jax.vmap(lambda key: dist.sample(seed=key))(jax.random.split(jax.random.key(0), 4000))
    both = draws[:, 0, :2, None] * draws[:, 0, None, 2:]
    np.testing.assert_allclose(both.mean(0), np.outer([0.2, 0.8], [0.1, 0.3, 0.6]), atol=0.03)
    rows = jax.random.split(jax.random.key(1), 2)  # one key for each row
    np.testing.assert_array_equal(dist.sample(seed=rows)[:1], distributions.choices(
        jax.tree.map(lambda x: x[:1], logits)).sample(seed=rows[:1]))  # fmt: skip
    sample = lambda x: distributions.choices({"logits0": x, "logits1": jnp.zeros(3)}).sample(seed=jax.random.key(0))[0]
    np.testing.assert_allclose(jax.grad(sample)(jnp.log(jnp.array([0.2, 0.8]))), [0.16, -0.16], rtol=1e-5)
    assert distributions.choices({"mean": jnp.zeros(2)}) is None


def test_the_draw_of_every_distribution_can_be_replaced_in_one_place(monkeypatch):
    monkeypatch.setattr(distributions, "straight_through_sample", lambda key, logits: jax.nn.softmax(logits))
    policy = OneHotCategorical(LOGITS, 0.01)
    np.testing.assert_allclose(policy.sample(seed=jax.random.key(0)), MIXED, rtol=1e-5)


def test_log_prob_of_a_soft_label():
    np.testing.assert_allclose(bernoulli_log_prob(jnp.array(0.7), jnp.array(1 - 1 / 333)), -0.4052882, rtol=1e-6)
    np.testing.assert_allclose(bernoulli_log_prob(jnp.array([-300.0, 300.0]), jnp.array([1.0, 1.0])), [-300, 0])


# --- two-hot


def entropy_target(bins, target):
    """Two-hot encoding in NumPy, float64, by the words of the paper."""
    bins = np.asarray(bins, np.float64)
    target = np.clip(target, bins[0], bins[-1])
    below = np.clip(np.searchsorted(bins, target, "right") - 1, 0, len(bins) - 2)
    weight = (target - bins[below]) / (bins[below + 1] - bins[below])
    return (1 - weight)[..., None] * np.eye(len(bins))[below] + weight[..., None] * np.eye(len(bins))[below + 1]


def test_bins_are_exactly_antisymmetric_and_exponentially_spaced():
    bins = np.array(exponential_bins(255))
    np.testing.assert_array_equal(bins, -bins[::-1])
    np.testing.assert_allclose(bins[[-1, 128]], [485165184, 0.17055759], rtol=2e-6)
    assert bins[127] == 0
    assert (np.diff(bins) > 0).all()
    np.testing.assert_allclose(np.diff(np.log1p(bins[127:])), 20 / 127, rtol=1e-3)


@pytest.mark.parametrize("num_bins", [254, 1, -3])
def test_bins_that_cannot_be_mirrored_are_refused(num_bins):
    with pytest.raises(UsageError, match=rf"num_bins: {num_bins} .*odd"):
        exponential_bins(num_bins)


def test_uniform_logits_cost_ln_255_for_every_target_and_predict_exactly_zero_under_jit():
    bins = exponential_bins(255)
    logits = jnp.zeros((4, 255))
    target = jnp.array([0.0, 1.0, -3.7, 1e9])
    np.testing.assert_allclose(-TwoHot(logits, bins).log_prob(target), 5.5412636, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda x: TwoHot(x, bins).mean())(logits), 0)
    np.testing.assert_array_equal(jax.jit(lambda x: TwoHot(x[:, :5], exponential_bins(5)).mean())(logits), 0)


@pytest.mark.parametrize("target, below", [(1.0, 131), (-3.7, 117)])
def test_a_target_puts_its_weight_on_its_two_neighbors_linearly_in_value(target, below):
    bins = exponential_bins(255)
    weights = jax.grad(lambda x: TwoHot(x, bins).log_prob(jnp.array(target)))(jnp.zeros(255)) + 1 / 255
    assert np.flatnonzero(np.abs(weights) > 1e-6).tolist() == [below, below + 1]
    np.testing.assert_allclose((weights * bins)[below : below + 2].sum(), target, rtol=1e-5)


def test_targets_on_a_bin_beyond_the_ends_and_between_agree_with_the_definition():
    bins = exponential_bins(31)
    target = np.concatenate([np.array(bins), [1e12, -1e12, np.inf, -np.inf, 0.3, -0.3], np.linspace(-50, 50, 20)])
    logits = jax.random.normal(jax.random.key(0), (len(target), 31))
    log_prob = jax.jit(lambda x, y: TwoHot(x, bins).log_prob(y))(logits, jnp.array(target, jnp.float32))
    expected = (entropy_target(bins, target) * np.array(jax.nn.log_softmax(logits))).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_target_minus_probabilities_and_none_flows_into_the_target():
    bins = exponential_bins(31)
    logits, target = jax.random.normal(jax.random.key(0), (5, 31)), jnp.array([0.0, 0.3, -7.0, 1e4, 1e12])
    loss = lambda x, y: TwoHot(x, bins).log_prob(y).sum()
    to_logits, to_target = jax.grad(loss, (0, 1))(logits, target)
    np.testing.assert_allclose(to_logits, entropy_target(bins, target) - jax.nn.softmax(logits), atol=1e-5)
    assert not to_target.any()


def test_the_mean_is_the_value_and_is_not_expanded_again():
    bins = exponential_bins(255)
    target = np.array([-1e3, -3.7, 0.0, 1e-2, 1.0, 5e5])
    logits = jnp.log(jnp.array(entropy_target(bins, target), jnp.float32) + 1e-30)
    np.testing.assert_allclose(TwoHot(logits, bins).mean(), target, rtol=1e-3, atol=1e-4)


FAR_BINS = """
import jax, numpy as np
from wmjax.ops.distributions import TwoHot, exponential_bins

for size in (31, 41, 255):
    bins, half = exponential_bins(size), size // 2
    logits = np.random.default_rng(0).normal(size=(200, half + 1)).astype(np.float32) - 8
    logits[:, 0] += 12  # the middle
    logits = np.concatenate([logits[:, :0:-1], logits], -1)
    logits[:, half + 1] += 3.0
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    assert (exact * np.abs(bins)).sum(-1).mean() > 1e4
    expected = (exact[:, half + 1] - exact[:, half - 1]) * float(bins[half + 1])
    mean = jax.jit(lambda x: TwoHot(x, bins).mean())
    np.testing.assert_allclose(mean(logits), expected, rtol=1e-5)
    np.testing.assert_allclose([mean(x) for x in logits[:20]], expected[:20], rtol=1e-5)
"""


@pytest.mark.slow
def test_far_bins_that_are_as_likely_on_both_sides_add_nothing_to_the_mean():
    # As XLA compiles it by itself: the tests' own flags round exponentials alike wherever they are.
    subprocess.run([sys.executable, "-c", FAR_BINS], env=os.environ | {"XLA_FLAGS": ""}, check=True)


def test_the_gradient_of_the_mean_is_each_bins_distance_from_it_times_its_probability():
    bins = exponential_bins(31)
    for logits in (jnp.zeros(31), jax.random.normal(jax.random.key(0), (31,))):
        probs, far = np.array(jax.nn.softmax(logits), np.float64), np.array(bins, np.float64)
        expected = probs * (far - (probs * far).sum())
        gradient = jax.grad(lambda x: TwoHot(x, bins).mean())(logits)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_a_bin_that_is_ruled_out_counts_for_nothing():
    bins = exponential_bins(5)
    for out in ([0], [0, 4], [4, 3]):
        logits = jnp.zeros(5).at[jnp.array(out)].set(-jnp.inf)
        mean, gradient = jax.value_and_grad(lambda x: TwoHot(x, bins).mean())(logits)
        left = np.delete(np.array(bins, np.float64), out)
        np.testing.assert_allclose(mean, left.mean(), rtol=1e-6)
        assert np.isfinite(gradient).all() and not gradient[jnp.array(out)].any()


def test_two_hot_is_float32_under_bfloat16_logits():
    bins = exponential_bins(31)
    logits = jax.random.normal(jax.random.key(0), (5, 31)).astype(jnp.bfloat16)
    target = jnp.linspace(-4.03, 5.01, 5)
    for low, high in zip(
        (TwoHot(logits, bins).mean(), TwoHot(logits, bins).log_prob(target)),
        (TwoHot(logits.astype(jnp.float32), bins).mean(), TwoHot(logits.astype(jnp.float32), bins).log_prob(target)),
        strict=True,
    ):
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, high)


# --- continuous actions

RAW = jnp.array([0.5, -1.0]), jnp.array([0.0, 1.0])


def test_bounded_normal_of_hand_values():
    policy = bounded_normal(*RAW)
    np.testing.assert_allclose(policy.mode(), np.tanh([0.5, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(policy.stddev(), [0.8927173, 0.9573167], rtol=1e-6)
    np.testing.assert_allclose(policy.entropy(), 2.6807709, rtol=1e-6)
    np.testing.assert_allclose(policy.log_prob(jnp.array([0.3, -1.4])), -1.9196178, rtol=1e-6)


def test_the_deviation_stays_within_its_bounds():
    policy = bounded_normal(jnp.zeros(2), jnp.array([-100.0, 100.0]), 0.2, 0.7)
    np.testing.assert_allclose(policy.stddev(), [0.2, 0.7], rtol=1e-6)


def test_samples_have_the_stated_moments_and_leave_the_bounds_of_the_mean():
    policy = bounded_normal(*RAW)
    sample = policy.sample(seed=jax.random.key(0), sample_shape=100_000)
    np.testing.assert_allclose(sample.mean(0), policy.mean(), atol=0.015)
    np.testing.assert_allclose(sample.std(0), policy.stddev(), rtol=0.015)
    assert abs(np.corrcoef(sample.T)[0, 1]) < 0.015
    assert np.abs(sample).max() > 3


def test_actions_drawn_with_one_key_for_each_row_do_not_depend_on_the_batch():
    raw = jax.random.normal(jax.random.key(0), (2, 4, 3))
    keys = noise.row_keys(jax.random.key(1), 4)
    whole = bounded_normal(*raw).sample(seed=keys)
    assert whole.shape == (4, 3)
    np.testing.assert_allclose(bounded_normal(*raw[:, 1:3]).sample(seed=keys[1:3]), whole[1:3], rtol=1e-6)


def test_bounded_normal_is_float32_under_bfloat16_outputs():
    policy = bounded_normal(*(x.astype(jnp.bfloat16) for x in RAW))
    assert policy.sample(seed=jax.random.key(0)).dtype == policy.entropy().dtype == jnp.float32
    np.testing.assert_allclose(policy.entropy(), 2.6807709, rtol=1e-6)  # RAW is exact in bfloat16


# --- the official code


@pytest.mark.parity
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_categorical_agrees_with_the_official_code(unimix):
    f = load("dreamer_v3_heads")
    out = f.tree(f"out/categorical_unimix{unimix}")
    logits = jnp.array(f["in/categorical/logits"])
    policy = OneHotCategorical(logits, unimix)
    event = jax.nn.one_hot(f["in/categorical/event"], logits.shape[-1])
    np.testing.assert_allclose(policy.probs, out["probs"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.log_prob(event), out["logp"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(policy.entropy(), out["entropy"], rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_two_hot_agrees_with_the_official_code():
    f = load("dreamer_v3_heads")
    bins = exponential_bins(f["out/twohot/bins"].shape[0])
    np.testing.assert_allclose(bins, f["out/twohot/bins"], rtol=2e-6, atol=0)
    logits, target = jnp.array(f["in/twohot/logits"]), jnp.array(f["in/twohot/target"])
    head = TwoHot(jnp.broadcast_to(logits[:, None], (len(logits), len(target), len(bins))), bins)
    loss = -head.log_prob(jnp.broadcast_to(target, (len(logits), len(target))))
    np.testing.assert_allclose(loss, f["out/twohot/loss"], rtol=1e-5, atol=1e-4)
    error = np.abs(head.mean()[:, 0] - f["out/twohot/pred"])
    assert (error <= 2e-6 * f["out/twohot/pred_scale"]).all()
    gradient = jax.grad(lambda x: -TwoHot(x, bins).log_prob(target[: len(logits)]).sum())(logits)
    np.testing.assert_allclose(gradient, f["grad/twohot/logits_loss_first_targets"], atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("head", ["rew", "val"])
def test_value_heads_agree_with_the_official_code(head):
    f = load("dreamer_v3_heads")
    logits = jnp.array(f[f"out/{head}/logits"])
    two_hot = TwoHot(logits, exponential_bins(logits.shape[-1]))
    loss = -two_hot.log_prob(jnp.array(f[f"in/{head}/target"]))
    np.testing.assert_allclose(loss, f[f"out/{head}/loss"], rtol=1e-5, atol=1e-4)
    scale = (jax.nn.softmax(logits) * jnp.abs(two_hot.bins)).sum(-1)
    assert (np.abs(two_hot.mean() - f[f"out/{head}/pred"]) <= 2e-6 * scale).all()


@pytest.mark.parity
@pytest.mark.parametrize("head, given", [("con", "out/con/logit"), ("binary", "in/binary/logit")])
def test_binary_agrees_with_the_official_code(head, given):
    f = load("dreamer_v3_heads")
    log_prob = bernoulli_log_prob(jnp.array(f[given]), jnp.array(f[f"in/{head}/target"]))
    np.testing.assert_allclose(-log_prob, f[f"out/{head}/loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_continuous_policy_agrees_with_the_official_code():
    f = load("dreamer_v3_heads")
    out = f.tree("out/pol_cont")
    # Raw outputs are not stored: invert the two squashing functions.
    low, high = f.config["minstd"], f.config["maxstd"]
    share = (out["stddev"].astype(np.float64) - low) / (high - low)
    policy = bounded_normal(
        jnp.array(np.arctanh(out["mean"].astype(np.float64))), jnp.array(np.log(share / (1 - share)) - 2), low, high
    )
    np.testing.assert_allclose(policy.mode(), out["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.stddev(), out["stddev"], rtol=1e-5)
    np.testing.assert_allclose(policy.log_prob(jnp.array(f["in/pol_cont/action"])), out["logp"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(policy.entropy(), out["entropy"], rtol=1e-5)
