"""What a user's own environment gives is what its `EnvSpec` says: found by its shapes alone, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.raw_env import Outcome, RawEnv, auto_reset
from wmjax.suites.pictures import BRIGHT
from wmjax.types import Box, Discrete, Env, EnvSpec, HostEnv, MultiDiscrete, PyTree, TimeStep, UsageError

SPACES = "Discrete(n), MultiDiscrete(ns) or Box(low, high, shape, dtype) of wmjax"
RESET = {
    Env: "reset(key) -> (state, TimeStep(obs, reward, is_first, is_last, is_terminal))",
    RawEnv: "reset(key) -> state",
}
STEP = {
    Env: "step(key, state, action) -> (state, TimeStep(obs, reward, is_first, is_last, is_terminal))",
    RawEnv: "step(key, state, action) -> (state, Outcome(reward, is_last, is_terminal))",
}
WHOLE_TYPES = (jnp.bool_, jnp.integer)


def checked(env: Env | RawEnv | HostEnv) -> Env | HostEnv:
    """An environment of a user's own, whose outputs are what its `spec` says; what is harmless is settled.

    Settled are dtypes that hold the same numbers: rewards become float32, flags bool, observations what the spec says
    where that loses nothing, and states keep from step to step the dtypes that fit both reset and step. A `RawEnv`
    restarts by `auto_reset`; where a step is terminal it is the last, also where only the one flag says so.

    Raises:
      UsageError: a spec that is none, a function that raises an error while it is traced, a state that changes its
        structure or shapes, an observation, reward or flag of another kind than the spec says; the message says which,
        what was found and what is valid.
    """
    check_spec(env.spec)
    if isinstance(env, HostEnv):
        _check_callables(env, ("start", "native"))
        return env
    if isinstance(env, RawEnv):
        return auto_reset(_checked_raw(env))
    return _checked_env(env)


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def check_spec(spec: Any) -> None:
    """Raises `UsageError` where an `EnvSpec` is not one, naming the field."""
    if not isinstance(spec, EnvSpec):
        raise _invalid("its spec is", f"a {type(spec).__name__}", "an EnvSpec is")
    if not isinstance(spec.obs, dict) or not spec.obs:
        example = "{'vector': Box(-1, 1, (3,))}"
        raise _invalid("spec.obs is", f"{spec.obs!r:.80}", f"spaces by name are, such as {example}")
    for name, space in spec.obs.items():
        if not isinstance(name, str):
            raise _invalid("spec.obs has the name", f"{name!r:.80}", "text is")
        _check_space(f"spec.obs[{name!r}]", space)
        if space.dtype == "uint8" and len(space.shape) == 3 and np.max(space.high) < BRIGHT:
            valid = "pictures hold values up to 255, and these would be read as black"
            raise _invalid(f"spec.obs[{name!r}] is", str(space), valid)
    _check_space("spec.action", spec.action)
    for field in ("max_episode_steps", "action_repeat"):
        value = getattr(spec, field)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
        if not whole and not (value is None and field == "max_episode_steps"):
            raise _invalid(f"spec.{field} is", f"{value!r:.80}", "an integer of at least 1 is")
    if spec.action_map is not None and not callable(spec.action_map):
        raise _invalid("spec.action_map is", f"{spec.action_map!r:.80}", "a function or None is")
    if spec.survival not in (None, True, False):
        raise _invalid("spec.survival is", f"{spec.survival!r:.80}", "True, False or None is")


def _invalid(what: str, found: str, valid: str) -> UsageError:
    return UsageError(f"env: {what} {found}, which is not valid; {valid}")


def _check_space(field: str, space: Any) -> None:
    if not isinstance(space, Discrete | MultiDiscrete | Box):
        line, kind = _translated(space), type(space)
        raise _invalid(f"{field} is", f"{kind.__module__}.{kind.__name__}", f"write {line}" if line else f"{SPACES} is")


def _translated(space: Any) -> str | None:
    """What to write for a space of Gymnasium, or of a library whose spaces look alike."""
    names = [cls.__name__ for cls in type(space).__mro__]
    kind = next((name for name in names if name in ("Box", "Discrete", "MultiDiscrete")), None)
    if kind == "Discrete" and hasattr(space, "n"):
        return f"wmjax.Discrete({space.n})"
    if kind == "MultiDiscrete" and hasattr(space, "nvec"):
        return f"wmjax.MultiDiscrete({tuple(np.ravel(space.nvec).tolist())})"
    if kind == "Box" and hasattr(space, "low") and hasattr(space, "high"):
        low, high = jnp.min(jnp.asarray(space.low)), jnp.max(jnp.asarray(space.high))
        shape = tuple(getattr(space, "shape", None) or jnp.shape(space.low))
        dtype = "uint8" if jnp.dtype(getattr(space, "dtype", "float32")) == jnp.uint8 else "float32"
        return f"wmjax.Box({float(low):g}, {float(high):g}, {shape}, {dtype!r})"
    return None


def _check_callables(env: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if not callable(getattr(env, name)):
            raise _invalid(f"its {name} is", f"{getattr(env, name)!r:.80}", "a function is")


# ---------------------------------------------------------------------------------------------------------------------
# What is given


def _arguments(spec: EnvSpec) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """A key and an action."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return key, jax.ShapeDtypeStruct(spec.action.shape, spec.action.dtype)


