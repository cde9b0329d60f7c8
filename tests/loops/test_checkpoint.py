import json
import os
import pickle
import shutil
import subprocess
import sys
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
    monkeypatch.setattr(checkpoint, "OLDEST", 9)
    checkpoint.save(tmp_path, 1, {"x": jnp.float32(1)})
    monkeypatch.undo()
    with pytest.raises(UsageError, match="format 9 is newer"):
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


PEAK = """
import sys
import numpy as np
from wmjax.loops import checkpoint

peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
checkpoint.save(sys.argv[1], 1, {"small": np.ones(3)})  # imports what it needs
before, array = peak(), np.full((1, 100_000, 3_000), 3, np.uint8)
checkpoint.save(sys.argv[1], 2, {"replay": array})
print((peak() - before) / array.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory that Linux reports")
def test_saving_takes_memory_for_one_more_copy_of_a_large_array(tmp_path):
    copies = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], stdout=subprocess.PIPE, check=True).stdout
    assert float(copies) < 2.8  # itself, and what is kept of it while training goes on


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


# ---------------------------------------------------------------------------------------------------------------------
# What others have put there


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_folders_of_twelve_digits_are_steps_and_nothing_else_is_touched(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    checkpoint.save(elsewhere, 7, {"x": jnp.float32(7)})
    for name in ("20261126", "²", "٠٠٠٠٠٠٠٠٠٠٠٩", "0000000000009", "000000000009.damaged", ".x.tmp", ".x.old", "notes"):
        (folder / name).mkdir(parents=True)
    (folder / "000000000008").write_text("a file")
    (folder / "000000000007").symlink_to(elsewhere / "000000000007")
    (folder / ".000000000006.old").symlink_to(elsewhere)
    before = names(folder)
    assert checkpoint.steps(folder) == [] and checkpoint.latest(folder) is None
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {"x": jnp.float32(step)}, keep=2)
    assert checkpoint.steps(folder) == [2, 3]
    assert names(folder) == sorted({*before, "000000000002", "000000000003"} - {".000000000006.old"})
    for step in (7, 8):  # their places are taken: what is there is set aside
        checkpoint.save(folder, step, {"x": jnp.float32(step)}, keep=2)
    assert checkpoint.steps(folder) == [7, 8] and (folder / "000000000008.damaged").read_text() == "a file"
    assert (folder / "000000000007.damaged").is_symlink()
    assert float(checkpoint.restore(elsewhere, SCALAR)["x"]) == 7


def test_a_folder_that_is_a_link_is_not_written_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        checkpoint.save(tmp_path / "checkpoints", 1, {"x": jnp.float32(1)})
    assert names(tmp_path / "elsewhere") == []


def test_a_step_just_written_stays_though_later_ones_are_there(tmp_path):
    for step in (10, 90):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)})
    for step in (20, 30):
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=1)
        assert checkpoint.steps(tmp_path) == [step, 90]


def test_the_best_agents_are_kept_as_far_back_as_a_run_may_go_on_from(tmp_path):
    for step, oldest, left in [(1, None, [1]), (3, None, [3]), (5, 4, [3, 5]), (8, 4, [3, 5, 8]), (9, 6, [5, 8, 9])]:
        checkpoint.save(tmp_path, step, {"x": jnp.float32(step)}, keep=1, since=oldest)
        assert checkpoint.steps(tmp_path) == left


def rewrite(place, change):
    """Edits a manifest, with the hash that fits."""
    content = json.loads((place / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    checkpoint._write_manifest(place / "manifest.json", content)


ENTRIES = [
    (lambda c: c.pop("step"), "step"),
    (lambda c: c.update(step=2), "step"),
    (lambda c: c.update(step="1"), "step"),
    (lambda c: c.update(step=True), "step"),
    (lambda c: c.pop("leaves"), "leaves"),
    (lambda c: c.update(leaves=[]), "leaves"),
    (lambda c: c.pop("info"), "info"),
    (lambda c: c.update(info=None), "info"),
    (lambda c: c.pop("format"), "format"),
    (lambda c: c.update(format="1"), "format"),
    (lambda c: c["leaves"].update(x=None), "x"),
    (lambda c: c["leaves"].update(x=[]), "x"),
    (lambda c: c["leaves"].update(y=3), "y"),
    (lambda c: c["leaves"]["x"].pop("dtype"), "x: dtype"),
    (lambda c: c["leaves"]["x"].update(dtype=3), "x: dtype"),
    (lambda c: c["leaves"]["x"].pop("shape"), "x: shape"),
    (lambda c: c["leaves"]["x"].update(shape=4), "x: shape"),
    (lambda c: c["leaves"]["x"].update(shape=[-1]), "x: shape"),
    (lambda c: c["leaves"]["x"].update(shape=["4"]), "x: shape"),
    (lambda c: c["leaves"]["x"].update(shape=[10**30]), "x: shape"),
    (lambda c: c["leaves"]["x"].pop("sha256"), "x: sha256"),
    (lambda c: c["leaves"]["x"].update(sha256="0" * 63), "x: sha256"),
    (lambda c: c["leaves"]["key"].pop("impl"), "key: impl"),
    (lambda c: c["leaves"]["key"].update(impl=3), "key: impl"),
    (lambda c: c["leaves"]["key"].update(impl="rbg"), "key"),
    (lambda c: c["leaves"]["key"].update(impl="none"), "key: impl"),
]


@pytest.fixture(scope="module")
def steps_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    tree = {"x": jnp.zeros(4), "key": jax.random.key(0)}
    for step in (0, 1):
        checkpoint.save(folder, step, tree)
    return folder, jax.eval_shape(lambda: tree)


@pytest.mark.parametrize(("change", "entry"), ENTRIES, ids=[f"{i}-{entry}" for i, (_, entry) in enumerate(ENTRIES)])
def test_a_manifest_with_an_odd_entry_is_damaged_by_its_name_and_the_step_before_is_used(
    change, entry, steps_of_two, tmp_path
):
    folder, shapes = tmp_path / "steps", steps_of_two[1]
    shutil.copytree(steps_of_two[0], folder)
    rewrite(folder / "000000000001", change)
    with pytest.raises(checkpoint.CheckpointCorruptError, match=entry):
        checkpoint.restore(folder, shapes)
    said = []
    assert checkpoint.restore_newest(folder, shapes, said.append)[0] == 0
    assert len(said) == 1 and entry in said[0]


def test_what_would_need_terabytes_is_refused_before_it_is_allocated(steps_of_two, tmp_path):
    folder = tmp_path / "steps"
    shutil.copytree(steps_of_two[0], folder)
    rewrite(folder / "000000000001", lambda c: c["leaves"]["x"].update(shape=[2**45]))
    with pytest.raises(UsageError, match="35184372088832"):
        checkpoint.restore(folder, steps_of_two[1])


def test_steps_that_were_swapped_and_arrays_that_are_no_files_are_damage(steps_of_two, tmp_path):
    folder, shapes = tmp_path / "steps", steps_of_two[1]
    shutil.copytree(steps_of_two[0], folder)
    (folder / "000000000001").rename(folder / "000000000009")
    with pytest.raises(checkpoint.CheckpointCorruptError, match="'step' must be 9"):
        checkpoint.restore(folder, shapes)
    assert checkpoint.restore_newest(folder, shapes, lambda text: None)[0] == 0
    os.mkfifo(folder / "000000000000" / "arrays" / "pipe")  # who opens it waits forever
    with pytest.raises(checkpoint.CheckpointCorruptError, match="pipe"):
        checkpoint.restore(folder, shapes, 0)
    shutil.rmtree(folder / "000000000000" / "arrays")
    with pytest.raises(checkpoint.CheckpointCorruptError, match="arrays"):
        checkpoint.restore(folder, shapes, 0)


def test_whether_a_state_fits_is_told_by_the_newest_step_that_can_be_read(steps_of_two, tmp_path):
    folder, shapes = tmp_path / "steps", steps_of_two[1]
    shutil.copytree(steps_of_two[0], folder)
    (folder / "000000000009").mkdir()
    checkpoint.check(folder, shapes)
    with pytest.raises(UsageError, match="holds 'x' too"):
        checkpoint.check(folder, {"key": shapes["key"]})
    for step in (0, 1):
        (folder / f"{step:012d}" / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointCorruptError, match="000000000009"):
        checkpoint.check(folder, shapes)


@pytest.mark.parametrize("dtype", ["nonsense", "U3", "object", "datetime64[s]", "m8", "key<fry>"])
def test_a_dtype_of_a_manifest_is_one_of_numbers(dtype, tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": jnp.bfloat16(1), "y": True}) / "manifest.json"
    assert checkpoint.shapes(tmp_path)["x"].dtype == jnp.bfloat16
    content = json.loads(path.read_text())
    content.pop("sha256")
    content["leaves"]["x"]["dtype"] = dtype
    checkpoint._write_manifest(path, content)
    with pytest.raises(checkpoint.CheckpointCorruptError, match=r"'x: (dtype|impl)' must be"):
        checkpoint.shapes(tmp_path)
