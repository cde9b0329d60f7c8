"""One step of a run's dream as a function of named arrays: state, action and random numbers in; what follows out.

It is the model's own `imagine`, `predict` and `decode`, of one dream at a time. What they draw from a key is handed in
(`noise.Given`), so that a program without JAX's random numbers computes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wmjax import dreaming
from wmjax.agents import AGENTS
from wmjax.dream_step.plain import plain, reads
from wmjax.figures import frames, windows
from wmjax.loops.driver import evaluation_key
from wmjax.nets.spaces import action_size
from wmjax.ops import noise
from wmjax.play.controls import controls
from wmjax.run import Run
from wmjax.types import Agent, Array, PyTree, Trajectory

STARTS = 4  # real moments that a dream may begin from
STATE, NEXT, NOISE = "state.", "next.", "noise."  # what names begin with


class DreamStep(NamedTuple):
    """A step of a dream, batch of one."""

    function: Callable  # ({name: array}) -> {name: array}, as `inputs` and `outputs` say
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: dict[str, jax.ShapeDtypeStruct]
    left_out: dict[str, str]  # what the agent lacks, and why
    starts: list[dict[str, np.ndarray]]  # by the names of the state's inputs
    pictures: list[dict[str, np.ndarray]]  # what is seen there, uint8 [H, W, 3] by name
    about: dict[str, Any]  # of the run: title, agent, env, controls, temperature; JSON


def make_step(run: Run) -> DreamStep:
    """The step of a run of one seed, computed in float32.

    Raises:
      UsageError: the environment is none (of a run on data alone), or has more actions than a page shows.
    """
    agent, where = run.playing(0, None, None)
    # On the CPU, whose arithmetic is float32 throughout.
    params = jax.device_put(run.state.variables, jax.local_devices(backend="cpu")[0])
    agent = _in_float32(run, agent)
    starts = _real_starts(agent, where, params)
    function, asked = _step_of(agent, params, starts)
    shapes = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in _named(STATE, starts).items()}
    shapes = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in shapes.items()}
    shapes["action"] = jax.ShapeDtypeStruct((1, action_size(run.env.spec)), jnp.float32)
    if agent.model.temperature is not None:
        shapes["temperature"] = jax.ShapeDtypeStruct((), jnp.float32)
    shapes |= asked(shapes)
    inputs, outputs, left_out = _kept(function, shapes, agent)

    def step(given: dict[str, Array]) -> dict[str, Array]:
        # What is not read may be anything.
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items() if name not in inputs}
        found = function({name: given[name] for name in inputs} | zeros)
        return {name: found[name] for name in outputs}

    count = len(jax.tree.leaves(starts)[0])
    flat = {name: np.asarray(x) for name, x in _named(STATE, starts).items() if name in inputs}
    begins = [{name: x[i : i + 1] for name, x in flat.items()} for i in range(count)]
    env_name = run.description.get("env")
    about = {
        "title": run.title(), "agent": run.description["agent"], "env": env_name,
        "controls": controls(run.env.spec.action, env_name), "temperature": agent.model.temperature,
    }  # fmt: skip
    return DreamStep(step, inputs, outputs, left_out, begins, _seen(agent, params, starts), about)


def _in_float32(run: Run, agent: Agent) -> Agent:
    """The agent with all arithmetic in float32, which every runtime has."""
    if getattr(run.config, "compute_dtype", "float32") == "float32":
        return agent
    config = dataclasses.replace(run.config, compute_dtype="float32")
    return AGENTS[run.description["agent"]][1](run.env.spec, config, equations=run.equations)


def _real_starts(agent: Agent, env: Any, params: PyTree) -> PyTree:
    """Filtered states `[STARTS, ...]` after the first observation of as many episodes."""
    key_play, key_observe = jax.random.split(evaluation_key(0))
    records = windows.play(agent, env, params, key_play, STARTS, 1)
    history = Trajectory(records.step, records.action, jnp.ones(records.action.shape[:2], bool), ())
    stops = jnp.ones(STARTS, jnp.int32)
    begin = jax.jit(lambda params, history: dreaming.observe_until(agent.model, params, key_observe, history, stops)[0])
    return begin(params, history)


def _named(prefix: str, tree: PyTree) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {prefix + jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _step_of(agent: Agent, params: PyTree, starts: PyTree) -> tuple[Callable, Callable]:
    """The step over all of its state, by names; and what noise it asks for: shapes of the other inputs to its own."""
    model, structure, names = agent.model, jax.tree.structure(starts), list(_named(STATE, starts))

    def imagined(given: dict[str, Array], hand: Callable) -> PyTree:
        state = jax.tree.unflatten(structure, [given[name] for name in names])
        more = () if model.temperature is None else (given["temperature"],)
        return model.imagine(params, noise.Given(hand), state, given["action"], *more)

    def asked(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        found = {}

        def hand(place, kind, shape):
            lead = [index[1] for index in place if not isinstance(index, int)]
            found[_noise_name(place, kind)] = jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
            return jnp.zeros(shape)

        jax.eval_shape(lambda given: imagined(given, hand), shapes)
        return found

    def function(given: dict[str, Array]) -> dict[str, Array]:
        def hand(place, kind, shape):
            x = given[_noise_name(place, kind)]
            for index in place:
                x = x if isinstance(index, int) else jnp.take(x, index[0], 0)
            return x

        state = imagined(given, hand)
        reward, cont = model.predict(params, state)
        return _named(NEXT, state) | _pictured(agent, params, state) | {"reward": reward, "continue": cont}

    return function, asked


def _noise_name(place: tuple, kind: str) -> str:
    return NOISE + ".".join([*(str(index) for index in place if isinstance(index, int)), kind])


def _pictured(agent: Agent, params: PyTree, state: PyTree) -> dict[str, Array]:
    """What is decoded, by name: pictures in [0, 1]."""
    found = {}
    for name, x in agent.model.decode(params, state).items():
        picture = x.ndim == 4
        found[f"frame.{name}" if picture else f"obs.{name}"] = jnp.clip(x / 255, 0, 1) if picture else x
    return found


def _kept(
    function: Callable, shapes: dict[str, jax.ShapeDtypeStruct], agent: Agent
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct], dict[str, str]]:
    """Inputs that something depends on, outputs that depend on something, and why others are left out."""
    names = list(shapes)
    values = lambda *x: function(dict(zip(names, x, strict=True)))
    outputs = jax.eval_shape(values, *shapes.values())
    of = dict(zip(sorted(outputs), reads(plain(values, *shapes.values())), strict=True))  # leaves of a dictionary
    left_out = {}
    if agent.model.no_rewards is not None:
        left_out["reward"] = agent.model.no_rewards
    for name in ("reward", "continue"):
        if name not in left_out and not of[name]:
            zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes.values()]
            left_out[name] = f"it is {float(jax.jit(values)(*zeros)[name][0]):g} at every step"
    shown = [name for name in outputs if not name.startswith(NEXT) and name not in left_out]
    state, before = {name for name in names if name.startswith(STATE)}, None
    while state != before:  # what is read to compute what is read
        before = state
        wanted = shown + [NEXT + name.removeprefix(STATE) for name in state]
        read = {names[i] for name in wanted for i in of[name]}
        state = state & read
    inputs = {name: x for name, x in shapes.items() if name in state or not name.startswith(STATE)}
    nexts = [NEXT + name.removeprefix(STATE) for name in names if name in state]
    return inputs, {name: outputs[name] for name in [*nexts, *shown]}, left_out


def _seen(agent: Agent, params: PyTree, starts: PyTree) -> list[dict[str, np.ndarray]]:
    pictures = {name: x for name, x in _pictured(agent, params, starts).items() if name.startswith("frame.")}
    shown = {name: np.uint8(np.round(255 * np.asarray(x))) for name, x in pictures.items()}
    return [{name: frames.rgb(x[i]) for name, x in shown.items()} for i in range(STARTS)]
