"""Restarting, time limits, action repeat and agents' actions, on an environment that can be counted in the head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax import raw_env
from wmjax.types import Box, Discrete, EnvSpec, UsageError


class Count(NamedTuple):
    start: jax.Array
    now: jax.Array


def counter(length=None):
    """Counts steps from a random start in [0, 100); the reward is the action; ends by itself at `length` steps."""

    def reset(key):
        start = jax.random.randint(key, (), 0, 100)
        return Count(start, start)

    def step(key, state, action):
        state = state._replace(now=state.now + 1)
        end = jnp.bool_(False) if length is None else state.now - state.start >= length
        return state, raw_env.Outcome(jnp.float32(action), end, end)

    spec = EnvSpec({"vector": Box(0, 1000, (1,))}, Discrete(10), max_episode_steps=length)
    return raw_env.RawEnv(spec, reset, step, lambda state: {"vector": state.now[None].astype(jnp.float32)})


def run(raw, actions, seed=0):
    """Records of one stream under the given actions, as numpy."""
    env = raw_env.auto_reset(raw)
    state, step = env.reset(jax.random.key(seed))
    steps, act = [step], jax.jit(env.step)
    for i, action in enumerate(actions):
        state, step = act(jax.random.key(100 + i), state, jnp.int32(action))
        steps.append(step)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


def test_last_observation_is_kept_and_the_next_record_is_first():
    records = run(counter(3), [1, 2, 3, 4, 5, 6])
    count = records.obs["vector"][:, 0]
    np.testing.assert_array_equal(count[:4] - count[0], [0, 1, 2, 3])
    np.testing.assert_array_equal(count[4:] - count[4], [0, 1, 2])
    assert count[4] != count[0]  # another episode, not the same one again
    np.testing.assert_array_equal(records.is_first, [1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(records.is_last, [0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(records.is_terminal, [0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(records.reward, [0, 1, 2, 3, 0, 5, 6])


def test_action_after_the_last_record_is_ignored():
    one, other = run(counter(3), [1, 2, 3, 4, 5]), run(counter(3), [1, 2, 3, 9, 5])
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_time_limit_is_last_but_not_terminal():
    raw = raw_env.time_limit(counter(), 3)
    records = run(raw, [1] * 8)
    np.testing.assert_array_equal(records.is_last, [0, 0, 0, 1, 0, 0, 0, 1, 0])
    assert not records.is_terminal.any()
    assert raw.spec.max_episode_steps == 3


def test_end_at_the_time_limit_is_still_terminal():
    records = run(raw_env.time_limit(counter(3), 3), [1] * 3)
    assert records.is_last[3] and records.is_terminal[3]


def test_action_repeat_sums_rewards_and_stops_where_the_episode_ends():
    raw = raw_env.action_repeat(counter(5), 2)
    records = run(raw, [1, 2, 3, 4, 5])
    count = records.obs["vector"][:, 0]
    np.testing.assert_array_equal(count[:4] - count[0], [0, 2, 4, 5])
    np.testing.assert_array_equal(records.reward, [0, 2, 4, 3, 0, 10])
    np.testing.assert_array_equal(records.is_terminal, [0, 0, 0, 1, 0, 0])
    assert raw.spec.max_episode_steps == 3 and raw.spec.action_repeat == 2


def test_time_limit_counts_frames_under_action_repeat():
    records = run(raw_env.action_repeat(raw_env.time_limit(counter(), 5), 3), [1, 1])
    np.testing.assert_array_equal(records.reward, [0, 3, 2])
    assert records.is_last[2] and not records.is_terminal[2]


def test_action_repeats_multiply():
    spec = raw_env.action_repeat(raw_env.action_repeat(counter(13), 2), 3).spec
    assert spec.action_repeat == 6 and spec.max_episode_steps == 3


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, "2"])
def test_action_repeat_refuses_what_is_not_a_count(repeats):
    with pytest.raises(UsageError, match=r"action_repeat: .* an integer in \[1, 1000\]"):
        raw_env.action_repeat(counter(3), repeats)


@pytest.mark.slow
def test_flicker_hides_its_share_of_what_is_seen_but_no_first_record():
    play = lambda raw: rollout(raw_env.auto_reset(raw), jax.random.key(0), lambda key, step: jnp.int32(1), 40, 50)[0]
    seen, flickering = play(counter(4)), play(raw_env.flicker(counter(4), 0.75))
    assert not play(raw_env.flicker(counter(4), 1)).obs["vector"][~seen.is_first].any()
    hidden = (flickering.obs["vector"] == 0)[..., 0] & (seen.obs["vector"] != 0)[..., 0]
    assert not hidden[seen.is_first].any()
    assert 0.7 < hidden[~seen.is_first].mean() < 0.8  # 1,600 draws of 0.75 deviate by 0.01
    assert (hidden[:, 0] != hidden[:, 1]).any()  # each environment by draws of its own
    shown = seen._replace(obs={"vector": jnp.where(hidden[..., None], 0, seen.obs["vector"])})
    jax.tree.map(np.testing.assert_array_equal, shown, flickering)


def test_wrappers_vmap_and_scan():
    env = raw_env.auto_reset(raw_env.action_repeat(raw_env.time_limit(counter(), 6), 2))
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(1), 8, 3)
    np.testing.assert_array_equal(records.is_last[:, 1], [0, 0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(records.reward[:, 2], [0, 2, 2, 2, 0, 2, 2, 2, 0])
    assert len(np.unique(records.obs["vector"][0])) > 1  # rows have keys of their own
