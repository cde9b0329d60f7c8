"""Whatever a user gets wrong is one line on standard error and exit code 2, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import wmjax
from wmjax import presets, settings
from wmjax.agents import AGENTS
from wmjax.cli import main
from wmjax.loops import checkpoint

CONFIG = AGENTS["dreamer_v3"][0]
HINTS = typing.get_type_hints(CONFIG)
NUMBERS = sorted(name for name, hint in HINTS.items() if hint in (int, float))
WHOLE = sorted(name for name, hint in HINTS.items() if hint is int)
CHOICES = sorted(name for name, hint in HINTS.items() if typing.get_origin(hint) is typing.Literal)

NAMES = [
    # what is typed, the field that the message names, the value, and what is near or valid
    ("trian dreamer_v3", "command", "'trian'", "'train'"),
    ("train", "agent", "missing", "dreamer_v3"),
    ("train dreamer", "agent", "'dreamer'", "dreamer_v3"),
    ("train dreamer_v33", "agent", "'dreamer_v33'", "'dreamer_v3'"),
    ("train DREAMER_V3", "agent", "'DREAMER_V3'", "dreamer_v3"),
    ("train dreamer_v3 --env catsh", "env", "'catsh'", "'catch'"),
    ("train dreamer_v3 --env Pendulum-v1", "env", "'Pendulum-v1'", "valid are"),
    ("train dreamer_v3 --env probe:acts", "env", "'probe:acts'", "'probe:act'"),
    ("train dreamer_v3 --env", "--env", "", ""),
    ("train dreamer_v3 --preset tiny", "preset", "'tiny'", "small"),
    ("train dreamer_v3 --preset smal", "preset", "'smal'", "'small'"),
    ("train dreamer_v3 --agent.lenght 3", "--agent.lenght", "unknown", "--agent.length"),
    ("train dreamer_v3 --agent.kl_scale 3", "--agent.kl_scale", "unknown", ""),
    ("train dreamer_v3 --device 2", "--device", "unknown", "--devices"),
    ("train dreamer_v3 --parallell pmap", "--parallell", "unknown", "--parallel"),
    ("train dreamer_v3 catch", "catch", "", ""),
    ("train dreamer_v3 --worker-timeout 0", "worker_timeout", "0.0", "above 0"),
    ("train dreamer_v3 --agent.replay-capacity 3000000000", "replay_capacity", "3000000000", "2**31"),
    ("eval", "RUN", "", ""),
    ("eval {empty} --episode 3", "--episode", "unknown", "--episodes"),
    ("eval {empty} --action best", "--action", "'best'", "sample"),
    ("eval {absent}", "run", "{absent}", "not a run folder"),
    ("eval {file}", "run", "{file}", "not a run folder"),
    ("eval {empty} --episodes many", "--episodes", "'many'", "whole number"),
    ("dream {empty}", "run", "{empty}", "not a run folder"),
    ("dream {absent} --horizon x", "--horizon", "'x'", "whole number"),
    ("plot", "runs", "missing", "at least one"),
    ("compare --out {absent} --runs", "runs", "missing", "one run folder or more"),
    ("compare --out {file}/deeper --agents iris", "out", "{file}/deeper", "can be"),
    ("compare --out {absent} --agents iris,irs", "agents", "'irs'", "'iris'"),
    ("record --out {absent} --env catch --steps 1 --which best", "which", "'best'", "of a run"),
    ("plot {empty}", "run", "{empty}", "not a run folder"),
    ("plot {agentless}", "run", "{agentless}", "not a run folder"),
    ("eval {agentless}", "run", "{agentless}", "not a run folder"),
    ("eval {other}", "agent", "'muzero'", "dreamer_v3"),
    ("eval {unsaved}", "run", "{unsaved}", "no checkpoint"),
    ("dream {unsaved}", "run", "{unsaved}", "no checkpoint"),
    ("list agent", "'agent'", "", "agents"),
    ("list", "", "", "agents"),
    ("train dreamer_v3 --resume", "resume", "out", ""),
    ("train --resume", "resume", "", "--out RUN"),
    ("train dreamer_v3 --resume --out {empty}", "run", "{empty}", "not a run folder"),
    ("train dreamer_v3 --resume --out {other}", "agent", "'muzero'", "cannot change"),
    ("train dreamer_v3 --out {file}", "out", "{file}", "not empty"),
    ("train dreamer_v3 --out {unsaved}", "out", "{unsaved}", "not empty"),
    ("train dreamer_v3 --out {file}/below", "out", "{file}/below", "cannot be written"),
    ("train dreamer_v3 --out /proc/below", "out", "/proc/below", "cannot be written"),
    ("train dreamer_v3 --devices 1000", "devices", "1000", "more than"),
    ("train dreamer_v3 --shard-params 2", "shard_params", "2", "1 is"),
    ("train dreamer_v3 --parallel xmap", "--parallel", "'xmap'", "pmap"),
    ("train dreamer_v3 --env catch --image-size 63", "image", "63x63", "valid"),
    ("train dreamer_v3 --env probe:value --image-size 64", "image_size", "64", "leave it out"),
    ("train dreamer_v3 --agent.blocks 7", "deter", "blocks=7", "multiple"),
    ("train dreamer_v3 --agent.bins 40", "bins", "40", "odd"),
    ("train dreamer_v3 --agent.imagine_last 17", "imagine_last", "17", "length=16"),
    ("train dreamer_v3 --agent.batch_size 100000", "batch_size", "100000", "replay_capacity"),
    ("train dreamer_v3 --agent.replay_capacity 100", "replay_capacity", "100", "window"),
    ("train dreamer_v3 --agent.train_ratio 0.00001", "train_ratio", "1e-05", "fraction"),
    ("train dreamer_v3 --agent.return_norm_low 96", "return_norm_low", "96", "below"),
    ("train dreamer_v3 --agent.cell lstm", "--agent.cell", "'lstm'", "block_gru"),
    ("train dreamer_v3 --agent.compute_dtype float16", "--agent.compute", "'float16'", "'bfloat16'"),
    ("train dreamer_v3 --agent.grad_accum 3", "grad_accum", "3", "1, 2, 4, 8, 16"),
    ("train dreamer_v3 --agent.remat perhaps", "--agent.remat", "'perhaps'", "True"),
    ("train dreamer_v3 --agent.encoder_units 0", "encoder_units", "0", "positive"),
    ("train dreamer_v3 --seeds 1000000000", "seeds", "1000000000", "[1, 10000]"),
    ("train dreamer_v3 --seeds 10000", "seeds", "10000", "GB"),
    ("train dreamer_v3 --action-repeat 2147483647", "action_repeat", "2147483647", "[1, 1000]"),
    ("train dreamer_v3 --image-size 2147483648", "image_size", "2147483648", "MB"),
    ("train dreamer_v3 --image-size 65536", "image_size", "65536", "MB"),
    ("train dreamer_v3 --agent.replay_capacity 2147483647", "replay_capacity", "2147483647", "GB"),
    ("train dreamer_v3 --agent.train_ratio 1e300", "train_ratio", "1e+300", "at most"),
    ("train dreamer_v3 --agent.warmup 2147483648", "warmup", "2147483648", "2**31"),
    ("train dreamer_v3 --agent.prefill 40000", "steps", "32000", "40016"),
    ("train dreamer_v3 --agent.beta1 1.0", "beta1", "1.0", "[0, 1)"),
    ("train dreamer_v3 --agent.bins 2147483647", "bins", "2147483647", "65,536"),
    ("train dreamer_v1 --agent.grad_accum 100000", "grad_accum", "100000", "1, 2, 4, 8, 16"),
    ("train iris --agent.dropout 1.0", "dropout", "1.0", "[0, 1)"),
    ("train world_models --agent.evolve.population 4000000000", "population", "4000000000", "1,048,576"),
    ("dream {unsaved} --horizon 2147483648", "horizon", "2147483648", "[1, 100000]"),
    ("dream {unsaved} --context 9223372036854775808", "context", "9223372036854775808", "[1, 100000]"),
    ("eval {unsaved} --episodes 9223372036854775808", "episodes", "9223372036854775808", "[1, 1000000]"),
    ("plot {unsaved} --out {empty}", "out", "{empty}", "a folder"),
    ("plot {unsaved} --out x.nonsense", "out", "'x.nonsense'", "png"),
    ("train world_models --image-size 60", "image_size", "60", "16 x base + 48"),
    ("train world_models --steps 5", "steps", "5", "env steps in all"),
    ("train world_models --agent.inputs h", "--agent.inputs", "'h'", "zch"),
    ("train world_models --agent.evolve.population 3", "population", "3", "at least 4"),
    ("train world_models --agent.evolve.wher dream", "--agent.evolve.wher", "unknown", "--agent.evolve.where"),
    ("train world_models --agent.evolve.where dream --agent.memory_updates 0", "evolve.where", "'dream'", "V and M"),
    ("train world_models --agent.evolve.where dream --agent.reward_head none", "evolve.where", "'none'", "gaussian"),
    ("train world_models --preset paper_doom --env catch", "dream_reward", "'survival'", "'predicted'"),
]  # fmt: skip
OPTIONS = [
    (f"train dreamer_v3 --{name} {value}", name.replace("-", "_"), value, "valid")
    for name, values in {
        "seed": ("-1", str(2**31)),
        "seeds": ("0", "-3"),
        "steps": ("0", "-5", str(2**31)),
        "devices": ("0", "-2"),
        "eval-every": ("-1",),
        "max-skipped": ("-1",),
        "checkpoint-seconds": ("-1.0", "nan"),
        "image-size": ("7", "-64", "0"),
    }.items()
    for value in values
]
TYPES = [
    (f"train dreamer_v3 --{name} {value}", f"--{name}", f"'{value}'", "")
    for name in ("seed", "seeds", "steps", "devices", "image-size", "agent.horizon", "agent.batch_size", "agent.bins")
    for value in ("x", "1.5", "1e3")
] + [
    (f"train dreamer_v3 --agent.{name} {value}", f"--agent.{name}", f"'{value}'", "")
    for name in ("learning_rate", "unimix", "lambda_")
    for value in ("x", "1,5")
]  # fmt: skip
CASES = NAMES + OPTIONS + TYPES
assert len(CASES) >= 100


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders that are no runs, each for a reason of its own."""
    root = tmp_path_factory.mktemp("places")
    names = {name: root / name for name in ("empty", "absent", "file", "agentless", "other", "unsaved")}
    for name in ("empty", "agentless", "other", "unsaved"):
        names[name].mkdir()
    names["file"].write_text("text")
    made = settings.setup("dreamer_v3", "catch").description
    for name, change in (("other", {"agent": "muzero"}), ("unsaved", {})):
        (names[name] / "config.json").write_text(json.dumps(made | change))
    (names["agentless"] / "config.json").write_text("{}")
    return {name: str(path) for name, path in names.items()}


