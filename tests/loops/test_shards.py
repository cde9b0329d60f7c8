"""Checkpoints that several processes write together, here by one that plays their parts."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.loops import checkpoint, shards
from wmjax.loops.checkpoint import CheckpointCorruptError
from wmjax.loops.shards import Block, Part, Team

REPLAY = np.arange(24, dtype=np.float32).reshape(4, 6)
TREE = {"params": np.ones(3, np.float32), "replay": REPLAY, "flags": np.zeros((2, 4), bool)}
TEMPLATE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))


def part(index, token="0a", number=0):
    """What a process of two has of the tree: columns of replay, rows of flags."""
    leaves = checkpoint.snapshot(TREE)
    columns, row = slice(3 * index, 3 * index + 3), slice(index, index + 1)
    leaves["replay"] = [Block((0, columns.start), REPLAY[:, columns].copy())], leaves["replay"][1]
    leaves["flags"] = [Block((index, 0), TREE["flags"][row].copy())], leaves["flags"][1]
    return leaves, Team(index, 2, token, number)


def write(folder, step, index):
    leaves, team = part(index, number=step)
    return checkpoint.write(folder, step, leaves, team=team)


def save(folder, step=7):
    """Both processes save; the first waits for the second."""
    thread = threading.Timer(0.2, write, (folder, step, 1))
    thread.start()
    try:
        return write(folder, step, 0)
    finally:
        thread.join()


def test_a_step_of_two_processes_is_read_by_one(tmp_path):
    place = save(tmp_path)
    assert sorted(path.name for path in place.iterdir()) == [
        "arrays", "blocks-0.safetensors", "blocks-1.safetensors", "manifest.json",
    ]  # fmt: skip
    found = checkpoint.restore(tmp_path, TEMPLATE, exact=True)
    jax.tree.map(np.testing.assert_array_equal, found, TREE)
    assert checkpoint.digest(found) == checkpoint.digest(TREE)
    assert not list(tmp_path.glob(".*"))


def test_a_part_that_an_earlier_attempt_left_behind_is_not_taken(tmp_path):
    leaves, team = part(1, "0b")
    leaves["replay"][0][0].array[:] = -1
    checkpoint.write(tmp_path, 7, leaves, team=team)  # and then all were killed
    save(tmp_path)
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, TEMPLATE)["replay"], REPLAY)


def test_a_process_that_is_a_save_ahead_does_not_replace_the_part_that_the_first_one_waits_for(tmp_path):
    for number, value in ((1, -1), (2, 0)):  # of one step, both before the first process begins with either
        leaves, team = part(1, number=number)
        leaves["replay"][0][0].array[:] = value
        checkpoint.write(tmp_path, 7, leaves, team=team)
    for number, value in ((1, -1), (2, 0)):
        leaves, team = part(0, number=number)
        checkpoint.write(tmp_path, 7, leaves, team=team)
        assert (checkpoint.restore(tmp_path, TEMPLATE)["replay"][:, 3:] == value).all()
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_cannot_write_its_part_leaves_the_steps_before(tmp_path, monkeypatch):
    save(tmp_path, step=6)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write(tmp_path, 7, 1)
    with pytest.raises(OSError, match="process 1 could not save its part: disk full"):
        write(tmp_path, 7, 0)
    assert checkpoint.steps(tmp_path) == [6]
    save(tmp_path, step=8)
    assert checkpoint.steps(tmp_path) == [6, 8] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other"])
def test_damaged_blocks_are_named_and_the_step_before_is_used(tmp_path, damage):
    save(tmp_path, step=6)
    file = save(tmp_path, step=7) / "blocks-1.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-3], "other": b"nothing of ours"}.get(damage, content))
    with pytest.raises(CheckpointCorruptError, match=r"blocks-1\.safetensors"):
        checkpoint.restore(tmp_path, TEMPLATE)
    said = []
    step, found = checkpoint.restore_newest(tmp_path, TEMPLATE, said.append)
    assert step == 6 and len(said) == 1
    np.testing.assert_array_equal(found["replay"], REPLAY)


def test_what_a_process_does_not_need_is_not_read(tmp_path):
    save(tmp_path)
    block = {"start": [0, 3], "shape": [4, 3]}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    leaf = lambda sharding: types.SimpleNamespace(shape=(4, 6), sharding=sharding)
    assert shards.is_needed(block, leaf(None)) and shards.is_needed(block, leaf(whole))

    class Half:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(None), slice(0, 3))}

    assert not shards.is_needed(block, leaf(Half()))
    assert shards.is_needed({"start": [0, 2], "shape": [4, 2]}, leaf(Half()))
    halves = [Part(np.zeros((4, 3)), 1, index, 2) for index in range(2)]
    assert [shards.is_needed(block, half) for half in halves] == [False, True]
    for index, half in enumerate(halves):  # as each process reads its own
        template = TEMPLATE | {"replay": Part(jax.ShapeDtypeStruct((4, 3), np.float32), 1, index, 2)}
        found = checkpoint.restore(tmp_path, template, exact=True)["replay"]
        np.testing.assert_array_equal(found, REPLAY[half.place])
