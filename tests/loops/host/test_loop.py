"""The host loop computes what the device loop computes, and gives up nothing when it is stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import ACTIONS, counter_env, fake_agent, fake_recipe, learn
from wmjax import evolution
from wmjax.loops import checkpoint, device
from wmjax.loops.host.evolution import Search
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.host.rollout import HostEvaluator, Options, act_program, first_episodes, play
from wmjax.loops.schedule import Schedule
from wmjax.ops import noise
from wmjax.replay import chunks
from wmjax.types import (
    AgentState,
    Evolve,
    HostEnv,
    Recipe,
    RunError,
    Sampling,
    Stage,
    TimeStep,
    Trajectory,
    Update,
    UsageError,
)


class CounterEnvs:
    """`fakes.counter_env` in NumPy, in this process."""

    def __init__(self, num_envs, length, breaks, stop):
        self.count, self.length, self.restarts = np.zeros(num_envs, int), length, 0
        self.breaks, self.stop, self.steps, self.log = breaks, stop, 0, []

    def observe(self, reward):
        flag = self.count == self.length
        obs = {"vector": self.count[:, None].astype(np.float32)}
        return TimeStep(obs, reward.astype(np.float32), self.count == 0, flag, flag.copy())

    def reset(self, seeds):
        self.log.append(seeds)
        self.count[:] = 0
        return self.observe(np.zeros(len(self.count)))

    def send(self, action):
        assert action.dtype == np.int32
        self.action, self.steps = action, self.steps + 1

    def receive(self):
        if self.stop():
            return None
        if self.steps == self.breaks:
            raise RunError("the environments are gone")
        over = self.count == self.length
        self.count = np.where(over, 0, self.count + 1)
        return self.observe(np.where(over, 0, self.action))

    def close(self):
        self.log.append("closed")


def host_env(length=4, breaks=None):
    begun = []

    def start(num_envs, *, stop=lambda: False, **options):
        begun.append(CounterEnvs(num_envs, length, breaks, stop))
        return begun[-1]

    return HostEnv(counter_env(length).spec, start, lambda action: action.argmax(-1).astype(jnp.int32)), begun


def with_recipe(**kwargs):
    return fake_agent(fake_recipe(fake_agent().act, **kwargs))


def run_host(agent, env, iterations, *, stop=lambda: False, path=None, key=0, **options):
    loop = HostLoop(agent, env, path, Options(**options), stop=stop)
    state, metrics = loop.init(jax.random.key(key)), []
    for number, stage in enumerate(agent.recipe.stages):
        state, found = loop.compile_stage(stage)(state, iterations[number])
        metrics.append(found)
        if number + 1 < len(agent.recipe.stages) and not loop.failure:
            state = device.next_stage(state)
    return loop, state, metrics


def run_device(agent, env, iterations):
    state = jax.jit(lambda key: device.init(agent, env, key))(jax.random.key(0))
    metrics = []
    for number, stage in enumerate(agent.recipe.stages):
        state, found = device.compile_stage(agent, env, stage)(state, iterations[number])
        metrics.append(found)
        if number + 1 < len(agent.recipe.stages):
            state = device.next_stage(state)
    return state, metrics


def stored(loop):
    """Records in the order of the ring, by name, with latents."""
    rows = np.arange(loop.replay.rows)[:, None]
    index = np.broadcast_arrays(rows, np.arange(loop.replay.num_envs))
    flags = jax.tree.map(np.asarray, loop.replay.ring.data.step)
    found = loop.replay.gather(Trajectory(flags, None, None, None), tuple(index))
    return found.step, found.action, loop.replay.latent


@pytest.mark.parametrize("capacity", [24, pytest.param(64, marks=pytest.mark.slow)])  # rows are overwritten, or not
def test_without_overlap_a_run_is_that_of_the_device_loop(capacity):
    agent = with_recipe(capacity=capacity)
    loop, state, metrics = run_host(agent, host_env()[0], [3, 8], overlap=False)
    expected, wanted = run_device(agent, counter_env(), [3, 8])
    loop._latents.flush()
    np.testing.assert_allclose(state.agent.params["w"], expected.agent.params["w"], rtol=1e-6)
    step, action, latent = stored(loop)
    jax.tree.map(np.testing.assert_array_equal, (step, action), tuple(expected.replay.data[:2]))
    np.testing.assert_array_equal(latent, expected.replay.data.latent)
    for mine, theirs in zip(metrics, wanted, strict=True):
        assert set(theirs) < set(mine)
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, err_msg=name)
    for name in ("skips", "episode", "stage", "iteration", "steps"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(expected, name))
    assert loop.replay.ring.cursor == expected.replay.cursor


def test_with_overlap_updates_sample_what_was_there_before_and_nothing_is_lost():
    agent = with_recipe()
    runs = [run_host(agent, host_env()[0], [3, 8]) for _ in range(2)]
    loop, state, metrics = runs[0]
    assert checkpoint.digest(state.agent) == checkpoint.digest(runs[1][1].agent)
    assert (int(state.agent.step), int(state.steps), int(state.iteration)) == (16, 22, 8)
    step, _, _ = stored(loop)
    assert step.obs["vector"][:22, 1, 0].tolist() == [i % 5 for i in range(22)]
    assert {"time/envs", "time/device", "time/replay", "envs/restarts", "memory/resident_gb"} < set(metrics[1])
    # The online queue ends with the windows of four rows that were complete before the last iteration: 20 // 4 of
    # each of two environments, or before the iteration after it.
    other, _, _ = run_host(agent, host_env()[0], [3, 7], overlap=False)
    assert int(loop.replay.ring.cursor) == int(other.replay.ring.cursor) == 10


def test_a_stage_without_collecting_only_learns():
    update = Update("encode", lambda s, k, b: (*learn(s, k, b)[:2], None), 3, 2, Sampling(2))
    recipe = Recipe(2, 20, (Stage("collect", 4, 1, None), Stage("learn", 2, 0, None, (update,))))
    _, state, metrics = run_host(fake_agent(recipe), host_env()[0], [4, 2])
    assert (int(state.steps), int(state.agent.step)) == (4, 6)
    assert float(metrics[1]["encode/step"]) == 2.5 and "episode/count" not in metrics[1]


def test_what_is_gathered_can_be_saved_and_goes_on_with_new_episodes(tmp_path):
    agent, (env, begun) = with_recipe(), host_env()
    loop, state, _ = run_host(agent, env, [3, 4], path=tmp_path)
    before = np.asarray(state.agent.params["w"])
    checkpoint.save(tmp_path / "checkpoints", 1, loop.gather(state))
    loop.close()
    assert begun[0].log[-1] == "closed"
    again = HostLoop(agent, env, tmp_path)
    restored = again.place(checkpoint.restore(tmp_path / "checkpoints", again.template, exact=True))
    np.testing.assert_array_equal(restored.agent.params["w"], before)
    jax.tree.map(np.testing.assert_array_equal, stored(again), stored(loop))
    assert begun[1].log[0] != begun[0].log[0]  # other episodes than those of the start
    restored, _ = again.compile_stage(agent.recipe.stages[1])(restored, 2)
    assert (int(restored.steps), int(restored.iteration)) == (18, 6)
    vector = stored(again)[0].obs["vector"][12:18, 0, 0].tolist()
    assert vector == [2, 3, 0, 1, 2, 3] and stored(again)[0].is_first[14, 0]


def test_replay_files_that_no_checkpoint_names_go(tmp_path, monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 1)
    agent = with_recipe(capacity=16)
    loop, state, _ = run_host(agent, host_env()[0], [3, 1], path=tmp_path)
    train = loop.compile_stage(agent.recipe.stages[1])
    for _ in range(4):
        step = Schedule(agent, host_env()[0]).env_steps(state)
        checkpoint.save(tmp_path / "checkpoints", step, loop.gather(state), keep=2)
        state, _ = train(state, 6)
    assert len(list((tmp_path / "replay").iterdir())) <= 3 * 8 + 12
    assert len(checkpoint.steps(tmp_path / "checkpoints")) == 2
    for step in checkpoint.steps(tmp_path / "checkpoints"):
        said = []
        again = HostLoop(agent, host_env()[0], tmp_path, say=said.append)
        again.place(checkpoint.restore(tmp_path / "checkpoints", again.template, step, exact=True))
        assert not any("torn" in text for text in said)


def test_an_iteration_that_is_stopped_does_not_count_and_nothing_before_is_lost():
    agent, stop = with_recipe(), []
    loop, state, _ = run_host(agent, host_env()[0], [3, 4], stop=lambda: bool(stop))
    stop.append(1)
    stopped, metrics = loop.compile_stage(agent.recipe.stages[1])(state, 5)
    assert (int(stopped.iteration), int(stopped.steps)) == (4, 14) == (4, int(loop.replay.ring.added))
    assert "episode/return" not in metrics and "model/seen" not in metrics
    jax.block_until_ready(stopped.agent)


def test_an_iteration_whose_records_are_in_replay_counts_though_its_updates_were_interrupted():
    agent, loops = with_recipe(repeats=50), []
    # From the first of the training stage on. (The ring itself belongs to the thread that makes batches.)
    stop = lambda: bool(loops) and loops[0].replay.next_rows(1)[0] > 6
    loop, state, _ = run_host(agent, host_env()[0], [3, 0], stop=stop, overlap=False)
    loops.append(loop)
    state, _ = loop.compile_stage(agent.recipe.stages[1])(state, 5)
    assert (int(state.iteration), int(state.steps)) == (1, 8) == (1, int(loop.replay.ring.added))


def test_metrics_are_means_over_the_updates_that_were_made():
    agent = with_recipe()
    loop, state, _ = run_host(agent, host_env()[0], [3, 0], overlap=False)
    ready, calls = loop._ready, []
    loop._ready = lambda stage: calls.append(0) or (len(calls) > 2 and ready(stage))  # as if records were lost at first
    state, metrics = loop.compile_stage(agent.recipe.stages[1])(state, 4)
    assert int(state.agent.step) == 4 and float(metrics["model/step"]) == 1.5


def test_a_stage_without_records_to_learn_from_ends_the_run_instead_of_learning_nothing(tmp_path):
    update = Update("encode", lambda s, k, b: (*learn(s, k, b)[:2], None), 3, 2, Sampling(2))
    recipe = Recipe(2, 20, (Stage("collect", 4, 1, None), Stage("learn", 2, 0, None, (update,))))
    loop, state, _ = run_host(fake_agent(recipe), host_env()[0], [0, 2], path=tmp_path)
    assert (int(state.iteration), int(state.agent.step)) == (0, 0)
    assert "too few records for the stage 'learn'" in str(loop.failure) and str(tmp_path) in str(loop.failure)


def test_after_a_torn_file_those_of_the_checkpoint_are_kept_until_there_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 150)
    agent = with_recipe(capacity=32)
    loop, state, _ = run_host(agent, host_env()[0], [3, 9], path=tmp_path)  # rows were overwritten
    checkpoint.save(tmp_path / "checkpoints", 1, loop.gather(state))
    loop.close()
    torn = next((tmp_path / "replay").iterdir())
    torn.write_bytes(torn.read_bytes()[:-3])
    left = []
    for _ in range(2):  # the first is killed before it has a checkpoint of its own
        said = []
        again = HostLoop(agent, host_env()[0], tmp_path, say=said.append)
        restored = again.place(checkpoint.restore(tmp_path / "checkpoints", again.template, exact=True))
        left.append((int(again.replay.ring.added), [text for text in said if "torn" in text]))
        restored, _ = again.compile_stage(agent.recipe.stages[1])(restored, 3)
        again.gather(restored)
        again.close()
    assert left[0] == left[1] and "1 of" in left[0][1][0]


def test_a_disk_that_old_records_have_filled_is_cleared_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 150)
    write, folder = chunks.write, tmp_path / "replay"

    def small_disk(*args):
        if folder.exists() and len(list(folder.iterdir())) >= 8:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(chunks, "write", small_disk)
    agent = with_recipe(capacity=16)  # two files, or three
    loop, state, _ = run_host(agent, host_env()[0], [3, 40], path=tmp_path)
    assert len(list(folder.iterdir())) == 8
    saved = loop.gather(state)
    assert len(list(folder.iterdir())) <= 3
    checkpoint.save(tmp_path / "checkpoints", 1, saved)
    again = HostLoop(agent, host_env()[0], tmp_path)
    again.place(checkpoint.restore(tmp_path / "checkpoints", again.template, exact=True))
    jax.tree.map(np.testing.assert_array_equal, stored(again), stored(loop))


def test_lost_environments_end_the_stage_with_its_state():
    agent = with_recipe()
    loop, state, _ = run_host(agent, host_env(breaks=6 + 9)[0], [3, 8])
    assert str(loop.failure) == "the environments are gone"
    assert (int(state.iteration), int(state.steps), int(loop.replay.ring.added)) == (4, 14, 14)


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


def test_a_replay_larger_than_memory_or_disk_is_refused(tmp_path, monkeypatch):
    said = []
    begin = lambda resume=False: HostLoop(
        with_recipe(), host_env()[0], tmp_path, say=said.append, records=1000, resume=resume
    )
    begin()
    assert "replay of 64 records" in said[0] and "fills 100%" in said[0]
    monkeypatch.setattr("wmjax.loops.host.loop.available_bytes", lambda: 100)
    with pytest.raises(UsageError, match=r"replay_capacity: 64 needs .* GB of memory"):
        begin()
    with monkeypatch.context() as patch:
        patch.setattr("wmjax.loops.host.loop.HostReplay", lambda *args, **kwargs: np.empty(2**50))
        with pytest.raises(UsageError, match=r"replay_capacity: 64 needs .* GB of memory, .* or memory_map"):
            HostLoop(with_recipe(), host_env()[0], tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UsageError, match=r"replay_capacity: 64 needs .* GB of disk"):
        begin()
    begin(resume=True)


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
