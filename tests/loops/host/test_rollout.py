"""Acting in environments on the host: evaluation, and records to look at."""

import jax
import numpy as np
import pytest

from tests.loops.fakes import ACTIONS, fake_agent
from tests.loops.host.fakes import CounterEnvs, host_env, with_recipe
from wmjax.loops.host.rollout import HostEvaluator, act_program, first_episodes, play
from wmjax.ops import noise
from wmjax.types import RunError, UsageError


def test_evaluation_plays_the_first_episode_of_every_seed():
    env, begun = host_env()
    agent = fake_agent()
    evaluate = HostEvaluator(agent, env)
    assert evaluate({}, jax.random.key(0), 3).returns.tolist() == [4.0 * (ACTIONS - 1)] * 3
    assert len(begun[0].log) == 3 and len({str(log) for log in begun[0].log}) == 3  # two rounds, then closed
    evaluate({}, jax.random.key(0), 2)
    assert begun[1].log[0] == begun[0].log[0]
    with pytest.raises(UsageError, match="episodes: 0"):
        evaluate({}, jax.random.key(0), 0)


def test_an_evaluation_whose_environments_are_lost_is_told_or_an_error():
    said = []
    broken = host_env(breaks=2)[0]
    assert np.isnan(HostEvaluator(fake_agent(), broken, say=said.append)({}, jax.random.key(0), 2).returns).all()
    assert "evaluation was given up: the environments are gone" in said[0]
    with pytest.raises(RunError):
        HostEvaluator(fake_agent(), broken)({}, jax.random.key(0), 2)


def test_an_evaluation_episode_that_is_begun_again_is_played_to_its_end():
    env, agent = host_env(length=10)[0], fake_agent()

    class Lost(CounterEnvs):
        """Loses its second environment in the sixth step."""

        def receive(self):
            if self.steps == 6:
                self.count[1] = 10  # the next record begins an episode
            return super().receive()

    envs = Lost(2, 10, None, lambda: False)
    act = act_program(agent.act, env, explore=False)
    carry = agent.act_carry({}, 2)
    keys = noise.row_keys(jax.random.key(0), 2)
    played = first_episodes(envs, act, {}, keys, carry, [[0], [1]], 8)
    assert played.returns.tolist() == [16, 16] and played.lengths.tolist() == [8, 8] and envs.steps == 6 + 8
    assert played.cut.all()


def test_played_records_follow_each_other():
    records = play(fake_agent(), host_env()[0], {}, jax.random.key(0), 2, 6)
    assert records.step.obs["vector"][:, 1, 0].tolist() == [0, 1, 2, 3, 4, 0]
    assert records.action.shape == (6, 2, ACTIONS)


def test_played_records_do_not_depend_on_how_many_are_played_at_once():
    results, explore = [], fake_agent().act
    for num_envs, rounds in ((1, 5), (2, 3), (8, 1)):
        agent = with_recipe(num_envs=num_envs)._replace(act=lambda *args, **_: explore(*args, explore=True))
        env, begun = host_env()
        results.append(play(agent, env, {}, jax.random.key(0), 5, 6))
        assert len(begun[0].count) == min(num_envs, 5) and len(begun[0].log) == rounds + 1
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])
    assert len(np.unique(results[0].action.argmax(-1), axis=1).T) > 1
