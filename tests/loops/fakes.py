"""An agent and an environment that can be worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from wmjax.types import (
    Agent,
    AgentState,
    Box,
    Discrete,
    Env,
    EnvSpec,
    Recipe,
    Sampling,
    Stage,
    TimeStep,
    Update,
    WorldModel,
)

ACTIONS = 3


def counter_env(length: int = 4, size: int = 0, space: Discrete | Box | None = None, limit: int | None = None) -> Env:
    """Observes how many steps the episode has had; pays the number of the action; ends after `length` steps."""
    spec = EnvSpec({"vector": Box(0, length, (1,))}, space or Discrete(ACTIONS), limit, action_repeat=2)

    def observe(count, reward):
        obs = {"vector": jnp.float32(count)[None]}
        if size:
            obs["image"] = jnp.broadcast_to(count.astype(jnp.uint8), (size, size, 3))
        return TimeStep(obs, jnp.float32(reward), count == 0, count == length, count == length)

    def reset(key):
        count = jnp.int32(0)
        return count, observe(count, 0.0)

    def step(key, count, action):
        over = count == length
        count = jnp.where(over, 0, count + 1)
        return count, observe(count, jnp.where(over, 0.0, action.argmax(-1).astype(jnp.float32)))

    return Env(spec, reset, step)


def learn(state: AgentState, key, batch):
    """Moves a weight by noise and by what was sampled; latents become the number of the update."""
    seen = batch.step.obs["vector"].mean() + batch.latent.mean()
    w = 0.9 * state.params["w"] + 0.1 * seen + 0.01 * jax.random.normal(key, state.params["w"].shape)
    metrics = {"seen": seen, "step": state.step.astype(jnp.float32)}
    state = state._replace(params={"w": w}, step=state.step + 1)
    return state, metrics, jnp.broadcast_to(state.step.astype(jnp.float32), batch.latent.shape)


def fake_agent(recipe: Recipe | None = None, *, actions: int = ACTIONS) -> Agent:
    """Acts at random by its carry and key when exploring, else emits the last action."""

    def init(key):
        return AgentState({"w": jax.random.normal(key, (4,))}, {}, (), jnp.int32(0))

    def act(params, key, carry, timestep, *, explore):
        carry = jnp.where(timestep.is_first, 0.0, carry) + 1.0
        choice = jax.vmap(lambda k: jax.random.randint(k, (), 0, actions))(key)
        choice = choice if explore else jnp.full_like(choice, actions - 1)
        return carry, jax.nn.one_hot(choice, actions), carry[:, None]

    recipe = recipe or fake_recipe(act)
    nothing = lambda *_: ()
    model = WorldModel(*[nothing] * len(WorldModel._fields))
    return Agent(init, nothing, nothing, lambda params, n: jnp.zeros(n), act, model, recipe)


def fake_recipe(act, *, num_envs=2, capacity=64, prefill=3, collect=2, repeats=2, batch_size=3, online=True) -> Recipe:
    update = Update("model", learn, repeats, batch_size, Sampling(3, context=1, online=online))
    stages = (Stage("prefill", prefill, collect, None), Stage("train", None, collect, act, (update,)))
    return Recipe(num_envs, capacity, stages)
