"""The unit and integration tests of the implementation guide for its papers 2 and 3, in JAX.

The guide's tensors are channel-first and its modules take (embed, action, state, hidden). Images here are channel-last
(`np.moveaxis(image, -3, -1)` of a guide's one), and `one_step` below has the guide's arguments.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.agents.batches import TINY_V1, TINY_V2
from tests.agents.dreamer_traps import Maker
from wmjax import dreaming, presets
from wmjax.agents import dreamer_v1 as v1
from wmjax.agents import dreamer_v2 as v2
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.nets.rssm import DenseRSSM, LatentState
from wmjax.ops import distributions, latents
from wmjax.types import Box, Discrete, EnvSpec, TimeStep, Trajectory, WorldModel

ACTIONS, EMBED = 3, 1024
SPEC = EnvSpec({"image": Box(0, 255, (64, 64, 3), "uint8")}, Box(-1.0, 1.0, (ACTIONS,)))


@functools.cache
def guide(paper):
    """Recurrent model and actor of a guide preset, with parameters; the other modules are not needed here."""
    config, _ = presets.resolve(paper.__name__.split(".")[-1], "guide")
    parts = paper.assemble(SPEC, config)
    nets, state = parts.nets, parts.model.init_state({}, 1)
    assert nets.rssm.embed == EMBED  # so many numbers leave the encoder of 64x64 images
    feat = paper.feature(state)
    inputs = (state.deter, state.stoch, jnp.zeros((1, ACTIONS)), jnp.zeros((1, EMBED)))
    params = {
        "rssm": nets.rssm.init(jax.random.key(0), *inputs, method="everything")["params"],
        "actor": nets.actor.init(jax.random.key(1), feat)["params"],
    }
    return parts, params


def one_step(paper, embed, action, state, hidden):
    """The guide's `rssm(embed, action, state, hidden) -> (new_state, new_hidden, prior, posterior)`."""
    parts, params = guide(paper)
    config = parts.config
    stoch = state if paper is v1 else state.reshape(-1, config.stoch, config.classes)
    hidden, *raw = paper.call(parts.nets.rssm, params["rssm"], hidden, stoch, action, embed, method="everything")
    prior, posterior = map(parts.latent.dist, raw)
    estimator = () if paper is v1 else (config.latent_estimator,)
    new_state = posterior.sample(jax.random.key(2), *estimator)
    return new_state.reshape(state.shape), hidden, prior, posterior


@pytest.mark.slow
def test_one_step_of_the_recurrent_model_returns_state_hidden_prior_and_posterior():
    key = jax.random.key(0)
    embed, action = jax.random.normal(key, (4, EMBED)), jax.random.normal(key, (4, ACTIONS))
    state, hidden = jax.random.normal(key, (4, 30)), jax.random.normal(key, (4, 200))
    new_state, new_hidden, prior, posterior = one_step(v1, embed, action, state, hidden)
    assert (new_state.shape, new_hidden.shape) == ((4, 30), (4, 200))
    for dist in (prior, posterior):
        assert dist.mean.shape == dist.std.shape == (4, 30)
        assert dist.std.min() > 0
    assert not np.allclose(prior.mean, posterior.mean)
    other = one_step(v1, embed + 1, action, state, hidden)
    np.testing.assert_array_equal(other[2].mean, prior.mean)  # the prior does not see the observation
    assert not np.allclose(other[3].mean, posterior.mean)


@pytest.mark.slow
def test_one_step_of_the_discrete_recurrent_model_has_32_latents_of_32_classes():
    key = jax.random.key(0)
    state = jax.nn.one_hot(jax.random.randint(key, (4, 32), 0, 32), 32).reshape(4, 1024)
    new_state, new_hidden, prior, posterior = one_step(
        v2, jax.random.normal(key, (4, EMBED)), jnp.zeros((4, ACTIONS)), state, jnp.zeros((4, 200))
    )
    assert (new_state.shape, new_hidden.shape) == ((4, 1024), (4, 200))
    assert prior.logits.shape == posterior.logits.shape == (4, 32, 32)
    np.testing.assert_array_equal(new_state.reshape(4, 32, 32).sum(-1), 1)  # one class of each latent


