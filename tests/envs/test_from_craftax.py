import jax
import numpy as np
import pytest

from tests.envs.rollouts import rollout
from wmjax.envs import env_names, from_craftax, make_env
from wmjax.types import Discrete, UsageError


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Classic-Pixels", "Classic-Symbolic"])
def test_a_game_of_craftax_is_seen_and_ends_by_death(task):
    pytest.importorskip("craftax", reason="needs the extra `craftax`")
    env = make_env(f"craftax:{task}")
    records, _ = rollout(env, jax.random.key(0), lambda key, step: jax.random.randint(key, (), 0, 17), 300, 4)
    records = jax.tree.map(np.asarray, records)
    for name, space in env.spec.obs.items():
        seen = records.obs[name]
        assert seen.shape[2:] == space.shape and seen.dtype == space.dtype
        assert seen.min() >= 0 and np.unique(seen).size > 5
    assert records.is_last.any()
    np.testing.assert_array_equal(records.is_last, records.is_terminal)  # no episode of these reaches the limit
    np.testing.assert_array_equal(records.is_first[1:], records.is_last[:-1])
    assert not records.reward[records.is_first].any() and records.reward.any()
    assert f"craftax:{task}" in {info.name for info in env_names()}


@pytest.mark.slow
def test_the_step_limit_of_craftax_is_no_terminal():
    pytest.importorskip("craftax", reason="needs the extra `craftax`")
    raw = from_craftax.make("Classic-Symbolic")
    state = raw.reset(jax.random.key(0))
    late = state.replace(timestep=state.timestep + raw.spec.max_episode_steps - 1)
    step = jax.jit(raw.step)
    outcome = step(jax.random.key(1), late, 0)[1]
    assert outcome.is_last and not outcome.is_terminal
    outcome = step(jax.random.key(1), state.replace(player_health=state.player_health * 0), 0)[1]
    assert outcome.is_last and outcome.is_terminal


def test_what_is_known_of_craftax_before_it_is_made():
    assert from_craftax.spec("Pixels", 32).obs["image"].shape == (32, 32, 3)
    assert from_craftax.spec("Symbolic").action == Discrete(43)
    with pytest.raises(UsageError, match="did you mean 'craftax:Classic-Pixels'"):
        make_env("craftax:classicpixels")
    with pytest.raises(UsageError, match=r"image_size: 64 .*vector"):
        make_env("craftax:Symbolic", image_size=64)


def test_without_craftax_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(from_craftax, "available", lambda: False)
    with pytest.raises(UsageError, match=r'pip install "wmjax\[craftax\]"'):
        make_env("craftax:Symbolic")
