"""Named ablations: an agent with one of its parts changed, to see what the part is for. One entry each.

What an ablation changes, it changes of the preset it is compared with (`small` by default), on the task nearest to
where the effect was seen. Where `small` has a part turned off that the paper has, the entry turns it on, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Ablation(NamedTuple):
    """A change of an agent's configuration that its paper, or those after it, say makes it worse."""

    agent: str  # a name in `agents.AGENTS`
    name: str  # what it is called on the command line, one for each agent
    changes: Mapping[str, Any]  # fields of the configuration; of a part as a mapping, as in presets
    about: str  # a sentence: what it takes away
    env: str = ""  # the task of the table; "": the agent's default
    steps: int | None = None  # env steps; None: the preset's for the task
    source: str = ""  # where the effect was seen


# Papers that are not the agent's own.
TALLEC = "Tallec et al. 2018, 'Reproducing World Models: is training the recurrent network really needed?'"
VQ_VAE, VQGAN = "van den Oord et al. 2017 (VQ-VAE), appendix A.1", "Esser et al. 2021 (VQGAN), section 3.1"

# fmt: off
ABLATIONS: tuple[Ablation, ...] = (
    Ablation(
        "world_models", "z", {"inputs": "z"},
        "The controller sees z alone, the present picture, and not what M remembers.",
        env="recall", source="table 1 of the paper: 632 of 906 on CarRacing",
    ),
    Ablation(
        "world_models", "z_hidden_layer", {"inputs": "z", "controller_units": 40},
        "The controller sees z alone, and has a hidden layer.",
        env="recall", source="table 1 of the paper: 788 of 906 on CarRacing",
    ),
    Ablation(
        "world_models", "untrained_memory", {"memory_updates": 0},
        "M keeps its first weights, so that h is a random function of the past.",
        env="recall", source=TALLEC,
    ),
    Ablation(
        "world_models", "dream_at_0.5", {"evolve": {"where": "dream"}, "temperature": 0.5},
        "The controller is evolved in dreams that are more certain than the world.",
        env="catch", source="table 2 of the paper: 196 of 1092 on Take Cover",
    ),
    Ablation(
        "world_models", "dream_at_1", {"evolve": {"where": "dream"}},
        "The controller is evolved in dreams that are as certain as M.",
        env="catch", source="table 2 of the paper: 868 of 1092 on Take Cover",
    ),
    Ablation(
        "world_models", "dream_at_1.15", {"evolve": {"where": "dream"}, "temperature": 1.15},
        "The controller is evolved in dreams that are less certain than M.",
        env="catch", source="table 2 of the paper, its best: 1092 on Take Cover",
    ),

    Ablation(
        "dreamer_v1", "no_free_nats", {"free_nats": 0.0},
        "The KL is pushed down to nothing.",
        env="pendulum", source="section 5 of the paper uses 3 free nats and shows no run without",
    ),
    Ablation(
        "dreamer_v1", "no_continue_head", {"use_continue": False},
        "The end of an episode is not predicted, so that imagination goes on beyond it.",
        env="catch", source="appendix C of the paper predicts it for early termination and shows no run without",
    ),
    Ablation(
        "dreamer_v1", "short_horizon", {"horizon": 3},
        "Three steps are imagined.",
        env="pendulum", source="figure 4 of the paper",
    ),
    Ablation(
        "dreamer_v1", "no_value", {"bootstrap": False, "lambda_": 1.0},
        "The actor maximizes the rewards within the horizon, without a value of what comes after.",
        env="pendulum", source="figures 4 and 7 of the paper",
    ),

    Ablation(
        "dreamer_v2", "gaussian_latents", {"latent": "gaussian"},
        "The latents are Gaussian, as in DreamerV1, in place of categorical.",
        env="catch", source="figure 5 and table 2 of the paper",
    ),
    Ablation(
        "dreamer_v2", "no_kl_balance", {"kl_mode": "plain"},
        "Both sides of the KL have the same weight.",
        env="catch", source="figure 5 and table 2 of the paper",
    ),
    Ablation(
        "dreamer_v2", "dynamics_gradient", {"actor_grad": "dynamics"},
        "The actor learns by straight-through gradients of the model in place of REINFORCE.",
        env="catch", source="table 2 of the paper, 'no policy REINFORCE'",
    ),
    Ablation(
        "dreamer_v2", "reinforce_gradient", {"actor_grad": "reinforce"},
        "Continuous actions are learned by REINFORCE in place of gradients of the model.",
        env="pendulum", source="section 2 of the paper: the better one depends on the kind of action",
    ),

    Ablation(
        "dreamer_v3", "no_symlog", {"symlog_vectors": False, "reward_head": "normal", "critic_head": "normal"},
        "Vectors, rewards and returns are regressed as they are; without two-hot bins, for these are spaced by symexp.",
        env="pendulum", source="figure 6 of the paper",
    ),
    Ablation(
        "dreamer_v3", "no_two_hot", {"reward_head": "symlog_mse", "critic_head": "symlog_mse"},
        "Rewards and returns are regressed in symlog space in place of two-hot classification.",
        env="pendulum", source="figure 6 of the paper",
    ),
    Ablation(
        "dreamer_v3", "no_unimix", {"unimix": 0.0, "actor_unimix": 0.0},
        "Distributions over choices have no uniform share.",
        env="catch", source="section 'World model learning' of the paper, which shows no run without",
    ),
    Ablation(
        "dreamer_v3", "no_free_bits", {"free_nats": 0.0},
        "Both terms of the KL are pushed down to nothing.",
        env="catch", source="figure 6 of the paper, together with KL balance",
    ),
    Ablation(
        "dreamer_v3", "no_return_normalization", {"return_norm_rate": 0.0},
        "Advantages are as large as returns are: the range that divides them stays at 1.",
        env="pendulum", source="figure 6 of the paper",
    ),
    Ablation(
        "dreamer_v3", "no_replay_value_loss", {"replay_critic_scale": 0.0},
        "The critic learns from imagined steps alone.",
        env="catch", source="section 'Critic learning' of the paper, which shows no run without",
    ),

    Ablation(
        "iris", "short_context", {"max_blocks": 2, "world_model_length": 2},
        "The world model sees one frame before the one it predicts.",
        env="catch", source="table 4 of the paper has 20 frames and shows no run with fewer",
    ),
    Ablation(
        "iris", "ema_codebook", {"codebook": "ema"},
        "Turned on: codebook entries are moving averages of what they stand for, in place of learned by gradient.",
        env="catch", source=VQ_VAE,
    ),
    Ablation(
        "iris", "perceptual_loss", {"perceptual": "random_features"},
        "Turned on, for `small` has none: the tokenizer is also trained by distances of features.",
        env="catch", source=VQGAN,
    ),
)
# fmt: on


def ablations(agent: str) -> dict[str, Ablation]:
    """Those of an agent, by name."""
    return {ablation.name: ablation for ablation in ABLATIONS if ablation.agent == agent}