@pytest.mark.parametrize("paper", [v1, pytest.param(v2, marks=pytest.mark.slow)])
def test_imagination_gives_sixteen_states_and_fifteen_actions(paper):
    parts, params = guide(paper)
    config, model = parts.config, parts.model

    def policy(key, carry, state):
        return carry, paper.policy_dist(parts, params["actor"], paper.feature(state)).sample(seed=key)

    run = jax.jit(lambda key: dreaming.imagine(model, params, key, model.init_state(params, 1), policy, config.horizon))
    _, states, actions = run(jax.random.key(0))
    assert len(states.deter) == len(states.stoch) == 16  # the first and 15 imagined
    assert actions.shape == (15, 1, ACTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Learning


MAKERS = {v1: Maker(v1, v1.dreamer_v1, TINY_V1), v2: Maker(v2, v2.dreamer_v2, TINY_V2)}


@pytest.mark.slow
@pytest.mark.parametrize("paper", [v1, v2])
def test_a_world_model_overfits_one_batch(paper):
    env = agent_actions(make_env("catch", image_size=16))
    changes = dict(model_lr=3e-3, imagine_last=1, units=32, depth=4)
    made = MAKERS[paper](env.spec, **changes)
    agent, config = made.agent, made.config
    length = config.length + agent.recipe.stages[-1].updates[0].sampling.context

    @jax.jit
    def play(key):
        env_state, first = jax.vmap(env.reset)(jax.random.split(key, config.batch_size))

        def step(carry, key):
            env_state, record = carry
            key_action, key_env = jax.random.split(key)
            action = jax.nn.one_hot(jax.random.randint(key_action, (config.batch_size,), 0, 3), 3)
            env_state, following = jax.vmap(env.step)(jax.random.split(key_env, config.batch_size), env_state, action)
            return (env_state, following), (record, action)

        return jax.lax.scan(step, (env_state, first), jax.random.split(key, length))[1]

    step, action = play(jax.random.key(0))
    batch = Trajectory(step, action, jnp.ones(step.reward.shape, bool), ())
    state, learn = jax.jit(agent.init)(jax.random.key(0)), made.update
    constant = 0.5 * np.log(2 * np.pi) * 16 * 16 * 3
    errors = []
    for i in range(400):
        state, metrics, _ = learn(state, jax.random.key(i), batch)
        errors.append(float(metrics["loss/decode/image"]) - constant)
    assert np.mean(errors[-10:]) < 0.05 * errors[0]


class Table(nn.Module):
    """A head that looks its output up by the state: rewards of a Markov decision process."""

    values: tuple[float, ...]

    def __call__(self, feat):
        return {"mean": feat[..., -len(self.values) :] @ jnp.array(self.values)[:, None]}


# A chain with a lure at its left end. To stay there is best from there alone, or (the weaker one) from nowhere:
# straight-through gradients judge an action that was not taken by the slope at the one that was, which is biased, so
# DreamerV1 gets the chain whose optimum does not hang on a small difference.
REWARDS = {v2: (0.6, 0.0, 0.0, 0.0, 1.0), v1: (0.2, 0.0, 0.0, 0.0, 1.0)}
DISCOUNT = 0.8
STATES = 5
LEFT, RIGHT = 0, 1
NEXT = np.stack(
    [np.maximum(np.arange(STATES) - 1, 0), np.minimum(np.arange(STATES) + 1, STATES - 1)]
)  # [action, state]


def value_iteration(rewards):
    """Optimal values and actions of the chain: V(s) = r(s) + γ max V(s')."""
    value = np.zeros(STATES)
    for _ in range(200):
        value = np.array(rewards) + DISCOUNT * value[NEXT].max(0)
    return value, value[NEXT].argmax(0)


def value_of(probs, rewards):
    """Values of a policy `[state, action]`, by linear algebra."""
    move = np.zeros((STATES, STATES))
    for action in (LEFT, RIGHT):
        move[np.arange(STATES), NEXT[action]] += probs[:, action]
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * move, np.array(rewards))


def chain_model():
    """The chain as a world model that knows it exactly; `deter` is the state, one-hot."""
    moves = jax.nn.one_hot(NEXT, STATES)  # [action, state, next state]

    def imagine(params, key, state, action):
        deter = jnp.einsum("ns,na,ast->nt", state.deter, action, moves)
        return LatentState(deter, jnp.zeros((*deter.shape[:-1], 1)), state.dist)

    return WorldModel(None, None, None, imagine, None, None)


def chain_state(index):
    flat = jnp.zeros((*index.shape, 1))
    return LatentState(jax.nn.one_hot(index, STATES), flat, latents.Gaussian(flat, flat))


