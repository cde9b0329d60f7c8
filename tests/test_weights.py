"""Parameters in one file: what is in it, that it stands for the run, what is refused; and those of the package."""

import json
import re
import struct
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import wmjax
from tests.marks import partly_long
from tests.test_conformance import ROWS, make, pixels
from tests.test_run import ENV, TINY
from wmjax import run_folder, settings, weights
from wmjax.cli import main
from wmjax.loops import checkpoint

PRETRAINED = weights.pretrained()


def folder_of(path, made, seed):
    """A run folder with an agent that nobody has trained."""
    random = np.random.default_rng(seed)
    draw = lambda x: random.normal(size=x.shape).astype(x.dtype)
    state = jax.tree.map(draw, jax.eval_shape(made.agent.init, jax.random.key(0)))
    path.mkdir(parents=True)
    run_folder.write_json(path / "config.json", made.description)
    checkpoint.save(path / "checkpoints", 60, {"agent": state})
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    folder_of(path, settings.setup("dreamer_v3", ENV, steps=60, overrides=TINY | {"eval_action": "sample"}), 3)
    return path


@pytest.fixture(scope="module")
def loaded(run):
    return wmjax.load(run)


@pytest.fixture(scope="module")
def file(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "agent.safetensors"
    wmjax.export(loaded, path)
    return path


def test_parameters_are_the_same_of_a_run_of_its_file_and_of_what_is_loaded_bit_for_bit(run, loaded, file):
    whole = loaded.state.variables
    found = wmjax.load_params(file)
    for tree in (wmjax.load_params(run), wmjax.load(file).state.variables):
        assert checkpoint.digest(tree) == checkpoint.digest(found)
    assert set(whole) - set(found) == {"critic", "slow_critic"}
    assert checkpoint.digest({name: whole[name] for name in found}) == checkpoint.digest(found)


def test_other_programs_read_a_file_by_the_names_of_the_modules(loaded, file):
    params = loaded.state.params
    tensors = load_file(file)
    np.testing.assert_array_equal(tensors["actor/mlp/linear0/kernel"], params["actor"]["mlp"]["linear0"]["kernel"])
    assert {name.split("/")[0] for name in tensors} == {"encoder", "rssm", "decoder", "reward", "cont", "actor"}


def test_a_file_stands_for_its_run_and_writes_into_the_current_folder(loaded, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = wmjax.load(file)
    assert (other.config, other.step, other.which, other.seed) == (loaded.config, 60, "latest", loaded.seed)
    assert str(other.path) == f"exported-agent-{weights.read(file).card['digest'][:8]}" and not other.path.exists()
    assert str(weights.outputs("pretrained:iris/catch", "0" * 64)) == "pretrained-iris-catch"
    other.path.write_text("precious")
    with pytest.raises(wmjax.UsageError, match=r"exported-agent-.*is no folder"):
        wmjax.load(file)
    other.path.unlink()
    other.path.symlink_to(tmp_path)
    with pytest.raises(wmjax.UsageError, match=r"exported-agent-.*is no folder"):
        wmjax.load(file)


def test_half_precision_halves_the_file_and_can_overflow_by_name(loaded, file, tmp_path):
    card = wmjax.export(loaded, tmp_path / "half.safetensors", dtype="float16")
    full = wmjax.load_params(file)
    half = wmjax.load_params(tmp_path / "half.safetensors")
    rounded = jax.tree.map(lambda x: np.float32(np.float16(x)), full)
    assert checkpoint.digest(half) == checkpoint.digest(rounded) != checkpoint.digest(full)
    stored = weights.nested(load_file(tmp_path / "half.safetensors"))
    assert card["digest"] == checkpoint.digest(stored)
    with pytest.raises(wmjax.UsageError, match="cannot hold 'actor/kernel', which goes up to 70000; float32 can"):
        weights.narrowed({"actor": {"kernel": np.full(2, 7e4, np.float32)}}, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(value, file, tmp_path):
    found = weights.read(file)
    params = weights.load(found)
    params["actor"]["mlp"]["linear0"]["kernel"] = params["actor"]["mlp"]["linear0"]["kernel"].at[0, 0].set(value)
    with pytest.raises(wmjax.UsageError, match="'actor/mlp/linear0/kernel' holds numbers that are not finite"):
        weights.narrowed(params, "float32")
    weights.write(tmp_path / "bad.safetensors", jax.tree.map(np.asarray, params), found.description, found.card)
    with pytest.raises(wmjax.UsageError, match="'actor/mlp/linear0/kernel' holds numbers that are not finite"):
        weights.load(weights.read(tmp_path / "bad.safetensors"))


def test_the_card_says_how_to_train_it_again_and_says_nothing_of_this_machine(run, file):
    card = weights.read(file).card
    words = card["command"].split()
    assert words[:7] == ["wmjax", "train", "dreamer_v3", "--env", ENV, "--seed", "0"]
    assert ["--steps", "60"] == words[7:9] and "--agent.eval_action" in words and "--agent.deter" in words
    assert card["return"] is None and card["steps"] == 60 and card["dtype"] == "float32"
    assert str(run) not in file.read_bytes()[:20000].decode(errors="replace")


def test_how_it_acts_may_be_chosen_for_the_file(loaded, tmp_path):
    card = wmjax.export(loaded, tmp_path / "mode.safetensors", action="mode")
    assert weights.read(tmp_path / "mode.safetensors").description["config"]["eval_action"] == "mode"
    assert "eval_action" not in card["command"]


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(ROWS, ("dreamer_v3", "iris", "world_models")))
def test_a_file_has_the_modules_that_acting_and_dreaming_read(name):
    agent, spec = make(name), pixels(name)
    found = weights.acting(agent, spec)
    needless = {"critic", "slow_critic", "exploration"} if name.startswith("dreamer") else set()
    variables = jax.eval_shape(agent.init, jax.random.key(0)).variables
    assert set(found) == set(variables) - needless  # `exploration` is how much of it there is in training
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"float32"}


def test_of_several_seeds_one_is_chosen(tmp_path, capsys):
    made = settings.setup("dreamer_v3", ENV, steps=60, seed=4, seeds=2, overrides=TINY)
    folder_of(
        tmp_path / "run" / "seed-4", made._replace(description=run_folder.member_description(made.description, 4)), 4
    )
    five = folder_of(
        tmp_path / "run" / "seed-5", made._replace(description=run_folder.member_description(made.description, 5)), 5
    )
    run_folder.write_json(tmp_path / "run" / "config.json", made.description)
    words = ["export", str(tmp_path / "run"), str(tmp_path / "x.safetensors")]
    assert main(words) == 2
    assert "has the seeds 4 to 5, and one is asked for; which one? (--seed 4" in capsys.readouterr().err
    assert main([*words, "--seed", "6"]) == 2
    assert "seed: 6 is not in" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert main([*words, "--seed", "5"]) == 0
    one = weights.read(tmp_path / "x.safetensors")
    assert checkpoint.digest(weights.load(one)["actor"]) == checkpoint.digest(five.params["actor"])
    assert (one.description["seed"], one.description["seeds"]) == (5, 1)
    assert "--seed 4 --seeds 2" in one.card["command"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def header(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(said, tensors):
    text = json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def edited(change):
    """What `change` makes of the header, with the tensors as they were."""

    def damage(data):
        said, tensors = header(data)
        change(said)
        return joined(said, tensors)

    return damage


KERNEL = "rssm/dyngru/kernel"


def transpose(said):
    said[KERNEL]["shape"].reverse()


def rename(said):
    said["rssm/no_such"] = said.pop(KERNEL)


def widen(said):
    description = json.loads(said["__metadata__"]["description"])
    description["config"]["units"] = 16
    said["__metadata__"]["description"] = json.dumps(description)


def entry(name, value):
    def change(said):
        said["__metadata__"][name] = value

    return edited(change)


def card(name, value):
    def change(said):
        found = json.loads(said["__metadata__"]["card"]) | {name: value}
        said["__metadata__"]["card"] = json.dumps(found)

    return edited(change)


DAMAGE = {
    "cut": (lambda data: data[:-9], "ends before its tensor 'rssm/"),
    "cut in the header": (lambda data: data[:90], "its header would have"),
    "empty": (lambda data: b"", "its header is not one of safetensors"),
    "other": (lambda data: b"PK\3\4" + bytes(2**10), "at most"),
    "a header of 2^60 bytes": (lambda data: struct.pack("<Q", 2**60) + data[8:], "at most"),
    "no JSON": (lambda data: data[:8] + b"[" + data[9:], "its header is not one of safetensors"),
    "a flipped bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its tensor 'rssm/prior_norm_0/scale' does not"),
    "more at its end": (lambda data: data + b"x", "it is not whole"),
    "another shape": (edited(transpose), f"its tensor '{KERNEL}' has the shape"),
    "another size": (edited(widen), "not (16, 2), which dreamer_v3 on probe:act_obs has"),
    "another name": (edited(rename), f"it holds no tensor '{KERNEL}'"),
    "no metadata": (edited(lambda said: said.pop("__metadata__")), "not a file of `wmjax export`"),
    "a newer format": (entry("wmjax", "2"), "its format is '2'"),
    "no description": (entry("description", "{"), "description in its metadata is no JSON"),
    "another agent": (entry("description", '{"agent": 3}'), "in its description"),
    "a card that is none": (card("steps", "many"), "in its card steps: 'many'"),
    "a card of another": (card("digest", "0" * 64), "do not match the digest of its card"),
    "a return that is text": (card("return", {"mean": [[1]]}), "in its card return: mean"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_line_and_exit_code_2(name, file, tmp_path, capsys):
    damage, words = DAMAGE[name]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(file.read_bytes()))
    assert main(["eval", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "damaged.safetensors" in err and words in err


def test_a_file_of_other_programs_is_refused(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(wmjax.UsageError, match="not a file of `wmjax export`"):
        wmjax.load_params(tmp_path / "other.safetensors")
    with pytest.raises(wmjax.UsageError, match="No such file"):
        wmjax.load("none.safetensors")


def test_what_a_file_names_is_not_run_without_the_users_word(file, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    def change(said):
        description = json.loads(said["__metadata__"]["description"]) | {"env": f"gym:{tmp_path / 'mine.py'}:Mine"}
        said["__metadata__"]["description"] = json.dumps(description)

    (tmp_path / "x.safetensors").write_bytes(edited(change)(file.read_bytes()))
    with pytest.raises(wmjax.UsageError, match="would run the code"):
        wmjax.load(tmp_path / "x.safetensors")
    wmjax.load_params(tmp_path / "x.safetensors")  # needs no environment
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "pretrained:dreamer_v3/cach"], "pretrained: unknown name 'dreamer_v3/cach'; did you mean"),
        (["dream", "pretrained:../../x"], "pretrained: unknown name '../../x'"),
        (["list", "pretrained", "nothing"], "pattern: nothing matches 'nothing'"),
        (["eval", f"pretrained:{PRETRAINED[0]}", "--which", "best"], "which: 'best' is of a run folder"),
        (["export", f"pretrained:{PRETRAINED[0]}"], "file: missing"),
        (["export", f"pretrained:{PRETRAINED[0]}", "x.npz"], "a name that ends in .safetensors is"),
        (["export", f"pretrained:{PRETRAINED[0]}", "no/x.safetensors"], "does not exist"),
        (["export", "nowhere", "x.safetensors"], "is not a run folder"),
        (["export", f"pretrained:{PRETRAINED[0]}", "x.safetensors", "--dtype", "int8"], "float32"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_no_file_is_replaced(file, run, capsys):
    before = file.read_bytes()
    assert main(["export", str(run), str(file)]) == 2
    assert "is there already" in capsys.readouterr().err and file.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What comes with the package


def test_pretrained_agents_are_small_and_whole_and_have_cards(capsys):
    sizes = [weights.locate(f"pretrained:{name}").stat().st_size for name in PRETRAINED]
    assert sizes and max(sizes) <= 2e6 and sum(sizes) <= 8e6
    assert main(["list", "pretrained"]) == 0
    shown = capsys.readouterr().out
    for name in PRETRAINED:
        file = weights.read(weights.locate(f"pretrained:{name}"))
        weights.load(file)
        assert f"{file.description['agent']}/{file.description['env']}" == name
        assert file.card["dtype"] == "float16" and file.card["return"]["episodes"] == 100
        low, high = file.card["return"]["interval"]
        assert low <= file.card["return"]["mean"] <= high
        assert f"pretrained:{name}\n" in shown and file.card["digest"] in shown
        assert not re.search("/(home|tmp|root|work)/", json.dumps([file.card, file.description]))


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(PRETRAINED, ("dreamer_v3/catch", "iris/catch", "world_models/catch")))
def test_a_pretrained_agent_earns_what_its_card_says(name):
    loaded = wmjax.load(f"pretrained:{name}")
    found = weights.read(weights.locate(f"pretrained:{name}")).card["return"]
    low, high = found["interval"]
    assert low <= loaded.evaluate(100, found["seed"] + 1).mean <= high


@pytest.mark.slow
def test_a_pretrained_agent_dreams_into_the_current_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["dream", "pretrained:dreamer_v3/catch"]) == 0
    assert "wrote pretrained-dreamer_v3-catch/dream.gif" in capsys.readouterr().out
    errors = json.loads((tmp_path / "pretrained-dreamer_v3-catch" / "dream.json").read_text())["image"]
    assert max(errors["model"][:3]) < 0.1 * min(errors["repeat_last"][:3])


@pytest.mark.slow
def test_a_wheel_carries_the_pretrained_agents(tmp_path):
    root = weights.PRETRAINED.parents[1]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"wmjax/pretrained/{name}.safetensors" for name in PRETRAINED} <= set(names)
