"""A search in environments on the host is that of the device loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import ACTIONS, counter_env, fake_agent
from tests.loops.host.fakes import host_env, run_device, run_host, stored
from wmjax import evolution
from wmjax.loops.host.evolution import Search
from wmjax.types import AgentState, Evolve, Recipe, RunError, Stage


def searching_agent(slots, sigma_min=None, restarts=None):
    """Emits the action with the highest of its parameters, which are searched for, turned by one at every step."""
    size = 2 * ACTIONS
    strategy = evolution.make_strategy(evolution.StrategyConfig(size, 4, sigma_min=sigma_min))
    evolve = Evolve(
        "search", strategy, lambda params: params["theta"],
        lambda params, theta: params | {"theta": theta}, "env", rollouts=2, max_steps=10, population=4, generations=3,
        mean_rollouts=5, restarts=restarts,
    )  # fmt: skip

    def init(key):
        params = {"theta": jnp.zeros(size)}
        return AgentState(params, {"search": evolution.init_evolving(evolve, key, params)}, (), jnp.int32(0))

    def act(params, key, carry, timestep, *, explore):
        carry = jnp.where(timestep.is_first, 0, carry) + 1
        theta = jnp.broadcast_to(params["theta"], (*params["theta"].shape[:-1], size)).reshape(-1, 2, ACTIONS)
        theta = jnp.repeat(theta, carry.shape[0] // theta.shape[0], 0)
        logits = jnp.take_along_axis(theta, (carry % 2)[:, None, None], 1)[:, 0]
        return carry, jax.nn.one_hot(logits.argmax(-1), ACTIONS), carry[:, None].astype(jnp.float32)

    stages = (Stage("collect", 1, 2, None), Stage("search", 4, 0, act, evolve=evolve), Stage("play", None, 2, act))
    agent = fake_agent(Recipe(slots, 24, stages))
    return agent._replace(init=init, act=act, act_carry=lambda params, n: jnp.zeros(n, jnp.int32))


# Rounds with an idle slot, or candidate i in slot i.
@pytest.mark.slow
@pytest.mark.parametrize("slots", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_search_tries_every_candidate_as_in_the_device_loop(slots):
    agent = searching_agent(slots)
    loop, state, metrics = run_host(agent, host_env()[0], [1, 4, 1])
    expected, wanted = run_device(agent, counter_env(), [1, 4, 1])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.agent.opt_state, expected.agent.opt_state)
    close(state.agent.params["theta"], expected.agent.params["theta"])
    for name in wanted[1]:
        np.testing.assert_allclose(metrics[1][name], wanted[1][name], rtol=1e-5, err_msg=name)
    assert metrics[1]["search/kept_return"] > 4  # of 8; actions of random parameters earn 4
    records, _, _ = stored(loop)
    assert records.is_first[2].all()  # acting goes on in new episodes


@pytest.mark.slow
def test_a_search_that_is_done_restarts_and_ends_as_in_the_device_loop():
    agent = searching_agent(4, sigma_min=0.0999, restarts=1)
    _, state, metrics = run_host(agent, host_env()[0], [1, 4, 1])
    expected, wanted = run_device(agent, counter_env(), [1, 4, 1])
    search = expected.agent.opt_state["search"]
    assert search.strategy.done and search.restarts.count == 1 and 2 <= int(expected.agent.step) < 12
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.agent.opt_state, expected.agent.opt_state)
    assert int(state.agent.step) == int(expected.agent.step)
    for name in wanted[1]:
        np.testing.assert_allclose(metrics[1][name], wanted[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["lost", "stopped"])
def test_what_happens_while_episodes_begin_after_a_search_ends_the_stage_with_its_state(fate):
    agent, (env, begun) = searching_agent(4), host_env()
    loop, state, _ = run_host(agent, env, [1, 4, 0])

    def reset(seeds):
        if fate == "lost":
            raise RunError("the environments are gone")

    begun[0].reset = reset
    again, _ = loop.compile_stage(agent.recipe.stages[2])(state, 3)
    assert int(again.iteration) == 0 and int(again.steps) == int(state.steps)
    assert str(loop.failure) == {"lost": "the environments are gone", "stopped": "None"}[fate]


def test_candidates_play_the_same_episodes_or_each_its_own():
    agent, env = searching_agent(4), host_env()[0]
    evolve = agent.recipe.stages[1].evolve
    for common in (True, False):
        envs = env.start(4)
        search = Search(agent, env, evolve._replace(common=common))
        assert search(envs, agent.init(jax.random.key(0)), jax.random.key(1), None) is not None
        own = [tuple(seed) for seeds in envs.log[:6] for seed in seeds]  # of three generations: no other seeds
        assert len(set(own)) == (6 if common else 24)


def test_a_search_that_is_stopped_changes_nothing():
    agent, calls = searching_agent(4), []
    stop = lambda: len(calls) > 20 or calls.append(0)
    _, state, metrics = run_host(agent, host_env()[0], [1, 4, 0], stop=stop)
    assert int(state.iteration) == 0 and int(state.agent.step) == 0 and "search/mean_return" not in metrics[1]
