import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import mean_return, rollout
from wmjax.envs import catch, make_env
from wmjax.types import UsageError


def columns(image, color):
    """The columns of the grid, 0 to 4, where `color` is."""
    return np.unique(np.argwhere((np.asarray(image) == color).all(-1))[:, 1] * 5 // image.shape[1])


def follow(key, step):
    """Sees where the ball and the paddle are and goes there."""
    image, (side, *_) = step.obs["image"], step.obs["image"].shape
    column = jnp.arange(side) * 5 // side
    where = lambda mask: jnp.max(jnp.where(mask, column, -1))
    paddle = where(image[-1, :, 2] == 255)
    return jnp.int32(1 + jnp.sign(where((image[:-1, :, 0] == 255).any(0)) - paddle))


def test_perfect_play_from_pixels_returns_one():
    assert mean_return(make_env("catch", image_size=20), jax.random.key(0), follow, 64) == 1.0


def test_random_play_returns_about_minus_0_6():
    play = lambda key, step: jax.random.randint(key, (), 0, 3)
    assert mean_return(make_env("catch", image_size=10), jax.random.key(0), play, 4096) == pytest.approx(-0.6, abs=0.06)


def test_an_episode_takes_nine_steps_and_ends_by_itself():
    env = make_env("catch", image_size=10)
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(1), 12, 32)
    assert env.spec.max_episode_steps == 9
    for flags in (records.is_last, records.is_terminal):
        np.testing.assert_array_equal(np.flatnonzero(flags.any(1)), [9])
        assert flags[9].all()
    assert (records.reward[9] == jnp.where(records.obs["image"][9, :, -1, 5, 0] == 255, 1, -1)).all()
    assert not records.reward[:9].any()


def test_actions_are_left_stay_right_and_stop_at_the_walls():
    env = make_env("catch", image_size=10)
    state, _ = env.reset(jax.random.key(0))
    seen = []
    for action in (0, 0, 0, 1, 2, 2, 2):
        state, step = env.step(jax.random.key(1), state, jnp.int32(action))
        seen.append(columns(step.obs["image"], catch.PADDLE).tolist())
    assert seen == [[1], [0], [0], [0], [1], [2], [3]]


def test_ball_starts_in_every_column():
    _, step = jax.vmap(make_env("catch", image_size=10).reset)(jax.random.split(jax.random.key(0), 200))
    ball = np.asarray(step.obs["image"][:, 0, ::2, 0] == 255)
    assert (ball.sum(1) == 1).all() and (ball.mean(0) > 0.1).all()


@pytest.mark.parametrize("size", [10, 37, 64, 96])
def test_ball_and_paddle_fill_their_cells_at_any_size(size):
    env = make_env("catch", image_size=size)
    state, step = env.reset(jax.random.key(0))
    image = np.asarray(step.obs["image"])
    for color in (catch.BALL, catch.PADDLE):
        rows, cols = np.nonzero((image == color).all(-1))
        assert np.ptp(rows) + 1 in (size // 10, size // 10 + 1) and np.ptp(cols) + 1 in (size // 5, size // 5 + 1)
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
    for row in range(9):  # no row of the grid is skipped
        assert (np.nonzero((image == catch.BALL).all(-1))[0] * 10 // size == row).all()
        state, step = env.step(jax.random.key(1), state, jnp.int32(1))
        image = np.asarray(step.obs["image"])


def test_a_size_that_cannot_show_every_row_is_refused():
    with pytest.raises(UsageError, match=r"image_size: 9 .* at least 10"):
        make_env("catch", image_size=9)
