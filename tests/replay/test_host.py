"""Replay on the host and on the device give the same batches; what the host writes survives, or is left out."""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.replay import chunks
from wmjax.replay import device as replays
from wmjax.replay.device import Record
from wmjax.replay.host import HostReplay, Shares, sizes
from wmjax.types import RunError, Sampling, TimeStep, UsageError

ENVS, CAPACITY = 3, 33  # 11 rows
add, write, sample = jax.jit(replays.add), jax.jit(replays.write), jax.jit(replays.sample, static_argnums=(2, 3))
SAMPLINGS = {
    "steps": Sampling(3, context=1),
    "online": Sampling(3, online=True),
    "within_episode": Sampling(3, within_episode=True, prioritize_ends=True),
    "episodes": Sampling(3, context=1, over="episodes", within_episode=True),
    "left": Sampling(1, context=3, over="episodes", pad="left"),
    "first": Sampling(3, pad="right", starts="first"),
}
SAVED = [SAMPLINGS[name] for name in ("online", "within_episode", "left")]


def records(start, steps, length=5):
    """Rows that say which they are; episodes of `length` steps, shifted by one in each environment."""
    row, env = np.arange(start, start + steps)[:, None], np.arange(ENVS)
    place = (row + env) % length
    pixel = ((7 * row + env) % 256).astype(np.uint8)
    obs = {"image": np.broadcast_to(pixel[..., None, None, None], (steps, ENVS, 2, 2, 3)).copy()}
    obs["vector"] = np.stack([row + 0 * env, env + 0 * row], -1).astype(np.float32)
    step = TimeStep(obs, (100.0 * row + env).astype(np.float32), place == 0, place == length - 1, place == length - 1)
    action = np.stack([row + 0.5 * env, 0.0 * row + env], -1).astype(np.float32)
    return Record(step, action, {"deter": (row * 10.0 + env)[..., None].astype(jnp.bfloat16)})


def example():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), records(0, 1))


@pytest.fixture(autouse=True)
def blocks_of_four_rows(monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 4 * 3 * 35)


def host(tmp_path=None, *, rows=CAPACITY // ENVS, by=(), **options):
    return HostReplay(example(), ENVS, ENVS * rows, by, folder=tmp_path, **options)


def load(replay, saved):
    if lost := replay.read(saved):
        replay.leave_out(lost)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("memory_map", [pytest.param(False, marks=pytest.mark.slow), True])
def test_host_and_device_give_the_same_batches_of_the_same_stream(name, memory_map, tmp_path):
    sampling, mine = SAMPLINGS[name], host(tmp_path, by=(SAMPLINGS[name],), memory_map=memory_map)
    theirs = replays.init(example(), ENVS, CAPACITY, (sampling,))
    draw = lambda replay, key: sample(replay, key, sampling, 4)
    row = 0
    for number, steps in enumerate([4, 4, 1, 11, 11, 4]):  # the ring is overwritten twice
        mine.add(records(row, steps))
        theirs = add(theirs, records(row, steps))
        row += steps
        assert mine.can_sample(sampling) == bool(replays.can_sample(theirs, sampling))
        key = jax.random.fold_in(jax.random.key(0), number)
        batch, index = mine.sample(key, sampling, 4)
        theirs, expected, where = draw(theirs, key)
        same(batch, expected)
        same(index, where)
        latent = {"deter": np.full((2, 4, 1), number, jnp.bfloat16)}
        mine.write(index, jax.tree.map(np.asarray, latent))
        theirs = write(theirs, where, latent)
    same(mine.sample(key, sampling, 4)[0], draw(theirs, key)[1])
    mine.close()


def part(tree, first, envs, axis=1):
    return jax.tree.map(lambda x: np.take(x, range(first, first + envs), axis), tree)


def of_envs(first, envs, by, tmp_path=None, **options):
    """A host replay of some of the environments."""
    rows = CAPACITY // ENVS
    return HostReplay(
        columns_example(first, envs), envs, envs * rows, by, folder=tmp_path, replays_saved=ENVS // envs, **options
    )


def columns_example(first, envs):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), part(records(0, 1), first, envs))


