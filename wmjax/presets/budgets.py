"""One table of how long each agent is trained in each environment, how that is shown and played, and what comes of it.

All rows that are of a run are laid over each other, in their order: a row says what it changes of those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType, MappingProxyType
from typing import Any, NamedTuple


class RunSettings(NamedTuple):
    """What a run needs to know besides its agent's configuration."""

    steps: int  # env steps (frames, as in `loops.schedule`) to train for
    image_size: int | None = None  # side in pixels; None: as registered
    action_repeat: int = 1  # frames per agent step
    env_args: Mapping[str, Any] = MappingProxyType({})  # of the environment


class Row(NamedTuple):
    """Settings of the runs that it names; `...` is what the rows before it say."""

    agent: str  # "*": all
    preset: str  # "*": all
    env: str  # a name; a suite, with its colon; "*": all
    steps: int | EllipsisType = ...
    image_size: int | EllipsisType | None = ...
    action_repeat: int | EllipsisType = ...
    env_args: Mapping[str, Any] | EllipsisType = ...  # the protocol; whole ones are in `docs/protocols.md`
    config: Mapping[str, Any] | EllipsisType = ...  # what the agent's configuration says of a budget: how many updates
    # and generations, and of how many episodes a candidate's fitness is the mean
    score: str = ""  # to be expected: a mean return, if it does not say what
    source: str = ""  # of the score


# The former over 100 episodes: of seeds 0, 1, ..., or the IQM of eight.
MEASURED, AUTHORS = "benchmarks/results", "scores of the authors"
# How agents' papers play Atari, where that differs from the suite by itself.
V1_ATARI = dict(
    sticky=0.25, life_loss=True, limit=108_000, all_actions=False, resize="bilinear", resize_first=False, gray=False
)
V3_ATARI = dict(min_noops=0, limit=108_000, life_loss=False, resize="bilinear", resize_first=False)

