import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax.envs import make_env, pendulum, wrappers


def frame(theta, size=64):
    """The picture at an angle, int32 [size, size, 3]."""
    raw = pendulum.pendulum(size)
    state = raw.reset(jax.random.key(0))
    state = state._replace(inner=pendulum.PendulumState(jnp.float32(theta), jnp.float32(0)))
    return np.asarray(raw.observe(state)["image"]).astype(int)


# Starts from which rounding does not grow: a rod that lingers at the top magnifies it.
@pytest.mark.parametrize("start", [(1.0, 0.2), (-3.0, 1.0), (2.2, 0.4)])
def test_dynamics_and_rewards_are_gymnasiums(start):
    reference = gymnasium.make("Pendulum-v1")
    reference.reset(seed=0)
    reference.unwrapped.state = np.array(start)
    raw = pendulum.pendulum(8)
    state = raw.reset(jax.random.key(0))
    state = state._replace(inner=pendulum.PendulumState(*(jnp.float32(x) for x in start)))
    actions = np.random.default_rng(0).uniform(-3, 3, (200, 1)).astype(np.float32)  # some beyond the bounds

    def step(state, action):
        state, outcome = raw.step(jax.random.key(0), state, action)
        return state, (state.inner, outcome)

    _, ((theta, theta_dot), outcome) = jax.jit(lambda s, a: jax.lax.scan(step, s, a))(state, actions)
    for t, action in enumerate(actions):
        (cos, sin, speed), reward, terminated, truncated, _ = reference.step(action)
        ours = [np.cos(theta[t]), np.sin(theta[t]), theta_dot[t], outcome.reward[t]]
        np.testing.assert_allclose(ours, [cos, sin, speed, reward], atol=3e-4)
        assert (terminated, truncated) == (outcome.is_terminal[t], outcome.is_last[t])
    assert truncated  # the limit of 200 steps was part of the comparison


def test_reset_is_uniform_over_angles_and_speeds():
    state = jax.vmap(pendulum.pendulum(8).reset)(jax.random.split(jax.random.key(0), 4000)).inner
    for values, bound in ((state.theta, np.pi), (state.theta_dot, 1.0)):
        assert np.abs(values).max() <= bound
        np.testing.assert_allclose(
            np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) / bound, [-0.9, -0.5, 0, 0.5, 0.9], atol=0.05
        )


def test_episode_is_cut_after_200_frames_whatever_the_action_repeat():
    env = make_env("pendulum", image_size=8, action_repeat=3)
    assert env.spec.max_episode_steps == 67 and env.spec.action_repeat == 3
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.zeros(1), 70, 2)
    np.testing.assert_array_equal(np.flatnonzero(records.is_last[:, 0]), [67])
    assert not records.is_terminal.any()


def test_random_play_returns_about_minus_1200():
    env = wrappers.agent_actions(make_env("pendulum", image_size=8))
    play = lambda key, step: jax.random.uniform(key, (1,), minval=-1)
    records, _ = rollout(env, jax.random.key(0), play, 200, 256)
    assert -1300 < records.reward.sum(0).mean() < -1100


@pytest.mark.parametrize(
    "theta, row, column", [(0, 19, 32), (np.pi / 2, 32, 19), (np.pi, 45, 32), (-np.pi / 2, 32, 45)]
)
def test_angle_zero_points_up_and_grows_counterclockwise(theta, row, column):
    rows, columns = np.nonzero((frame(theta) == pendulum.RED).all(-1))
    middle = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    np.testing.assert_allclose(middle, (row, column), atol=2)


def test_picture_has_soft_edges_that_move_with_small_angles():
    image = frame(0.3)
    assert (image[0, 0] == 255).all()
    assert len(np.unique(image[..., 1])) > 20  # anti-aliased: many shades between red and white
    assert np.abs(frame(0.31) - image).max() > 5


@pytest.mark.parametrize("size", [16, 64, 150])
def test_rod_covers_the_same_share_at_any_size(size):
    darkness = (255 - frame(0.7, size)[..., 1]).mean() / 178
    rod = 2 * pendulum.ROD_RADIUS + np.pi * pendulum.ROD_RADIUS**2
    axle = np.pi * pendulum.AXLE_RADIUS**2 * 77 / 178  # black is darker than red
    assert darkness == pytest.approx((rod + axle) / (2 * pendulum.HALF_WIDTH) ** 2, rel=0.08)
