import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax.envs import env_names, from_gymnax, make_env
from wmjax.types import Box, Discrete, UsageError

gymnax = pytest.importorskip("gymnax", reason="the extra gymnax is not installed", exc_type=ImportError)


def test_every_registered_environment_is_listed():
    listed = {info.name for info in env_names()}
    assert {f"gymnax:{name}" for name in gymnax.registered_envs} <= listed


def test_cartpole_is_a_vector_and_keeps_its_terminal_observation():
    env = make_env("gymnax:CartPole-v1")
    assert env.spec.obs.keys() == {"vector"} and env.spec.obs["vector"].shape == (4,)
    assert env.spec.action == Discrete(2) and env.spec.max_episode_steps == 500
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(1), 15, 8)
    last = np.asarray(records.is_last)
    vector = np.asarray(records.obs["vector"])
    fallen = np.abs(vector[..., 2]) > 12 * 2 * np.pi / 360
    assert last.any(0).all()
    np.testing.assert_array_equal(last, records.is_terminal)
    np.testing.assert_array_equal(last, fallen)
    np.testing.assert_array_equal(records.is_first[1:], last[:-1])
    assert (np.abs(vector[records.is_first]) <= 0.05).all()
    np.testing.assert_array_equal(records.reward, ~np.asarray(records.is_first))


def test_truncation_is_last_but_not_terminal():
    env = make_env("gymnax:MountainCar-v0")
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(1), 202, 2)
    np.testing.assert_array_equal(np.flatnonzero(records.is_last[:, 0]), [200])
    assert not records.is_terminal.any()


def test_continuous_actions_reach_gymnax():
    env = make_env("gymnax:Pendulum-v1")
    assert env.spec.action == Box(-2.0, 2.0, (1,))
    state, _ = env.reset(jax.random.key(0))
    speeds = [env.step(jax.random.key(1), state, jnp.array([u]))[1].obs["vector"][2] for u in (-2.0, 2.0)]
    assert speeds[1] - speeds[0] == pytest.approx(4 * 3 * 0.05, rel=1e-4)


def test_discrete_observation_becomes_one_hot():
    _, step = make_env("gymnax:FrozenLake-misc").reset(jax.random.key(0))
    np.testing.assert_array_equal(step.obs["vector"], np.eye(16)[0])


def test_every_plane_every_pair_of_planes_and_nothing_differ_in_color():
    sets = [(), *itertools.combinations(range(10), 1), *itertools.combinations(range(10), 2)]
    planes = np.zeros((len(sets), 10, 10, 10), bool)
    for i, active in enumerate(sets):
        planes[i, 3, 4, list(active)] = True
    images = np.asarray(jax.vmap(lambda p: from_gymnax.paint(p, 10))(planes)).astype(int)
    colors = images[:, 3, 4]
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + 1000 * np.eye(len(sets), dtype=int)
    assert distance.min() >= 30
    images[:, 3, 4] = 0
    assert not images.any()


@pytest.mark.parametrize("size", [10, 40, 80])
def test_minatar_cells_are_squares_of_pixels(size):
    env = make_env("gymnax:Breakout-MinAtar", image_size=size)
    _, step = env.reset(jax.random.key(0))
    image = np.asarray(step.obs["image"])
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    cells = image.reshape(10, size // 10, 10, size // 10, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    bricks = (image == from_gymnax.PALETTE[3]).all(-1)
    assert bricks[size // 10 : 4 * size // 10].mean() > 0.9 and not bricks[4 * size // 10 :].any()
    paddle = np.argwhere((image == from_gymnax.PALETTE[0]).all(-1)) * 10 // size
    assert {tuple(cell) for cell in paddle} == {(9, 4)}


def test_minatar_is_registered_at_80():
    assert make_env("gymnax:Seaquest-MinAtar").spec.obs["image"].shape == (80, 80, 3)


@pytest.mark.parametrize("size", [8, 64, 85])
def test_minatar_sizes_that_are_no_multiple_of_ten_are_refused(size):
    with pytest.raises(UsageError, match=f"image_size: {size} .*multiple of 10"):
        make_env("gymnax:Breakout-MinAtar", image_size=size)


def test_image_size_of_a_vector_environment_is_refused():
    with pytest.raises(UsageError, match=r"image_size: 64 .*vector"):
        make_env("gymnax:CartPole-v1", image_size=64)


def test_wrong_case_gets_the_right_name():
    with pytest.raises(UsageError, match="did you mean 'gymnax:Breakout-MinAtar'"):
        make_env("gymnax:breakout-minatar")
