"""What is added to an environment's bare rules: time limits, action repeat, restarting, and the actions agents speak.

The rules are a `RawEnv`, which separates how the world moves from how it looks. So a step that restarts (under `vmap`
both branches of a choice are computed) and a step that repeats its action still draw one picture only. The order is
`auto_reset(action_repeat(time_limit(raw, frames), n))`, which is an `Env`; `agent_actions` goes around that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import checks
from wmjax.suites import SuiteError, check_names
from wmjax.types import Array, Box, Discrete, Env, EnvSpec, HostEnv, MultiDiscrete, PyTree, TimeStep, UsageError


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


def settled(raw: RawEnv) -> RawEnv:
    """Gives states the same dtypes at reset and after a step, as a scan needs: other libraries mix kinds of numbers."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    action = jax.ShapeDtypeStruct(raw.spec.action.shape, raw.spec.action.dtype)
    types = jax.eval_shape(lambda key, action: raw.step(key, raw.reset(key), action)[0], key, action)

    def settle(state):
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), state, types)

    def step(key, state, action):
        state, outcome = raw.step(key, state, action)
        return settle(state), outcome

    return raw._replace(reset=lambda key: settle(raw.reset(key)), step=step)


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


def agent_actions(env: Env | HostEnv) -> Env | HostEnv:
    """An environment that takes what agents emit; its `spec` stays the native one, which agents are built from.

    Of an `Env` it is `step` that takes them, of a `HostEnv` `native`.

    `Discrete(n)`: one-hot float32 `[n]`, argmax. `MultiDiscrete(ns)`: one-hots side by side, float32 `[sum(ns)]`.
    `Box`: float32 of the box's shape, clipped to [-1, 1], then `spec.action_map` or linearly to [low, high].
    Raises `UsageError` for any other space, and for a box without bounds.
    """
    convert = _converter(env.spec, isinstance(env, HostEnv))
    if isinstance(env, HostEnv):
        return env._replace(native=convert)
    return Env(env.spec, env.reset, lambda key, state, action: env.step(key, state, convert(action)))


def _converter(spec: EnvSpec, on_host: bool) -> Callable[[Array], Array]:
    space = spec.action
    if isinstance(space, Discrete):
        return lambda action: jnp.argmax(action, -1).astype(jnp.int32)
    if isinstance(space, MultiDiscrete):
        cuts = np.cumsum(space.ns)[:-1].tolist()
        return lambda action: jnp.stack(
            [jnp.argmax(part, -1).astype(jnp.int32) for part in jnp.split(action, cuts, -1)], -1
        )
    if isinstance(space, Box) and jnp.issubdtype(space.dtype, jnp.floating):
        return _box_converter(space, spec.action_map, on_host)
    raise UsageError(f"action space: {space} is not supported; valid are Discrete, MultiDiscrete and a Box of floats")


MAP = "give EnvSpec.action_map"
BOUNDS = (
    "give it some: gymnasium.wrappers.TransformAction(env, lambda a: a, gymnasium.spaces.Box(-1, 1, "
    "env.action_space.shape)), or RescaleAction(env, -1, 1) in place of a ClipAction that took them away"
)


def _box_converter(space: Box, action_map: Callable[[Array], Array] | None, on_host: bool) -> Callable[[Array], Array]:
    if action_map is not None:
        return lambda action: action_map(jnp.clip(action, -1, 1)).astype(space.dtype)
    with np.errstate(over="ignore"):  # what is infinite then has no bounds, as below
        low, high = (np.broadcast_to(np.asarray(x, space.dtype), space.shape) for x in (space.low, space.high))
    # float32's largest number is how some libraries write "no bound".
    if not (np.abs([low, high]) < np.finfo(np.float32).max).all():
        shown = f"{space.dtype} {space.shape} in [{np.min(low):g}, {np.max(high):g}]"
        raise UsageError(f"action space: {shown} has no bounds to rescale [-1, 1] to; {BOUNDS if on_host else MAP}")
    # A weighted mean, and a clip after it, because rounding must not leave the bounds.
    return lambda action: jnp.clip(
        (1 - jnp.clip(action, -1, 1)) / 2 * low + (1 + jnp.clip(action, -1, 1)) / 2 * high, low, high
    ).astype(space.dtype)


def with_arguments(name: str, params: Any, args: Mapping[str, Any]) -> Any:
    """Parameters of an environment, a dataclass of numbers, some of which are given by name.

    Raises `UsageError` for a name that is not there, and for a value that is no number of that kind.
    """
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    try:
        check_names(name, [field for field, value in fields.items() if np.shape(value) == ()], args)
    except SuiteError as error:
        raise UsageError(str(error)) from None
    for field, value in args.items():
        real = np.issubdtype(np.asarray(fields[field]).dtype, np.floating)
        kinds = bool if isinstance(fields[field], bool) else (int, float) if real else int
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise UsageError(
                f"env_args: {field} of {name!r} is {value!r:.80}, which is not valid; such as {fields[field]} is"
            )
    return dataclasses.replace(params, **args)
