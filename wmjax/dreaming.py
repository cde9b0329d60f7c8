"""What can be done with any world model: filter, act, imagine, predict open-loop, and step it like an environment.

Time is a `lax.scan` here and nowhere else. A `key` is one key, or one for each row of the batch; step t uses
`fold_in(key, t)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wmjax import checks
from wmjax.ops import contracts, noise
from wmjax.ops.scan import scan
from wmjax.raw_env import Outcome, RawEnv, auto_reset, time_limit
from wmjax.types import Array, Box, Discrete, Env, EnvSpec, MultiDiscrete, PyTree, Trajectory, WorldModel


def observe(
    model: WorldModel,
    params: PyTree,
    key: Array,
    state: PyTree,
    prev_action: Array,
    embed: PyTree,
    is_first: Array,
    *,
    emit: Callable[[PyTree], PyTree] = lambda state: state,
    remat: bool = False,
) -> tuple[PyTree, PyTree]:
    """Filters a sequence: the state after each observation.

    Args:
      key: one key or keys `[B]`; consumed.
      state: the state before the first step, `[B, ...]`.
      prev_action: `[T, B, A]`, the action that led to step t; ignored where `is_first`.
      embed: `[T, B, ...]`, from `model.encode`.
      is_first: bool `[T, B]`.
      emit: what to keep of each state; a scan stacks only this.
      remat: recompute the step in the backward pass instead of storing its insides.

    Returns:
      The last state, and `emit` of every state, `[T, B, ...]`.
    """
    contracts.exactly(None, None, is_first=is_first)
    contracts.booleans(is_first=is_first)
    contracts.floating(None, prev_action=prev_action)
    contracts.leading(2, prev_action=prev_action, embed=embed, is_first=is_first)
    contracts.leading(1, state=state)
    contracts.keys(is_first.shape[1], key=key)

    def step(state, inputs):
        t, prev_action, embed, is_first = inputs
        state = model.observe(params, noise.fold_in(key, t), state, prev_action, embed, is_first)
        return state, emit(state)

    steps = jnp.arange(is_first.shape[0])
    return scan(step, state, (steps, prev_action, embed, is_first), remat=remat)


class Acting(NamedTuple):
    """Four fields of an `Agent`."""

    policy_carry: Callable
    policy: Callable
    act_carry: Callable
    act: Callable


def acting(
    model: WorldModel,
    choose: Callable,
    action_size: int,
    *,
    latent: Callable[[PyTree], PyTree] = lambda state: (),
    eval_model: WorldModel | None = None,
) -> Acting:
    """How an agent acts whose policy sees the filtered state and remembers nothing else.

    Args:
      choose: `(params, key, State, *, explore) -> action [B, A]`.
      latent: what replay keeps of a state.
      eval_model: filters where the agent does not explore; None: `model`.
    """

    def policy_carry(params, batch_size):
        del params, batch_size
        return ()

    def policy(params, key, carry, state, *, explore):
        return carry, choose(params, key, state, explore=explore)

    def act_carry(params, batch_size):
        return model.init_state(params, batch_size), jnp.zeros((batch_size, action_size))

    def act(params, key, carry, timestep, *, explore):
        key_observe, key_policy = noise.split(key, 2)
        filtering = model if explore or eval_model is None else eval_model
        embed = filtering.encode(params, timestep.obs)
        state = filtering.observe(params, key_observe, *carry, embed, timestep.is_first)
        action = choose(params, key_policy, state, explore=explore)
        return (state, action), action, latent(state)

    return Acting(policy_carry, policy, act_carry, act)


def last_steps(tree: PyTree, count: int) -> PyTree:
    """The last steps of each row as rows of their own, to imagine from: `[T, B, ...]` to `[count * B, ...]`."""
    contracts.leading(2, tree=tree)
    return jax.tree.map(lambda x: x[-count:].reshape(count * x.shape[1], *x.shape[2:]), tree)


def imagine(
    model: WorldModel,
    params: PyTree,
    key: Array,
    state: PyTree,
    policy: Callable,
    horizon: int,
    *,
    policy_carry: PyTree = (),
    emit: Callable[[PyTree], PyTree] = lambda state: state,
    remat: bool = False,
) -> tuple[PyTree, PyTree, Array]:
    """Rolls the model forward without observations, the policy choosing actions from its states.

    Args:
      key: one key or keys `[B]`; consumed.
      state: start states `[B, ...]`.
      policy: `(key, policy_carry, state) -> (policy_carry, action [B, A])`; `given_actions` replays a sequence.
      horizon: steps H.
      policy_carry: the policy's own memory at the start.
      emit: what to keep of each state.
      remat: recompute the step in the backward pass instead of storing its insides.

    Returns:
      The last state, `emit` of the H + 1 states (the start first) `[H + 1, B, ...]`, and the H actions `[H, B, A]`,
      where action t leads from state t to state t + 1.
    """

    contracts.leading(1, state=state)
    contracts.keys(*jnp.shape(next(iter(jax.tree.leaves(state)), ()))[:1], key=key)

    def step(carry, t):
        state, policy_carry = carry
        key_policy, key_model = noise.split(noise.fold_in(key, t), 2)
        policy_carry, action = policy(key_policy, policy_carry, state)
        state = model.imagine(params, key_model, state, action)
        return (state, policy_carry), (emit(state), action)

    start = emit(state)
    (state, _), (emitted, actions) = scan(step, (state, policy_carry), jnp.arange(horizon), remat=remat)
    emitted = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, emitted)
    return state, emitted, actions


def given_actions(actions: Array) -> tuple[Callable, Array]:
    """A policy for `imagine` that plays `actions` `[H, B, A]`, and its first `policy_carry`."""
    contracts.exactly(None, None, None, actions=actions)
    contracts.floating(actions=actions)

    def policy(key, t, state):
        del key, state
        return t + 1, actions[t]

    return policy, jnp.int32(0)


def observe_until(
    model: WorldModel, params: PyTree, key: Array, trajectory: Trajectory, stops: Array
) -> tuple[PyTree, Array]:
    """Filters each row of a sequence up to a step of its own: the state before that step, and the action to it.

    Args:
      key: consumed.
      trajectory: `[T, B]` records; each row starts from the model's initial state.
      stops: int32 `[B]`, in [0, T]; 0 gives the initial state and zeros.
    """
    contracts.leading(2, trajectory=trajectory)
    contracts.booleans(is_first=trajectory.step.is_first)
    contracts.exactly(trajectory.action.shape[1], stops=stops)
    contracts.integers(stops=stops)
    contracts.keys(key=key)

    def step(carry, inputs):
        t, step, action = inputs
        state, prev_action = carry
        embed = model.encode(params, step.obs)  # here, for all steps at once may be more than fits
        state = model.observe(params, jax.random.fold_in(key, t), state, prev_action, embed, step.is_first)
        going = lambda x: (t < stops).reshape(-1, *[1] * (x.ndim - 1))
        return jax.tree.map(lambda new, old: jnp.where(going(new), new, old), (state, action), carry), None

    start = model.init_state(params, trajectory.action.shape[1]), jnp.zeros_like(trajectory.action[0])
    steps = jnp.arange(trajectory.action.shape[0])
    return jax.lax.scan(step, start, (steps, trajectory.step, trajectory.action))[0]


def open_loop(
    model: WorldModel,
    params: PyTree,
    key: Array,
    trajectory: Trajectory,
    context: int,
    before: tuple[PyTree, Array] | None = None,
) -> dict[str, Array]:
    """Predicts observations from the first `context` steps and the actions alone.

    Args:
      key: consumed.
      trajectory: `[T, B]` records.
      context: steps that the model sees, in [1, T].
      before: the state before the first record and the action to it, as `observe_until` gives them; None: the model's
        initial state.

    Returns:
      Decoded observations `[T, B, ...]`: reconstructions for the first `context` steps, predictions after them.
      Images are float32 in [0, 255].
    """
    contracts.keys(key=key)
    contracts.leading(2, trajectory=trajectory)
    contracts.booleans(is_first=trajectory.step.is_first)
    key_observe, key_imagine = jax.random.split(key)
    if before is None:
        before = model.init_state(params, trajectory.action.shape[1]), jnp.zeros_like(trajectory.action[0])
    state, action = before
    prev_action = jnp.concatenate([action[None], trajectory.action[:-1]])
    seen = jax.tree.map(lambda x: x[:context], trajectory.step)
    embed = model.encode(params, seen.obs)
    state, states = observe(model, params, key_observe, state, prev_action[:context], embed, seen.is_first)
    policy, carry = given_actions(trajectory.action[context - 1 : -1])
    steps = trajectory.action.shape[0] - context
    _, imagined, _ = imagine(model, params, key_imagine, state, policy, steps, policy_carry=carry)
    states = jax.tree.map(lambda a, b: jnp.concatenate([a, b[1:]]), states, imagined)
    return model.decode(params, states)


def dream_env(
    model: WorldModel,
    params: PyTree,
    starts: PyTree,
    spec: EnvSpec,
    *,
    horizon: int,
    obs: str = "decoded",
    end: str = "threshold",
    actions: str = "native",
) -> Env:
    """The world model as an environment like any other.

    Build it inside the traced function: parameters captured outside of it become constants of the program.

    Args:
      model, params: the world model.
      starts: states to start episodes from, `[N, ...]`, drawn uniformly.
      spec: of the environment that the model learned. The dream keeps its observations and its discrete actions;
        `Box` actions are the agent's own, in [-1, 1].
      horizon: steps after which an episode is cut (`is_last`, not `is_terminal`).
      obs: `decoded` gives the entries of `spec.obs` in their own dtypes; `state` gives {"state": State}, for policies
        that act on states.
      end: an episode is terminal where P(continue) < 0.5 (`threshold`), or by a draw with that probability (`sample`).
      actions: `native`, those of the dream's spec; `agent`, what agents emit, so that one-hots stay one-hots.

    Returns:
      An `Env`: one dream, batched by `vmap`, restarting by itself.

    Raises:
      ValueError: `obs`, `end` or `actions` is none of the above.
      UsageError: `horizon` is not an integer of at least 1.
    """
    if obs not in ("decoded", "state") or end not in ("threshold", "sample") or actions not in ("native", "agent"):
        raise ValueError(
            f"obs={obs!r} (valid: decoded, state), end={end!r} (valid: threshold, sample), "
            f"actions={actions!r} (valid: native, agent)"
        )
    horizon = checks.number("horizon", horizon, checks.BOUNDS["steps"])
    contracts.leading(1, starts=starts)
    action = spec.action
    if isinstance(action, Box):
        action = Box(-1.0, 1.0, action.shape)
    count = jax.tree.leaves(starts)[0].shape[0]

    def reset(key):
        index = jax.random.randint(key, (), 0, count)
        return jax.tree.map(lambda x: x[index], starts)

    def step(key, state, action):
        key_model, key_end = jax.random.split(key)
        action = action if actions == "agent" else _to_agent(action, spec.action)
        state = model.imagine(params, key_model, state, action)
        reward, cont = model.predict(params, state)
        terminal = cont < (0.5 if end == "threshold" else jax.random.uniform(key_end))
        return state, Outcome(reward, terminal, terminal)

    def observe(state):
        if obs == "state":
            return {"state": state}
        decoded = model.decode(params, state)
        return {name: _to_space(decoded[name], space) for name, space in spec.obs.items()}

    dream_spec = EnvSpec(spec.obs if obs == "decoded" else {}, action)
    return auto_reset(time_limit(RawEnv(dream_spec, reset, step, observe), horizon))


def _to_space(x: Array, space) -> Array:
    x = jnp.clip(jnp.round(x), 0, 255) if space.dtype == "uint8" else x
    return x.astype(space.dtype)


def _to_agent(action: Array, space) -> Array:
    if isinstance(space, Discrete):
        return jax.nn.one_hot(action, space.n)
    if isinstance(space, MultiDiscrete):
        return jnp.concatenate([jax.nn.one_hot(action[i], n) for i, n in enumerate(space.ns)])
    return action.astype(jnp.float32)
