"""What returns of environments mean: what random play earns, what is known to be possible, what counts as solved."""

from __future__ import annotations

from typing import NamedTuple

from wmjax.envs.atari_scores import SCORES
from wmjax.envs.probe import PROBES


class Reference(NamedTuple):
    """Mean returns of an environment; None where nobody says."""

    random: float | None = None
    best: float | None = None
    threshold: float | None = None  # that counts as learned
    best_is: str = "best known"


REFERENCES = {
    "catch": Reference(-0.6, 1.0, 0.9),
    "pendulum": Reference(-1200.0, -150.0, -250.0),
    "racing": Reference(-40.0, 930.0, 900.0, "a lap without a mistake"),
    "recall": Reference(0.0, 1.0, 0.9, "best"),
    "gym:CartPole-v1": Reference(22.0, 500.0, 475.0),
    "gymnax:CartPole-v1": Reference(22.0, 500.0, 475.0),
    "gym:CarRacing-v3": Reference(-30.0, 906.0, 900.0, "World Models' paper"),
    "gym:Pendulum-v1": Reference(-1200.0, -150.0, -250.0),
}


def reference(env: str) -> Reference:
    """Of an environment by name: of a probe its own, of an Atari game what a random player and a human earn."""
    suite, _, game = env.partition(":")
    if suite.startswith("atari") and game in SCORES:
        low, high = SCORES[game]
        return Reference(low, high, high, "human")
    if env in PROBES:
        return Reference(PROBES[env].random_return, PROBES[env].optimal_return, best_is="best")
    return REFERENCES.get(env, Reference())