@pytest.mark.slow
@pytest.mark.parametrize("paper", [v1, v2])
def test_the_actor_critic_reaches_the_optimum_of_a_small_mdp_known_by_value_iteration(paper):
    sizes = dict(
        deter=STATES, stoch=1, units=32, actor_layers=1, critic_layers=1, horizon=8, discount=DISCOUNT,
        use_continue=False, actor_lr=3e-3, critic_lr=1e-2,
    )  # fmt: skip
    extra = {} if paper is v1 else dict(latent="gaussian", slow_critic_every=10, entropy_scale=3e-3)
    config = (v1.DreamerV1Config if paper is v1 else v2.DreamerV2Config)(**sizes, **extra)
    spec = EnvSpec({"number": Discrete(STATES)}, Discrete(2))
    made, model, rewards = paper.assemble(spec, config), chain_model(), REWARDS[paper]
    nets = made.nets._replace(reward=Table(rewards))
    parts = made._replace(nets=nets, model=model)
    feat = paper.feature(chain_state(jnp.arange(STATES)))
    keys = dict(zip(("actor", "critic"), jax.random.split(jax.random.key(0)), strict=True))
    params = {name: getattr(nets, name).init(key, feat)["params"] for name, key in keys.items()}
    chains = {name: paper.optim.model_actor_critic(config)[name] for name in params}
    critic_of = lambda params, feat: distributions.number(paper.call(nets.critic, params["critic"], feat))
    rows = 64

    def loss(params, slow, key):
        key_start, key_imagine = jax.random.split(key)
        start = chain_state(jax.random.randint(key_start, (rows,), 0, STATES))
        keys = jax.random.split(key_imagine, rows)
        if paper is v2:
            world, no = {"reward": {}, "slow_critic": slow}, jnp.zeros(rows, bool)
            return v2.behavior_loss(parts, world, params, keys, start, no)[0]
        imagined = v1.imagine_behavior(parts, params | {"reward": {}}, keys, start)
        critic = critic_of(params, jax.lax.stop_gradient(imagined.feat[:-1]))
        losses, _ = v1.behavior_losses(critic, jnp.zeros(()), imagined, jnp.ones(rows), config)
        return losses["actor"] + losses["critic"]

    def update(carry, step):
        params, slow, opt_state = carry
        key = jax.random.fold_in(jax.random.key(1), step)
        objective = lambda params: (loss(params, slow, key), ({}, ()))
        params, opt_state, *_ = paper.optim.descend(objective, chains, opt_state, params, None)
        slow = paper.optim.soft_update(params["critic"], slow, 1.0, step, 10)
        return (params, slow, opt_state), ()

    def policy(params):
        return np.asarray(paper.policy_dist(parts, params["actor"], feat).probs)

    before = value_of(policy(params), rewards).mean()
    opt_state = {name: chain.init(params[name]) for name, chain in chains.items()}
    carry = (params, params["critic"], opt_state)
    (params, _, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(1500)))(carry)
    optimum, best = value_iteration(rewards)
    assert best.tolist() == [LEFT if paper is v2 else RIGHT, RIGHT, RIGHT, RIGHT, RIGHT]
    found = value_of(policy(params), rewards)
    assert before < 0.8 * optimum.mean()
    assert found.mean() > 0.97 * optimum.mean()
    assert policy(params).argmax(-1).tolist() == best.tolist()
    critic = critic_of(params, feat).mean()
    np.testing.assert_allclose(critic, found, rtol=0.15)


def test_a_dense_rssm_without_its_input_layer_feeds_latent_and_action_straight_to_the_gru():
    rssm = DenseRSSM(200, 200, 60, EMBED, "gru", input_layer=False, activation="relu")
    inputs = (jnp.zeros((1, 200)), jnp.zeros((1, 30)), jnp.zeros((1, ACTIONS)), jnp.zeros((1, EMBED)))
    shapes = jax.eval_shape(lambda: rssm.init(jax.random.key(0), *inputs, method="everything"))["params"]
    assert shapes["gru"]["kernel"].shape == (30 + ACTIONS, 600)
    assert shapes["posterior_layer"]["kernel"].shape == (200 + EMBED, 200)
    assert shapes["prior_out"]["kernel"].shape == (200, 60)


def test_symlog_is_undone_by_symexp_and_rewards_are_learned_in_its_space():
    config, _ = presets.resolve("dreamer_v2", "guide")
    target = jnp.array([0.0, 100.0, -1000.0])
    dist = distributions.number({"mean": distributions.symlog(target)[:, None]}, config.reward_head)
    np.testing.assert_allclose(dist.mean(), target, rtol=1e-4)
    np.testing.assert_allclose(dist.log_prob(target), 0.0, atol=1e-9)
    step = TimeStep({}, target, *[jnp.zeros(3, bool)] * 3)
    assert config.reward_transform == "identity" and step.reward is target
