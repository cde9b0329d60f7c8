"""Restarting, time limits, action repeat and agents' actions, on an environment that can be counted in the head."""

import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.envs import wrappers
from wmjax.types import Box, Discrete, EnvSpec, MultiDiscrete, UsageError


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