# fmt: off
BUDGETS = (
    # The usual budget of a suite.
    Row("*", "*", "*", 1_000_000, None, 1, {}),
    Row("*", "*", "atari:", 400_000),
    Row("*", "*", "atari200m:", 200_000_000),
    Row("*", "*", "dmc_proprio:", 500_000),
    Row("*", "*", "vizdoom:", 10_000_000, action_repeat=4),
    # As an agent's paper shows and plays a suite; for all its presets, which differ in their sizes.
    Row("dreamer_v1", "*", "atari:", env_args=V1_ATARI),
    Row("dreamer_v1", "*", "atari200m:", image_size=64, env_args=V1_ATARI),
    Row("dreamer_v2", "*", "atari200m:", image_size=64, env_args=dict(all_actions=False)),
    Row("dreamer_v3", "*", "atari:", env_args=V3_ATARI),
    Row("dreamer_v3", "*", "atari200m:", env_args=V3_ATARI | dict(gray_last=True)),

    # `small`, the default: by suite, with as many frames as an action is usually taken for there, and what was tried.
    Row("*", "small", "*", 100_000, None, 1),
    Row("*", "small", "atari:", 400_000),
    Row("*", "small", "atari200m:", 400_000),
    Row("*", "small", "crafter:", 1_000_000),
    Row("*", "small", "dmc:", 500_000, action_repeat=2),
    Row("*", "small", "dmc_proprio:", 500_000, action_repeat=2),
    Row("*", "small", "vizdoom:", 400_000, action_repeat=4),
    Row("dreamer_v1", "small", "catch", 40_000, score="1.00, 0.98, 1.00", source=MEASURED),
    Row("dreamer_v1", "small", "pendulum", 200_000, 32, 2, score="-158 [-164, -153]", source=MEASURED),
    Row("dreamer_v2", "small", "catch", 64_000, score="1.00, 1.00, 1.00", source=MEASURED),
    Row("dreamer_v2", "small", "pendulum", 260_000, 32, 2, score="-200, -194, -242", source=MEASURED),
    Row("dreamer_v3", "small", "catch", 32_000, score="1.00 [1.00, 1.00]", source=MEASURED),
    Row("dreamer_v3", "small", "pendulum", 200_000, 32, 2, score="-165, -157, -169", source=MEASURED),
    Row("dreamer_v3", "small", "gymnax:CartPole-v1", 90_000, action_repeat=2, score="500", source=MEASURED),
    Row("dreamer_v3", "small", "gym:CartPole-v1", 90_000, action_repeat=2),
    Row("dreamer_v3", "small", "gymnax:Breakout-MinAtar", 80_000, 40, score="6.4", source=MEASURED),
    Row("world_models", "small", "racing", 65_536, 64, 4, score="929", source=MEASURED),
    Row("world_models", "small", "racing:flicker", 65_536, 64, 4),
    Row("world_models", "small", "gym:CarRacing-v3", 65_536, 64, 4),
    Row("world_models", "small", "catch", 16_384, config=dict(
        vision_updates=1_500, evolve=dict(rollouts=16, generations=100),
    ), score="1.00, 1.00, 1.00", source=MEASURED),
    Row("world_models", "small", "recall", 16_384, config=dict(
        vision_updates=300, memory_updates=1_000, evolve=dict(generations=20),
    )),
    Row("iris", "small", "catch", 51_200, score="1.00, 1.00, 1.00", source=MEASURED),

    # Presets with a budget of their own, wherever they are tried. Of World Models: frames to collect, and the size of
    # picture that each is made for.
    Row("dreamer_v1", "paper", "*", 5_000_000, action_repeat=2),
    Row("dreamer_v1", "paper_discrete", "*", 2_000_000, action_repeat=1),
    Row("dreamer_v2", "paper", "*", 200_000_000, action_repeat=1),
    Row("dreamer_v2", "paper_atari", "*", 200_000_000, action_repeat=1),
    Row("dreamer_v2", "paper_dmc", "*", 2_000_000, action_repeat=2),
    Row("dreamer_v3", "paper_atari100k", "*", 400_000, action_repeat=1),
    Row("dreamer_v3", "paper_crafter", "*", 1_000_000, action_repeat=1),
    Row("dreamer_v3", "paper_dmc_proprio", "*", 500_000, action_repeat=1),
    Row("dreamer_v3", "paper_dmc_vision", "*", 1_000_000, action_repeat=1),
    Row("world_models", "paper_car", "*", 10_000_000, 64, 1),
    Row("world_models", "paper_doom", "*", 3_080_000, 64, 1),
    Row("world_models", "guide", "*", 1_000_000, 96, 1),

    # What the papers report, or the curves that their authors have published.
    Row("dreamer_v1", "paper", "dmc:", score="806, mean of 20 tasks", source=AUTHORS),
    Row("dreamer_v2", "paper", "atari200m:", score="2.14 of a human's, median of the games", source=AUTHORS),
    Row("dreamer_v3", "paper", "atari200m:", score="8.29 of a human's, median of the games", source=AUTHORS),
    Row("dreamer_v3", "paper_atari100k", "atari:", score="1.25 of a human's, mean of 26 games", source=AUTHORS),
    Row("dreamer_v3", "paper_dmc_proprio", "dmc_proprio:", score="758, mean of the tasks", source=AUTHORS),
    Row("dreamer_v3", "paper_dmc_vision", "dmc:", score="787, mean of the tasks", source=AUTHORS),
    Row("world_models", "paper_car", "gym:CarRacing-v3", score="906, of CarRacing-v0", source="table 1 of the paper"),
    Row("world_models", "paper_doom", "vizdoom:TakeCover", env_args=dict(actions="axis"), score="1092",
        source="table 2 of the paper"),
    Row("iris", "paper", "atari:", score="1.046 of a human's, mean of 26 games", source="table 1 of the paper"),
)
# fmt: on


def run_settings(agent: str, preset: str, env: str | None) -> RunSettings:
    """What the table says of a run; `env` None is an environment without a name."""
    found: dict[str, Any] = {}
    for row in _rows(agent, preset, env):
        found |= {name: value for name in RunSettings._fields if (value := getattr(row, name)) is not ...}
    return RunSettings(**found)


def config_fields(agent: str, preset: str, env: str | None) -> list[Mapping[str, Any]]:
    """What the table says of the agent's configuration, to be laid over its preset one after the other."""
    return [row.config for row in _rows(agent, preset, env) if row.config is not ...]


def _rows(agent: str, preset: str, env: str | None) -> list[Row]:
    names = {"*", env, f"{env.partition(':')[0]}:"} if env is not None else {"*"}
    return [row for row in BUDGETS if row.agent in ("*", agent) and row.preset in ("*", preset) and row.env in names]
