"""What M and the world model promise beyond equal numbers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.agents.batches import perturb
from tests.agents.world_models.made import CAR, CATCH, TINY, memory_params, tiny, trajectory, updates
from wmjax import dreaming
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import memory
from wmjax.nets.mdn import MDNRNN
from wmjax.ops import flat
from wmjax.types import Box, TimeStep


def test_the_forget_gate_is_opened_by_one_at_run_time_and_gates_are_input_candidate_forget_output():
    net = MDNRNN(2, 1, hidden=3, mixtures=2)
    rng = np.random.default_rng(0)
    h, c = rng.normal(size=(2, 1, 3))
    z, a, first = rng.normal(size=(1, 2)), rng.normal(size=(1, 1)), jnp.zeros(1, bool)
    params = perturb(net.init(jax.random.key(0), h, c, z, a, first, method="everything")["params"], scale=0.5)
    new_h, new_c, *_ = net.apply({"params": params}, h, c, z, a, first, method="everything")
    gates = np.concatenate([z, a, h], -1) @ params["kernel"] + params["bias"]
    i, j, f, o = np.split(np.asarray(gates), 4, -1)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    expected = c * sigmoid(f + 1.0) + sigmoid(i) * np.tanh(j)
    np.testing.assert_allclose(new_c, expected, atol=1e-6)
    np.testing.assert_allclose(new_h, np.tanh(expected) * sigmoid(o), atol=1e-6)
    # Where weights bring their own 1, it is folded into the bias.
    folded = params | {"bias": params["bias"].at[6:9].add(1.0)}
    bare = dataclasses.replace(net, forget_bias=0.0, parent=None)
    again, *_ = bare.apply({"params": folded}, h, c, z, a, first, method="everything")
    np.testing.assert_allclose(again, new_h, atol=1e-6)


def test_layer_norm_normalizes_each_gate():
    net = MDNRNN(2, 1, hidden=4, mixtures=2, layer_norm=True)
    z, a, first, h = jnp.ones((1, 2)), jnp.ones((1, 1)), jnp.zeros(1, bool), jnp.ones((1, 4))
    params = net.init(jax.random.key(0), h, h, z, a, first, method="everything")["params"]
    scaled = params | {"kernel": 50 * params["kernel"]}
    run = lambda params: net.apply({"params": params}, h, h, z, a, first, method="everything")[0]
    np.testing.assert_allclose(run(scaled), run(params), rtol=1e-3)
    assert not np.allclose(run(params), run(params | {"kernel": -params["kernel"]}), atol=1e-2)


def test_each_latent_dimension_has_a_mixture_of_its_own():
    from tests.agents.world_models.test_parity import official_head

    latent, mixtures, hidden = 4, 3, 6
    net = MDNRNN(latent, 1, hidden, mixtures)
    h = jnp.zeros((1, hidden))
    args = (h, h, jnp.zeros((1, latent)), jnp.zeros((1, 1)), jnp.zeros(1, bool))
    params = net.init(jax.random.key(0), *args, method="everything")["params"]
    x = jnp.full((1, latent), 0.5)

    def density(column=None):
        # The authors' columns: d * 3 K + [K weights, K means, K deviations].
        bias = np.zeros(latent * 3 * mixtures)
        if column is not None:
            bias[column] = 2.0
        head = official_head(np.zeros((hidden, bias.size)), bias, latent, mixtures)
        mixture = net.apply({"params": params | {"mixture_out": head}}, h, method="predict_latent")
        return np.asarray(mixture.log_prob(x)[0]), np.asarray(jax.nn.softmax(mixture.logits, -2)[0])

    plain, weights = density()
    for d, part in ((0, 1), (2, 0), (3, 2)):
        changed, moved = density(d * 9 + 3 * part + 1)
        others = np.arange(latent) != d
        np.testing.assert_allclose(changed[others], plain[others])
        np.testing.assert_allclose(moved[:, others], weights[:, others])
        assert part == 0 or abs(changed[d] - plain[d]) > 0.05
        assert part != 0 or moved[1, d] > 0.7


@pytest.mark.slow
def test_a_restart_in_the_middle_of_a_sequence_is_two_sequences():
    config = dataclasses.replace(TINY, restart_input=True)
    nets = wm.networks(CATCH, config)
    params = perturb(memory_params(CATCH, config), scale=0.5)
    batch = trajectory(config, CATCH, 8, 2)
    z, action = batch.latent["mu"].astype(jnp.float32), batch.action
    first = jnp.zeros((8, 2), bool).at[0].set(True).at[5].set(True)
    zeros = jnp.zeros((2, config.hidden))
    unroll = jax.jit(functools.partial(memory.unroll, nets, params))
    run = lambda sl, h, c: unroll(h, c, z[sl], action[sl], first[sl])
    whole, _ = run(slice(0, 8), zeros, zeros)
    one, (h, c) = run(slice(0, 5), zeros, zeros)
    two, _ = run(slice(5, 8), h + 9, c - 9)  # whatever was before
    np.testing.assert_allclose(whole, jnp.concatenate([one, two]), rtol=1e-5)
    unflagged, _ = unroll(zeros, zeros, z[5:], action[5:], jnp.zeros((3, 2), bool))
    assert np.abs(unflagged - two).max() > 1e-3  # the restart is an input, too


@pytest.mark.slow
def test_chunks_that_follow_each_other_hand_on_the_state():
    config = dataclasses.replace(TINY, memory_stateful=True, memory_batch_size=2, memory_learning_rate=1e-9,
                                 memory_final_learning_rate=0.0, z_source="mean")  # fmt: skip
    agent = wm.world_models(CATCH, config)
    state = jax.jit(agent.init)(jax.random.key(0))
    nets, batch = wm.networks(CATCH, config), trajectory(config, CATCH, 11, 2)
    batch = batch._replace(step=batch.step._replace(is_first=jnp.zeros((11, 2), bool)))
    learn = jax.jit(updates(agent)["memory"].fn)
    for start in (0, 5):  # windows of 5 steps and the one after them
        state, _, _ = learn(state, jax.random.key(1), jax.tree.map(lambda x, s=start: x[s : s + 6], batch))
    zeros = jnp.zeros((2, config.hidden))
    z = batch.latent["mu"].astype(jnp.float32)[:10]
    _, (h, c) = memory.unroll(
        nets, state.params["memory"], zeros, zeros, z, batch.action[:10], jnp.zeros((10, 2), bool)
    )
    np.testing.assert_allclose(state.stats["memory_carry"][0], h, rtol=1e-5)
    np.testing.assert_allclose(state.stats["memory_carry"][1], c, rtol=1e-5)
    assert updates(agent)["memory"].sampling.over == "in_order"


@pytest.mark.slow
def test_the_action_of_a_step_is_an_input_of_the_prediction_of_the_next():
    """Files of some reimplementations are shifted by one."""
    _, config, nets, state = tiny()
    batch = trajectory(config, CATCH, 6, 1)
    flags = jnp.zeros((6, 1), bool)
    step = TimeStep({}, jnp.zeros((6, 1)), flags, flags, flags)
    zeros = jnp.zeros((1, config.hidden))
    z = batch.latent["mu"].astype(jnp.float32)

    def loss(action, upto):  # of the first predictions only
        cut = jax.tree.map(lambda x: x[: upto + 1], (z, action, step))
        return memory.memory_loss(nets, config, state.params["memory"], (zeros, zeros), *cut)[0]

    for upto in (2, 5):
        grads = np.abs(jax.jit(jax.grad(loss), static_argnums=1)(batch.action, upto)).max((1, 2))
        assert (grads[:upto] > 0).all() and (grads[upto:] == 0).all()


@pytest.mark.slow
def test_a_memory_learns_what_an_action_does_and_nothing_from_shifted_actions():
    config = dataclasses.replace(TINY, latent=1, hidden=12, mixtures=1, reward_head="none", done_head=False,
                                 memory_learning_rate=2e-2, clip="none")  # fmt: skip
    spec = CAR._replace(action=Box(-1.0, 1.0, (1,)))
    nets = wm.networks(spec, config)
    rng = np.random.default_rng(0)
    action = rng.choice([-1.0, 1.0], size=(20, 64, 1)).astype(np.float32)
    z = np.concatenate([np.zeros_like(action[:1]), action[:-1]]) + 0.1 * rng.normal(size=action.shape)
    flags = jnp.zeros((20, 64), bool)
    step, zeros = TimeStep({}, jnp.zeros((20, 64)), flags, flags, flags), jnp.zeros((64, 12))

    params = memory_params(spec, config)

    def train(action):
        optimizer = memory.optimizer(config)

        def update(carry, _):
            params, opt_state = carry
            objective = lambda params: memory.memory_loss(
                nets, config, params, (zeros, zeros), jnp.float32(z), action, step
            )[0]
            loss, grads = jax.value_and_grad(objective)(params)
            changes, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, changes), opt_state), loss

        return jax.lax.scan(update, (params, optimizer.init(params)), None, 150)[1][-1]

    train = jax.jit(train)
    aligned, shifted = train(jnp.asarray(action)), train(jnp.roll(jnp.asarray(action), 1, 0))
    assert aligned < -0.3 < 1.0 < shifted  # ln(0.1) + 1.42 = -0.88; 1.42 for a deviation of 1


@pytest.mark.slow
def test_nothing_is_learned_from_the_step_between_two_episodes():
    agent, config, _, state = tiny()
    batch = trajectory(config, CATCH, 6, 4)
    assert batch.step.is_first[3, 0]
    learn = jax.jit(updates(agent)["memory"].fn)
    loss = lambda batch: float(learn(state, jax.random.key(0), batch)[1]["loss"])
    plain = loss(batch)
    other = batch._replace(action=batch.action.at[2, 0].set(jnp.roll(batch.action[2, 0], 1)))
    assert loss(other) == plain  # the last action of an episode leads nowhere
    reward = batch.step._replace(reward=batch.step.reward.at[3, 0].add(5.0))
    assert loss(batch._replace(step=reward)) == plain
    reward = batch.step._replace(reward=batch.step.reward.at[2, 0].add(5.0))
    assert loss(batch._replace(step=reward)) != plain


def test_gradients_are_clipped_entry_by_entry_or_by_their_norm():
    grads = {"a": jnp.array([3.0, -0.2]), "b": jnp.array([-4.0])}
    for clip, expected in (("value", ([1.0, -0.2], [-1.0])), ("norm", (np.array([3.0, -0.2]) / 5.004, [-4 / 5.004]))):
        config = dataclasses.replace(TINY, clip=clip)
        # Adam's first step has the size of the rate whatever the gradient: look at its moments.
        optimizer = memory.optimizer(config)
        _, state = optimizer.update(grads, optimizer.init(grads))
        moments = flat.unflatten(optax.tree.get(state, "mu"), grads)
        np.testing.assert_allclose(moments["a"] * 10, expected[0], rtol=1e-3)
        np.testing.assert_allclose(moments["b"] * 10, expected[1], rtol=1e-3)


def test_ends_weigh_as_much_as_they_are_told_to():
    logits, target = jnp.array([0.3, 0.3]), jnp.array([1.0, 0.0])
    plain, heavy = memory.done_loss(logits, target, 1.0), memory.done_loss(logits, target, 10.0)
    np.testing.assert_allclose(heavy / plain, [10.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(plain, optax.sigmoid_binary_cross_entropy(logits, target), rtol=1e-6)


def test_a_gaussian_reward_is_the_negative_log_of_a_normal_density():
    mean, std, target = 0.3, 1.7, -1.1
    loss = memory.reward_loss(jnp.array([mean, np.log(std)]), jnp.array(target), "gaussian")
    assert loss == pytest.approx(0.5 * ((target - mean) / std) ** 2 + np.log(std * np.sqrt(2 * np.pi)), rel=1e-5)
    assert memory.reward_loss(jnp.array([mean]), jnp.array(target), "mse") == pytest.approx((target - mean) ** 2)


def test_a_dream_ends_where_the_logit_of_the_end_is_above_zero_and_at_the_horizon():
    agent, _, _, state = tiny(CATCH)

    def episode(bias):
        memory = state.params["memory"]
        done = {"kernel": jnp.zeros_like(memory["done_out"]["kernel"]), "bias": jnp.array([bias])}
        params = state.params | {"memory": memory | {"done_out": done}}
        starts = agent.model.init_state(params, 3)._replace(started=jnp.ones(3, bool))
        env = dreaming.dream_env(agent.model, params, starts, CATCH, horizon=4, obs="state", actions="agent")
        dream, _ = env.reset(jax.random.key(0))
        ends = []
        for t in range(5):
            dream, step = env.step(jax.random.key(t), dream, jnp.array([0.0, 1.0, 0.0]))
            ends.append((bool(step.is_last), bool(step.is_terminal), bool(step.is_first)))
        return ends

    yes, no = True, False
    assert episode(0.01)[:2] == [(yes, yes, no), (no, no, yes)]
    assert episode(-0.01) == [(no, no, no)] * 3 + [(yes, no, no), (no, no, yes)]


@pytest.mark.slow
def test_survival_pays_one_for_each_step_where_no_reward_is_predicted():
    agent, _, _, state = tiny(CATCH, reward_head="none", dream_reward="survival")
    start = agent.model.init_state(state.params, 2)
    after = agent.model.imagine(state.params, jax.random.split(jax.random.key(0)), start, jnp.zeros((2, 3)))
    assert agent.model.predict(state.params, after)[0].tolist() == [1.0, 1.0]


def test_open_loop_predictions_are_pictures():
    agent, config, _, state = tiny()
    batch = trajectory(config, CATCH, 6, 2)
    images = jax.jit(lambda key: dreaming.open_loop(agent.model, state.params, key, batch, 3))(jax.random.key(0))
    assert images["image"].shape == (6, 2, 64, 64, 3)
    assert images["image"].min() >= 0 and images["image"].max() <= 255 and images["image"].std() > 0


def test_imagination_draws_at_the_temperature_of_its_configuration_unless_another_is_given():
    agent, config, _, state = tiny(temperature=0.5)
    hot, *_ = tiny(temperature=1.5)
    assert agent.model.temperature == config.temperature == 0.5
    start, action, key = agent.model.init_state(state.params, 3), jnp.eye(3), jax.random.key(1)
    imagine = lambda agent, *more: agent.model.imagine(state.params, key, start, action, *more).z
    np.testing.assert_array_equal(imagine(agent, 1.5), imagine(hot))
    np.testing.assert_array_equal(imagine(agent, 0.5), imagine(agent))
    assert not np.allclose(imagine(agent), imagine(hot))
