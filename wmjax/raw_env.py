"""An environment's bare rules, and what makes an `Env` of them: time limits, hiding, action repeat, restarting.

The rules are a `RawEnv`, which separates how the world moves from how it looks. So a step that restarts (under `vmap`
both branches of a choice are computed) and a step that repeats its action still draw one picture only. The order is
`auto_reset(action_repeat(flicker(time_limit(raw, frames), share), n))`, which is an `Env`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax import checks
from wmjax.types import Array, Env, EnvSpec, PyTree, TimeStep


class Outcome(NamedTuple):
    """What one step of the rules leads to, besides the next state."""

    reward: Array  # float32 []
    is_last: Array  # bool [], the episode ends here
    is_terminal: Array  # bool [], it ends by its own end, not by a time limit; implies is_last


class RawEnv(NamedTuple):
    """One environment that does not restart, as pure functions. `state` is a pytree of arrays, small if possible."""

    spec: EnvSpec
    reset: Callable[[Array], PyTree]  # (key) -> state
    step: Callable[[Array, PyTree, Array], tuple[PyTree, Outcome]]  # (key, state, action) -> (state, Outcome)
    observe: Callable[[PyTree], dict[str, Array]]  # (state) -> obs, as `spec.obs` says


def _select(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


class _Limited(NamedTuple):
    inner: PyTree
    frame: Array  # int32 [], steps since the reset


def time_limit(raw: RawEnv, steps: int) -> RawEnv:
    """Ends an episode after `steps` steps with `is_last` and, unless it ends by itself there, without `is_terminal`."""
    steps = checks.number("time limit", steps, checks.BOUNDS["steps"])

    def reset(key):
        return _Limited(raw.reset(key), jnp.int32(0))

    def step(key, state, action):
        inner, outcome = raw.step(key, state.inner, action)
        frame = state.frame + 1
        return _Limited(inner, frame), outcome._replace(is_last=outcome.is_last | (frame >= steps))

    limit = steps if raw.spec.max_episode_steps is None else min(steps, raw.spec.max_episode_steps)
    return RawEnv(raw.spec._replace(max_episode_steps=limit), reset, step, lambda state: raw.observe(state.inner))


class _Flickering(NamedTuple):
    inner: PyTree
    hidden: Array  # bool [], nothing is seen


def flicker(raw: RawEnv, share: float) -> RawEnv:
    """Hides this share of the observations, in [0, 1], each by a draw of its own: all their numbers are 0.

    The first of an episode is always seen. What happened meanwhile has to be remembered, or predicted.

    Source: Hausknecht & Stone 2015, "Deep Recurrent Q-Learning for Partially Observable MDPs" (arXiv 1507.06527),
    section "Flickering Atari games", which hide half of the frames.
    """

    def step(key, state, action):
        key_step, key_hide = jax.random.split(key)
        inner, outcome = raw.step(key_step, state.inner, action)
        return _Flickering(inner, jax.random.bernoulli(key_hide, float(share))), outcome

    def observe(state):
        return jax.tree.map(lambda x: jnp.where(state.hidden, jnp.zeros_like(x), x), raw.observe(state.inner))

    return RawEnv(raw.spec, lambda key: _Flickering(raw.reset(key), jnp.bool_(False)), step, observe)


def action_repeat(raw: RawEnv, repeats: int) -> RawEnv:
    """Takes each action `repeats` times and sums the rewards; stops early where the episode ends.

    `spec.action_repeat` is multiplied by `repeats` and `spec.max_episode_steps` divided, rounding up. Raises
    `UsageError` where `repeats` is not an integer of at least 1.
    """
    repeats = checks.number("action_repeat", repeats)
    if repeats == 1:
        return raw

    def step(key, state, action):
        def frame(carry, key):
            state, outcome = carry
            after, then = raw.step(key, state, action)
            then = then._replace(reward=outcome.reward + then.reward)
            return _select(outcome.is_last, (state, outcome), (after, then)), None

        first, *rest = jax.random.split(key, repeats)
        return jax.lax.scan(frame, raw.step(first, state, action), jnp.stack(rest))[0]

    limit = raw.spec.max_episode_steps
    spec = raw.spec._replace(
        max_episode_steps=None if limit is None else math.ceil(limit / repeats),
        action_repeat=raw.spec.action_repeat * repeats,
    )
    return RawEnv(spec, raw.reset, step, raw.observe)


class _Running(NamedTuple):
    inner: PyTree
    is_last: Array  # bool [], the record given last ended its episode


def auto_reset(raw: RawEnv) -> Env:
    """Restarts episodes as gymnasium's NEXT_STEP mode does, so that the last observation of an episode is kept.

    The step after an `is_last` record ignores its action and gives the first record of a new episode: `is_first`,
    reward 0, no other flag.
    """

    def reset(key):
        inner = raw.reset(key)
        no = jnp.bool_(False)
        return _Running(inner, no), TimeStep(raw.observe(inner), jnp.float32(0), jnp.bool_(True), no, no)

    def step(key, state, action):
        key_reset, key_step = jax.random.split(key)
        inner, outcome = raw.step(key_step, state.inner, action)
        again = state.is_last
        # Choose between states and draw afterwards: one picture, whichever it is.
        inner = _select(again, raw.reset(key_reset), inner)
        reward = jnp.where(again, 0.0, outcome.reward).astype(jnp.float32)
        is_last, is_terminal = outcome.is_last & ~again, outcome.is_terminal & ~again
        return _Running(inner, is_last), TimeStep(raw.observe(inner), reward, again, is_last, is_terminal)

    return Env(raw.spec, reset, step)
