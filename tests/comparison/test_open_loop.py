"""Held-out episodes that are the same for all agents, and what their errors come to."""

import jax
import numpy as np
import pytest

from wmjax import figures
from wmjax.comparison import open_loop
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.figures import OpenLoop
from wmjax.types import Agent


def test_episodes_are_played_again_in_pictures_of_another_size():
    actions = jax.nn.one_hot(jax.random.randint(jax.random.key(0), (12, 3), 0, 3), 3)
    agent = open_loop._repeating(Agent(*[None] * 7))
    play = lambda size: figures.play(
        agent, agent_actions(make_env("catch", image_size=size)), actions, jax.random.key(1), 3, 12
    )
    small, large = play(10), play(20)
    np.testing.assert_array_equal(small.action, actions)
    for name in ("reward", "is_first", "is_last"):
        np.testing.assert_array_equal(getattr(small.step, name), getattr(large.step, name))
    assert small.step.is_first.sum() > 3 and small.step.reward.any()
    np.testing.assert_array_equal(small.step.obs["image"], large.step.obs["image"][:, :, ::2, ::2])


def test_pictures_are_compared_at_the_smallest_size():
    def result(size, guess):
        halves = np.repeat([0, 255], size // 2).astype(np.uint8)[:, None]  # left and right
        truth = np.broadcast_to(halves, (2, 1, size, size, 3))
        return OpenLoop({"image": truth}, {"image": np.full(truth.shape, guess, np.float32)}, np.ones((1, 1), bool))

    results = {"a": [result(4, 0.0)], "b": [result(8, 127.5)]}
    errors = {}
    for label, (own,) in results.items():
        shrunk = open_loop._shrink(own, results)
        assert shrunk.truth["image"].shape == shrunk.model["image"].shape == (2, 1, 4, 4, 3)
        assert shrunk.truth["image"].dtype == np.uint8
        errors[label] = figures.horizon_errors(shrunk, 1)["image"]
    assert errors["a"]["model"] == pytest.approx([0.5]) and errors["a"]["repeat_last"] == [0.0]
    assert errors["b"]["model"][0] < 0.3


def test_errors_are_means_over_seeds_with_an_interval_where_all_have_one():
    found = open_loop._over_seeds([[1.0, 2.0, None], [3.0, 2.0, None], [5.0, 2.0, None]])
    assert found["mean"] == [3.0, 2.0, None]
    low, high = found["interval"]
    assert low[0] < 3 < high[0] and (low[1], high[1]) == (2.0, 2.0) and (low[2], high[2]) == (None, None)
    assert open_loop._over_seeds([[1.0], [3.0]])["interval"] is None
