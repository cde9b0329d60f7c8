"""What is played, as compiled programs: a dream, and the real environment beside it; each is a batch of one.

In a step of the dream the agent chooses (or somebody else has chosen), the model imagines what follows, predicts and
decodes it. In a step of the real environment the model also filters what is seen, so that a dream may begin there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import planning
from wmjax.figures import frames
from wmjax.loops import compiler
from wmjax.loops.host.rollout import Options, seed_words, start
from wmjax.nets.spaces import action_size, is_image
from wmjax.play.controls import action_of, controls
from wmjax.run import Run
from wmjax.run_folder import warn
from wmjax.types import Agent, Array, Env, HostEnv, PyTree, TimeStep, UsageError

# Few enough candidates that a person can wait for each step.
PLANNER = planning.ICEMConfig(candidates=32, elites=8, iterations=2)
REACH = 10  # steps that it looks ahead, where the model's context holds so many


class Dream(NamedTuple):
    """Where a dream stands, or what the model believes of the real environment; leaves are `[1, ...]`."""

    state: PyTree  # of the model
    carry: PyTree  # the policy's own memory, which has not seen `state` yet


class Imagined(NamedTuple):
    """What is seen of a dream; NaN where nothing predicts it."""

    frame: np.ndarray  # uint8 [H, W, 3], its pictures side by side
    reward: float
    cont: float  # P(not terminal)
    value: float  # the return that the critic expects


class Real(NamedTuple):
    """Where the real environment stands; leaves are `[1, ...]`."""

    place: PyTree  # the environment's state; on the host the number of steps that it has taken
    timestep: TimeStep  # not acted on yet
    belief: Dream  # filtered from what was seen of the episode
    earned: Array  # float32 [1], sum of the rewards since it began


class Happened(NamedTuple):
    """What is seen of the real environment; fields as in `Real` and `TimeStep`."""

    frame: np.ndarray  # uint8 [H, W, 3]
    reward: float
    is_first: bool
    is_last: bool
    is_terminal: bool
    earned: float


class Side(NamedTuple):
    """One real environment. On the host it has one place only, and cannot go back to another."""

    begin: Callable  # (key) -> (Real, Happened), a new episode
    step: Callable  # (key, Real, action [A]) -> (Real, Happened); None where it cannot go on from there
    newest: Callable  # (Real, Happened) -> those that it can go on from
    close: Callable  # () -> None


class Game(NamedTuple):
    """A run that can be played."""

    space: Any  # of the environment's own actions
    controls: dict[str, Any]  # as `controls.controls`
    about: dict[str, Any]  # of the run, for the page; JSON
    temperature: float | None  # that the model draws at; None: it has none
    look: Callable  # (Dream) -> Imagined
    dream: Callable  # (key, Dream, action [A], by_agent, temperature) -> (Dream, action [A] taken, Imagined)
    plan: Callable | None  # (key, Dream, plan, or None) -> (plan, action [A]); None: nothing can be planned
    side: Callable  # () -> Side


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def _pictures(env: Env | HostEnv) -> list[str]:
    names = [name for name, space in env.spec.obs.items() if is_image(space)]
    if not names:
        raise UsageError(
            f"run: the environment observes {', '.join(env.spec.obs) or 'nothing'}, which is no picture, so that its "
            "dreams cannot be seen; an agent of an environment with pictures can be played"
        )
    return names


def _shown(obs: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """The pictures of an observation `[1, ...]` side by side, uint8 `[H, W, 3]`."""
    return np.concatenate([frames.rgb(np.asarray(obs[name])[0]) for name in names], 1)


def _outlook(agent: Agent, names: list[str], valued: bool) -> Callable:
    """`(params, Dream) -> pictures, float32 [3]`: what is decoded, and reward, cont and value."""
    model = agent.model

    def outlook(params: PyTree, dream: Dream) -> tuple[dict[str, Array], Array]:
        obs = model.decode(params, dream.state)
        pictures = {n: jnp.clip(jnp.round(jnp.nan_to_num(obs[n])), 0, 255).astype(jnp.uint8) for n in names}
        reward, cont = model.predict(params, dream.state)
        unknown = jnp.full(1, jnp.nan)
        reward = reward if model.no_rewards is None else unknown
        value = agent.value(params, dream.carry, dream.state) if valued else unknown
        return pictures, jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in (reward, cont, value)])

    return outlook


def follow(
    agent: Agent, params: PyTree, key: Array, real: Real, place: PyTree, action: Array, timestep: TimeStep
) -> Real:
    """What is real after one more record `[1, ...]`, to which `action` `[1, A]` led; at a first one all is new."""
    model, before = agent.model, real.belief
    carry = before.carry
    key_policy, key_observe = jax.random.split(key)
    if jax.tree.leaves(carry):  # what a policy remembers comes of the states that it has seen
        carry, _ = agent.policy(params, key_policy, carry, before.state, explore=False)
        fresh = lambda new, old: jnp.where(timestep.is_first.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        carry = jax.tree.map(fresh, agent.policy_carry(params, 1), carry)
    embed = model.encode(params, timestep.obs)
    state = model.observe(params, key_observe, before.state, action, embed, timestep.is_first)
    earned = jnp.where(timestep.is_first, 0.0, real.earned + timestep.reward)
    return Real(place, timestep, Dream(state, carry), earned)


def _nothing(agent: Agent, params: PyTree) -> Real:
    """Before anything was seen."""
    return Real((), (), Dream(agent.model.init_state(params, 1), agent.policy_carry(params, 1)), jnp.zeros(1))


def _compiled(function: Callable) -> Callable:
    """Compiled, with results of definite types, so that what a step gives the next one need not be compiled for."""

    @functools.wraps(function)
    def definite(*args: Any) -> PyTree:
        settle = lambda x: (
            x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, x.dtype)
        )
        return jax.tree.map(lambda x: settle(jnp.asarray(x)), function(*args))

    return jax.jit(definite, compiler_options=compiler.options())


def _has_value(agent: Agent, params: PyTree) -> str | None:
    """Why there is no value to show; None: there is one."""
    if agent.value is None:
        return "this agent has no critic"
    try:
        nothing = jax.eval_shape(lambda params: _nothing(agent, params).belief, params)
        jax.eval_shape(agent.value, params, nothing.carry, nothing.state)
    except KeyError:
        return "the file holds no critic"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The real environment


def _happened(real: Real, names: list[str]) -> Happened:
    step, earned = jax.device_get((real.timestep, real.earned))
    flags = (bool(x[0]) for x in (step.is_first, step.is_last, step.is_terminal))
    return Happened(_shown(step.obs, names), float(step.reward[0]), *flags, float(earned[0]))


def _device_side(agent: Agent, env: Env, params: PyTree, names: list[str]) -> Callable:
    def begin(params: PyTree, key: Array) -> Real:
        key_env, key_model = jax.random.split(key)
        place, timestep = jax.vmap(env.reset)(key_env[None])
        action = jnp.zeros((1, action_size(env.spec)))
        return follow(agent, params, key_model, _nothing(agent, params), place, action, timestep)

    def step(params: PyTree, key: Array, real: Real, action: Array) -> Real:
        key_env, key_model = jax.random.split(key)
        action = action[None]
        place, timestep = jax.vmap(env.step)(key_env[None], real.place, action)
        return follow(agent, params, key_model, real, place, action, timestep)

    begin, step = _compiled(begin), _compiled(step)
    seen = lambda real: (real, _happened(real, names))
    side = Side(
        lambda key: seen(begin(params, key)),
        lambda key, real, action: seen(step(params, key, real, action)),
        lambda real, happened: (real, happened),
        lambda: None,
    )
    return lambda: side


def _host_side(agent: Agent, env: HostEnv, params: PyTree, names: list[str]) -> Callable:
    filtered = _compiled(lambda params, key, *rest: follow(agent, params, key, *rest))
    native = _compiled(lambda action: env.native(action)[None])
    zeros = np.zeros((1, action_size(env.spec)), np.float32)

    def side() -> Side:
        envs, newest = start(env, 1, Options(workers=1), training=False, say=warn), []

        def seen(key: Array, before: Real, action: np.ndarray, timestep: TimeStep) -> tuple[Real, Happened]:
            count = newest[0][0].place + 1 if newest else 0
            before = before._replace(place=(), timestep=())
            real = filtered(params, key, before, (), action, timestep)._replace(place=count)
            newest[:] = [(real, _happened(real, names))]
            return newest[0]

        def begin(key: Array) -> tuple[Real, Happened]:
            return seen(key, _nothing(agent, params), zeros, envs.reset([seed_words(key)]))

        def step(key: Array, real: Real, action: np.ndarray) -> tuple[Real, Happened] | None:
            if real.place != newest[0][0].place:
                return None
            envs.send(np.asarray(native(action)))
            return seen(key, real, action[None], envs.receive())

        return Side(begin, step, lambda real, happened: newest[0], envs.close)

    return side


# ---------------------------------------------------------------------------------------------------------------------
# A run


def make_game(run: Run, env: Any = None, planner: planning.PlannerConfig | None = None) -> Game:
    """What can be played of a run of one seed.

    Args:
      run: the run.
      env: another environment, as for `Run.evaluate`.
      planner: who plans where a planner drives; None: a small one.

    Raises:
      UsageError: the environment has no pictures, or more actions than a page shows, or is none (of a run on data
        alone); the planner does not fit.
    """
    agent, env = run.playing(0, env, None)
    params, model = run.state.variables, agent.model
    names = _pictures(env)
    why_no_value = _has_value(agent, params)
    outlook = _outlook(agent, names, why_no_value is None)
    look = _compiled(outlook)

    @_compiled
    def dream(params, key, dream, given, by_agent, temperature):
        key_policy, key_model = jax.random.split(key)
        carry, action = agent.policy(params, key_policy, dream.carry, dream.state, explore=False)
        action = jnp.where(by_agent, action, given[None])
        more = () if model.temperature is None else (temperature,)
        dream = Dream(model.imagine(params, key_model, dream.state, action, *more), carry)
        return dream, action[0], outlook(params, dream)

    def imagined(pictures: dict[str, Array], numbers: Array) -> Imagined:
        return Imagined(_shown(pictures, names), *map(float, numbers))

    def dream_step(key, at, action, by_agent, temperature):
        at, action, found = dream(params, key, at, action, by_agent, np.float32(temperature or 1))
        action, found = jax.device_get((action, found))
        return at, action, imagined(*found)

    plan, why_no_plan = _planning(agent, env, params, planner)
    side = (_host_side if isinstance(env, HostEnv) else _device_side)(agent, env, params, names)
    height, width, _ = _shape(env, names)
    shown = controls(env.spec.action, run.description.get("env"))
    about = {
        "title": run.title(), "width": width, "height": height, "pictures": names, "controls": shown,
        "on_host": isinstance(env, HostEnv), "temperature": model.temperature, "no_value": why_no_value,
        "no_reward": model.no_rewards, "no_plan": why_no_plan,
        "no_temperature": None if model.temperature is not None else "this model's latents have no temperature",
    }  # fmt: skip
    return Game(
        env.spec.action, shown, about, model.temperature, lambda at: imagined(*jax.device_get(look(params, at))),
        dream_step, plan, side,
    )  # fmt: skip


def _shape(env: Env | HostEnv, names: list[str]) -> tuple[int, ...]:
    zeros = {name: np.zeros((1, *env.spec.obs[name].shape), np.uint8) for name in names}
    return _shown(zeros, names).shape


def _planning(
    agent: Agent, env: Env | HostEnv, params: PyTree, planner: planning.PlannerConfig | None
) -> tuple[Callable | None, str | None]:
    """`Game.plan`, and why there is none."""
    model = agent.model
    if planner is None and model.no_rewards is not None:
        return None, model.no_rewards
    if planner is None:
        planner = dataclasses.replace(PLANNER, horizon=min(REACH, model.context or REACH))
    planned = planning.with_planner(agent, env.spec, planner)
    start = _compiled(lambda params: planned.policy_carry(params, 1))
    choose = _compiled(lambda params, key, plan, at: planned.policy(params, key, plan, at.state, explore=False))

    def plan(key: Array, at: Dream, before: PyTree) -> tuple[PyTree, np.ndarray]:
        before = start(params) if before is None else before
        plan, action = choose(params, key, before, at)
        return plan, np.asarray(action)[0]

    return plan, None


def warm_up(game: Game) -> None:
    """Compiles what all sessions share, but for the planner."""
    key, side = jax.random.key(0), game.side()
    try:
        real, _ = side.begin(key)
        game.look(real.belief)
        _, action, _ = game.dream(
            key, real.belief, action_of(game.space, game.controls["rest"]), False, game.temperature
        )
        side.step(key, real, action)
    finally:
        side.close()