def complaint(capsys, arguments) -> str:
    """The one line that the command gives."""
    code = main(arguments)
    out = capsys.readouterr()
    lines = out.err.splitlines()
    assert (code, len(lines)) == (2, 1), (code, out)
    assert lines[0].startswith("wmjax: error: ") and "Traceback" not in lines[0]
    assert "updates" not in out.out
    return lines[0]


@pytest.mark.parametrize(("arguments", "field", "value", "valid"), CASES, ids=[case[0] for case in CASES])
def test_one_line_names_the_field_the_value_and_what_is_valid(
    arguments, field, value, valid, places, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files = lambda: sorted(path for path in Path(places["empty"]).parent.rglob("*") if path.name != ".lock")
    before = files()
    line = complaint(capsys, arguments.format(**places).split())
    hyphens = lambda text: text.replace("_", "-")  # a field is shown as it is, or as an option
    for word in (field, value.format(**places), valid):
        assert hyphens(word) in hyphens(line), line
    assert files() == before
    assert not list(tmp_path.iterdir())


QUICK = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@QUICK
@hypothesis.given(st.sampled_from(NUMBERS), st.sampled_from([-1, -(2**40), float("nan"), float("inf"), -0.5]))
def test_a_number_that_is_out_of_every_range_is_refused_by_the_name_of_its_field(name, value):
    value = int(value) if name in WHOLE and value == value and abs(value) != float("inf") else value
    hypothesis.assume(not (name in WHOLE and value == 0))
    with pytest.raises(wmjax.UsageError) as caught:
        presets.resolve("dreamer_v3", "small", None, {name: value})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@QUICK
@hypothesis.given(st.sampled_from([field.name for field in dataclasses.fields(CONFIG)]), st.randoms())
def test_a_misspelled_field_gets_the_right_one(name, rng: random.Random):
    place = rng.randrange(len(name))
    wrong = name[:place] + rng.choice("qxz") + name[place + 1 :]
    hypothesis.assume(wrong not in HINTS and len(name) > 4)
    with pytest.raises(wmjax.UsageError, match=r"did you mean|valid are") as caught:
        presets.resolve("dreamer_v3", "small", None, {wrong: 1})
    assert repr(wrong) in str(caught.value)


@QUICK
@hypothesis.given(st.sampled_from(sorted(HINTS)), st.sampled_from(["many", [1.5], {}, b"1", 1j]))
def test_a_value_of_a_wrong_type_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(wmjax.UsageError, match=f"^{name}: .* is not valid; .* is$"):
        presets.resolve("dreamer_v3", "small", None, {name: value})


@QUICK
@hypothesis.given(st.sampled_from(CHOICES), st.text("abcxyz_0", min_size=1, max_size=8))
def test_a_choice_that_is_none_is_refused_with_those_that_are(name, value):
    hypothesis.assume(value not in HINTS[name].__args__)
    with pytest.raises(wmjax.UsageError) as caught:
        presets.resolve("dreamer_v3", "small", None, {name: value})
    assert all(str(choice) in str(caught.value) for choice in HINTS[name].__args__)


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path, capsys, monkeypatch):
    made = settings.setup("dreamer_v3", "probe:value")
    (tmp_path / "config.json").write_text(json.dumps(made.description))
    monkeypatch.setattr(checkpoint, "OLDEST", 99)
    checkpoint.save(tmp_path / "checkpoints", 1, {"x": 1.0})
    monkeypatch.undo()
    assert "format 99 is newer" in complaint(capsys, ["eval", str(tmp_path)])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda out: wmjax.load_params(None), "run"),
        (lambda out: wmjax.read_config(None), "config"),
        (lambda out: wmjax.compare(out=3), "out"),
        (lambda out: wmjax.compare(3, out=out), "agents"),
        (lambda out: wmjax.compare([3], out=out), "agents"),
        (lambda out: wmjax.compare("iris", 3, out=out), "envs"),
        (lambda out: wmjax.compare(runs=3, out=out), "runs"),
        (lambda out: wmjax.compare(runs=[None], out=out), "runs"),
        (lambda out: wmjax.ablate([], out=out), "agent"),
        (lambda out: wmjax.ablate("iris", only=3, out=out), "only"),
        (lambda out: wmjax.ablate("iris", only=[3], out=out), "only"),
        (lambda out: wmjax.plan(card=3), "card"),
        *((lambda out, dtype=dtype: wmjax.Box(0, 1, (1,), dtype), "Box") for dtype in (None, [], "object", "U3")),
        (lambda out: wmjax.Box(0, 1, (1,), "complex64"), "Box"),
    ],
)
def test_what_python_is_given_of_another_kind_is_named(call, field, tmp_path):
    with pytest.raises(wmjax.UsageError, match=f"^{field}: ") as caught:
        call(tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
