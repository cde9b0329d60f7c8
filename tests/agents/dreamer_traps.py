"""What DreamerV1 and DreamerV2 promise alike: agents to try it on, and checks that both test files call."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.agents.batches import PIXELS, perturbed, random_action, random_step
from wmjax import dreaming
from wmjax.types import Agent, AgentState, Box, EnvSpec, TimeStep, Trajectory

VECTOR = EnvSpec({"vector": Box(-1.0, 1.0, (2,))}, Box(-1.0, 1.0, (2,)))


class Made:
    """An agent, what it is made of, and (once somebody asks) a state with perturbed parameters."""

    def __init__(self, paper: ModuleType, factory: Any, spec: EnvSpec, config: Any) -> None:
        self.agent: Agent = factory(spec, config)
        self.config, self.parts = config, paper.assemble(spec, config)

    @functools.cached_property
    def state(self) -> AgentState:
        state = jax.jit(self.agent.init)(jax.random.key(0))
        return perturbed(state)

    @functools.cached_property
    def update(self) -> Any:
        return jax.jit(self.agent.recipe.stages[-1].updates[0].fn)

    def __iter__(self):
        return iter((self.agent, self.config, self.parts, self.state))


class Maker:
    """Makes tiny agents of one paper; each specification and set of changes once, for compiling takes long."""

    def __init__(self, paper: ModuleType, factory: Any, config: Any) -> None:
        self.paper, self.factory, self.config, self.made = paper, factory, config, {}

    def __call__(self, spec: EnvSpec = PIXELS, **changes) -> Made:
        name = (str(spec), *sorted(changes.items()))
        if name not in self.made:
            self.made[name] = Made(self.paper, self.factory, spec, dataclasses.replace(self.config, **changes))
        return self.made[name]


def held(state: AgentState, name: str) -> AgentState:
    """The state with one optimizer's second moments so large that its next step is none."""
    moments = optax.tree.get(state.opt_state[name], "nu")
    huge = optax.tree.set(state.opt_state[name], nu=jax.tree.map(lambda x: x + 1e30, moments))
    return state._replace(opt_state=state.opt_state | {name: huge})


def observed(agent: Agent, params: Any, step: TimeStep, prev_action):
    """Filtered states `[T, B]` from the zero state."""
    batch = step.reward.shape[1]
    embed = agent.model.encode(params, step.obs)
    start = agent.model.init_state(params, batch)
    return dreaming.observe(agent.model, params, jax.random.key(1), start, prev_action, embed, step.is_first)[1]


def check_reset(made: Made, spec: EnvSpec) -> None:
    """A reset inside a window forgets both the state and the action before it."""
    step = random_step(spec, (6, 2))._replace(is_first=jnp.zeros((6, 2), bool).at[3].set(True))
    first, second = (random_action(spec, (6, 2), seed) for seed in (0, 1))
    second = second.at[4:].set(first[4:])  # the same actions after the reset only
    params = made.state.params
    run = jax.jit(lambda action: observed(made.agent, params, step, action))
    a, b = run(first), run(second)
    assert not np.allclose(a.deter[2], b.deter[2])
    assert np.array_equal(a.deter[3:], b.deter[3:])
    assert np.array_equal(a.stoch[3:], b.stoch[3:])


def echoes(length: int, batch: int, seed: int, late: int = 0) -> Trajectory:
    """Experience in which each observation is the action before it (or `late` steps earlier still)."""
    rng = np.random.default_rng(seed)
    action = jnp.asarray(rng.choice([-1.0, 1.0], (length + 3, batch, 2)), jnp.float32)
    no = jnp.zeros((length, batch), bool)
    vector = action[2 - late : 2 - late + length]
    step = TimeStep({"vector": vector}, vector[..., 0], no, no, no)
    return Trajectory(step, action[3:], jnp.ones((length, batch), bool), ())


def echo_loss(maker: Maker, late: int, updates: int = 250, **changes) -> float:
    """What of the world model's loss remains on echoes after some updates, without the constant of the densities."""
    made = maker(VECTOR, **changes)
    state, learn = jax.jit(made.agent.init)(jax.random.key(0)), made.update
    sampling = made.agent.recipe.stages[-1].updates[0].sampling
    remaining = []
    for i in range(updates):
        batch = echoes(sampling.length + sampling.context, made.config.batch_size, i, late)
        state, metrics, _ = learn(state, jax.random.key(i), batch)
        constant = 0.5 * np.log(2 * np.pi) * (2 * made.config.vector_scale)
        remaining.append(float(metrics["loss/decode/vector"]) * made.config.vector_scale - constant)
        remaining[-1] += float(metrics["kl"]) * made.config.kl_scale
    return float(np.mean(remaining[-20:]))


def directional(function, point, seed: int = 0, size: float = 1e-3):
    """Slope of a scalar function along a random direction: by automatic and by finite differences."""
    leaves, structure = jax.tree.flatten(point)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    direction = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    moved = lambda sign: jax.tree.map(lambda x, d: x + sign * size * d, point, direction)
    function = jax.jit(function)
    slopes = jax.tree.map(jnp.vdot, jax.grad(function)(point), direction)
    automatic = sum(jax.tree.leaves(slopes))
    finite = (function(moved(1.0)) - function(moved(-1.0))) / (2 * size)
    return float(automatic), float(finite)
