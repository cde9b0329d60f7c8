"""One step of a dream as a program of its own: that it is the model's, where it runs, and what is refused."""

import base64
import errno
import functools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wmjax
from tests.play import made
from wmjax import files
from wmjax.cli import main
from wmjax.dream_step import comparing, onnx_program, stablehlo, writing
from wmjax.dream_step.step import NEXT, NOISE, STATE, make_step
from wmjax.types import RunError

run = functools.cache(made.tiny)


@functools.cache
def step(name):
    return make_step(run(name))


def noise_of(key, name, shape):
    """What code that splits keys in two draws from them at a place; a first axis too many is of what is folded in."""
    *places, kind = name.removeprefix(NOISE).split(".")
    for place in places:
        key = jax.random.split(key)[int(place)]
    draw = getattr(jax.random, kind)
    if name == "noise.1.gumbel":  # of IRIS: a frame's tokens, one after the other
        return jax.vmap(lambda k: draw(jax.random.fold_in(key, k), shape[1:]))(jnp.arange(shape[0]))
    return draw(key, shape)


SLOWLY = [name if name == "dreamer_v1" else pytest.param(name, marks=pytest.mark.slow) for name in made.CONFIGS]


@pytest.mark.parametrize("name", SLOWLY)
def test_a_step_is_what_the_model_imagines_from_a_key_that_draws_the_same(name):
    the_run, the_step, key = run(name), step(name), jax.random.key(3)
    model, params = the_run.agent.model, the_run.state.variables
    drawn = {n: noise_of(key, n, x.shape) for n, x in the_step.inputs.items() if n.startswith(NOISE)}
    given = comparing.draw(the_step, np.random.default_rng(0)) | drawn | the_step.starts[1]
    found = jax.jit(the_step.function)(given)

    def imagined(action):
        state = jax.tree.map(lambda x: x[1:2], starts(the_run))
        state = model.imagine(params, key, state, action)
        return state, model.predict(params, state), model.decode(params, state)

    state, (reward, cont), decoded = jax.jit(imagined)(given["action"])
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    state = {NEXT + jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    for n in found:
        if n.startswith(NEXT):
            near(found[n], state[n])
    near(found["frame.image"], np.clip(decoded["image"] / 255, 0, 1))
    for n, x in (("reward", reward), ("continue", cont)):
        if n in found:
            near(found[n], x)


def starts(the_run):
    from wmjax.dream_step.step import _real_starts

    return _real_starts(the_run.agent, the_run.env, the_run.state.variables)


def test_state_is_what_the_next_step_reads_and_no_more():
    names = {n for n in step("dreamer_v3").inputs if n.startswith(STATE)}
    assert names == {"state.deter", "state.stoch"}
    assert names == {STATE + n.removeprefix(NEXT) for n in step("dreamer_v3").outputs if n.startswith(NEXT)}


def test_starts_are_moments_of_different_episodes_as_the_model_sees_them():
    the_step = step("dreamer_v3")
    assert len(the_step.starts) == len(the_step.pictures) == 4
    assert len({x["state.deter"].tobytes() + x["state.stoch"].tobytes() for x in the_step.starts}) > 1
    shapes = {n: x.shape for n, x in the_step.starts[0].items()}
    assert shapes == {n: x.shape for n, x in the_step.inputs.items() if n.startswith(STATE)}


def test_what_an_agent_lacks_is_left_out_and_said():
    agent = run("dreamer_v3").agent
    certain = lambda params, state: (state.deter[..., 0], jnp.ones(state.deter.shape[:-1]))
    model = agent.model._replace(predict=certain, no_rewards="reward_head: none")
    changed = made.tiny("dreamer_v3")
    changed.agent = agent._replace(model=model)
    found = make_step(changed)
    assert found.left_out == {"reward": "reward_head: none", "continue": "it is 1 at every step"}
    assert not {"reward", "continue"} & found.outputs.keys()


RELOAD = """
import sys
import jax, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **program.call(given))
assert not [name for name in sys.modules if name.partition(".")[0] in ("wmjax", "flax", "distrax", "optax")]
assert program.platforms == ("cpu", "cuda"), program.platforms
"""


def test_stablehlo_is_read_and_run_by_jax_alone(tmp_path):
    the_step = step("dreamer_v3")
    found = wmjax.export_step(run("dreamer_v3"), stablehlo=tmp_path / "dream.stablehlo")
    assert found["stablehlo"]["difference"] <= 1e-4
    given = comparing.draw(the_step, np.random.default_rng(5)) | the_step.starts[0]
    np.savez(tmp_path / "given.npz", **given)
    (tmp_path / "reload.py").write_text("import jax.export" + RELOAD)
    command = [sys.executable, "reload.py", "dream.stablehlo", "given.npz", "found.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    expected = jax.jit(the_step.function)(given)
    with np.load(tmp_path / "found.npz") as back:
        assert set(back) == set(the_step.outputs)
        for n, x in expected.items():
            np.testing.assert_allclose(back[n], x, rtol=1e-5, atol=1e-5)


def test_products_in_stablehlo_are_of_float32_wherever_it_runs():
    with jax.default_matmul_precision("bfloat16"):
        data, _ = stablehlo.serialize(step("dreamer_v1"))
    text = jax.export.deserialize(bytearray(data)).mlir_module()
    products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    assert len(products) > 10 and all(line.count("HIGHEST") == 2 for line in products)


def test_the_json_beside_it_is_enough_to_begin_from(tmp_path):
    the_step = step("dreamer_v3")
    about = json.loads(json.dumps(writing.description(the_step)))
    assert about["inputs"]["action"] == {"shape": [1, 3], "dtype": "float32"}
    assert [len(labels) for labels in about["controls"]["choices"]] == [3]
    for start, state in zip(about["starts"], the_step.starts, strict=True):
        for n, x in state.items():
            assert len(start["state"][n]) == math.prod(about["inputs"][n]["shape"])
            assert np.array_equal(np.array(start["state"][n], x.dtype).reshape(x.shape), x)
        kind, _, data = start["frame"]["frame.image"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")


def test_a_program_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    the_step, reference = step("dreamer_v3"), comparing.on_cpu(step("dreamer_v3"))
    off = lambda given: reference(given) | {"frame.image": reference(given)["frame.image"] + 2e-4}
    with pytest.raises(RunError, match=r"stablehlo: .* frame.image differs by 0.0002 in step 1; nothing is written"):
        comparing.compare(the_step, off, "stablehlo")
    assert comparing.compare(the_step, reference, "stablehlo") == 0
    monkeypatch.setattr(stablehlo, "compare", lambda *args: comparing.compare(the_step, off, "stablehlo"))
    with pytest.raises(RunError):
        wmjax.export_step(run("dreamer_v3"), stablehlo=tmp_path / "dream.stablehlo")
    assert not list(tmp_path.iterdir())


def test_where_one_of_two_programs_cannot_be_written_neither_is(tmp_path, monkeypatch):
    write, (first, second) = files.write, (tmp_path / "first", tmp_path / "second")

    def fail(path, *parts):
        if path == second / "a.stablehlo":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *parts)

    first.mkdir(), second.mkdir()
    monkeypatch.setattr(files, "write", fail)
    monkeypatch.setattr(onnx_program, "check_installed", lambda: None)
    for name in writing.SERIALIZE:
        monkeypatch.setitem(writing.SERIALIZE, name, lambda step: (b"program", 0.0))
    with pytest.raises(wmjax.UsageError, match=r"stablehlo: .*second/a.stablehlo' cannot be written: No space left"):
        wmjax.export_step(run("dreamer_v3"), onnx=first / "a.onnx", stablehlo=second / "a.stablehlo")
    assert not [*first.iterdir(), *second.iterdir()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "file: missing; "),
        (["--onnx", "a.safetensors"], "onnx: 'a.safetensors' is not valid; a name that ends in .onnx is"),
        (["--stablehlo", "a.onnx"], "stablehlo: 'a.onnx' is not valid; a name that ends in .stablehlo is"),
        (["--stablehlo", "there.stablehlo"], "stablehlo: 'there.stablehlo' is there already"),
        (["--stablehlo", "taken.stablehlo"], "stablehlo: 'taken.json' is there already"),
        (["--stablehlo", "no/a.stablehlo"], "stablehlo: 'no/a.stablehlo' cannot be written: the folder 'no' does not"),
        (["--stablehlo", "a.stablehlo", "--dtype", "float16"], "dtype: is of FILE.safetensors, which is not asked for"),
        (["--stablehlo", "a.stablehlo", "--episodes", "3"], "episodes: is of FILE.safetensors"),
        (["there.safetensors", "--stablehlo", "a.stablehlo"], "file: 'there.safetensors' is there already"),
        (["--stablehlo", "a.stablehlo", "--seed", "7"], "seed: 7 is not in 'pretrained-"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("there.stablehlo", "taken.json", "there.safetensors")
    for name in names:
        (tmp_path / name).write_text("mine")
    assert main(["export", "pretrained:dreamer_v3/catch", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"wmjax: error: {message}") and error.count("\n") == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


# ---------------------------------------------------------------------------------------------------------------------
# ONNX, which takes seconds to convert: slow


@pytest.fixture(scope="module")
def converter():
    for name in ("onnx", "onnxruntime", "onnx_ir", "jax2onnx"):
        pytest.importorskip(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", made.CONFIGS)
def test_onnx_dreams_what_jax_dreams_for_50_steps(name, converter, tmp_path):
    import onnx

    found = wmjax.export_step(run(name), onnx=tmp_path / "dream.onnx")
    assert found["onnx"]["difference"] <= 1e-4
    model = onnx.load(tmp_path / "dream.onnx")
    onnx.checker.check_model(model)
    about = json.loads(model.metadata_props[0].value)
    the_step = step(name)
    names = lambda given: {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim] for x in given}
    assert names(model.graph.input) == {n: list(x.shape) for n, x in the_step.inputs.items()}
    assert {n: x["shape"] for n, x in about["inputs"].items()} == names(model.graph.input)
    assert list(names(model.graph.output)) == sorted(the_step.outputs)


@pytest.mark.slow
def test_what_onnx_lacks_is_named_with_its_module(converter):
    the_step = step("dreamer_v3")

    def function(given):
        with jax.named_scope("decoder"), jax.named_scope("odd"):
            frame = jax.lax.linalg.householder_product(given["state.stoch"], given["state.stoch"][..., 0])
        return the_step.function(given) | {"reward": frame[0, :1, 0]}

    with pytest.raises(wmjax.UsageError, match=r"onnx: the operation 'householder_product' in decoder/odd has none"):
        onnx_program.serialize(the_step._replace(function=function))


def test_a_model_that_onnx_runtime_cannot_run_is_one_line(converter):
    with pytest.raises(RunError, match=r"onnx: ONNX Runtime cannot run it: .*; nothing is written") as raised:
        onnx_program.run_by_onnx(b"no model")
    assert "\n" not in str(raised.value)


def test_parameters_that_one_file_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(onnx_program, "check_installed", lambda: None)
    monkeypatch.setattr(onnx_program, "MOST", 1000)
    with pytest.raises(wmjax.UsageError, match=r"onnx: parameters of [\d.]+ .B do not fit in one file, .*; stablehlo"):
        onnx_program.serialize(step("dreamer_v3"))


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnx_ir", "jax2onnx"])
def test_what_is_not_installed_is_named_with_its_extra_before_anything_is_written(name, tmp_path, monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else object())
    words = [str(tmp_path / "a.safetensors"), "--onnx", str(tmp_path / "a.onnx")]
    assert main(["export", "pretrained:dreamer_v3/catch", *words]) == 2
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert f'onnx: {name} is not installed; pip install "wmjax[onnx]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
