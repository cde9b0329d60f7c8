import json
import pickle
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wmjax.loops import checkpoint
from wmjax.types import UsageError


class Pair(NamedTuple):
    key: jax.Array
    rest: dict


def tree():
    return {
        "agent": Pair(
            jax.random.split(jax.random.key(5), 3),
            {
                "half": jnp.array([1.5, jnp.nan], jnp.bfloat16),
                "none": jnp.zeros((0, 3)),
                "flag": jnp.array([True, False]),
            },
        ),
        "replay": (jnp.arange(12, dtype=jnp.uint8).reshape(3, 4), np.float32(2.5), jnp.int32(7), ()),
    }


def template():
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree()))


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("a checkpoint was unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("a checkpoint was unpickled"))
    checkpoint.save(tmp_path, 4, tree(), info={"score": 0.5})
    restored = checkpoint.restore(tmp_path, template())
    assert jax.tree.structure(restored) == jax.tree.structure(tree())
    assert checkpoint.digest(restored) == checkpoint.digest(tree())
    assert isinstance(restored["agent"], Pair) and restored["agent"].rest["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.random.bits(restored["agent"].key[1]), jax.random.bits(tree()["agent"].key[1]))
    assert checkpoint.info(tmp_path) == {"score": 0.5}


def test_a_part_can_be_read_from_a_checkpoint_of_the_whole(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    part = checkpoint.restore(tmp_path, {"agent": template()["agent"]})
    assert checkpoint.digest(part) == checkpoint.digest({"agent": tree()["agent"]})


def test_only_the_newest_are_kept_and_any_of_them_can_be_read(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (1, 5, 10):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=2)
    checkpoint.save(tmp_path / "best", 3, {"x": jnp.float32(3)}, keep=1)
    assert checkpoint.steps(tmp_path) == [5, 10] and checkpoint.latest(tmp_path) == 10
    scalar = {"x": jax.ShapeDtypeStruct((), jnp.float32)}
    assert float(checkpoint.restore(tmp_path, scalar)["x"]) == 10
    assert float(checkpoint.restore(tmp_path, scalar, 5)["x"]) == 5
    checkpoint.save(tmp_path, 10, {"x": jnp.float32(-1)}, keep=2)
    assert float(checkpoint.restore(tmp_path, scalar)["x"]) == -1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000005", "000000000010", "best"]


def test_a_save_that_was_interrupted_is_not_a_step(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": jnp.float32(1)})
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 2, {"x": jnp.float32(2)})
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == 1
    checkpoint.save(tmp_path, 2, {"x": jnp.float32(2)})
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_what_does_not_fit_the_template_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.zeros((2, 3))})
    for wanted, message in [
        ({"w": jax.ShapeDtypeStruct((2, 4), jnp.float32)}, r"'w' is float32 \(2, 3\), not float32 \(2, 4\)"),
        ({"w": jax.ShapeDtypeStruct((2, 3), jnp.int32)}, "'w' is float32 .* not int32"),
        ({"v": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "holds no 'v'"),
    ]:
        with pytest.raises(UsageError, match=message):
            checkpoint.restore(tmp_path, wanted)
    with pytest.raises(UsageError, match="not step 9"):
        checkpoint.restore(tmp_path, {}, 9)
    with pytest.raises(UsageError, match="nothing"):
        checkpoint.restore(tmp_path / "absent", {})


def test_a_format_of_the_future_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path, 1, {"x": jnp.float32(1)})
    monkeypatch.undo()
    with pytest.raises(UsageError, match="format 2 is newer"):
        checkpoint.restore(tmp_path, {"x": jnp.float32(0)})


def test_a_flipped_bit_or_a_truncation_in_any_file_is_an_error_or_changes_nothing(tmp_path):
    value = {"w": jax.random.normal(jax.random.key(0), (64,)), "n": jnp.arange(5)}
    shapes = jax.eval_shape(lambda: value)
    good = checkpoint.save(tmp_path / "good", 1, value)
    noticed = 0
    for path in sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file()):
        data = (good / path).read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"x"
        for bad in (flipped, data[:middle]):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            (tmp_path / "bad" / "000000000001" / path).write_bytes(bad)
            try:
                restored = checkpoint.restore(tmp_path / "bad", shapes)
            except checkpoint.CheckpointCorruptError as error:
                assert str(tmp_path / "bad" / "000000000001") in str(error)
                noticed += 1
            else:
                assert checkpoint.digest(restored) == checkpoint.digest(value)
    assert noticed >= 4  # the manifest and the arrays, both ways


def test_a_manifest_that_was_edited_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": jnp.float32(1)}, info={"score": 1}) / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"info": {"score": 2}}))
    with pytest.raises(checkpoint.CheckpointCorruptError, match=r"manifest\.json"):
        checkpoint.info(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.float32(0.0), "b": jnp.zeros(2)},
        {"a": jnp.float32(-0.0), "b": jnp.zeros((2, 1))},
        {"a": jnp.float32(-0.0), "b": jnp.zeros(2, jnp.int32)},
        {"a": jnp.float32(-0.0), "c": jnp.zeros(2)},
    ],
)
def test_the_digest_sees_bits_shapes_dtypes_and_names(other):
    value = {"a": jnp.float32(-0.0), "b": jnp.zeros(2)}
    assert checkpoint.digest(value) == checkpoint.digest(dict(reversed(value.items())))
    assert checkpoint.digest(value) != checkpoint.digest(other)