@pytest.mark.parametrize("name", ["online", "within_episode"])
def test_shares_of_a_batch_come_from_the_environments_of_each_device_as_the_device_loop_draws_them(name):
    sampling, key, rows = SAMPLINGS[name], jax.random.key(3), 9
    by = (sampling,)
    mine = HostReplay(columns_example(0, 3), 3, CAPACITY, by, shares=Shares(3, 3))
    last = HostReplay(columns_example(1, 2), 2, CAPACITY // 3 * 2, by, shares=Shares(2, 3, first=1))
    mine.add(records(0, rows))
    last.add(part(records(0, rows), 1, 2))
    batch, (row, env) = mine.sample(key, sampling, 6)
    for device in range(ENVS):
        theirs = add(replays.init(columns_example(device, 1), 1, CAPACITY // 3, by), part(records(0, rows), device, 1))
        theirs, expected, where = sample(theirs, jax.random.fold_in(key, device), sampling, 2)
        same(jax.tree.map(lambda x, device=device: x[:, 2 * device : 2 * device + 2], batch), expected)
        same(row[:, 2 * device : 2 * device + 2], where[0])
        assert (env[:, 2 * device : 2 * device + 2] == device).all()
    assert mine.ring.cursor == theirs.cursor
    other, (row_of_last, _) = last.sample(key, sampling, 4)
    same(other, jax.tree.map(lambda x: x[:, 2:], batch))
    same(row_of_last, row[:, 2:])


@pytest.mark.parametrize("memory_map", [False, True])
def test_what_replays_side_by_side_saved_is_loaded_by_one_of_all_and_the_other_way_round(memory_map, tmp_path):
    said, sides = [], [of_envs(i, 1, SAVED, tmp_path, memory_map=memory_map) for i in range(ENVS)]
    whole = of_envs(0, ENVS, SAVED, tmp_path, memory_map=memory_map)
    for i, side in enumerate(sides):
        side.add(part(records(0, 10), i, 1))
    whole.add(records(0, 10))
    saved, all_saved = jax.tree.map(np.array, ([side.saved() for side in sides], whole.saved()))
    files = np.stack([each.digests for each in saved], 1)
    lists = np.zeros_like(all_saved.digests)
    for number in np.flatnonzero(files.any((1, 2))):
        lists[number] = np.frombuffer(chunks.write(tmp_path, {chunks.PARTS: files[number]}), np.uint8)
    again = of_envs(0, ENVS, SAVED, tmp_path, memory_map=memory_map)
    load(again, all_saved._replace(digests=lists))
    for sampling in SAVED:
        same(again.sample(jax.random.key(1), sampling, 6), whole.sample(jax.random.key(1), sampling, 6))
    for i, side in enumerate(sides):
        again = of_envs(i, 1, SAVED, tmp_path, memory_map=memory_map)
        assert again.read(saved[i]._replace(digests=all_saved.digests), i, ENVS) == []
        expected = side.sample(jax.random.key(2), SAVED[0], 2)
        same(again.sample(jax.random.key(2), SAVED[0], 2), expected)
        again = of_envs(i, 1, SAVED, tmp_path, memory_map=memory_map)
        assert again.read(saved[i]._replace(digests=lists), i, ENVS) == []
        assert again.digests() == side.digests()  # the files are its own already
    # What an online queue has given is counted alike, whoever shares it.
    shared = of_envs(0, ENVS, SAVED, tmp_path, shares=Shares(ENVS, ENVS))
    load(shared, all_saved)
    shared.draw(jax.random.key(3), SAMPLINGS["online"], 2 * ENVS)
    assert int(shared.ring.cursor) == 2 and int(shared.saved().ring.cursor) == 2 * ENVS
    again = of_envs(0, ENVS, SAVED, tmp_path)
    load(again, all_saved._replace(ring=jax.tree.map(np.array, shared.saved().ring)))
    assert int(again.ring.cursor) == 2 * ENVS
    # A file that is gone costs the block in all of them, once they agree.
    chunks.path_of(tmp_path, files[0, 1].tobytes()).unlink()
    for i in range(ENVS):
        again = of_envs(i, 1, SAVED, tmp_path, warn=said.append)
        assert again.read(saved[i]._replace(digests=lists), i, ENVS) == [0] * (i == 1)
        again.leave_out([0], ENVS)
        assert int(again.ring.added) == 6
    assert ["the 12 records" in text for text in said] == [True] * 3


def test_of_two_latents_for_one_record_the_later_in_the_window_stays():
    mine = host()
    mine.add(records(0, 8))
    index = (np.array([[2, 1], [3, 2]]), np.array([[0, 0], [0, 0]]))
    mine.write(index, {"deter": np.arange(4, dtype=np.float32).reshape(2, 2, 1)})
    assert mine.latent["deter"][1:4, 0, 0].tolist() == [1, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("rows", [7, 11, 12, 27])
def test_what_was_saved_is_loaded_bit_for_bit_and_goes_on_alike(rows, memory_map, tmp_path):
    mine = host(tmp_path, by=SAVED, memory_map=memory_map)
    for row in range(rows):
        mine.add(records(row, 1))
    mine.draw(jax.random.key(5), SAMPLINGS["online"], 2)  # moves the cursor
    saved = jax.tree.map(np.array, mine.saved())
    again = host(tmp_path, by=SAVED, memory_map=memory_map)
    load(again, saved)
    for replay in (mine, again):
        replay.add(records(rows, 3))
    for sampling in SAVED:
        same(again.sample(jax.random.key(1), sampling, 6), mine.sample(jax.random.key(1), sampling, 6))
    mine.close()
    again.close()


def test_complete_blocks_are_written_once_and_named_by_their_digest(tmp_path):
    mine = host(tmp_path)
    mine.add(records(0, 9))
    mine.saved()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 2  # blocks of four rows
    mine.saved()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert all(chunks.is_whole(tmp_path, bytes.fromhex(path.name.split(".")[0])) for path in files)
    first = chunks.mapped(tmp_path, mine._digests[0].tobytes())
    assert first["reward"].tolist() == records(0, 4).step.reward.tolist()


@pytest.mark.parametrize("damage", ["torn", "missing", "flipped"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_a_damaged_chunk_is_left_out_and_episodes_end_before_the_gap(damage, memory_map, tmp_path):
    said = []
    mine = host(tmp_path)
    mine.add(records(0, 10))
    saved = jax.tree.map(np.array, mine.saved())
    mine.close()
    path = chunks.path_of(tmp_path, saved.digests[1].tobytes())  # rows 4 to 7
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    again = host(tmp_path, memory_map=memory_map, warn=said.append)
    load(again, saved)
    assert "1 of 3 chunks" in said[0] and "12 records" in said[0]
    batch, _ = again.sample(jax.random.key(0), Sampling(6), 3)  # all that is left
    for b in range(3):
        env = int(batch.step.obs["vector"][0, b, 1])
        assert batch.step.obs["vector"][:, b, 0].tolist() == [0, 1, 2, 3, 8, 9]
        assert batch.step.reward[:, b].tolist() == [100.0 * row + env for row in (0, 1, 2, 3, 8, 9)]
        assert np.asarray(batch.latent["deter"][:, b, 0], np.float32).tolist() == pytest.approx(
            [10.0 * row + env for row in (0, 1, 2, 3, 8, 9)], rel=1e-2
        )
        assert batch.step.is_first[4, b] and batch.step.is_last[3, b]
    again.add(records(10, 5))
    assert len(set(again.sample(jax.random.key(0), Sampling(11), 1)[0].step.obs["vector"][:, 0, 0].tolist())) == 11
    assert again.saved().digests.any() and len(list(tmp_path.iterdir())) >= 2
    again.close()


def test_a_chunk_that_cannot_be_written_is_tried_again_at_the_next_save(tmp_path, monkeypatch):
    said = []
    mine = host(tmp_path, warn=said.append)

    def full(folder, arrays):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "write", full)
        mine.add(records(0, 9))
        with pytest.raises(OSError, match="No space left"):
            mine.saved()
    assert "could not be written (No space left on device)" in said[0]
    again = host(tmp_path)
    load(again, jax.tree.map(np.array, mine.saved()))
    same(again.sample(jax.random.key(1), Sampling(4), 6), mine.sample(jax.random.key(1), Sampling(4), 6))


def test_of_its_own_files_only_those_that_are_named_are_kept_and_others_stay(tmp_path):
    mine = host(tmp_path)
    mine.add(records(0, 8))
    mine.saved()
    (tmp_path / f".tmp-0123abcd-{'0' * 64}{chunks.SUFFIX}").write_text("begun")
    others = [f"model{chunks.SUFFIX}", f"{'A' * 64}{chunks.SUFFIX}", f".tmp-0123abcd-model{chunks.SUFFIX}", "x"]
    for name in others:
        (tmp_path / name).write_text("another's")
    (tmp_path / f"{'1' * 64}{chunks.SUFFIX}").mkdir()
    keep = mine._digests[1].tobytes()
    chunks.keep(tmp_path, [keep])
    chunks.tidy(tmp_path)
    left = {chunks.path_of(tmp_path, keep).name, f"{'1' * 64}{chunks.SUFFIX}", *others}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_nothing_is_removed_or_written_where_the_folder_is_a_link(tmp_path):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "replay"
    elsewhere.mkdir()
    for name in (f"{'1' * 64}{chunks.SUFFIX}", f".tmp-0123abcd-{'0' * 64}{chunks.SUFFIX}"):
        (elsewhere / name).write_text("another's")
    link.symlink_to(elsewhere)
    chunks.keep(link, [])
    chunks.tidy(link)
    with pytest.raises(OSError, match="link"):
        chunks.write(link, {"x": np.zeros(3)})
    assert len(list(elsewhere.iterdir())) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (40).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[9]}}'.ljust(40),
        (60).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}'.ljust(60),
        (60).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[-9,0]}}'.ljust(60),
        (60).to_bytes(8, "little") + b'{"x":{"dtype":"V99","shape":[1],"data_offsets":[0,4]}}'.ljust(60) + b"1234",
        (60).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(60) + b"1234",
    ],
)
def test_a_file_whose_hash_is_right_and_whose_arrays_are_not_is_left_out(data, tmp_path):
    said, mine = [], host(tmp_path)
    mine.add(records(0, 8))
    saved = jax.tree.map(np.array, mine.saved())
    mine.close()
    digest = hashlib.sha256(data).digest()
    chunks.path_of(tmp_path, digest).write_bytes(data)
    saved.digests[0] = np.frombuffer(digest, np.uint8)
    again = host(tmp_path, warn=said.append)
    load(again, saved)
    assert len(said) == 1 and "1 of 3 chunks" in said[0] and int(again.ring.added) == 4
    again.close()


