"""What holds for every environment, and the errors of `make_env`."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax.envs import env_names, is_host, make_env
from wmjax.types import Box, MultiDiscrete, UsageError

# One environment fetches its data from the network when it is made.
NAMES = [info.name for info in env_names() if "MNIST" not in info.name and not is_host(info.name)]
BUILTIN = [name for name in NAMES if not name.startswith(("gymnax:", "craftax:"))]
SLOW = ("racing", "racing:flicker")  # to compile
RUN = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in BUILTIN]
RUN = [*RUN, *(name for name in NAMES if name in ("gymnax:CartPole-v1", "gymnax:Breakout-MinAtar"))]


def zero_action(space):
    if isinstance(space, MultiDiscrete):
        return jnp.zeros(len(space.ns), jnp.int32)
    return jnp.zeros(space.shape, space.dtype) if isinstance(space, Box) else jnp.int32(0)


def random_action(space):
    if isinstance(space, Box):
        low, high = jnp.array(space.low), jnp.array(space.high)
        return lambda key, step: jax.random.uniform(key, space.shape, minval=low, maxval=high)
    if isinstance(space, MultiDiscrete):
        return lambda key, step: jax.random.randint(key, (len(space.ns),), 0, jnp.array(space.ns))
    return lambda key, step: jax.random.randint(key, (), 0, space.n)


@functools.cache
def stream(name):
    """A jitted function from a key to the records of 8 streams under random actions, a few steps beyond one episode."""
    env = make_env(name)
    steps = min(40, env.spec.max_episode_steps + 3)
    return jax.jit(lambda key: rollout(env, key, random_action(env.spec.action), steps, 8)[0])


@pytest.mark.parametrize("name", NAMES)
def test_records_have_the_shapes_and_dtypes_of_the_spec_and_a_step_keeps_the_types(name):
    env = make_env(name)
    key = jax.random.key(0)
    state, first = jax.eval_shape(env.reset, key)
    again, step = jax.eval_shape(env.step, key, state, zero_action(env.spec.action))
    # Equal weak types too: a carry that changes them is traced twice.
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert types(state) == types(again) and types(first) == types(step)
    assert {k: (v.shape, v.dtype) for k, v in step.obs.items()} == {
        k: (box.shape, jnp.dtype(box.dtype)) for k, box in env.spec.obs.items()
    }
    assert (step.reward.shape, step.reward.dtype) == ((), jnp.float32)
    assert all((flag.shape, flag.dtype) == ((), jnp.bool_) for flag in step[2:])


@pytest.mark.parametrize("name", RUN)
def test_streams_keep_the_rules_of_records(name):
    records = stream(name)(jax.random.key(0))
    first, last, terminal = (np.asarray(x) for x in records[2:])
    assert first[0].all()
    np.testing.assert_array_equal(first[1:], last[:-1])
    assert not (first & last).any() and not (terminal & ~last).any()
    assert not np.asarray(records.reward)[first].any()
    for key, box in make_env(name).spec.obs.items():
        obs = np.asarray(records.obs[key])
        assert np.isfinite(obs).all() and (obs >= np.array(box.low)).all() and (obs <= np.array(box.high)).all()


@pytest.mark.parametrize("name", RUN)
def test_same_key_same_stream_and_another_key_another(name):
    one, again, other = (stream(name)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    if name not in ("probe:value", "probe:discount"):  # nothing random in these
        assert any(
            (np.asarray(a) != np.asarray(b)).any()
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        )


@pytest.mark.parametrize(
    "name, args, share",
    [
        ("catch", {"flicker": 0.5}, 0.5),
        ("pendulum", {"flicker": 0}, 0),
        pytest.param("racing:flicker", {}, 0.8, marks=pytest.mark.slow),
    ],
)
def test_pictures_are_hidden_as_the_argument_or_the_name_says(name, args, share):
    env = make_env(name, image_size=16, env_args=args)
    policy = lambda key, step: zero_action(env.spec.action)
    records, _ = rollout(env, jax.random.key(0), policy, 16, 16)
    black = ~records.obs["image"].any((-3, -2, -1))
    assert abs(black[~records.is_first].mean() - share) < 0.1 and not black[records.is_first].any()


@pytest.mark.parametrize("name", ["catch", "pendulum", "probe:obs_is_action"])
def test_a_batched_step_is_traced_once(name):
    env = make_env(name)
    step = jax.jit(jax.vmap(env.step))
    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 3))
    action = jnp.stack([zero_action(env.spec.action)] * 3)
    for seed in range(3):
        state, _ = step(jax.random.split(jax.random.key(seed), 3), state, action)
    assert step._cache_size() == 1


def test_list_describes_observation_and_action():
    infos = {info.name: info for info in env_names()}
    assert infos["catch"][1:3] == ("image uint8 [64, 64, 3]", "Discrete(3)")
    assert infos["pendulum"][1:3] == ("image uint8 [64, 64, 3]", "Box(-2, 2, [1])")
    assert infos["probe:act"][1:3] == ("vector float32 [1]", "Discrete(2)")
    assert all(info.description for info in infos.values())


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("catchh", "'catch'"),
        ("Pendulum", "'pendulum'"),
        ("probe:vale", "'probe:value'"),
        ("act_obs", "'probe:act_obs'"),
    ],
)
def test_unknown_name_gets_the_nearest_one_in_one_line(name, nearest):
    with pytest.raises(UsageError) as error:
        make_env(name)
    message = str(error.value)
    assert f"env: unknown name {name!r}; did you mean {nearest}?" in message and "\n" not in message


def test_a_name_like_no_other_gets_the_valid_ones():
    with pytest.raises(UsageError, match=r"env: unknown name 'xyzzy'; valid are catch, pendulum, .*gymnax:NAME"):
        make_env("xyzzy")


@pytest.mark.parametrize("size", [7, 0, -64, 64.0, True, "64"])
def test_image_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match=r"image_size: .* an integer in \[8, 4096\]"):
        make_env("pendulum", image_size=size)


def test_image_size_of_a_probe_is_refused():
    with pytest.raises(UsageError, match="image_size: 64 is not valid for probe:act, which observes a vector"):
        make_env("probe:act", image_size=64)


def test_action_repeat_of_zero_is_refused():
    with pytest.raises(UsageError, match="action_repeat: 0"):
        make_env("catch", action_repeat=0)


def test_missing_extra_is_named(monkeypatch):
    imported = importlib.import_module

    def refuse(name):
        if name.partition(".")[0] == "gymnax":
            raise ImportError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(UsageError, match=r'pip install "wmjax\[gymnax\]"'):
        make_env("gymnax:CartPole-v1")
    assert all(not info.name.startswith("gymnax:") for info in env_names())