SCALAR = {"x": jax.ShapeDtypeStruct((), jnp.float32)}


def damage(path):
    """Changes one byte in the middle of every file of a step's arrays."""
    for file in (path / "arrays").rglob("*"):
        if file.is_file() and (data := file.read_bytes()):
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])


def test_the_newest_step_that_is_whole_is_used_and_the_damaged_ones_are_named(tmp_path):
    paths = [checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}) for step in (1, 2, 3)]
    said = []
    assert checkpoint.restore_newest(tmp_path, SCALAR, said.append) == (3, {"x": 3.0}) and not said
    damage(paths[2])
    (paths[1] / "manifest.json").write_text("{")
    assert checkpoint.restore_newest(tmp_path, SCALAR, said.append) == (1, {"x": 1.0})
    assert len(said) == 1 and str(paths[2]) in said[0] and "step 1" in said[0]
    damage(paths[0])
    with pytest.raises(checkpoint.CheckpointCorruptError, match="000000000003"):
        checkpoint.restore_newest(tmp_path, SCALAR, said.append)
    with pytest.raises(UsageError, match="nothing"):
        checkpoint.restore_newest(tmp_path / "absent", SCALAR, said.append)


def test_steps_after_the_one_that_a_run_goes_on_from_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)})
    checkpoint.set_aside(tmp_path, after=1)
    assert checkpoint.steps(tmp_path) == [1]
    assert sorted(p.name for p in tmp_path.iterdir())[1:] == ["000000000002.damaged", "000000000003.damaged"]


def test_a_process_killed_while_replacing_a_step_loses_neither(tmp_path):
    checkpoint.save(tmp_path, 7, {"x": jnp.float32(7)})
    (tmp_path / "000000000007").rename(tmp_path / ".000000000007.old")  # killed between the two renames
    (tmp_path / ".000000000007.tmp" / "arrays").mkdir(parents=True)
    checkpoint.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["000000000007"]
    assert float(checkpoint.restore(tmp_path, SCALAR)["x"]) == 7


def test_arrays_of_another_size_than_the_manifest_says_are_refused_before_they_are_read(tmp_path, monkeypatch):
    small = checkpoint.save(tmp_path / "small", 1, {"x": jnp.float32(1)})
    large = checkpoint.save(tmp_path / "large", 1, {"x": jnp.zeros(1000)})
    shutil.rmtree(small / "arrays")
    shutil.copytree(large / "arrays", small / "arrays")
    _, checkpointer = checkpoint._orbax()
    monkeypatch.setattr(type(checkpointer), "restore", lambda *_, **__: pytest.fail("arrays were read"))
    with pytest.raises(checkpoint.CheckpointCorruptError, match="1000"):
        checkpoint.restore(tmp_path / "small", SCALAR)


def test_what_holds_more_than_expected_is_another_run(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.float32(1), "y": jnp.float32(2)})
    checkpoint.restore(tmp_path, SCALAR)
    with pytest.raises(UsageError, match="holds 'y' too"):
        checkpoint.restore(tmp_path, SCALAR, exact=True)
    with pytest.raises(UsageError, match="holds 'y' too"):
        checkpoint.check(tmp_path, SCALAR)


def test_a_save_in_the_background_keeps_what_the_arrays_were_when_it_was_asked_for(tmp_path):
    saver = checkpoint.Saver(pytest.fail)
    value = np.arange(1000.0)
    saver.save(tmp_path, 1, {"x": value})
    value[:] = -1
    x = jnp.arange(1000.0)
    saver.save(tmp_path, 2, {"x": x})
    x = jax.jit(lambda x: x - 5, donate_argnums=0)(x)
    saver.close()
    shape = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, shape, 1)["x"], np.arange(1000.0))
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, shape, 2)["x"], np.arange(1000.0))


def test_a_save_that_fails_in_the_background_is_a_warning_and_the_step_before_it_stays(tmp_path, monkeypatch):
    said = []
    saver = checkpoint.Saver(said.append)
    saver.save(tmp_path, 1, {"x": jnp.float32(1)})
    saver._pending[tmp_path][1].result()
    with monkeypatch.context() as patch:
        full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        patch.setattr(checkpoint, "_write_manifest", full)
        saver.save(tmp_path, 2, {"x": jnp.float32(2)})
        saver._pending[tmp_path][1].exception()  # wait
    saver.poll()
    assert len(said) == 1 and "step 2" in said[0] and "No space left" in said[0] and "step 1 is kept" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["000000000001"] and saver.failed == {tmp_path}
    saver.save(tmp_path, 3, {"x": jnp.float32(3)})
    saver.close()
    assert checkpoint.steps(tmp_path) == [1, 3] and not saver.failed and len(said) == 1


def test_a_save_that_could_not_begin_stays_a_failure_though_the_one_before_it_ends_well(tmp_path):
    said = []
    saver = checkpoint.Saver(said.append)
    saver.save(tmp_path, 1, {"x": jnp.float32(1)})
    saver.refuse(tmp_path, 2, OSError(28, "No space left on device"))
    assert saver.failed == {tmp_path} and "step 1 is kept" in said[0]  # it was waited for
    saver.close()
    assert saver.failed == {tmp_path} and len(said) == 1
