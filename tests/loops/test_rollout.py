from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tests.loops.fakes import counter_env, fake_agent
from wmjax.loops import rollout as rollouts


def start(agent, env, params, count):
    env_state, timestep = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), count))
    return rollouts.Position(env_state, timestep, agent.act_carry(params, count))


def run(count, steps, act=None, env=None, key=7):
    env, agent = env or counter_env(), fake_agent()
    params = agent.init(jax.random.key(1)).variables
    position = start(agent, env, params, count)
    act = act(agent, env.spec) if act else agent.act
    return rollouts.rollout(partial(act, explore=True), env, params, jax.random.key(key), position, steps)


def test_a_record_holds_the_observation_and_the_action_that_was_chosen_on_seeing_it():
    position, records = run(count=2, steps=7)
    assert records.step.obs["vector"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert records.step.is_first[:, 0].tolist() == [True, False, False, False, False, True, False]
    assert records.step.is_last[:, 1].tolist() == [False, False, False, False, True, False, False]
    chosen = np.asarray(records.action.argmax(-1), np.float32)
    arrived = np.where(records.step.is_first[1:], 0, chosen[:-1])
    np.testing.assert_array_equal(records.step.reward[1:], arrived)
    assert len(np.unique(chosen)) > 1
    assert records.latent[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 1, 2]  # the carry starts anew with the episode
    assert position.timestep.obs["vector"].tolist() == [[2.0], [2.0]]  # what comes next is not yet recorded


def test_two_rollouts_in_a_row_neither_repeat_nor_skip_a_step():
    env, agent = counter_env(), fake_agent()
    position = start(agent, env, {}, 2)
    act = partial(agent.act, explore=True)
    go = lambda position: rollouts.rollout(act, env, {}, jax.random.key(0), position, 3)
    position, one = go(position)
    position, two = go(position)
    assert [*one.step.obs["vector"][:, 0, 0], *two.step.obs["vector"][:, 0, 0]] == [0, 1, 2, 3, 4, 0]


def test_an_environment_does_not_depend_on_how_many_others_there_are():
    _, two = run(count=2, steps=9)
    _, five = run(count=5, steps=9)
    np.testing.assert_array_equal(two.action, five.action[:, :2])
    assert (five.action[:, 0] != five.action[:, 1]).any()


def test_random_actions_are_uniform_one_hots_and_latents_are_zeros_of_the_agents_structure():
    _, records = run(count=200, steps=15, act=rollouts.random_act)
    assert records.action.shape == (15, 200, 3) and records.action.dtype == jnp.float32
    assert set(np.unique(records.action)) == {0.0, 1.0} and (records.action.sum(-1) == 1).all()
    np.testing.assert_allclose(records.action.mean((0, 1)), 1 / 3, atol=0.05)
    assert records.latent.shape == (15, 200, 1) and not records.latent.any()


def evaluate(episodes, env=None, explore=False, **kwargs):
    agent, act = fake_agent(), fake_agent().act
    agent = agent._replace(act=lambda *args, explore: act(*args, explore=True)) if explore else agent
    return rollouts.Evaluator(agent, env or counter_env(), **kwargs)({}, jax.random.key(3), episodes)


def test_evaluation_sums_the_rewards_of_exactly_one_episode():
    result = evaluate(5)
    assert result.returns.tolist() == [8.0] * 5  # four steps of reward 2, and none of the episode after
    assert result.lengths.tolist() == [4] * 5
    assert not result.cut.any()


def test_evaluation_acts_as_the_agent_does_by_its_keys():
    assert len(set(evaluate(12, explore=True).returns.tolist())) > 1


def test_an_episode_of_an_evaluation_does_not_depend_on_how_many_there_are():
    few = evaluate(3, explore=True).returns
    many = evaluate(35, explore=True).returns  # three rounds of sixteen, thirteen of them left over
    assert many.shape == (35,)
    np.testing.assert_array_equal(many[:3], few)


def test_episodes_that_do_not_end_are_cut_at_the_limit_and_counted():
    result = evaluate(3, max_steps=2)
    assert (result.returns.tolist(), result.lengths.tolist(), result.cut.tolist()) == ([4.0] * 3, [2] * 3, [True] * 3)
    result = evaluate(2, env=counter_env(limit=3))
    assert (result.lengths.tolist(), result.cut.tolist()) == ([3, 3], [True, True])
