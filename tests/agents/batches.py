"""Small agents and random experience to try them on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wmjax.agents.dreamer_v1 import DreamerV1Config
from wmjax.agents.dreamer_v2 import DreamerV2Config
from wmjax.agents.dreamer_v3 import DreamerV3Config
from wmjax.agents.iris import IRISConfig
from wmjax.types import Agent, AgentState, Box, Discrete, EnvSpec, MultiDiscrete, TimeStep, Trajectory

IMAGE = Box(0, 255, (16, 16, 3), "uint8")
VECTOR = Box(-np.inf, np.inf, (5,))
PIXELS = EnvSpec({"image": IMAGE}, Discrete(3))
MIXED = EnvSpec({"image": IMAGE, "kind": Discrete(4), "vector": VECTOR}, Box(-2.0, 2.0, (2,)))

TINY_DENSE = dict(
    deter=32, hidden=16, depth=2, units=16, vector_layers=1, reward_layers=1, cont_layers=1, actor_layers=2,
    critic_layers=2, batch_size=4, length=6, horizon=4, num_envs=2, prefill=16, pretrain=0, train_every=4,
    train_steps=1, replay_capacity=256, model_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
)  # fmt: skip
TINY_V1 = DreamerV1Config(stoch=6, use_continue=True, free_nats=0.1, **TINY_DENSE)
TINY_V2 = DreamerV2Config(stoch=4, classes=4, reward_transform="identity", discount=0.99, **TINY_DENSE)
TINY_V3 = DreamerV3Config(
    size="small", deter=32, hidden=16, stoch=4, classes=4, depth=2, units=16, blocks=4, bins=21, batch_size=4, length=6,
    horizon=3, num_envs=2, train_ratio=12, replay_capacity=256, prefill=16, learning_rate=1e-3, warmup=0,
)  # fmt: skip

TINY_IRIS = IRISConfig(
    vocab_size=16, embed_dim=8, latents=8, channels=16, multipliers=(), res_blocks=1, patch=8,
    perceptual="none", max_blocks=4, layers=2, heads=2, width=16, dropout=0.0, world_model_length=3,
    policy_channels=(8,), lstm_units=8, burn_in=2, horizon=3, num_envs=2, collect=8, tokenizer_updates=2,
    world_model_updates=2, actor_critic_updates=2, tokenizer_batch=4, world_model_batch=4, actor_critic_batch=4,
    tokenizer_after=1, world_model_after=2, actor_critic_after=3, replay_capacity=256, tokenizer_rate=1e-3,
    world_model_rate=1e-3, actor_critic_rate=1e-3,
)  # fmt: skip

KINDS = ("params", "non_trainable")  # of parameters, in an agent's state


def random_entry(rng: np.random.Generator, space, lead: tuple[int, ...]):
    """Random values of a space, `[*lead, ...]`."""
    if isinstance(space, Discrete):
        return jnp.asarray(rng.integers(0, space.n, lead), jnp.int32)
    if space.dtype == "uint8":
        return jnp.asarray(rng.integers(0, 256, (*lead, *space.shape)), jnp.uint8)
    return jnp.asarray(rng.normal(size=(*lead, *space.shape)), jnp.float32)


def random_step(spec: EnvSpec, lead: tuple[int, ...], seed: int = 0) -> TimeStep:
    """Random observations and rewards; one row has an episode boundary inside."""
    rng = np.random.default_rng(seed)
    obs = {name: random_entry(rng, space, lead) for name, space in spec.obs.items()}
    flags = np.zeros((3, *lead), bool)
    if len(lead) == 2 and lead[0] > 3:
        flags[0, 3, 0] = flags[1, 2, 0] = flags[2, 2, 0] = True
    return TimeStep(obs, jnp.asarray(rng.normal(size=lead), jnp.float32), *map(jnp.asarray, flags))


def random_action(spec: EnvSpec, lead: tuple[int, ...], seed: int = 0):
    """Actions as an agent emits them, `[*lead, A]`."""
    rng = np.random.default_rng(seed)
    if isinstance(spec.action, Discrete):
        return jax.nn.one_hot(rng.integers(0, spec.action.n, lead), spec.action.n)
    if isinstance(spec.action, MultiDiscrete):
        return jnp.concatenate([jax.nn.one_hot(rng.integers(0, n, lead), n) for n in spec.action.ns], -1)
    return jnp.asarray(rng.normal(size=(*lead, *spec.action.shape)), jnp.float32)


def random_trajectory(agent: Agent, spec: EnvSpec, state, length: int, batch: int, seed: int = 0) -> Trajectory:
    """`[length, batch]` records with the latents that acting on them leaves."""
    step, action = random_step(spec, (length, batch), seed), random_action(spec, (length, batch), seed)
    latents, carry = [], agent.act_carry(state.variables, batch)
    act = jax.jit(lambda key, carry, step: agent.act(state.variables, key, carry, step, explore=True))
    for t in range(length):
        key = jax.random.fold_in(jax.random.key(seed), t)
        carry, _, latent = act(key, carry, jax.tree.map(lambda x, t=t: x[t], step))
        latents.append(latent)
    latent = jax.tree.map(lambda *xs: jnp.stack(xs), *latents)
    return Trajectory(step, action, jnp.ones((length, batch), bool), latent)


def perturb(params, seed: int = 0, scale: float = 0.1):
    """Moves every parameter a little: heads that start at zero would hide where gradients go."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def perturbed(state: AgentState, scale: float = 0.1) -> AgentState:
    """The state with every parameter moved a little, those that no gradient trains too."""
    moved = perturb(state.variables, scale=scale)
    return state._replace(**{kind: {name: moved[name] for name in getattr(state, kind)} for kind in KINDS})
