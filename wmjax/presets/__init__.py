"""Named configurations, and how long to train on each environment.

`small` learns on a laptop's CPU in minutes; it is the same for every environment except what `RUNS` holds. `guide` has
the sizes of the implementation guide. `paper` is the authors' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from wmjax.agents import AGENTS
from wmjax.fields import check_fields, replace
from wmjax.names import nearest

DEFAULT_PRESET = "small"
# The environment that an agent is trained on if none is named: discrete actions, or continuous ones.
DEFAULT_ENVS = {
    "dreamer_v1": "pendulum",
    "dreamer_v2": "catch",
    "dreamer_v3": "catch",
    "world_models": "racing",
    "iris": "catch",
}


class RunSettings(NamedTuple):
    """What a run needs to know besides its agent's configuration."""

    steps: int  # env steps (frames, `device.env_steps`) to train for
    image_size: int | None = None  # side in pixels; None: as registered
    action_repeat: int = 1  # frames per agent step
    env_args: Mapping[str, Any] = MappingProxyType({})  # of the environment


PRESET_NOTES = {
    "small": "learns on a laptop's CPU in minutes; the default",
    "guide": "the sizes of the implementation guide",
    "paper": "the authors' hyperparameters (DreamerV1: control suite; DreamerV2: Atari, as in the released code)",
    "paper_discrete": "the paper's changes for discrete actions and early termination",
    "paper_atari": "Atari with the numbers of the paper's table, where they differ from the released code",
    "paper_dmc": "the authors' hyperparameters for the DeepMind Control Suite",
    "paper_atari100k": "the authors' hyperparameters for Atari in 400 thousand frames",
    "paper_dmc_proprio": "the authors' hyperparameters for the DeepMind Control Suite, from vectors",
    "paper_dmc_vision": "the authors' hyperparameters for the DeepMind Control Suite, from pixels",
    "paper_crafter": "the authors' hyperparameters for Crafter",
    "paper_car": "the authors' hyperparameters for CarRacing",
    "paper_doom": "the authors' hyperparameters for Doom, evolved in dreams",
}

# DreamerV1 and V2 draw an episode first, then a window within it.
EPISODES = dict(within_episode=True, over="episodes")

