"""Named ablations: an agent with one of its parts changed, to see what the part is for. One entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Ablation(NamedTuple):
    """A change of an agent's configuration that its paper, or those after it, say makes it worse."""

    agent: str  # a name in `agents.AGENTS`
    name: str  # what it is called on the command line, one for each agent
    changes: Mapping[str, Any]  # fields of the configuration; of a part with a dot
    about: str  # a sentence: what it takes away
    env: str = ""  # the task of the table; "": the agent's default
    steps: int | None = None  # env steps; None: the preset's for the task
    source: str = ""  # where the effect was seen


ABLATIONS: tuple[Ablation, ...] = (
    Ablation(
        "dreamer_v2", "gaussian_latents", {"latent": "gaussian"},
        "The latents are Gaussian, as in DreamerV1, in place of categorical.", source="figure 5 of the paper",
    ),
    Ablation(
        "dreamer_v2", "no_kl_balance", {"kl_mode": "plain"},
        "Both sides of the KL have the same weight.", source="figure 5 of the paper",
    ),
    Ablation(
        "dreamer_v3", "no_unimix", {"unimix": 0.0, "actor_unimix": 0.0},
        "Distributions over choices have no uniform share.",
    ),
)  # fmt: skip


def ablations(agent: str) -> dict[str, Ablation]:
    """Those of an agent, by name."""
    return {ablation.name: ablation for ablation in ABLATIONS if ablation.agent == agent}
