"""Statistics over seeds: numbers that can be checked by hand, and those of rliable."""

import numpy as np
import pytest

from wmjax.comparison import statistics

# Computed by rliable 1.2.0 (with arch 7.2.0 and pandas 2): `metrics.aggregate_*`, `metrics.probability_of_improvement`,
# `library.create_performance_profile` and `library.get_interval_estimates`, np.random.seed(0), 50,000 resamples (the
# profile 2,000, the probability 5,000).
X = np.array([[0.2, 1.5, 3.0], [0.9, 1.5, -1.0], [1.0, 2.5, 0.0], [0.4, 2.0, 0.5], [0.7, 0.5, 1.0]])
Y = np.array([[0.4, 1.0, 0.5], [0.8, 1.5, 0.5], [0.9, 0.0, -2.0], [0.1, 2.5, 0.0]])
RLIABLE = {
    "iqm": (0.8888888888888888, 0.5333333333333333, 1.36666667),
    "mean": (0.9800000000000001, 0.56, 1.44),
    "median": (0.7, 0.44, 1.7),
    "optimality_gap": (0.3866666666666667, 0.16666667, 0.64),
}
TAUS = np.array([-1.0, 0.0, 0.5, 1.0, 2.0])
PROFILE = np.array([0.93333333, 0.86666667, 0.6, 0.33333333, 0.13333333])
PROFILE_LOW, PROFILE_HIGH = [0.8, 0.73333333, 0.4, 0.2, 0.0], [1.0, 1.0, 0.8, 0.46666667, 0.33333333]


@pytest.mark.parametrize("name", RLIABLE)
def test_aggregates_and_their_intervals_are_those_of_rliable(name):
    value, low, high = RLIABLE[name]
    statistic = getattr(statistics, name)
    assert statistic(X) == pytest.approx(value)
    found = statistics.interval(statistic, X, resamples=20_000)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_other_aggregates_are_those_of_rliable():
    assert statistics.iqm(Y) == pytest.approx(0.5333333333333333)
    assert statistics.median(Y) == pytest.approx(0.55)
    assert statistics.optimality_gap(Y, 2.0) == pytest.approx(1.525)


def test_the_probability_of_improvement_is_that_of_rliable_and_ties_count_half():
    assert statistics.probability_of_improvement(X, Y) == pytest.approx(0.6333333333333333)
    assert statistics.probability_of_improvement(Y, X) == pytest.approx(0.3666666666666667)
    found = statistics.interval(statistics.probability_of_improvement, X, Y)
    assert found.low == pytest.approx(0.40833333, abs=0.02) and found.high == pytest.approx(0.83333333, abs=0.02)
    tie, above = np.array([[1.0], [1.0], [0.0]]), np.array([[2.0], [1.0]])
    assert statistics.probability_of_improvement(tie, tie) == 0.5
    assert statistics.probability_of_improvement(above, tie) == pytest.approx((3 + 1 + 0.5 + 0.5) / 6)


def test_profiles_and_their_intervals_are_those_of_rliable():
    profile = lambda scores: statistics.performance_profile(scores, TAUS)
    np.testing.assert_allclose(profile(X), PROFILE, atol=1e-7)
    found = statistics.interval(profile, X, resamples=20_000)
    np.testing.assert_allclose(found.low, PROFILE_LOW, atol=1.01 / X.size)  # a step: one score of all
    np.testing.assert_allclose(found.high, PROFILE_HIGH, atol=1.01 / X.size)


def test_the_interquartile_mean_drops_a_quarter_at_either_end_rounded_down():
    assert statistics.iqm(np.array([[1.0], [2.0], [9.0]])) == pytest.approx(4.0)
    assert statistics.iqm(np.array([[-100.0], [2.0], [4.0], [100.0]])) == pytest.approx(3.0)


def test_axes_in_front_stay_and_whole_runs_are_drawn():
    curve = np.stack([X, X + 10.0])  # [T, runs, tasks]
    found = statistics.interval(statistics.iqm, curve)
    assert statistics.iqm(curve).shape == found.low.shape == (2,)
    np.testing.assert_allclose(found.low - found.low[0], [0, 10])  # the same draws at both times


def test_runs_are_drawn_within_their_task():
    apart = np.array([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    found = statistics.interval(statistics.mean, apart)
    assert (found.low, found.high) == (50.0, 50.0)


def test_too_few_seeds_for_an_interval_are_said():
    for runs in (1, 2):
        assert statistics.interval(statistics.iqm, X[:runs]) is None
        assert str(runs) in statistics.too_few(runs) and str(statistics.LEAST_RUNS) in statistics.too_few(runs)
        assert statistics.interval(statistics.probability_of_improvement, X, Y[:runs]) is None
    assert statistics.interval(statistics.iqm, X[:3]) is not None and statistics.too_few(3) == ""


def test_the_same_seed_gives_the_same_interval():
    first, again, other = (statistics.interval(statistics.mean, X, seed=seed, resamples=200) for seed in (0, 0, 1))
    assert first == again and first != other
