"""A user's own environment is compared with its spec by shapes alone, before anything runs."""

import re
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmjax
from wmjax.envs.wrappers import agent_actions
from wmjax.ops.action_distributions import random_action
from wmjax.raw_env import Outcome
from wmjax.types import Box, Discrete, Env, EnvSpec, HostEnv, MultiDiscrete, TimeStep, UsageError

SPEC = EnvSpec({"vector": Box(-1, 1, (3,))}, Discrete(2), 10)
PICTURE = EnvSpec({"image": Box(0, 255, (16, 16, 3), "uint8")}, Discrete(2))


def own(spec=SPEC, *, state=lambda: jnp.int32(0), next_state=lambda s: s + 1, obs=lambda s: {"vector": jnp.zeros(3)},
        reward=lambda s: jnp.float32(1), last=lambda s: s >= 5, terminal=lambda s: s >= 5, first=False):  # fmt: skip
    """An `Env` that counts, some of which is another."""

    def record(state, is_first):
        flags = jnp.bool_(is_first), last(state), terminal(state)
        return TimeStep(obs(state), reward(state), *flags)

    def step(key, state, action):
        state = next_state(state)
        return state, record(state, first)

    return Env(spec, lambda key: (state(), record(state(), True)), step)


def raw(spec=SPEC, *, state=lambda: jnp.int32(0), next_state=lambda s: s + 1, obs=lambda s: {"vector": jnp.zeros(3)},
        reward=lambda s: jnp.float32(1), last=lambda s: s >= 5):  # fmt: skip
    """The same as rules."""
    step = lambda key, s, action: (next_state(s), Outcome(reward(s), last(s), last(s)))
    return wmjax.RawEnv(spec, lambda key: state(), step, obs)


def play(env, steps=8):
    """Rewards, flags and dtypes of some steps, in one scan, as loops have it."""
    env = wmjax.make_env(env)

    def step(carry, key):
        state, _ = carry
        after = env.step(key, state, random_action(env.spec.action, key))
        return after, after[1]

    _, steps = jax.jit(lambda key: jax.lax.scan(step, env.reset(key), jax.random.split(key, steps)))(jax.random.key(0))
    return steps


REFUSED = [
    # what it is, the field that the message names, what was found, what is valid
    ("reward (1,)", dict(reward=lambda s: jnp.ones(1)), "reward", r"\(1,\)", r"\(\)"),
    ("reward complex", dict(reward=lambda s: jnp.complex64(1)), "reward", "complex64", "float32"),
    ("flag (1,)", dict(last=lambda s: jnp.zeros(1, bool)), "is_last", r"\(1,\)", r"\(\)"),
    ("no dict", dict(obs=lambda s: jnp.zeros(3)), "obs", r"float32 \[3\]", "'vector'"),
    ("other name", dict(obs=lambda s: {"state": jnp.zeros(3)}), "obs", r"\['state'\]", r"\['vector'\]"),
    ("more names", dict(obs=lambda s: {"vector": jnp.zeros(3), "x": s}), "obs", "'x'", r"\['vector'\]"),
    ("other shape", dict(obs=lambda s: {"vector": jnp.zeros(4)}), r"obs\['vector'\]", r"\(4,\)", r"\(3,\)"),
    ("nested", dict(obs=lambda s: {"vector": [jnp.zeros(3)]}), r"obs\['vector'\]", "a list", r"float32 \[3\]"),
    ("raises", dict(reward=lambda s: {}["speed"]), "raised KeyError", "speed", "TimeStep"),
    ("shapes change", dict(next_state=lambda s: jnp.zeros(2)), "state", r"\(2,\)", r"\(\)"),
    ("structure", dict(next_state=lambda s: (s, s), last=lambda s: False, terminal=lambda s: False), "state",
     r"PyTreeDef\(\(\*, \*\)\)", "one structure"),
    ("text in it", dict(next_state=lambda s: "no array"), "raised TypeError", "no array|str", "step"),
]  # fmt: skip


