"""Evaluations: which episodes they play, where, when, and what they say of those that were cut."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, fake_recipe, learn
from tests.loops.host.fakes import CounterEnvs, host_env
from tests.loops.host.test_driver import drive
from wmjax.loops.device import RunState, Skips
from wmjax.loops.display import Display
from wmjax.loops.driver import Driver, Plan, make_evaluator
from wmjax.loops.host.rollout import HostEvaluator, Options
from wmjax.loops.parallel import Programs
from wmjax.loops.report import read_metrics
from wmjax.loops.rollout import Evaluation, Evaluator
from wmjax.types import AgentState, HostEnv, Recipe, RunError, Sampling, Stage, Update, UsageError

KEY = jax.random.key(3)


def exploring(agent):
    """Acts by its keys in evaluations too."""
    return agent._replace(act=lambda *args, explore: agent.act(*args, explore=True))


class Limited:
    """Environments on the host of which `room` may exist at once; keeps how many were begun."""

    def __init__(self, room, length=4):
        self.room, self.alive, self.begun, self.seeds = room, 0, [], []
        env, _ = host_env(length)
        self.env = env._replace(start=self.start)
        self.length = length

    def start(self, num_envs, *, training, stop=lambda: False, **options):
        envs = CounterEnvs(num_envs, self.length, None, stop)
        self.begun.append(("training" if training else "evaluation", num_envs))
        self.alive += num_envs
        reset, close = envs.reset, envs.close

        def begin(seeds):
            if self.alive > self.room:
                raise RunError("no room")
            self.seeds.append(seeds)
            return reset(seeds)

        def end():
            self.alive -= num_envs
            close()

        envs.reset, envs.close = begin, end
        return envs


def test_an_episode_on_the_host_is_the_same_however_many_are_played_at_once():
    agent, results, seeds = exploring(fake_agent()), [], []
    for eval_envs in (1, 3, 16, 40):
        there = Limited(40)
        results.append(HostEvaluator(agent, there.env, Options(eval_envs=eval_envs))({}, KEY, 20))
        assert there.begun == [("evaluation", min(eval_envs, 20))] and there.alive == 0
        seeds.append([seed for row in there.seeds for seed in row][:20])
    assert len(set(results[0].returns.tolist())) > 2
    for other, other_seeds in zip(results[1:], seeds[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, other, results[0])
        assert other_seeds == seeds[0]
    assert len({str(seed) for seed in seeds[0]}) == 20
    few = HostEvaluator(agent, Limited(40).env, Options(eval_envs=2))({}, KEY, 5)
    np.testing.assert_array_equal(few.returns, results[0].returns[:5])


def test_the_keys_of_episodes_on_the_host_are_those_of_sixteen_at_once():  # so that results stay what they were
    there = Limited(16)
    HostEvaluator(fake_agent(), there.env, Options(eval_envs=16))({}, KEY, 20)
    words = [np.ravel(jax.random.key_data(jax.random.fold_in(KEY, r))).tolist() for r in range(2)]
    assert there.seeds == [[[*words[0], i] for i in range(16)], [[*words[1], i] for i in range(16)]]


@pytest.mark.parametrize("num_envs, episodes, begun", [(1, 16, 1), (5, 3, 3), (5, 16, 5), (64, 100, 16), (64, 1, 1)])
def test_evaluation_begins_no_more_environments_than_training_has_and_episodes_there_are(num_envs, episodes, begun):
    there = Limited(100)
    agent = fake_agent(fake_recipe(fake_agent().act, num_envs=num_envs))
    played = make_evaluator(agent, there.env)({}, KEY, episodes)
    assert there.begun == [("evaluation", begun)] and played.returns.tolist() == [8.0] * episodes


def test_episodes_that_do_not_end_are_cut_and_counted_on_device_and_host():
    endless = counter_env(10**6)
    for env in (endless, Limited(9, length=10**6).env):
        played = make_evaluator(fake_agent(), env, max_steps=7)({}, KEY, 3)
        assert (played.returns.tolist(), played.lengths.tolist()) == ([14.0] * 3, [7] * 3)
        assert played.cut.tolist() == [True] * 3
    for env in (counter_env(7), Limited(9, length=7).env):  # that end in the last step are not cut
        assert not make_evaluator(fake_agent(), env, max_steps=7)({}, KEY, 3).cut.any()


def test_of_several_seeds_each_has_its_own_episodes():
    agent = exploring(fake_agent())
    params = {"w": jnp.zeros((2, 4))}
    keys = jnp.stack([KEY, jax.random.key(4)])
    both = Evaluator(agent, counter_env(), seeds=True)(params, keys, 20)
    assert both.returns.shape == both.lengths.shape == both.cut.shape == (2, 20)
    alone = Evaluator(agent, counter_env())({"w": jnp.zeros(4)}, KEY, 20)
    np.testing.assert_array_equal(both.returns[0], alone.returns)
    assert (both.returns[1] != both.returns[0]).any()


@pytest.mark.parametrize("episodes", [0, -1, 1.5, True, 2**31])
def test_no_episodes_are_refused_on_device_and_host(episodes):
    for env in (counter_env(), Limited(9).env):
        with pytest.raises(UsageError, match="episodes"):
            make_evaluator(fake_agent(), env)({}, KEY, episodes)


# ---------------------------------------------------------------------------------------------------------------------
# While training


def evaluations(path):
    return [line for line in read_metrics(path) if "eval/return" in line]


def test_evaluations_in_the_place_of_training_close_its_environments_and_these_begin_again(tmp_path):
    there = Limited(2)
    state, said = drive(tmp_path, there.env, 104, eval_every=40, options=Options(workers=1, eval_envs=0))
    assert [line["eval/return"] for line in evaluations(tmp_path)] == [8.0, 8.0]
    assert [line["eval/cut"] for line in evaluations(tmp_path)] == [0, 0]
    assert there.begun == [("training", 2), ("evaluation", 2)] * 2 + [("training", 2)]
    assert there.alive == 0 and int(state.steps) == 26 and not any("warning" in text for text in said)


def test_where_there_is_no_room_beside_training_evaluations_take_its_place_and_say_so(tmp_path):
    there = Limited(3)
    _, said = drive(tmp_path, there.env, 104, eval_every=40, options=Options(workers=1))
    assert [line["eval/return"] for line in evaluations(tmp_path)] == [8.0, 8.0]
    warnings = [text for text in said if "warning" in text]
    assert len(warnings) == 1 and "no room" in warnings[0] and "eval_envs 0" in warnings[0]
    kinds = [kind for kind, _ in there.begun]
    assert kinds == ["training", "evaluation", *["evaluation", "training"] * 2]


def test_where_there_is_room_training_is_not_disturbed(tmp_path):
    there = Limited(4)
    drive(tmp_path, there.env, 104, eval_every=40)
    assert there.begun == [("training", 2), ("evaluation", 2), ("evaluation", 2)]


def test_an_evaluation_that_cannot_be_played_at_all_has_no_value_and_training_goes_on(tmp_path):
    there = Limited(2)
    begin = there.env.start
    broken = HostEnv(
        there.env.spec,
        lambda num_envs, *, training, **options: begin(num_envs + 9 * (not training), training=training, **options),
        there.env.native,
    )
    state, said = drive(tmp_path, broken, 104, eval_every=40)
    assert int(state.steps) == 26
    assert [(line["eval/return"], line["eval/cut"]) for line in evaluations(tmp_path)] == [(None, None)] * 2
    assert sum("evaluation was given up: no room" in text for text in said) == 2
    assert not (tmp_path / "best").exists()


class Counting:
    """Programs that only count iterations and steps, and an evaluator that keeps by which keys it was asked."""

    def __init__(self, path, stages, eval_every):
        agent = fake_agent(Recipe(2, 64, stages))
        zero = np.int32(0)
        state = AgentState({"w": np.zeros(2)}, {}, (), zero)
        self.state = RunState(state, (), (), (), (), (), Skips(zero, zero, zero), KEY, zero, zero, zero)
        counted = Programs()
        counted.compile_stage = self.compile_stage
        steps = sum(stage.collect * stage.iterations for stage in stages) * 2 * 2
        plan = Plan(agent, counter_env(), path, (0,), steps, eval_every, 1e6, 100, Display(io.StringIO()))
        self.driver, self.keys = Driver(plan, counted, []), []
        self.driver.evaluator = self.evaluate

    def compile_stage(self, stage):
        def run_stage(state, iterations):
            steps = state.steps + np.int32(iterations * stage.collect)
            return state._replace(iteration=state.iteration + np.int32(iterations), steps=steps), {}

        return run_stage

    def evaluate(self, params, key, episodes):
        self.keys.append(str(jax.random.key_data(key)))
        return Evaluation(np.ones(episodes), np.full(episodes, 4), np.arange(episodes) < 3)

    def run(self):
        self.driver.run(self.state)
        lines = evaluations(self.driver._plan.path)
        assert all((line["eval/length"], line["eval/cut"]) == (4, 3) for line in lines)
        assert len(set(self.keys)) == len(self.keys)
        return [(line["stage"], line["step"], line["iteration"]) for line in lines]


def still_stages(final, learns=True):
    """Collects and learns, then learns without collecting, in one stage or several."""
    act, updates = fake_agent().act, (Update("model", learn, 1, 2, Sampling(3)),)
    stages = [Stage("prefill", 2, 3, None), Stage("train", 10, 2, act, updates if learns else ())]
    return (*stages, *(Stage(f"final-{i}", length, 0, act, updates) for i, length in enumerate(final)))


def test_where_env_steps_stand_still_evaluations_follow_iterations_at_the_pace_of_those_before(tmp_path):
    # An iteration of `train` takes 8 env steps, so that evaluations are 4 iterations apart: after 24 + 8 * 10 steps,
    # which are 104 in all, the next ones are where it would be at 128, 160 and 192.
    begin = [("train", 32, 3), ("train", 64, 7), ("train", 96, 11)]
    for number, (final, names) in enumerate((([12], "000"), ([2, 3, 7], "122"), ([3, 9], "011"), ([3], "0"))):
        found = Counting(tmp_path / str(number), still_stages(final), 32).run()
        there = zip(names, (15, 19, 23), strict=False)
        assert found == begin + [(f"final-{name}", 104, iteration) for name, iteration in there]


def test_what_learns_after_mere_collecting_is_not_evaluated_before_it_acts(tmp_path):  # as World Models' V and M
    assert Counting(tmp_path, still_stages([6, 6], learns=False), 32).run() == []


def test_no_periodic_evaluations_where_they_are_turned_off(tmp_path):
    assert Counting(tmp_path, still_stages([12]), 0).run() == [] and not (tmp_path / "best").exists()