def _shapes(what: str, valid: str, function: Callable, *args: Any) -> PyTree:
    """Shapes and dtypes that a user's function returns. Raises `UsageError` where it raises an error."""
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:  # whatever the function raises
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UsageError(f"env: its {what} raised {type(error).__name__}: {text:.300}; valid is {valid}") from error


def _pair(env: Env | RawEnv, what: str, valid: str, kind: type, *args: Any) -> tuple[PyTree, Any]:
    """Shapes and dtypes of a state, and of the `kind` that a user's function returns with it."""
    given = _shapes(what, valid, getattr(env, what), *args)
    if type(given) is not tuple or len(given) != 2 or not isinstance(given[1], kind):
        second = f" with a {type(given[1]).__name__}" if type(given) is tuple and len(given) == 2 else ""
        size = f" of {len(given)}" if isinstance(given, tuple) else ""
        raise UsageError(f"env: its {what} returns a {type(given).__name__}{size}{second}, not valid; {valid} is")
    return given


def _checked_env(env: Env) -> Env:
    _check_callables(env, ("reset", "step"))
    key, action = _arguments(env.spec)
    state, first = _pair(env, "reset", RESET[Env], TimeStep, key)
    after = lambda state: _pair(env, "step", STEP[Env], TimeStep, key, state, action)
    types = _settled_types(state, lambda state: after(state)[0])
    for what, step in (("reset", first), ("step", after(types)[1])):
        _check_obs(what, env.spec, step.obs)
        for name in TimeStep._fields[1:]:
            _check_scalar(what, name, getattr(step, name))

    def settle(given: tuple[PyTree, TimeStep]) -> tuple[PyTree, TimeStep]:
        state, step = given
        flags = {name: jnp.asarray(getattr(step, name)).astype(bool) for name in TimeStep._fields[2:]}
        obs, reward = _settled_obs(env.spec, step.obs), jnp.asarray(step.reward, jnp.float32)
        return _as_types(state, types), TimeStep(obs, reward, **flags)

    return Env(env.spec, lambda key: settle(env.reset(key)), lambda *args: settle(env.step(*args)))


