"""Named configurations, and how long to train on each environment.

`small` learns on a laptop's CPU in minutes; it is the same for every environment except what `RUNS` holds. `guide` has
the sizes of the implementation guide. `paper` is the authors' own.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from wmjax.agents import AGENTS
from wmjax.types import UsageError

DEFAULT_PRESET = "small"


class RunSettings(NamedTuple):
    """What a run needs to know besides its agent's configuration."""

    steps: int  # env steps (frames) to train for
    image_size: int | None = None  # side in pixels; None: as registered
    action_repeat: int = 1  # frames per agent step


PRESET_NOTES = {
    "small": "learns on a laptop's CPU in minutes; the default",
    "guide": "the sizes of the implementation guide",
    "paper": "the authors' hyperparameters",
}

# Overrides of the paper's defaults, by agent and preset.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dreamer_v3": {
        "small": dict(
            # Sizes.
            size="small",
            bins=41,
            stem="patch",
            length=16,
            horizon=10,
            imagine_last=8,
            replay_capacity=100_000,
            # Learning rate, warm-up, train ratio, entropy and reconstruction scales.
            learning_rate=1e-3,
            warmup=100,
            train_ratio=16.0,
            entropy_scale=1e-2,
        ),
        # "Paper 4" of the guide: dense layers 512, 512, 1024 with LayerNorm and ReLU, the recurrent state of the papers
        # before it (200, 32 x 32 latents), symlog predictions, batches of 50 x 50, 15 imagined steps.
        "guide": dict(
            size="guide",
            stem="flat",
            encoder_units=(512, 512, 1024),
            cell="gru",
            norm="layer",
            activation="relu",
            prior_layers=1,
            reward_head="symlog_mse",
            batch_size=50,
            length=50,
            num_envs=1,
            train_ratio=2500.0,
            replay_capacity=1_000_000,
            learning_rate=6e-4,
        ),
        "paper": dict(),
    },
    "iris": {
        "small": dict(
            # Sizes. An MLP on patches of 16 pixels instead of VQGAN.
            patch=16,
            multipliers=(),
            res_blocks=1,
            channels=256,
            latents=32,
            embed_dim=32,
            vocab_size=128,
            layers=2,
            heads=2,
            width=64,
            dropout=0.0,
            max_blocks=8,
            world_model_length=8,
            policy_channels=(32,),
            lstm_units=64,
            burn_in=2,
            horizon=6,
            replay_capacity=50_000,
            # A small ball is lost in a mean of absolute errors.
            recon_loss="delta_iris",
            recon_scale=10.0,
            perceptual="none",
            codebook_reset=0.001,
            codebook_decay=0.98,
            # Rates.
            tokenizer_rate=2e-3,
            world_model_rate=1e-3,
            actor_critic_rate=1e-3,
            entropy_scale=1e-2,
            discount=0.97,
            # Schedule.
            num_envs=16,
            collect=8,
            tokenizer_batch=32,
            world_model_batch=16,
            actor_critic_batch=32,
            tokenizer_updates=20,
            world_model_updates=10,
            actor_critic_updates=10,
            tokenizer_after=5,
            world_model_after=65,
            actor_critic_after=100,
        ),
        # "Paper 5" of the guide: a codebook of 512 x 64, six layers of width 512 with eight heads, reward tokens, 15
        # imagined steps. `norm="post"`, `activation="relu"` and `ff=2048` give its transformer layers to the letter.
        "guide": dict(
            vocab_size=512,
            embed_dim=64,
            width=512,
            heads=8,
            layers=6,
            reward_tokens=True,
            horizon=15,
        ),
        "paper": dict(collect_epochs=500, final_epochs=100),
    },
}

# Steps (frames), image size and action repeat of `small`. Seen with seed 0 on two CPU cores: catch 0.98 after 24,000
# steps (about 5 minutes), pendulum -185, CartPole 500 in periodic evaluations at 20,000 and 30,000 steps.
RUNS: dict[str, RunSettings] = {
    "catch": RunSettings(28_000),
    "pendulum": RunSettings(200_000, image_size=32, action_repeat=2),
    "gymnax:CartPole-v1": RunSettings(30_000),
    "gymnax:Breakout-MinAtar": RunSettings(80_000, image_size=40),
}
DEFAULT_RUN = RunSettings(100_000)
# Steps of the other presets: the paper's budget of its small benchmarks, 400 thousand frames and more.
PAPER_STEPS = 1_000_000


def nearest(kind: str, name: str, valid: Iterable[str]) -> UsageError:
    """The error for an unknown name: one line with the nearest valid name, and all of them where they are few."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, 1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else ""
    if len(valid) < 12 or not near:
        hint += f" valid are {', '.join(valid)}"
    return UsageError(f"{kind}: unknown name {name!r}; {hint.strip()}")


def preset_names(agent: str) -> list[str]:
    """Names of an agent's presets. Raises `UsageError` for an unknown agent."""
    _config_class(agent)
    return list(PRESETS[agent])


def resolve(
    agent: str, preset: str = DEFAULT_PRESET, env: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Any, RunSettings]:
    """The configuration of an agent, and the settings of a run.

    Args:
      agent: a name in `AGENTS`.
      preset: a name in `PRESETS[agent]`.
      env: an environment's name; None for one that has none. `RUNS` may know it; it is not checked here.
      overrides: fields of the agent's configuration.

    Returns:
      The validated frozen configuration, and the run settings.

    Raises:
      UsageError: unknown agent, preset or field, with the nearest valid name; a value of a wrong type or range.
    """
    config_class = _config_class(agent)
    if preset not in PRESETS[agent]:
        raise nearest("preset", preset, PRESETS[agent])
    overrides = check_fields(config_class, overrides or {})
    config = config_class(**PRESETS[agent][preset] | overrides)
    config.validate()
    if preset == "small":
        return config, RUNS.get(env, DEFAULT_RUN)
    return config, RunSettings(PAPER_STEPS)


def _config_class(agent: str) -> type:
    if agent not in AGENTS:
        raise nearest("agent", agent, AGENTS)
    return AGENTS[agent][0]


def check_fields(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values whose names and types are those of the fields; ints become floats where the field is one, lists tuples.

    Raises `UsageError` naming the field.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in names:
            raise nearest("field", name, names)
    return {name: _check_type(name, value, hints[name]) for name, value in values.items()}


def _check_type(name: str, value: Any, hint: Any) -> Any:
    choices = hint.__args__ if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for choice in choices:
        if choice is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(choice) is Literal:
            if value in choice.__args__:
                return value
        elif typing.get_origin(choice) is tuple:
            inner = choice.__args__[0]
            if isinstance(value, (tuple, list)) and all(type(item) is inner for item in value):
                return tuple(value)
        elif type(value) is choice:
            return value
    raise UsageError(f"{name}: {value!r} is not valid; {_describe(choices)} is")


def _describe(choices: Iterable[Any]) -> str:
    def one(choice: Any) -> str:
        if typing.get_origin(choice) is Literal:
            return "one of " + ", ".join(map(str, choice.__args__))
        if typing.get_origin(choice) is tuple:
            return f"a tuple of {choice.__args__[0].__name__}"
        return {type(None): "None", int: "an integer", float: "a number", bool: "true or false"}.get(
            choice, str(choice)
        )

    return " or ".join(one(choice) for choice in choices)
