from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.replay import device as replays
from wmjax.replay.device import Record
from wmjax.types import Sampling, TimeStep, UsageError

ENVS = 3
WITHIN = dict(within_episode=True)


def records(first: int, count: int, *, first_at: tuple = (), dtype=jnp.float32) -> Record:
    """Rows `first`, `first + 1`, ...; the observation is 100 * row + environment."""
    row = np.broadcast_to(np.arange(first, first + count)[:, None], (count, ENVS))
    label = (100 * row + np.arange(ENVS)).astype(np.float32)
    obs = {"image": np.full((count, ENVS, 2, 2, 3), 255, np.uint8), "label": label}
    no = np.zeros((count, ENVS), bool)
    step = TimeStep(obs, label, np.isin(row, first_at), no, no)
    return jax.tree.map(jnp.asarray, Record(step, label[..., None], {"deter": label[..., None].astype(dtype)}))


def empty(capacity: int, dtype=jnp.float32, by: tuple[Sampling, ...] = ()) -> replays.Replay:
    return replays.init(jax.tree.map(lambda x: x[0], records(0, 1, dtype=dtype)), ENVS, capacity, by)


def filled(rows: int, total: int, collect: int = 1, by: tuple[Sampling, ...] = (), **kwargs) -> replays.Replay:
    replay = empty(rows * ENVS, kwargs.get("dtype", jnp.float32), by)
    add = jax.jit(replays.add)
    for first in range(0, total, collect):
        replay = add(replay, records(first, collect, **kwargs))
    return replay


sample = jax.jit(replays.sample, static_argnums=(2, 3))