def _checked_raw(raw: RawEnv) -> RawEnv:
    _check_callables(raw, ("reset", "step", "observe"))
    key, action = _arguments(raw.spec)
    after = lambda state: _pair(raw, "step", STEP[RawEnv], Outcome, key, state, action)
    types = _settled_types(_shapes("reset", RESET[RawEnv], raw.reset, key), lambda state: after(state)[0])
    _check_obs("observe", raw.spec, _shapes("observe", "observe(state) -> obs", raw.observe, types))
    for name, value in after(types)[1]._asdict().items():
        _check_scalar("step", name, value)

    def step(key: Any, state: PyTree, action: Any) -> tuple[PyTree, Outcome]:
        state, outcome = raw.step(key, state, action)
        last, terminal = (jnp.asarray(flag).astype(bool) for flag in outcome[1:])
        return _as_types(state, types), Outcome(jnp.asarray(outcome.reward, jnp.float32), last | terminal, terminal)

    return raw._replace(
        reset=lambda key: _as_types(raw.reset(key), types),
        step=step,
        observe=lambda state: _settled_obs(raw.spec, raw.observe(state)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# States


def _settled_types(state: PyTree, step: Callable[[PyTree], PyTree]) -> PyTree:
    """Shapes and dtypes of states that hold what reset gives, and what each step makes of that."""
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    for _ in range(4):  # each time a dtype may only grow: from bool to integers to floats
        after = step(types)
        _check_alike(types, after)
        wider = jax.tree.map(_wider, types, after)
        if wider == types:
            return types
        types = wider
    raise UsageError(f"env: dtypes of its state change in every step, at last to {wider!r:.200}; equal ones are valid")


def _wider(a: Any, b: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype if a.dtype == b.dtype else jnp.promote_types(a.dtype, b.dtype))


def _check_alike(before: PyTree, after: PyTree) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise UsageError(
            f"env: its step returns a state of the structure {jax.tree.structure(after)}, its reset of "
            f"{jax.tree.structure(before)}; one structure is valid"
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = "state" + jax.tree_util.keystr(path)
        if a.shape != b.shape:
            raise UsageError(
                f"env: {name} has the shape {a.shape} after its reset and {b.shape} after its step; one shape is valid"
            )
        if a.dtype != b.dtype and (_is_special(a) or _is_special(b)):
            raise UsageError(
                f"env: {name} is {a.dtype} after its reset and {b.dtype} after its step; one dtype is valid"
            )


def _is_special(leaf: Any) -> bool:
    """Whether it is no number, such as a random key."""
    return not _is_any(leaf.dtype, jnp.number, jnp.bool_)


def _as_types(state: PyTree, types: PyTree) -> PyTree:
    return jax.tree.map(lambda x, like: x if _is_special(like) else jnp.asarray(x).astype(like.dtype), state, types)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def _check_scalar(what: str, name: str, value: Any) -> None:
    """Of a reward, any number is taken; of a flag, any that is 0 or 1."""
    which = f"{name} of its {what}"
    if not _is_array(value):
        raise _invalid(f"{which} is", f"a {type(value).__name__}", "one number is")
    if value.shape != ():
        valid = "() is, one environment's (an array of one entry becomes that by x[0] or jnp.squeeze)"
        raise _invalid(f"{which} has the shape", str(value.shape), valid)
    if not _is_any(value.dtype, *WHOLE_TYPES, jnp.floating):
        raise _invalid(f"{which} is", str(value.dtype), f"{'float32' if name == 'reward' else 'bool'} is")


def _check_obs(what: str, spec: EnvSpec, obs: Any) -> None:
    names = sorted(spec.obs)
    if not isinstance(obs, dict):
        valid = f"arrays by name are, and spec.obs says {', '.join(map(repr, names))}: {{{names[0]!r}: ...}}"
        raise _invalid(f"obs of its {what} is", _shown(obs), valid)
    if set(obs) != set(spec.obs):
        raise UsageError(f"env: obs of its {what} has the entries {sorted(map(str, obs))}; spec.obs says {names}")
    for name, space in spec.obs.items():
        _check_entry(f"obs[{name!r}] of its {what}", space, obs[name])


def _check_entry(what: str, space: Any, value: Any) -> None:
    shape, dtype = space.shape, space.dtype
    if not _is_array(value):
        raise _invalid(f"{what} is", _shown(value), f"{dtype} {list(shape)} is, as its spec says")
    if value.shape != shape:
        raise UsageError(f"env: {what} has the shape {value.shape}; its spec says {shape}")
    if not _is_harmless(value.dtype, jnp.dtype(dtype)):
        how = " (values of 0 to 255, by .astype(jnp.uint8))" if dtype == "uint8" else ""
        raise UsageError(f"env: {what} is {value.dtype}; its spec says {dtype}{how}")


def _is_harmless(found: Any, said: Any) -> bool:
    """Whether values keep their meaning in the dtype that the spec says. A picture of floats in [0, 1] would not."""
    if found == said:
        return True
    if jnp.issubdtype(said, jnp.floating):
        return _is_any(found, *WHOLE_TYPES, jnp.floating)
    return said != jnp.uint8 and jnp.issubdtype(said, jnp.integer) and _is_any(found, *WHOLE_TYPES)


def _is_any(dtype: Any, *kinds: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _settled_obs(spec: EnvSpec, obs: dict[str, Any]) -> dict[str, Any]:
    return {name: jnp.asarray(value).astype(spec.obs[name].dtype) for name, value in obs.items()}


def _shown(value: Any) -> str:
    return f"an array, {value.dtype} {list(value.shape)}" if _is_array(value) else f"a {type(value).__name__}"
