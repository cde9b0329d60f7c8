"""The host loop computes what the device loop computes, and gives up nothing when it is stopped."""

import jax
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent, learn
from tests.loops.host.fakes import host_env, run_device, run_host, stored, with_recipe
from wmjax.loops import checkpoint
from wmjax.loops.host.loop import HostLoop
from wmjax.loops.schedule import Schedule
from wmjax.replay import chunks
from wmjax.types import Recipe, Sampling, Stage, Update, UsageError


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [24, 64])  # rows are overwritten, or not
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


@pytest.mark.slow
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
