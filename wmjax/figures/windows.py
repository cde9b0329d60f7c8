"""What a world model expects of windows that it does not see, beside what happened, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks, dreaming
from wmjax.loops import compiler, memory
from wmjax.loops.host import rollout as host_rollout
from wmjax.loops.rollout import Position, rollout
from wmjax.ops import noise
from wmjax.replay.device import Record
from wmjax.types import Agent, Array, Env, HostEnv, PyTree, Trajectory

STREAMS = 64
HOST_STREAMS = 16  # of environments in other processes
CONTEXT, HORIZON = 5, 15  # where episodes are long enough for both


class OpenLoop(NamedTuple):
    """What happened and what the model expected, over windows of `context + horizon` steps."""

    truth: dict[str, np.ndarray]  # [T, N, ...], as the environment gave it
    model: dict[str, np.ndarray]  # [T, N, ...], float32
    valid: np.ndarray  # bool [horizon, N], still the episode that the context ended in

    @property
    def horizon(self) -> int:
        """Steps that the model predicted."""
        return len(self.valid)

    @property
    def context(self) -> int:
        """Steps that it saw before them."""
        return len(next(iter(self.truth.values()))) - self.horizon


def open_loop(
    agent: Agent,
    env: Env | HostEnv,
    params: PyTree,
    key: Array,
    context: int | None = None,
    horizon: int | None = None,
) -> OpenLoop:
    """Plays `STREAMS` environments and lets the model predict windows of what it did not see.

    On the host there are `HOST_STREAMS`. Each environment supplies one window. It lies within one episode, anywhere in
    it; where no episode is long enough it starts at any step.

    Args:
      agent: acts as in evaluation, and brings the model.
      env: takes what the agent emits.
      params: of the agent.
      key: consumed.
      context: steps that the model sees, at least 1; None: `CONTEXT`, or as many as fit into episodes (`fitting`).
      horizon: steps that it predicts from the actions alone, at least 1; None: `HORIZON`, or as many as fit.
    """
    most = (CONTEXT if context is None else context, HORIZON if horizon is None else horizon)
    streams, steps = window_records(env, *most)
    with memory.running_out():
        records = play(agent, env, params, key, streams, steps)
        context, horizon = fitting(records.step.is_first, context, horizon)
        return predictor(agent, context, horizon)(params, key, records)


def window_records(env: Env | HostEnv, context: int, horizon: int) -> tuple[int, int]:
    """Streams and steps to record for windows of so many steps. Raises `UsageError` where memory does not reach."""
    context, horizon = checks.number("context", context), checks.number("horizon", horizon)
    length = context + horizon
    spread = env.spec.max_episode_steps or length  # windows start within the first episode, or near to it
    spread = min(spread + 1, 500)
    streams = HOST_STREAMS if isinstance(env, HostEnv) else STREAMS
    field = f"context: {context}" if context > horizon else f"horizon: {horizon}"
    memory.check_records(field, env.spec, streams * (spread + length), streams * length)
    return streams, spread + length


def fitting(is_first: Array, context: int | None, horizon: int | None) -> tuple[int, int]:
    """Context and horizon, where None is for as many steps as fit into an episode of at least half of the streams.

    Where both are, and episodes are shorter than `CONTEXT + HORIZON`, a quarter is context. `is_first` is bool
    `[steps, streams]`.
    """
    room = int(np.median(_room(is_first).max(0)))
    if context is None:
        context = max(1, min(room // 4 if horizon is None else room - horizon, CONTEXT))
    return context, max(1, min(room - context, HORIZON)) if horizon is None else horizon


def _room(is_first: Array) -> Array:
    """Records from each one to the end of its episode, or of the recording: int32 `[steps, streams]`."""
    total = len(is_first)
    steps = jnp.arange(total)[:, None]
    begins = jnp.where(is_first, steps, total)
    after = jax.lax.cummin(begins, reverse=True)[1:]  # the first record of the episode that follows
    return jnp.concatenate([after, jnp.full_like(begins[:1], total)]) - steps


def predictor(agent: Agent, context: int, horizon: int) -> Callable[[PyTree, Array, Record], OpenLoop]:
    """The compiled function `(params, key, records [steps, streams, ...]) -> OpenLoop`, a window of each stream.

    A window starts where it fits into an episode, all such places being equally likely; if there is none, anywhere.
    """
    length = context + horizon

    def predict(params: PyTree, key: Array, records: Record) -> tuple[dict, dict, Array]:
        spread = records.step.reward.shape[0] - length
        _, _, key_start, key_model = jax.random.split(key, 4)
        fits = _room(records.step.is_first)[:spread] >= length
        starts = jnp.argmax(jax.random.uniform(key_start, fits.shape) + fits, 0)
        cut = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length), (1, 0), 1)
        step, action = jax.tree.map(lambda x: cut(x, starts), (records.step, records.action))
        mask = lambda action: jnp.ones(action.shape[:2], bool)
        # What came before a window is part of what the model knows: it may expect that episodes begin in one way.
        history = Trajectory(records.step, records.action, mask(records.action), ())
        history = jax.tree.map(lambda x: x[:spread], history)
        before = dreaming.observe_until(agent.model, params, jax.random.fold_in(key_model, 1), history, starts)
        batch = Trajectory(step, action, mask(action), ())
        predicted = dreaming.open_loop(agent.model, params, key_model, batch, context, before)
        valid = jnp.cumsum(step.is_first[context:], 0) == 0
        return step.obs, predicted, valid

    compiled = jax.jit(predict, compiler_options=compiler.options())
    return lambda params, key, records: OpenLoop(*jax.device_get(compiled(params, key, records)))


def play(agent: Agent, env: Env | HostEnv, params: PyTree, key: Array, streams: int, steps: int) -> Record:
    """Records `[steps, streams, ...]` of acting as in evaluation, without latents."""
    if isinstance(env, HostEnv):
        return host_rollout.play(agent, env, params, key, streams, steps)

    def steps_of(params: PyTree, key: Array) -> Record:
        key_reset, key_act, *_ = jax.random.split(key, 4)
        state, timestep = jax.vmap(env.reset)(noise.row_keys(key_reset, streams))
        position = Position(state, timestep, agent.act_carry(params, streams))
        _, records = rollout(partial(agent.act, explore=False), env, params, key_act, position, steps)
        return records._replace(latent=())

    return jax.jit(steps_of, compiler_options=compiler.options())(params, key)


def horizon_errors(result: OpenLoop, context: int) -> dict[str, Any]:
    """Mean squared error by horizon of the model and of two predictors that know no dynamics.

    Images count in [0, 1], averaged over pixels. Steps beyond the end of the window's episode do not count.

    Returns:
      For each observation: `model`, `repeat_last` (the last frame seen stays) and `mean_frame` (the mean over all
      frames of all windows, which knows the test frames), lists over horizons 1, 2, ...; null where no window counts,
      or a prediction is not finite.
      And `count`, how many windows do.
    """
    weight = result.valid / np.maximum(result.valid.sum(1, keepdims=True), 1)
    count = result.valid.sum(1)
    report: dict[str, Any] = {"count": count.tolist()}
    for name, truth in result.truth.items():
        scale = 255.0 if truth.dtype == np.uint8 else 1.0
        truth, model = truth.astype(np.float32) / scale, result.model[name].astype(np.float32) / scale
        later = truth[context:]
        guesses = {"model": model[context:], "repeat_last": truth[context - 1], "mean_frame": truth.mean((0, 1))}
        if model.shape != truth.shape:  # a distribution over choices has no such error
            continue
        report[name] = {}
        for kind, guess in guesses.items():
            error = np.square(later - guess).reshape(*later.shape[:2], -1).mean(-1)
            errors = zip((error * weight).sum(1), count, strict=True)
            report[name][kind] = [float(e) if n and np.isfinite(e) else None for e, n in errors]
    return report


def reconstruction_errors(result: OpenLoop, context: int) -> dict[str, float]:
    """Mean squared error of the last frame that the model saw, for each observation; images count in [0, 1]."""
    errors = {}
    for name, truth in result.truth.items():
        seen, model = truth[context - 1].astype(np.float32), result.model[name][context - 1].astype(np.float32)
        if model.shape == seen.shape:
            errors[name] = float(np.square((seen - model) / (255.0 if truth.dtype == np.uint8 else 1.0)).mean())
    return errors
