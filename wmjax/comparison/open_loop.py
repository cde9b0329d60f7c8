"""Open-loop prediction of several agents on the same held-out episodes, which none of them was trained on.

Half of the episodes are played at random, the other half by the agents in turn, each by its first seed. On the device
an episode is its key and its actions, so every agent sees it at its own size of pictures; errors are then taken at the
smallest size of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import figures
from wmjax.comparison import statistics
from wmjax.comparison.results import Group
from wmjax.figures import OpenLoop
from wmjax.loops import memory
from wmjax.loops.driver import evaluation_key
from wmjax.loops.rollout import random_act
from wmjax.replay.device import Record
from wmjax.run import Run, load
from wmjax.types import Agent, HostEnv, RunError, UsageError

SEED = 20_000  # of the episodes: apart from those of evaluations, whose seeds are those of runs
POLICY = "half of the episodes are played at random, half by the agents in turn"


class _Player(NamedTuple):
    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]


def open_loop_errors(
    groups: Sequence[Group], context: int, horizon: int, say: Callable[[str], None], *, trust_env: bool = False
) -> dict[str, Any]:
    """Mean squared error by horizon of all groups in one environment, and of two predictors that know no dynamics.

    Args:
      groups: what was trained in it.
      context: steps that the models see, at least 1.
      horizon: steps that they predict from the actions alone, at least 1.
      say: is told what goes on.
      trust_env: as for `load`.

    Returns:
      For each observation `repeat_last`, `mean_frame` and, by label, `agents`: lists over horizons 1, 2, ..., null
      where no window counts (`figures.horizon_errors`). And `count`, how many windows do; `notes`, what is left out.
    """
    players, notes = _load(groups, trust_env)
    if not players:
        return {"notes": notes}
    say(f"open-loop predictions on {players[0].first.description['env']}")
    key = evaluation_key(SEED)
    with memory.running_out():
        streams, steps = figures.window_records(players[0].first.env, context, horizon)
        records = _records(players, key, streams, steps)
        results = {}
        for player, own in zip(players, records, strict=True):
            predict = figures.predictor(player.first.agent, context, horizon)
            results[player.label] = [predict(run.state.variables, key, own) for run in player.runs]
    results = {label: [_shrink(found, results) for found in own] for label, own in results.items()}
    errors = {label: [figures.horizon_errors(found, context) for found in own] for label, own in results.items()}
    baseline = next(iter(errors.values()))[0]
    entries = {
        name: {kind: baseline[name][kind] for kind in ("repeat_last", "mean_frame")}
        | {"agents": {label: _over_seeds([own[name]["model"] for own in each]) for label, each in errors.items()
                      if all(name in own for own in each)}}
        for name in baseline if name != "count"
    }  # fmt: skip
    told = {"context": context, "horizon": horizon, "count": baseline["count"], "episodes": streams}
    return told | {"policy": POLICY, "entries": entries, "notes": notes}


def _load(groups: Sequence[Group], trust_env: bool) -> tuple[list[_Player], list[str]]:
    """The runs of groups whose episodes can be the same, and what is said of the others."""
    players, notes = [], []
    for group in groups:
        try:
            players.append(_Player(group.label, [load(run.path, trust_env=trust_env) for run in group.runs]))
        except (UsageError, RunError) as error:
            notes.append(f"{group.label}: not read ({error})")
    kinds = [_kind(player.first) for player in players]
    most = Counter(kinds).most_common(1)[0][0] if kinds else None
    for player, kind in zip(players, kinds, strict=True):
        if kind != most:
            notes.append(f"{player.label}: left out of the open-loop errors, for its episodes differ (action repeat, "
                         "arguments of the environment, or pictures of an environment on the host)")  # fmt: skip
    return [player for player, kind in zip(players, kinds, strict=True) if kind == most], notes


def _kind(run: Run) -> str:
    """What has to be the same for the same episodes."""
    about = run.description
    shown = (
        sorted((name, str(space)) for name, space in run.env.spec.obs.items()) if isinstance(run.env, HostEnv) else []
    )
    return str((about["action_repeat"], sorted((about.get("env_args") or {}).items()), shown, str(run.env.spec.action)))


def _records(players: Sequence[_Player], key: jax.Array, streams: int, steps: int) -> list[Record]:
    """The episodes `[steps, streams]` as each player sees them."""
    first = players[0].first
    random = first.agent._replace(act=random_act(first.agent, first.env.spec))
    played = [figures.play(random, first.env, first.state.variables, key, streams, steps)]
    played += [figures.play(p.first.agent, p.first.env, p.first.state.variables, key, streams, steps) for p in players]
    half = streams // 2
    who = np.array([0] * half + [1 + i % len(players) for i in range(streams - half)])
    pool = lambda *x: np.stack([np.asarray(x[player])[:, row] for row, player in enumerate(who)], 1)
    if isinstance(first.env, HostEnv):
        return [jax.tree.map(pool, *played)] * len(players)
    actions = jnp.asarray(pool(*(records.action for records in played)))
    return [figures.play(_repeating(p.first.agent), p.first.env, actions, key, streams, steps) for p in players]


def _repeating(agent: Agent) -> Agent:
    """Plays the actions `[steps, streams, A]` that it gets as its parameters."""

    def act(actions: Any, key: Any, t: Any, timestep: Any, *, explore: bool) -> tuple[Any, Any, Any]:
        del key, timestep, explore
        return t + 1, actions[t], ()

    return agent._replace(act=act, act_carry=lambda params, batch_size: jnp.int32(0))


def _shrink(found: OpenLoop, results: dict[str, list[OpenLoop]]) -> OpenLoop:
    """With pictures of the smallest size among all results."""
    truth, model = dict(found.truth), dict(found.model)
    for name, x in truth.items():
        if x.ndim != 5 or x.dtype != np.uint8:
            continue
        sizes = [own[0].truth[name].shape[2:4] for own in results.values() if name in own[0].truth]
        size = min(sizes)
        if x.shape[2:4] != size:
            resized = lambda x, size=size: np.asarray(
                jax.image.resize(jnp.asarray(x, jnp.float32), (*x.shape[:2], *size, x.shape[-1]), "linear")
            )
            truth[name], model[name] = np.rint(resized(x)).astype(np.uint8), resized(model[name])
    return OpenLoop(truth, model, found.valid)


def _over_seeds(errors: list[list[float | None]]) -> dict[str, Any]:
    """Mean over seeds by horizon, and its interval."""
    known = [i for i in range(len(errors[0])) if all(own[i] is not None for own in errors)]
    mean: list[float | None] = [None] * len(errors[0])
    low, high = list(mean), list(mean)
    if known:
        scores = np.array([[own[i] for own in errors] for i in known])[:, :, None]  # [horizons, seeds, 1]
        interval = statistics.interval(statistics.mean, scores, resamples=2000)
        for place, i in enumerate(known):
            mean[i] = float(statistics.mean(scores)[place])
            if interval is not None:
                low[i], high[i] = float(interval.low[place]), float(interval.high[place])
    return {"mean": mean, "by_seed": errors, "interval": [low, high] if len(errors) >= statistics.LEAST_RUNS else None}
