"""Names of other projects, and near ones, are answered with the name that is meant."""

import gymnasium
import pytest

from wmjax.envs import make_env
from wmjax.types import UsageError

MEANT = [
    ("gym:ALE/Pong-v5", "atari:Pong"),
    ("ALE/Pong-v5", "atari:Pong"),
    ("gymnasium:ALE/MsPacman-v5", "atari:MsPacman"),
    ("PongNoFrameskip-v4", "atari:Pong"),
    ("gym:BreakoutDeterministic-v4", "atari:Breakout"),
    ("Pong-ram-v0", "atari:Pong"),
    ("Pong", "atari:Pong"),
    ("pong", "atari:Pong"),
    ("atari_ms_pacman", "atari:MsPacman"),
    ("atari100k_pong", "atari:Pong"),
    ("CartPole-v1", "gym:CartPole-v1"),
    ("cartpole-v1", "gym:CartPole-v1"),
    ("CartPole", "gym:CartPole-v1"),
    ("gymnasium:CartPole-v1", "gym:CartPole-v1"),
    ("gymnasium/CartPole-v1", "gym:CartPole-v1"),
    ("gym/FrozenLake-v1", "gym:FrozenLake-v1"),
    ("gym:cartpole-v1", "gym:CartPole-v1"),
    ("gym:CarRacing-v2", "gym:CarRacing-v3"),
    ("Walk-v0", "gym:Walk-v0"),
    ("my_pkg/Walk-v3", "gym:my_pkg/Walk-v3"),
    ("my_module:Walk", "gym:my_module:Walk"),
    ("walk.py:Walk", "gym:walk.py:Walk"),
    ("dmc_walker_walk", "dmc:walker_walk"),
    ("dm_control/walker-walk-v0", "dmc:walker_walk"),
    ("walker_walk", "dmc:walker_walk"),
    ("ball_in_cup_catch", "dmc:ball_in_cup_catch"),
    ("gym:dm_control/cheetah-run-v0", "dmc:cheetah_run"),
    ("MinAtar/Breakout-v1", "gymnax:Breakout-MinAtar"),
    ("minatar:space_invaders", "gymnax:SpaceInvaders-MinAtar"),
    ("Breakout-MinAtar", "gymnax:Breakout-MinAtar"),
    ("crafter_reward", "crafter"),
    ("Crafter", "crafter"),
    ("CrafterReward-v1", "crafter"),
    ("crafter_noreward", "crafter:noreward"),
    ("VizdoomTakeCover-v0", "vizdoom:TakeCover"),
    ("gym:VizdoomBasic-v0", "vizdoom:Basic"),
    ("Catch", "catch"),
    ("probe_act_obs", "probe:act_obs"),
    ("racin", "racing"),
]  # fmt: skip


@pytest.mark.parametrize("name, meant", MEANT, ids=[row[0] for row in MEANT])
def test_what_is_meant_is_named(name, meant, monkeypatch):
    if meant.startswith(("atari", "vizdoom")):  # another test may have had them registered
        monkeypatch.delitem(gymnasium.registry, name.removeprefix("gym:"), raising=False)
    with pytest.raises(UsageError, match=f"env: unknown name {name!r}; did you mean {meant!r}") as error:
        make_env(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["crafter:reward", "dmc:walker-walk", "atari:pong"])
def test_a_task_of_a_suite_is_answered_by_the_suite(name):
    with pytest.raises(UsageError, match=r"crafter|dmc:walker_walk|dm_control|atari:Pong|ale-py"):
        make_env(name)