@pytest.mark.parametrize("memory_map", [False, True])
def test_memory_never_exceeds_what_is_stated_and_is_less_with_files(memory_map, tmp_path):
    rows, stated = 400, {}
    for option in (False, True):
        stated[option] = sizes(example(), ENVS, ENVS * rows, memory_map=option).memory_bytes
    assert stated[True] < 0.5 * stated[False]
    mine = host(tmp_path, rows=rows, memory_map=memory_map)
    most = 0
    for row in range(2 * rows + 3):
        mine.add(records(row, 1))
        held = sum(value.nbytes for block in mine._blocks if block is not None for value in block.values())
        saved = mine.latent, {name: value[:4] for name, value in mine._open(0).items()} if not memory_map else ()
        most = max(most, held + sum(x.nbytes for x in jax.tree.leaves((mine.latent, mine.ring, saved))))
    assert 0.5 * stated[memory_map] < most <= stated[memory_map]
    mine.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted as Linux shows them")
def test_however_many_files_there_are_few_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr("wmjax.replay.host.MAPPED", 3)
    monkeypatch.setattr("wmjax.replay.host.CHUNK_BYTES", 1)
    mine = host(tmp_path, rows=80, memory_map=True)
    before = len(os.listdir("/proc/self/fd"))
    mine.add(records(0, 80))
    mine.saved()
    assert len(list(tmp_path.iterdir())) == 80
    batch, index = mine.sample(jax.random.key(0), Sampling(60), 8)
    np.testing.assert_array_equal(batch.step.obs["vector"][..., 0], index[0])
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    mine.close()


def test_what_cannot_be_written_stops_a_replay_that_is_read_from_files_before_memory_is_full(tmp_path, monkeypatch):
    said = []
    mine = host(tmp_path, rows=80, memory_map=True, warn=said.append)

    def full(folder, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks, "write", full)
    with pytest.raises(RunError, match="chunks could not be written, and with memory_map there is no more memory"):
        for row in range(80):
            mine.add(records(row, 1))
    assert sum(block is not None for block in mine._blocks) <= 9 and said


def test_reading_from_files_needs_a_folder():
    with pytest.raises(UsageError, match="memory_map"):
        host(None, memory_map=True)