# Overrides of the paper's defaults, by agent and preset.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dreamer_v1": {
        "small": dict(
            # Sizes.
            deter=128,
            hidden=64,
            stoch=16,
            depth=8,
            units=64,
            vector_layers=2,
            cont_layers=2,
            actor_layers=2,
            critic_layers=2,
            batch_size=16,
            length=16,
            horizon=10,
            imagine_last=8,
            num_envs=16,
            replay_capacity=100_000,
            use_continue=True,
            # Learning rates, train ratio, scales.
            prefill=1024,
            pretrain=0,
            train_every=16,
            train_steps=2,
            reward_transform="symlog",  # returns of hundreds are learned slowly by a critic of deviation 1
            discount=0.98,
            free_nats=1.0,
            kl_scale=0.3,
            image_scale=4.0,
            cont_scale=1.0,
            entropy_scale=0.06,  # with less the actor saturates before the critic knows anything
            actor_lr=3e-4,
            critic_lr=1e-3,
        ),
        # "Paper 2" of the guide: dense ReLU layers, [z, a] straight into the GRU, padded convolutions with a layer of
        # 1024 after them, a continue head, plain discounted sums of imagined rewards, 100 updates per 100 steps.
        "guide": dict(
            embed=1024,
            encoder_padding=1,
            input_layer=False,
            activation="relu",
            actor_layers=3,
            use_continue=True,
            lambda_=1.0,
            bootstrap=False,
            prefill=0,
            pretrain=0,
            train_every=100,
            train_steps=100,
        ),
        # Replay keeps everything: as many steps as `PAPER_RUNS` has.
        "paper": EPISODES | dict(replay_capacity=2_500_000),
        "paper_discrete": EPISODES
        | dict(
            use_continue=True,
            kl_scale=0.1,
            horizon=10,
            exploration=0.4,
            exploration_min=0.1,
            exploration_updates=200_000,
            replay_capacity=2_000_000,
        ),
    },
    "dreamer_v2": {
        "small": dict(
            # Sizes.
            deter=128,
            hidden=64,
            stoch=8,
            classes=8,
            depth=8,
            units=64,
            vector_layers=2,
            reward_layers=2,
            cont_layers=2,
            actor_layers=2,
            critic_layers=2,
            norm="layer",  # as for Crafter; without it the latents saturate at these learning rates
            length=16,
            horizon=10,
            imagine_last=8,
            num_envs=16,
            replay_capacity=100_000,
            # Learning rates, train ratio, scales.
            prefill=1024,
            pretrain=0,
            reward_transform="symlog",
            discount=0.99,
            free_nats=1.0,
            image_scale=4.0,
            cont_scale=1.0,
            entropy_scale=1e-2,
            model_lr=4e-4,
            actor_lr=3e-4,
            critic_lr=5e-4,
        ),
        # "Paper 3" of the guide: 32 x 32 latents, the rest as its "Paper 2"; Gumbel-softmax, symlog rewards and values,
        # the KL as its code computes it (its text: kl_mode="balanced", kl_balance=0.5).
        "guide": dict(
            deter=200,
            hidden=200,
            depth=32,
            embed=1024,
            encoder_padding=1,
            cell="gru",
            input_layer=False,
            activation="relu",
            reward_layers=2,
            actor_layers=3,
            critic_layers=3,
            reward_head="symlog_mse",
            critic_head="symlog_mse",
            reward_transform="identity",
            latent_estimator="gumbel_straight_through",
            eval_latent="mode",
            kl_mode="guide_code",
            kl_balance=0.8,
            kl_scale=1.0,
            free_nats=1.0,
            free_mode="latent",
            cont_scale=1.0,
            discount=0.99,
            model_lr=6e-4,
            actor_lr=8e-5,
            critic_lr=8e-5,
            batch_size=50,
            length=50,
            replay_capacity=1_000_000,
            prefill=0,
            pretrain=0,
            train_every=100,
            train_steps=100,
        ),
        # On Atari and Crafter the last window of an episode is drawn more often.
        "paper": EPISODES | dict(prioritize_ends=True),
        "paper_atari": EPISODES | dict(prioritize_ends=True, batch_size=50, discount=0.995, train_every=4),
        "paper_dmc": EPISODES
        | dict(
            deter=200,
            hidden=200,
            free_nats=1.0,
            kl_scale=1.0,
            use_continue=False,
            reward_transform="identity",
            discount=0.99,
            entropy_scale=1e-4,
            cont_scale=1.0,
            model_lr=3e-4,
            actor_lr=8e-5,
            critic_lr=8e-5,
            prefill=1000,
            pretrain=100,
            train_every=5,
        ),
        "paper_crafter": EPISODES
        | dict(
            prioritize_ends=True,
            deter=1024,
            hidden=1024,
            norm="layer",
            kl_scale=1.0,
            cont_scale=1.0,
            entropy_scale=3e-3,
            model_lr=1e-4,
            actor_lr=1e-4,
            critic_lr=1e-4,
            prefill=10_000,
            train_every=5,
        ),
    },
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
            prefill=1024,
            entropy_scale=1.5e-2,
            image_scale=4.0,
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
            prefill=1024,
            replay_capacity=1_000_000,
            learning_rate=6e-4,
        ),
        "paper": dict(),
        # The authors' settings by benchmark, where they differ from the above. One environment needs fewer steps for
        # the 1,024 windows that training begins with.
        "paper_atari100k": dict(train_ratio=256.0, num_envs=1, prefill=1088),
        "paper_crafter": dict(train_ratio=512.0, num_envs=1, prefill=1088),
        "paper_dmc_proprio": dict(size="1m", train_ratio=1024.0),
        "paper_dmc_vision": dict(train_ratio=256.0),
    },
    "world_models": {
        "small": dict(
            # Sizes: the VAE a quarter as wide, one LSTM of 64.
            latent=16,
            depth=8,
            hidden=64,
            # The reward and the end, so that dreams can be evolved in; the noise of z helps M, not C.
            reward_head="mse",
            done_head=True,
            controller_z="mean",
            # Data, batches and learning rates.
            collection="held",
            collect_steps=16_384,
            num_envs=16,
            replay_capacity=16_384,
            vision_learning_rate=1e-3,
            vision_batch_size=64,
            vision_updates=3_000,
            memory_batch_size=64,
            memory_length=32,
            memory_within_episode=False,
            memory_updates=2_000,
            evolve=dict(population=32, rollouts=4, generations=60, mean_every=5, mean_rollouts=32),
        ),
        # The defaults: CarRacing.
        "paper_car": dict(),
        # Doom (Take Cover): evolved in dreams, which start at first frames. 10,000 episodes by random actions are about
        # 3.08 million frames: V's log ends after 308 thousand updates, ten epochs of 100 each, and M's after 400 epochs
        # of 61 chunks of 500 frames.
        "paper_doom": dict(
            latent=64,
            hidden=512,
            done_head=True,
            done_pos_weight=10.0,
            restart_input=True,
            dream_reward="survival",
            temperature=1.15,
            memory_decay=0.99999,
            memory_batch_size=100,
            memory_length=499,
            memory_updates=24_400,
            memory_stateful=True,
            num_envs=100,
            inputs="zch",
            controller_bias=False,
            collection="held",
            collect_steps=3_080_000,
            replay_capacity=3_080_000,
            vision_updates=308_000,
            evolve=dict(where="dream", start_from="first", horizon=2100, generations=200),
        ),
        # "Paper 1" of the guide: 96x96 pictures (its decoder, from a 3x3 map so that it really gives 96), 32 latents, a
        # plain ELBO summed over batches, one mixture of 5 for all latents, Gaussian reward, [z] -> 99 parameters.
        "guide": dict(
            encoder_padding="SAME",
            kl_tolerance=0.0,
            reduction="sum",
            vision_learning_rate=1e-3,
            vision_batch_size=50,
            mixture="shared",
            reward_head="gaussian",
            done_head=True,
            z_source="mean",
            memory_learning_rate=1e-3,
            memory_final_learning_rate=1e-3,
            clip="none",
            controller_z="mean",
            inputs="z",
            collect_steps=1_000_000,
            num_envs=1,
            memory_batch_size=1,
            memory_updates=1_000,
            vision_updates=200_000,
            replay_capacity=1_000_000,
            evolve=dict(sigma_init=0.5, population=17, generations=100, rollouts=3, mean_every=10, mean_rollouts=64),
        ),
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
            vocab_size=256,
            layers=2,
            heads=2,
            width=64,
            dropout=0.0,
            max_blocks=4,  # each position learns its attention by itself: few learn faster
            world_model_length=4,
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
            world_model_rate=2e-3,
            actor_critic_rate=1e-3,
            entropy_scale=1e-2,
            discount=0.97,
            # Schedule.
            num_envs=16,
            collect=8,
            tokenizer_batch=32,
            world_model_batch=32,
            actor_critic_batch=64,
            tokenizer_updates=10,
            world_model_updates=20,
            actor_critic_updates=10,
            tokenizer_after=3,
            world_model_after=123,
            actor_critic_after=223,
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

# Steps (frames), image size and action repeat of `small`, by agent and environment. DreamerV3 with seed 0: catch 1.00,
# pendulum -191, CartPole 500, Breakout-MinAtar 6.4.
PENDULUM = RunSettings(200_000, image_size=32, action_repeat=2)
RUNS: dict[str, dict[str, RunSettings]] = {
    "dreamer_v1": {"catch": RunSettings(40_000), "pendulum": PENDULUM},
    "dreamer_v2": {"catch": RunSettings(50_000), "pendulum": PENDULUM},
    "dreamer_v3": {
        "catch": RunSettings(32_000),
        "pendulum": PENDULUM,
        "gymnax:CartPole-v1": RunSettings(90_000, action_repeat=2),
        "gym:CartPole-v1": RunSettings(90_000, action_repeat=2),
        "gymnax:Breakout-MinAtar": RunSettings(80_000, image_size=40),
    },
    "world_models": {
        "racing": RunSettings(65_536, image_size=64, action_repeat=4),
        "gym:CarRacing-v3": RunSettings(65_536, image_size=64, action_repeat=4),
        "catch": RunSettings(16_384),
    },
    "iris": {"catch": RunSettings(76_800)},
}
# Of `small`, by suite, for what is not above: frames, and how many of them an action is usually taken for there.
SUITE_RUNS = {
    "atari": RunSettings(400_000),
    "atari200m": RunSettings(400_000),
    "crafter": RunSettings(1_000_000),
    "dmc": RunSettings(500_000, action_repeat=2),
    "dmc_proprio": RunSettings(500_000, action_repeat=2),
    "vizdoom": RunSettings(400_000, action_repeat=4),
}
DEFAULT_RUN = RunSettings(100_000)
# Of the other presets, where they do not say it themselves: the usual budget of a suite.
PAPER_RUN = RunSettings(1_000_000)
PAPER_SUITE_RUNS = {
    "atari": RunSettings(400_000),
    "atari200m": RunSettings(200_000_000),
    "dmc_proprio": RunSettings(500_000),
    "vizdoom": RunSettings(10_000_000, action_repeat=4),
}
# Where an agent's paper shows a suite otherwise than that does by itself.
PAPER_IMAGE_SIZES = {("dreamer_v1", "atari200m"): 64, ("dreamer_v2", "atari200m"): 64}
# How an agent's paper plays a suite, where that differs from the suite by itself; for all presets of the agent, which
# differ in their sizes. The whole protocols are in `docs/protocols.md`.
V1_ATARI = dict(sticky=0.25, life_loss=True, limit=108_000, all_actions=False, resize="bilinear", resize_first=False)
V1_ATARI |= dict(gray=False)
V3_PICTURES = dict(min_noops=0, limit=108_000, life_loss=False, resize="bilinear", resize_first=False)
ENV_ARGS: dict[tuple[str, str], dict[str, Any]] = {
    ("dreamer_v1", "atari"): V1_ATARI,
    ("dreamer_v1", "atari200m"): V1_ATARI,
    ("dreamer_v2", "atari200m"): dict(all_actions=False),
    ("dreamer_v3", "atari"): V3_PICTURES,
    ("dreamer_v3", "atari200m"): V3_PICTURES | dict(gray_last=True),
}
# The same, for one preset and one environment.
PRESET_ENV_ARGS = {("paper_doom", "vizdoom:TakeCover"): dict(actions="axis")}
PAPER_RUNS: dict[str, dict[str, RunSettings]] = {
    "dreamer_v1": {"paper": RunSettings(5_000_000, action_repeat=2), "paper_discrete": RunSettings(2_000_000)},
    "dreamer_v2": {
        "paper": RunSettings(200_000_000),
        "paper_atari": RunSettings(200_000_000),
        "paper_dmc": RunSettings(2_000_000, action_repeat=2),
    },
    "dreamer_v3": {
        "paper_atari100k": RunSettings(400_000),
        "paper_crafter": RunSettings(1_000_000),
        "paper_dmc_proprio": RunSettings(500_000),
        "paper_dmc_vision": RunSettings(1_000_000),
    },
    # Frames to collect, and the size of picture that each is made for.
    "world_models": {
        "paper_car": RunSettings(10_000_000, image_size=64),
        "paper_doom": RunSettings(3_080_000, image_size=64),
        "guide": RunSettings(1_000_000, image_size=96),
    },
}


def default_env(agent: str) -> str:
    """The environment that an agent is tried on first. Raises `UsageError` for an unknown agent."""
    _config_class(agent)
    return DEFAULT_ENVS[agent]


def resolve(
    agent: str, preset: str = DEFAULT_PRESET, env: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Any, RunSettings]:
    """The configuration of an agent, and the settings of a run.

    Args:
      agent: a name in `AGENTS`.
      preset: a name in `PRESETS[agent]`.
      env: an environment's name; None for one that has none. `RUNS[agent]` or `SUITE_RUNS` may know it; it is not
        checked here.
      overrides: fields of the agent's configuration.

    Returns:
      The validated frozen configuration, and the run settings.

    Raises:
      UsageError: unknown agent, preset or field, with the nearest valid name; a value of a wrong type or range.
    """
    config_class = _config_class(agent)
    if not isinstance(preset, str) or preset not in PRESETS[agent]:
        raise nearest("preset", preset, PRESETS[agent])
    config = replace(replace(config_class(), PRESETS[agent][preset]), overrides or {})
    config.validate()
    suite = (env or "").partition(":")[0]
    args = ENV_ARGS.get((agent, suite), {}) | PRESET_ENV_ARGS.get((preset, env), {})
    if preset == "small":
        return config, RUNS.get(agent, {}).get(env, SUITE_RUNS.get(suite, DEFAULT_RUN))._replace(env_args=args)
    settings = PAPER_RUNS.get(agent, {}).get(preset) or PAPER_SUITE_RUNS.get(suite, PAPER_RUN)
    size = PAPER_IMAGE_SIZES.get((agent, suite), settings.image_size)
    return config, settings._replace(image_size=size, env_args=args)


def starting_config(agent: str, preset: str | None, before: Mapping[str, Any]) -> Any:
    """A configuration before anything is overridden.

    Args:
      agent: a name in `AGENTS`.
      preset: a name in `PRESETS[agent]`, or None.
      before: what `config.json` says of a run that goes on, which holds where there is no preset; or nothing.

    Raises `UsageError` as `resolve`, and where the configuration of the run is not one of this version.
    """
    if before and preset is None:
        return saved_config(before)
    return resolve(agent, DEFAULT_PRESET if preset is None else preset)[0]


def saved_config(description: Mapping[str, Any]) -> Any:
    """The configuration that `config.json` holds. Raises `UsageError` where it is not one of this version."""
    config_class = _config_class(description["agent"])
    return config_class(**check_fields(config_class, description["config"]))


def _config_class(agent: str) -> type:
    if not isinstance(agent, str) or agent not in AGENTS:
        raise nearest("agent", agent, AGENTS)
    return AGENTS[agent][0]
