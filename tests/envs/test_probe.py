import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import mean_return, rollout
from wmjax.envs import make_env
from wmjax.envs.probe import PROBES
from wmjax.types import Discrete, MultiDiscrete

BEST = {
    "probe:act": lambda obs: jnp.int32(1),
    "probe:act_obs": lambda obs: (obs[0] > 0).astype(jnp.int32),
    "probe:act_both": lambda obs: jnp.stack([(obs[0] > 0).astype(jnp.int32), jnp.int32(2)]),
    "probe:act_continuous": lambda obs: jnp.full(1, 0.5),
    "probe:obs_is_action": lambda obs: jnp.ones(2),
}


@pytest.mark.parametrize("name", PROBES)
def test_best_and_random_play_return_what_the_probe_says(name):
    env, probe = make_env(name), PROBES[name]

    def play_randomly(key, step):
        space = env.spec.action
        if isinstance(space, Discrete):
            return jax.random.randint(key, (), 0, space.n)
        if isinstance(space, MultiDiscrete):
            return jax.random.randint(key, (len(space.ns),), 0, jnp.array(space.ns))
        return jax.random.uniform(key, space.shape, minval=space.low, maxval=space.high)

    best = lambda key, step: BEST.get(name, lambda obs: jnp.int32(0))(step.obs["vector"])
    mean = lambda policy: mean_return(env, jax.random.key(0), policy, 4000)
    noise = 0.05 if name == "probe:predict" else 1e-6  # its rewards are random signs
    assert mean(best) == pytest.approx(probe.optimal_return, abs=noise)
    assert mean(play_randomly) == pytest.approx(probe.random_return, abs=0.1)


def records_of(name, action, steps=4):
    return jax.tree.map(lambda x: np.asarray(x)[:, :64], rollout(make_env(name), jax.random.key(0), action, steps, 64))[
        0
    ]


def test_predict_rewards_the_observation_that_was_seen():
    records = records_of("probe:predict", lambda key, step: jnp.int32(0), 1)
    seen = records.obs["vector"][0, :, 0]
    np.testing.assert_array_equal(records.reward[1], seen)
    assert set(seen) == {-1.0, 1.0}


def test_discount_pays_at_the_second_step_only():
    records = records_of("probe:discount", lambda key, step: jnp.int32(0), 2)
    np.testing.assert_array_equal(records.reward[:, 0], [0, 0, 1])
    np.testing.assert_array_equal(records.is_terminal[:, 0], [0, 0, 1])
    np.testing.assert_array_equal(records.obs["vector"][:, 0, 0], [0, 0.5, 1])


def test_act_obs_pays_nothing_for_a_policy_that_does_not_look():
    records = records_of("probe:act_obs", lambda key, step: jnp.int32(1), 1)
    np.testing.assert_array_equal(records.reward[1], records.obs["vector"][0, :, 0])


def test_obs_is_action_shows_each_action_one_step_later():
    env = make_env("probe:obs_is_action")
    play = lambda key, step: jax.random.uniform(key, (2,), minval=-1)
    records, actions = rollout(env, jax.random.key(0), play, 8, 3)
    np.testing.assert_array_equal(records.obs["vector"][1:], actions)
    np.testing.assert_array_equal(records.reward[1:], actions[..., 0])
    assert not records.obs["vector"][0].any()
    assert records.is_last[8].all() and not records.is_terminal.any()
