import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import mean_return, rollout
from wmjax.envs import make_env


def lit(image):
    """Whether the left and the right half are lit."""
    image = np.asarray(image)
    return (image[..., 0, 0, 0] == 255), (image[..., 0, -1, 0] == 255)


@pytest.mark.slow
def test_who_remembers_the_light_earns_one_and_who_does_not_nothing():
    env = make_env("recall", image_size=8)
    records, actions = rollout(env, jax.random.key(0), lambda key, step: jax.random.randint(key, (), 0, 2), 6, 64)
    left, right = lit(records.obs["image"][0])
    assert (left != right).all() and 0.2 < left.mean() < 0.8
    assert (records.reward[6] == np.where(actions[5] == right, 1, -1)).all() and not records.reward[:6].any()
    for policy in (lambda key, step: jax.random.randint(key, (), 0, 2), lambda key, step: jnp.int32(1)):
        assert mean_return(env, jax.random.key(1), policy, 4096) == pytest.approx(0, abs=0.06)


def test_between_the_light_and_the_answer_all_pictures_are_the_same():
    env = make_env("recall", image_size=8)
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(0), 6, 16)
    image = np.asarray(records.obs["image"])
    assert (image[1:6] == image[1:6, :1]).all()  # whichever side it was on
    assert not image[1:5].any() and image[5].all(-1).all()
    assert all((a == b).all() for a, b in zip(lit(image[0]), lit(image[6]), strict=True))
    for flags in (records.is_last, records.is_terminal):
        np.testing.assert_array_equal(np.flatnonzero(flags.any(1)), [6])
