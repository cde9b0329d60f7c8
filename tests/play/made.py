"""Games that can be worked out by hand, and tiny agents, to play with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tests.agents.batches import TINY_IRIS, TINY_V1, TINY_V2, TINY_V3
from tests.agents.world_models.made import TINY as TINY_WORLD_MODELS
from wmjax.agents import AGENTS
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.ops import noise
from wmjax.play import game as games
from wmjax.play import session as sessions
from wmjax.raw_env import Outcome, RawEnv, auto_reset
from wmjax.run import Run
from wmjax.types import Agent, AgentState, Array, Box, Discrete, EnvSpec, Recipe, WorldModel

SIDE = 8
LENGTH = 6  # of an episode of `counting`
LEAVES = 40  # the sum at which the dream expects its end
CONFIGS = {
    "world_models": TINY_WORLD_MODELS,
    "dreamer_v1": TINY_V1,
    "dreamer_v2": TINY_V2,
    "dreamer_v3": TINY_V3,
    "iris": TINY_IRIS,
}


class Count(NamedTuple):
    """What the hand-made model knows."""

    total: Array  # int32 [B], sum of the actions, shown in the red channel
    noise: Array  # int32 [B], drawn in each step, shown in the green one
    heat: Array  # int32 [B], ten times the temperature, shown in the blue one


def picture(red, green, blue):
    """uint8 or float32 `[..., SIDE, SIDE, 3]` of one color."""
    color = jnp.stack([red, green, blue], -1)
    return jnp.broadcast_to(color[..., None, None, :], (*color.shape[:-1], SIDE, SIDE, 3))


def counting() -> RawEnv:
    """Pays the action, shows the sum of actions in red and the step in green, ends after `LENGTH` steps."""
    spec = EnvSpec({"image": Box(0, 255, (SIDE, SIDE, 3), "uint8")}, Discrete(4), LENGTH)

    def step(key, state, action):
        total, time = state[0] + action, state[1] + 1
        over = time >= LENGTH
        return (total, time), Outcome(action.astype(jnp.float32), over, over)

    show = lambda state: {"image": picture(state[0], state[1], 0 * state[0]).astype(jnp.uint8)}
    return RawEnv(spec, lambda key: (jnp.int32(0), jnp.int32(0)), step, show)


def model() -> WorldModel:
    """Adds up actions as the environment does, draws noise, and reads the sum where it sees one."""

    def init_state(params, batch):
        zeros = jnp.zeros(batch, jnp.int32)
        return Count(zeros, zeros, zeros)

    def observe(params, key, state, prev_action, embed, is_first):
        return Count(embed, jnp.zeros_like(embed), jnp.zeros_like(embed))

    def imagine(params, key, state, action, temperature=1.0):
        drawn = (256 * noise.uniform(key, state.total.shape)).astype(jnp.int32)
        heat = jnp.full_like(state.total, jnp.round(10 * temperature).astype(jnp.int32))
        return Count(state.total + jnp.argmax(action, -1), drawn, heat)

    return WorldModel(
        init_state,
        encode=lambda params, obs: obs["image"][..., 0, 0, 0].astype(jnp.int32),
        observe=observe,
        imagine=imagine,
        predict=lambda params, state: (state.total / 2, jnp.where(state.total >= LEAVES, 0.1, 0.9)),
        decode=lambda params, state: {"image": picture(state.total, state.noise, state.heat).astype(jnp.float32)},
        temperature=1.0,
    )


def run(agent: Agent, env, name: str, state: AgentState | None = None) -> Run:
    """A run that was never trained."""
    state = AgentState({}, {}, (), jnp.int32(0)) if state is None else state
    description = {"agent": name, "env": "counting", "seed": 0}
    return Run(Path("none"), description, CONFIGS.get(name), agent, agent_actions(env), state)


def hand_made(**changes) -> Run:
    """The run of an agent that always takes action 2, counts its choices, and expects a hundredth of that as a return.

    `changes` are of its model.
    """
    carry = lambda params, batch: jnp.zeros(batch, jnp.int32)
    policy = lambda params, key, carry, state, explore: (carry + 1, jax.nn.one_hot(jnp.full(carry.shape, 2), 4))
    value = lambda params, carry, state: carry / 100
    made = model()._replace(**changes)
    agent = Agent(lambda key: None, carry, policy, carry, None, made, Recipe(1, 1, ()), value)
    return run(agent, auto_reset(counting()), "by hand")


def hand_made_box() -> Run:
    """The run of an agent with two numbers as its action, which the pictures show: 128 + 50 a in red and green."""
    shade = lambda x: jnp.round(128 + 50 * x).astype(jnp.int32)
    show = lambda state: {"image": picture(shade(state[0]), shade(state[1]), 0 * shade(state[0])).astype(jnp.uint8)}
    over = jnp.bool_(False)
    spec = EnvSpec({"image": Box(0, 255, (SIDE, SIDE, 3), "uint8")}, Box(-1.0, 1.0, (2,)))
    rules = RawEnv(
        spec, lambda key: jnp.zeros(2), lambda key, state, action: (action, Outcome(jnp.float32(0), over, over)), show
    )
    value = lambda x: (x.astype(jnp.float32) - 128) / 50
    made = WorldModel(
        lambda params, batch: jnp.zeros((batch, 2)),
        encode=lambda params, obs: value(obs["image"][..., 0, 0, :2]),
        observe=lambda params, key, state, prev_action, embed, is_first: embed,
        imagine=lambda params, key, state, action: action,
        predict=lambda params, state: (state[..., 0], jnp.ones_like(state[..., 0])),
        decode=lambda params, state: {"image": jax.vmap(show)(state)["image"].astype(jnp.float32)},
    )
    carry = lambda params, batch: ()
    policy = lambda params, key, carry, state, explore: (carry, jnp.zeros_like(state))
    agent = Agent(lambda key: None, carry, policy, carry, None, made, Recipe(1, 1, ()))
    return run(agent, auto_reset(rules), "by hand")


@functools.cache
def game() -> games.Game:
    """The hand-made one."""
    return games.make_game(hand_made())


def tiny(name: str) -> Run:
    """The run of an agent of this name, on catch."""
    env = make_env("catch", image_size=64 if name == "world_models" else 16)
    agent = AGENTS[name][1](env.spec, CONFIGS[name])
    return run(agent, env, name, jax.jit(agent.init)(jax.random.key(0)))


def begin(played: games.Game | None = None, seed: int = 0) -> sessions.Session:
    """A session of a game, by default of the hand-made one."""
    played = played or game()
    return sessions.begin(played, played.side(), jax.random.key(seed))


def do(session: sessions.Session, *events, of: games.Game | None = None) -> sessions.Session:
    """What comes of events, each a name, or a name and what it reads."""
    for event in events:
        name, more = (event, {}) if isinstance(event, str) else event
        session = sessions.handle(of or game(), session, {"do": name} | more)
    return session


def act(index: int, tap: bool = True):
    """The event of a person's action."""
    return "act", {"action": [index], "tap": tap}
