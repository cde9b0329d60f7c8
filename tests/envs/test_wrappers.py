"""Restarting, time limits, action repeat and agents' actions, on an environment that can be counted in the head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax.envs import wrappers
from wmjax.types import Box, Discrete, EnvSpec, MultiDiscrete, UsageError


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
        return state, wrappers.Outcome(jnp.float32(action), end, end)

    spec = EnvSpec({"vector": Box(0, 1000, (1,))}, Discrete(10), max_episode_steps=length)
    return wrappers.RawEnv(spec, reset, step, lambda state: {"vector": state.now[None].astype(jnp.float32)})


def run(raw, actions, seed=0):
    """Records of one stream under the given actions, as numpy."""
    env = wrappers.auto_reset(raw)
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
    raw = wrappers.time_limit(counter(), 3)
    records = run(raw, [1] * 8)
    np.testing.assert_array_equal(records.is_last, [0, 0, 0, 1, 0, 0, 0, 1, 0])
    assert not records.is_terminal.any()
    assert raw.spec.max_episode_steps == 3


def test_end_at_the_time_limit_is_still_terminal():
    records = run(wrappers.time_limit(counter(3), 3), [1] * 3)
    assert records.is_last[3] and records.is_terminal[3]


def test_action_repeat_sums_rewards_and_stops_where_the_episode_ends():
    raw = wrappers.action_repeat(counter(5), 2)
    records = run(raw, [1, 2, 3, 4, 5])
    count = records.obs["vector"][:, 0]
    np.testing.assert_array_equal(count[:4] - count[0], [0, 2, 4, 5])
    np.testing.assert_array_equal(records.reward, [0, 2, 4, 3, 0, 10])
    np.testing.assert_array_equal(records.is_terminal, [0, 0, 0, 1, 0, 0])
    assert raw.spec.max_episode_steps == 3 and raw.spec.action_repeat == 2


def test_time_limit_counts_frames_under_action_repeat():
    records = run(wrappers.action_repeat(wrappers.time_limit(counter(), 5), 3), [1, 1])
    np.testing.assert_array_equal(records.reward, [0, 3, 2])
    assert records.is_last[2] and not records.is_terminal[2]


def test_action_repeats_multiply():
    spec = wrappers.action_repeat(wrappers.action_repeat(counter(13), 2), 3).spec
    assert spec.action_repeat == 6 and spec.max_episode_steps == 3


@pytest.mark.parametrize("repeats", [0, -1, 1.5, True, "2"])
def test_action_repeat_refuses_what_is_not_a_count(repeats):
    with pytest.raises(UsageError, match=r"action_repeat: .* an integer in \[1, 1000\]"):
        wrappers.action_repeat(counter(3), repeats)


def native(space, action, action_map=None):
    """What the environment receives where the agent emits `action`."""
    spec = EnvSpec({"vector": Box(0, 1, (1,))}, space, action_map=action_map)
    echo = wrappers.Env(spec, lambda key: None, lambda key, state, action: action)
    wrapped = wrappers.agent_actions(echo)
    assert wrapped.spec == spec
    return wrapped.step(None, None, jnp.asarray(action, jnp.float32))


def test_one_hot_becomes_its_index():
    action = native(Discrete(3), [0, 0, 1])
    assert action == 2 and action.dtype == jnp.int32 and action.shape == ()


def test_concatenated_one_hots_become_indices():
    action = native(MultiDiscrete((2, 3, 2)), [0, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(action, [1, 2, 0])
    assert action.dtype == jnp.int32


@pytest.mark.parametrize("emitted, expected", [(-1, -2), (0, 0), (0.5, 1), (1, 2), (2.0, 2), (-7, -2)])
def test_box_action_is_clipped_and_rescaled(emitted, expected):
    assert native(Box(-2, 2, (1,)), [emitted]) == pytest.approx([expected])


def test_box_bounds_may_differ_per_entry():
    np.testing.assert_allclose(native(Box((0.0, -4.0), (1.0, 8.0), (2,)), [0.0, 0.5]), [0.5, 5.0])


def test_box_action_never_leaves_its_bounds_by_rounding():
    low, high = np.float32(-0.1), np.float32(0.3)
    action = native(Box(float(low), float(high), (1001,)), np.linspace(-1, 1, 1001))
    assert action.min() == low and action.max() == high


def test_action_map_replaces_rescaling_and_sees_clipped_actions():
    space = Box((-1.0, 0.0), (1.0, 1.0), (2,))
    brake = native(space, [2.0, -3.0], lambda a: jnp.stack([a[0], jnp.maximum(a[1], 0)]))
    np.testing.assert_array_equal(brake, [1.0, 0.0])


@pytest.mark.parametrize(
    "space", [Box(-np.inf, np.inf, (1,)), Box(0, np.finfo(np.float32).max.item(), (1,)), Box(0, 9, (1,), "int32"), "?"]
)
def test_unsupported_action_space_is_refused(space):
    with pytest.raises(UsageError, match="action space"):
        native(space, [0.0])


def test_wrappers_vmap_and_scan():
    env = wrappers.auto_reset(wrappers.action_repeat(wrappers.time_limit(counter(), 6), 2))
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jnp.int32(1), 8, 3)
    np.testing.assert_array_equal(records.is_last[:, 1], [0, 0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(records.reward[:, 2], [0, 2, 2, 2, 0, 2, 2, 2, 0])
    assert len(np.unique(records.obs["vector"][0])) > 1  # rows have keys of their own
