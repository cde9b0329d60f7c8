"""The actions that agents speak around any environment, and what environments of other libraries need besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import RawEnv
from wmjax.suites import SuiteError, check_names
from wmjax.types import Array, Box, Discrete, Env, EnvSpec, HostEnv, MultiDiscrete, UsageError


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