def test_a_window_is_consecutive_steps_of_one_environment_and_never_straddles_the_write_head():
    replay = filled(rows=10, total=28, collect=4)  # rows 18..27 are kept, the head is in the middle of the storage
    _, batch, _ = sample(replay, jax.random.key(0), Sampling(3, context=1), 512)
    label = np.asarray(batch.step.obs["label"])
    assert label.shape == (4, 512)
    np.testing.assert_array_equal(np.diff(label, axis=0), 100)
    assert set(label[0] // 100) == set(range(18, 25))
    np.testing.assert_array_equal(batch.action[..., 0], label)
    np.testing.assert_array_equal(batch.latent["deter"][..., 0], label)
    assert batch.mask.all() and batch.mask.shape == (4, 512)
    assert batch.step.obs["image"].dtype == jnp.uint8 and (batch.step.obs["image"] == 255).all()


def test_starts_and_environments_are_uniform():
    replay = filled(rows=8, total=13)
    _, batch, _ = sample(replay, jax.random.key(1), Sampling(4), 15_000)
    _, counts = np.unique(batch.step.obs["label"][0], return_counts=True)
    assert counts.shape == (5 * ENVS,)
    assert np.abs(counts - 1000).max() < 150  # five standard deviations


def test_a_replay_that_is_not_full_gives_only_what_was_added():
    replay = filled(rows=50, total=5)
    assert int(replays.size(replay)) == 5
    assert bool(replays.can_sample(replay, Sampling(4, context=1)))
    assert not bool(replays.can_sample(replay, Sampling(5, context=1)))
    _, batch, _ = sample(replay, jax.random.key(0), Sampling(4), 64)
    assert set(np.asarray(batch.step.obs["label"][0] // 100)) == {0, 1}


def test_rows_of_a_batch_depend_on_their_own_key_only():
    replay = filled(rows=30, total=30)
    _, few, _ = sample(replay, jax.random.key(0), Sampling(2), 4)
    _, many, _ = sample(replay, jax.random.key(0), Sampling(2), 16)
    np.testing.assert_array_equal(few.step.obs["label"], many.step.obs["label"][:, :4])


def test_an_episode_that_was_cut_ends_where_the_next_begins_and_windows_cross_episodes():
    replay = filled(rows=6, total=6, first_at=(3,))
    _, batch, _ = sample(replay, jax.random.key(0), Sampling(6), 1)
    assert batch.step.is_first[:, 0].tolist() == [False, False, False, True, False, False]
    assert batch.step.is_last[:, 0].tolist() == [False, False, True, False, False, False]
    assert not batch.step.is_terminal.any()


def test_the_online_queue_gives_each_complete_window_once_oldest_first_then_uniform_ones():
    sampling, replay = Sampling(3, context=1, online=True), filled(rows=20, total=9)  # two windows of each environment
    firsts = []
    for i in range(3):
        replay, batch, _ = sample(replay, jax.random.key(i), sampling, 4)
        firsts.append(np.asarray(batch.step.obs["label"][0]).astype(int).tolist())
        np.testing.assert_array_equal(np.diff(batch.step.obs["label"], axis=0), 100)
    assert firsts[0] == [0, 1, 2, 400]
    assert firsts[1][:2] == [401, 402]
    assert int(replay.cursor) == 6
    replay = replays.add(replay, records(9, 3))
    _, batch, _ = sample(replay, jax.random.key(9), sampling, 4)
    assert batch.step.obs["label"][0, :3].tolist() == [800, 801, 802]


def test_the_online_queue_skips_windows_that_were_overwritten():
    replay = filled(rows=10, total=23)  # rows 13..22 are kept: of the windows of 4, those from 16
    replay, batch, _ = sample(replay, jax.random.key(0), Sampling(4, online=True), ENVS)
    assert batch.step.obs["label"][0].tolist() == [1600, 1601, 1602]
    assert int(replay.cursor) == 5 * ENVS


def test_sampling_without_the_online_queue_leaves_it_alone():
    replay, *_ = sample(filled(rows=10, total=8), jax.random.key(0), Sampling(4), 2)
    assert int(replay.cursor) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_latents_are_written_back_where_they_came_from_and_nowhere_else(dtype):
    replay = filled(rows=12, total=17, dtype=dtype)
    before = jax.tree.map(np.asarray, replay)
    replay, batch, index = sample(replay, jax.random.key(3), Sampling(3), 5)
    assert batch.latent["deter"].dtype == dtype
    replay = jax.jit(replays.write)(
        replay, index, jax.tree.map(lambda x: jnp.full_like(x, 7.0, jnp.float32), batch.latent)
    )
    stored = replays._unpack(replay.data.latent)["deter"][..., 0].astype(jnp.float32)
    expected = np.asarray(replays._unpack(before.data.latent)["deter"][..., 0].astype(np.float32)).copy()
    expected[np.asarray(index[0]), np.asarray(index[1])] = 7.0
    np.testing.assert_array_equal(stored, expected)
    jax.tree.map(np.testing.assert_array_equal, replay.data.step, before.data.step)


def test_of_two_latents_for_one_step_the_last_in_time_major_order_wins():
    replay = filled(rows=6, total=6)
    row = jnp.array([[0, 1, 1], [1, 2, 2]])  # [T, B]: step 1 of environment 0 three times
    index = (row, jnp.zeros_like(row))
    latent = {"deter": jnp.arange(6.0).reshape(2, 3, 1)}
    replay = replays.write(replay, index, latent)
    assert replay.data.latent["deter"][:, 0, 0].tolist() == [0.0, 3.0, 5.0, 300.0, 400.0, 500.0]


def test_latents_of_the_last_steps_only_leave_the_context_as_it_was():
    replay = filled(rows=6, total=6)
    index = (jnp.array([[1], [2], [3]]), jnp.full((3, 1), 2))
    replay = replays.write(replay, index, {"deter": jnp.full((2, 1, 1), -1.0)})
    assert replay.data.latent["deter"][:, 2, 0].tolist() == [2.0, 102.0, -1.0, -1.0, 402.0, 502.0]


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        (jnp.float32, Sampling(4, 1, True)),
        (jnp.bfloat16, Sampling(4, 1, True)),
        (jnp.float32, Sampling(3, over="episodes", prioritize_ends=True, **WITHIN)),
        (jnp.float32, Sampling(1, over="episodes", pad="left")),
    ],
)
def test_a_loop_over_add_sample_and_write_needs_no_second_copy_of_the_buffer(dtype, sampling):
    def loop(replay, key):
        def body(i, carry):
            replay, total = carry
            replay = replays.add(replay, records(0, 2, dtype=dtype))
            replay, batch, index = replays.sample(replay, jax.random.fold_in(key, i), sampling, 2)
            total += batch.step.obs["image"].sum()
            return replays.write(replay, index, jax.tree.map(lambda x: x + 1, batch.latent)), total

        return jax.lax.fori_loop(0, 10, body, (replay, jnp.uint32(0)))

    shapes = jax.eval_shape(partial(empty, 300_000, dtype, (sampling,)))
    memory = jax.jit(loop, donate_argnums=0).lower(shapes, jax.random.key(0)).compile().memory_analysis()
    latent = 300_000 * jnp.dtype(dtype).itemsize  # the smallest buffer that could be copied, but for the flags
    assert memory.temp_size_in_bytes < latent / 4
    assert memory.alias_size_in_bytes > 300_000 * 12


def test_what_replay_can_never_hold_is_refused():
    replays.check(ENVS * 10, ENVS, Sampling(9, context=1), 3)
    with pytest.raises(UsageError, match=r"length 10 \+ context 1: .* at most that"):
        replays.check(ENVS * 10, ENVS, Sampling(10, context=1), 1)
    with pytest.raises(UsageError, match=r"batch_size 4: .* at most 3"):
        replays.check(ENVS * 10, ENVS, Sampling(9, context=1), 4)
    with pytest.raises(UsageError, match="batch_size 0"):
        replays.check(ENVS * 10, ENVS, Sampling(2), 0)
    with pytest.raises(UsageError, match="length must be at least 1"):
        replays.check(ENVS * 10, ENVS, Sampling(0), 1)
    with pytest.raises(UsageError, match="replay_capacity 2"):
        empty(2)
    with pytest.raises(UsageError, match="collect 11"):
        replays.add(empty(ENVS * 10), records(0, 11))


# ---------------------------------------------------------------------------------------------------------------------
# Windows and episodes


PADDED = (Sampling(1, over="episodes", pad="left"), Sampling(1, over="episodes", pad="right"))


def episodes(rows: int, total: int, first_at: tuple, last_at: tuple = ()) -> replays.Replay:
    """A replay whose environments all begin an episode at `first_at` and end one at `last_at`."""
    record = records(0, total, first_at=first_at)
    last = np.isin(np.broadcast_to(np.arange(total)[:, None], (total, ENVS)), last_at)
    record = record._replace(step=record.step._replace(is_last=jnp.asarray(last)))
    replay = empty(rows * ENVS, by=PADDED)
    for begin in range(0, total, rows):
        replay = replays.add(replay, jax.tree.map(lambda x, b=begin: x[b : b + rows], record))
    return replay


def test_episodes_are_equally_likely_however_long_they_are():
    replay = episodes(100, 100, first_at=(0, 1))  # lengths 1 and 99
    for sampling, share in ((Sampling(1, over="episodes", pad="right"), 0.5), (Sampling(1, pad="right"), 0.01)):
        _, batch, _ = sample(replay, jax.random.key(0), sampling, 4000)
        row, env = np.divmod(np.asarray(batch.step.obs["label"][0]), 100)
        assert np.mean(row == 0) == pytest.approx(share, abs=0.03)
        assert np.bincount(env.astype(int)) / 4000 == pytest.approx(1 / ENVS, abs=0.03)
        _, counts = np.unique(row[row > 0], return_counts=True)
        assert counts.shape == (99,) and counts.max() < 4 * counts.mean()  # within an episode all steps are


def test_a_window_padded_on_the_right_starts_anywhere_and_ends_with_its_episode():
    replay = episodes(8, 8, first_at=(0, 3), last_at=(2,))
    _, batch, _ = sample(replay, jax.random.key(0), Sampling(4, over="episodes", pad="right"), 512)
    row, mask = np.asarray(batch.step.obs["label"]) // 100, np.asarray(batch.mask)
    assert set(row[0]) == set(range(8))
    for start in range(8):
        expected = [start + t < (3 if start < 3 else 8) for t in range(4)]
        assert (mask[:, row[0] == start] == np.array(expected)[:, None]).all()
        count = sum(expected)
        assert (row[:count, row[0] == start] == start + np.arange(count)[:, None]).all()


def test_a_window_padded_on_the_left_ends_at_any_step_that_the_episode_goes_on_from():
    replay = episodes(8, 8, first_at=(0, 3), last_at=(2, 7))
    _, batch, _ = sample(replay, jax.random.key(0), Sampling(1, context=3, over="episodes", pad="left"), 512)
    row, mask = np.asarray(batch.step.obs["label"]) // 100, np.asarray(batch.mask)
    assert set(row[-1]) == {0, 1, 3, 4, 5, 6}
    for stop in set(row[-1]):
        expected = [stop - 3 + t >= (0 if stop < 3 else 3) for t in range(4)]
        assert (mask[:, row[-1] == stop] == np.array(expected)[:, None]).all()
        assert mask[-1].all()


@pytest.mark.slow
def test_padding_never_shows_what_was_overwritten_or_not_yet_written():
    replay = episodes(6, 9, first_at=(0, 7))  # rows 3..8 are kept, and the storage wraps around
    for pad in ("left", "right"):
        _, batch, _ = sample(replay, jax.random.key(0), Sampling(5, over="episodes", pad=pad), 256)
        row, mask = np.asarray(batch.step.obs["label"]) // 100, np.asarray(batch.mask)
        assert set(row[mask]) == {3, 4, 5, 7, 8} | ({6} if pad == "right" else set())
        for b in range(256):
            seen = row[mask[:, b], b]
            assert (np.diff(seen) == 1).all() and len({x < 7 for x in seen}) == 1
    half = episodes(20, 5, first_at=(0,))
    _, batch, _ = sample(half, jax.random.key(0), Sampling(4, over="episodes", pad="right"), 64)
    assert set(np.asarray(batch.step.obs["label"])[np.asarray(batch.mask)] // 100) == set(range(5))


def test_samplings_that_contradict_themselves_are_refused():
    with pytest.raises(UsageError, match="over 'steps', 'episodes' or 'in_order'"):
        replays.check(ENVS * 10, ENVS, Sampling(2, over="days"), 1)
    with pytest.raises(UsageError, match="online"):
        replays.check(ENVS * 10, ENVS, Sampling(2, online=True, within_episode=True), 1)
    with pytest.raises(UsageError, match=r"prioritize_ends .* needs within_episode"):
        replays.check(ENVS * 10, ENVS, Sampling(2, prioritize_ends=True), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Windows within episodes


def test_windows_within_episodes_are_uniform_over_all_that_fit_and_may_begin_where_an_episode_does():
    # Rows 8..19 are kept, the write head in the middle of the storage; episodes begin at rows 11 and 16.
    how = Sampling(3, **WITHIN)
    replay = filled(rows=12, total=20, first_at=(11, 16), by=(how,))
    _, batch, _ = sample(replay, jax.random.key(0), how, 15_000)
    first = np.asarray(batch.step.obs["label"][0] // 100, int)
    starts, counts = np.unique(first, return_counts=True)
    assert starts.tolist() == [8, 11, 12, 13, 16, 17]
    assert np.abs(counts - 2500).max() < 250
    assert len(np.unique(batch.step.obs["label"][0] % 100)) == ENVS
    assert not batch.step.is_first[1:].any()


def test_context_in_front_of_a_window_may_be_of_another_episode():
    how = Sampling(3, context=1, **WITHIN)
    replay = filled(rows=12, total=20, first_at=(11, 16), by=(how,))
    _, batch, _ = sample(replay, jax.random.key(0), how, 2000)
    trained = np.unique(np.asarray(batch.step.obs["label"][1] // 100, int))
    assert trained.tolist() == [11, 12, 13, 16, 17]  # row 8 has no record in front
    assert not batch.step.is_first[2:].any()


def test_the_last_window_of_an_episode_counts_as_often_as_it_is_long_and_once_more():
    how = Sampling(3, prioritize_ends=True, **WITHIN)
    replay = filled(rows=12, total=20, first_at=(11, 16), by=(how,))
    _, batch, _ = sample(replay, jax.random.key(0), how, 14_000)
    starts, counts = np.unique(np.asarray(batch.step.obs["label"][0] // 100, int), return_counts=True)
    assert starts.tolist() == [8, 11, 12, 13, 16, 17]
    # Windows that end right before another episode begins: 8 and 13. The running episode has not ended.
    np.testing.assert_allclose(counts / 1000, [4 * 14 / 12, 14 / 12, 14 / 12, 4 * 14 / 12, 14 / 12, 14 / 12], rtol=0.15)


def test_where_no_episode_is_long_enough_windows_cross_their_ends():
    how = Sampling(3, **WITHIN)
    replay = filled(rows=12, total=12, first_at=(0, 2, 4, 6, 8, 10), by=(how,))
    _, batch, _ = sample(replay, jax.random.key(0), how, 500)
    assert set(np.asarray(batch.step.obs["label"][0] // 100, int)) == set(range(10))


@pytest.mark.slow
def test_windows_that_begin_episodes_are_uniform_over_these():
    # Rows 8..19 are kept; episodes begin at rows 11 and 16, and what is left of one before begins nothing.
    replay = filled(rows=12, total=20, first_at=(11, 16), by=PADDED)
    for sampling in (Sampling(1, starts="first"), Sampling(4, over="episodes", pad="right", starts="first")):
        replays.check(12 * ENVS, ENVS, sampling, 4)
        _, batch, _ = sample(replay, jax.random.key(0), sampling, 2000)
        starts, counts = np.unique(np.asarray(batch.step.obs["label"][0] // 100, int), return_counts=True)
        assert starts.tolist() == [11, 16] and np.abs(counts - 1000).max() < 150
        assert batch.step.is_first[0].all()
    without = filled(rows=6, total=20, first_at=(11,), by=PADDED)  # rows 14..19: no beginning is left
    _, batch, _ = sample(without, jax.random.key(0), Sampling(1, starts="first"), 500)
    assert set(np.asarray(batch.step.obs["label"][0] // 100, int)) == set(range(14, 20))
    for wrong in (Sampling(2, starts="last"), Sampling(2, pad="left", starts="first")):
        with pytest.raises(UsageError, match="starts"):
            replays.check(ENVS * 10, ENVS, wrong, 1)


@pytest.mark.slow
def test_an_episode_is_drawn_first_and_then_a_window_within_it_the_last_one_more_often():
    counts = {}
    for ends in (False, True):
        how = Sampling(3, over="episodes", prioritize_ends=ends, **WITHIN)
        replay = filled(rows=12, total=20, first_at=(11, 16), by=(how,))  # episodes of 3, 5 and, still running, 4 rows
        _, batch, _ = sample(replay, jax.random.key(0), how, 12_000)
        found, number = np.unique(np.asarray(batch.step.obs["label"][0] // 100, int), return_counts=True)
        counts[ends] = dict(zip(found.tolist(), number / 4000, strict=True))
    wanted = {8: 1, 11: 1 / 3, 12: 1 / 3, 13: 1 / 3, 16: 1 / 2, 17: 1 / 2}
    for row, share in wanted.items():
        np.testing.assert_allclose(counts[False][row], share, rtol=0.15)
    for row, share in (wanted | {11: 1 / 6, 12: 1 / 6, 13: 4 / 6}).items():
        np.testing.assert_allclose(counts[True][row], share, rtol=0.15)


def test_windows_in_order_cover_every_step_of_every_environment_and_begin_again():
    replay = filled(rows=10, total=17)  # rows 7..16 are kept
    sampling, seen = Sampling(4, over="in_order"), []
    replays.check(10 * ENVS, ENVS, sampling, 2)
    for i in range(5):  # 3 windows of each of 3 environments, 2 at once
        replay, batch, _ = sample(replay, jax.random.key(i), sampling, 2)
        np.testing.assert_array_equal(np.diff(batch.step.obs["label"], axis=0), 100)
        seen += batch.step.obs["label"][0].astype(int).tolist()
    assert seen == [700, 701, 702, 1100, 1101, 1102, 1300, 1301, 1302, 700]
    assert int(replay.cursor) == 1


def test_windows_in_order_overlap_by_their_context_only():
    replay = filled(rows=20, total=13)
    sampling, starts = Sampling(4, context=1, over="in_order"), []
    for i in range(3):
        replay, batch, _ = sample(replay, jax.random.key(i), sampling, ENVS)
        assert batch.step.obs["label"].shape == (5, ENVS)
        starts.append(int(batch.step.obs["label"][0, 0]))
    assert starts == [0, 400, 800]


def test_windows_in_order_cannot_be_chosen_otherwise():
    for sampling in (Sampling(2, over="in_order", online=True), Sampling(2, over="in_order", within_episode=True)):
        with pytest.raises(UsageError, match="in order"):
            replays.check(ENVS * 10, ENVS, sampling, 1)
    with pytest.raises(UsageError, match="in_order"):
        replays.check(ENVS * 10, ENVS, Sampling(2, over="rows"), 1)