@pytest.mark.parametrize("make", [own, raw], ids=["Env", "RawEnv"])
@pytest.mark.parametrize("what, changes, field, found, valid", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_not_as_the_spec_says_is_named(make, what, changes, field, found, valid):
    if make is raw:
        changes = {name: value for name, value in changes.items() if name != "terminal"}
    with pytest.raises(UsageError) as error:
        wmjax.make_env(make(**changes))
    text = str(error.value)
    assert "\n" not in text and text.startswith("env: ")
    for part in (field, found, valid if make is own or valid != "TimeStep" else "Outcome"):
        assert re.search(part, text), (part, text)
    if "raised" in field:
        assert error.value.__cause__ is not None


def test_a_picture_of_floats_under_a_spec_of_bytes_is_refused():
    for dtype in ("float32", "int32", "bool"):
        with pytest.raises(
            UsageError, match=rf"obs\['image'\] of its reset is {dtype}; its spec says uint8 .*0 to 255"
        ):
            wmjax.make_env(own(PICTURE, obs=lambda s, dtype=dtype: {"image": jnp.ones((16, 16, 3), dtype)}))


def test_a_picture_of_bytes_that_would_be_read_as_black_is_refused():
    spec = EnvSpec({"image": Box(0, 1, (16, 16, 1), "uint8")}, Discrete(2))
    with pytest.raises(
        UsageError, match=r"spec.obs\['image'\] is Box.*high=1.*not valid; pictures hold values up to 255"
    ):
        wmjax.make_env(own(spec, obs=lambda s: {"image": jnp.ones((16, 16, 1), jnp.uint8)}))


def test_a_step_that_is_terminal_is_the_last_one():  # where flags are those of Gymnasium, terminated and truncated
    step = lambda key, s, action: (s + 1, Outcome(1.0, False, s >= 2))
    steps = play(wmjax.RawEnv(SPEC, lambda key: jnp.int32(0), step, lambda s: {"vector": jnp.zeros(3)}))
    assert np.flatnonzero(steps.is_last).tolist() == np.flatnonzero(steps.is_terminal).tolist() == [2, 6]
    assert np.flatnonzero(steps.is_first).tolist() == [3, 7]


class Pair(NamedTuple):
    at: jax.Array
    key: jax.Array


@pytest.mark.parametrize("make", [own, raw], ids=["Env", "RawEnv"])
def test_harmless_dtypes_are_settled(make):
    flags = dict(last=lambda s: jnp.float32(s >= 5))
    steps = play(
        make(
            next_state=lambda s: s + 1.0,  # an int32 that becomes float32
            obs=lambda s: {"vector": np.arange(3)},
            reward=lambda s: 2,
            **flags | (dict(terminal=lambda s: jnp.int32(s >= 5)) if make is own else {}),
        )
    )
    assert steps.reward.dtype == jnp.float32 and steps.is_last.dtype == steps.is_terminal.dtype == jnp.bool_
    assert steps.obs["vector"].dtype == jnp.float32 and steps.obs["vector"][0].tolist() == [0, 1, 2]
    last = [4, 5, 6, 7] if make is own else [5]  # the other restarts; its `last` sees the state before
    assert np.flatnonzero(steps.is_last).tolist() == last and steps.reward[:4].tolist() == [2] * 4


def test_a_state_may_hold_keys_python_numbers_and_whatever_stays_alike():
    def next_state(state):
        return Pair(state.at + jax.random.uniform(state.key), jax.random.split(state.key)[0])

    env = own(
        state=lambda: Pair(0, jax.random.key(3)),
        next_state=next_state,
        last=lambda s: s.at > 9,
        terminal=lambda s: s.at > 9,
    )
    assert not play(env).is_last.any()


def test_an_environment_as_it_should_be_is_left_as_it_is():
    env = wmjax.make_env("probe:value")
    a, b = play(env), play(wmjax.make_env(env))
    jax.tree.map(np.testing.assert_array_equal, a, b)


SPECS = [
    (dict(obs=Box(-1, 1, (3,))), r"spec.obs is Box.*\{'vector': Box"),
    (dict(obs={}), r"spec.obs is \{\}"),
    (dict(obs={3: Box(-1, 1, (3,))}), "spec.obs has the name 3"),
    (dict(obs={"vector": gymnasium.spaces.Box(-1, 2, (3,))}),
     r"spec.obs\['vector'\] is gymnasium.*write wmjax.Box\(-1, 2, \(3,\), 'float32'\)"),
    (dict(action=gymnasium.spaces.Discrete(2)), r"spec.action is gymnasium.*write wmjax.Discrete\(2\)"),
    (dict(action=2), "spec.action is builtins.int.*Discrete"),
    (dict(max_episode_steps=-5), "max_episode_steps is -5.*at least 1"),
    (dict(max_episode_steps=0), "max_episode_steps is 0"),
    (dict(max_episode_steps=1.5), "max_episode_steps is 1.5"),
    (dict(max_episode_steps=True), "max_episode_steps is True"),
    (dict(action_repeat=0), "action_repeat is 0"),
    (dict(action_map=3), "action_map is 3"),
    (dict(survival="yes"), "survival is 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", SPECS)
def test_a_spec_that_is_none_is_refused_by_its_field(changes, message):
    for env in (own(SPEC._replace(**changes)), raw(SPEC._replace(**changes)), HostEnv(SPEC._replace(**changes), print)):
        with pytest.raises(UsageError, match=message):
            wmjax.make_env(env)
    with pytest.raises(UsageError, match="its spec is a dict"):
        wmjax.make_env(own({}))


@pytest.mark.parametrize("env", [Env(SPEC, 3, 4), wmjax.RawEnv(SPEC, print, print, None), HostEnv(SPEC, None)])
def test_what_should_be_a_function_is(env):
    with pytest.raises(UsageError, match="which is not valid; a function is"):
        wmjax.make_env(env)


@pytest.mark.parametrize(
    "reset, step, message",
    [
        (lambda: 0, None, r"its reset raised TypeError: .*; valid is reset\(key\) -> \(state, TimeStep"),
        (lambda key: jnp.zeros(3), None, "its reset returns a .*, not valid; reset"),
        (lambda key: (0, {"vector": jnp.zeros(3)}), None, "its reset returns a tuple of 2 with a dict"),
        (None, lambda state, action: state, r"its step raised TypeError: .*; valid is step\(key, state, action\)"),
        (None, lambda *args: (0, 0, 0, 0), "its step returns a tuple of 4, not valid"),
    ],
)
def test_functions_of_another_form_are_told_the_right_one(reset, step, message):
    env = own()
    env = env._replace(reset=reset or env.reset, step=step or env.step)
    with pytest.raises(UsageError, match=message):
        wmjax.make_env(env)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Box(1, -1, (2,)), "Box: low 1 is not valid; a number up to high, -1, is"),
        (lambda: Box((0.0, 2.0), (1.0, 1.0), (2,)), "Box: low"),
        (lambda: Box(float("nan"), 1, (2,)), "Box: low nan"),
        (lambda: Box(0, float("nan"), (2,)), "nan"),
        (lambda: Box((0.0,), 1.0, (2,)), "for the shape"),
        (lambda: Box("a", 1.0, (2,)), "Box: low 'a'"),
        (lambda: Box(0, 1, (0,)), "Box: shape is 0"),
        (lambda: Box(0, 1, (-3, 2)), "Box: shape is -3"),
        (lambda: Box(0, 1, 3), r"Box: shape is 3"),
        (lambda: Box(0, 1, np.array([2, 3])), r"Box: shape is array"),
        (lambda: Box(0, 1, []), r"Box: shape is \[\]"),
        (lambda: Box(0, 10**400, ()), "Box: low 0"),
        (lambda: Box(0, 1, (2,), "floaty"), "dtype 'floaty'"),
        (lambda: Discrete(0), "Discrete: n is 0"),
        (lambda: Discrete(-1), "Discrete: n is -1"),
        (lambda: Discrete(2.0), "Discrete: n is 2.0"),
        (lambda: Discrete(True), "Discrete: n is True"),
        (lambda: MultiDiscrete(()), r"MultiDiscrete: ns is \(\)"),
        (lambda: MultiDiscrete((2, 0)), "MultiDiscrete: ns is 0"),
    ],
)  # fmt: skip
def test_spaces_that_hold_nothing_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_train_refuses_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"reward of its reset has the shape \(1,\)"):
        wmjax.train("dreamer_v3", own(reward=lambda s: jnp.ones(1)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rules_restart_by_themselves_and_take_what_agents_emit():
    env = agent_actions(wmjax.make_env(raw()))
    state, first = env.reset(jax.random.key(0))
    assert bool(first.is_first) and env.spec == SPEC
    seen = []
    for _ in range(8):
        state, step = env.step(jax.random.key(1), state, jnp.array([1.0, 0.0]))
        seen.append((bool(step.is_first), bool(step.is_last)))
    assert seen[5:7] == [(False, True), (True, False)]
