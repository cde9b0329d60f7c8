"""Bad command lines and calls over all flags, fields and arguments that there are, made from their types.

Each is one line and exit code 2, or a `UsageError`, that names what is wrong; quick, small, and nothing is written.
"""

import dataclasses
import inspect
import json
import random
import resource
import time
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import tyro

import wmjax
from wmjax import checks, settings, training
from wmjax.agents import AGENTS
from wmjax.cli import arguments, main
from wmjax.types import UsageError

SECONDS, KILOBYTES = 10, 4 * 2**20
ENVS = {"dreamer_v1": "pendulum", "world_models": "racing"}  # for the others catch
LONG, RING = "x" * 5000, "a\nb"


def choices(hint) -> tuple:
    """The types that a hint allows, one by one."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def bad_words(name: str, hint) -> list[str]:
    """Words that are no value of an option or field of this name and type."""
    kinds, none = choices(hint), type(None) in choices(hint)
    literals = [x for x in kinds if typing.get_origin(x) is typing.Literal]
    if any(x in (str, Path, tuple[Path, ...]) for x in kinds) or (callable(hint) and name == "callback"):
        return ["a\0b", "\udcff", *([] if Path in kinds or name == "lpips_weights" else ["", LONG])]
    if literals:
        return ["", "qqq", RING, "1e3", *([] if int in kinds else ["-1"])]
    if bool in kinds:
        return ["perhaps", "", "2"]
    over = str(int(checks.BOUNDS[name].high) + 1) if name in checks.BOUNDS and int in kinds else None
    if int in kinds:
        return [
            "x",
            "",
            "1.5",
            "1e3",
            "-1",
            "nan",
            str(2**31),
            str(2**63),
            "9" * 5000,
            over,
            *([] if none else ["None"]),
        ]
    if float in kinds:
        return ["x", "", "1,5", "nan", "-1e39", "-inf", *([] if none else ["None"])]
    return ["x", "-1", str(2**31), "nan"]  # numbers side by side


def flags(args_class, prefix="--"):
    """(flag, name, hint) of all options of a class of arguments, or of all fields of a configuration."""
    for name, hint in typing.get_type_hints(args_class, include_extras=True).items():
        if tyro.conf.Positional[int].__metadata__[0] in getattr(hint, "__metadata__", ()):
            continue
        if dataclasses.is_dataclass(choices(hint)[0]):
            yield from flags(choices(hint)[0], f"{prefix}{name}.")
        else:
            yield prefix + (name.replace("_", "-") if prefix == "--" else name), name, hint


def misspelled(flag: str, rng: random.Random) -> str:
    place = rng.randrange(3, len(flag))
    return flag[:place] + "q" + flag[place:]


SPECIAL = {"--env-arg"}  # takes two words


def command_lines(rng: random.Random, folder: str) -> list[list[str]]:
    """Lines with one thing wrong in each: a value, its absence, or the spelling of an option."""
    commands = [
        (["train", agent, "--env", ENVS.get(agent, "catch")], [*flags(arguments.TrainArgs), *flags(config, "--agent.")])
        for agent, (config, *_) in AGENTS.items()
    ]
    commands += [
        (["eval", folder], [*flags(arguments.EvalArgs)]),
        (["dream", folder], [*flags(arguments.DreamArgs)]),
        (["plot", folder], [*flags(arguments.PlotArgs)]),
    ]
    lines = []
    for begin, options in commands:
        for flag, name, hint in options:
            lines += [[*begin, misspelled(flag, rng), "1"]]
            if bool in choices(hint) and not flag.startswith("--agent."):
                lines += [[*begin, f"{flag}={word}"] for word in ("perhaps", "2")]
            elif flag not in SPECIAL:
                lines += [[*begin, flag, word] for word in bad_words(name, hint) if word is not None]
                lines += [] if tuple in map(typing.get_origin, choices(hint)) else [[*begin, flag]]  # none of them
    return lines


WRONG = {
    bool: ["yes", 1, None, [], b"x", np.int64(1)],
    int: ["x", 1.5, True, b"1", [3], -1, 2**63, 10**5000, float("nan"), np.array([1, 2]), object()],
    float: ["x", b"1", [1.0], float("nan"), -1.0, 1j, 10**400, True],
    str: [3, b"x", [], {}, "", "a\0b", LONG, 1.5, True, object()],
    Path: [3, b"x", [], "", "a\0b", LONG, True, "\udcff", 1.5],
}


def bad_values(hint) -> list:
    """Values that are none of an argument of this type."""
    kinds = choices(hint)
    for kind in (Path, int, float, str, bool):
        if kind in kinds and not (kind is bool and len(kinds) > 1):
            return WRONG[kind]
    return []


OWN = {  # arguments whose type does not say all
    "env": [3, b"x", [], {}, 1.5, True, "", "a\0b", RING, LONG, object()],
    "progress": [3, "x", b"x", [], None, 1.5, object()],
    "which": ["newest", "", 3, b"latest", None, []],
    "action": ["best", 3, b"mode", [], ""],
    "parallel": ["xmap", 3, b"pmap", [], ""],
    "env_args": [3, "x", [1], {1: 2}, {"x": object()}, b"x"],
    "callback": [3, "x", [], b"x"],
    "name": [3, None, b"x", [], "", "catsh", "gym:\0", LONG],
}


def calls(function, **given):
    """(function, arguments, name) with one argument wrong in each, over all that the function has."""
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        for value in OWN.get(name) or bad_values(hints.get(name, str)):
            yield function, given | {name: value}, name


def overrides(agent: str):
    """As `calls`, over the fields of an agent's configuration."""
    for field in dataclasses.fields(AGENTS[agent][0]):
        hint = typing.get_type_hints(AGENTS[agent][0])[field.name]
        kinds = choices(hint)
        for value in (
            "qqq",
            b"x",
            1j,
            object(),
            {"qqq": 1},
            [1.5],
            2**200,
            float("nan"),
            -(10**400),
            np.float32("inf"),
        ):
            if not (str in kinds and isinstance(value, str)):
                yield wmjax.train, {"agent": agent, field.name: value}, "qqq" if value == {"qqq": 1} else field.name


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """A working folder in which nothing may be written, and no run may begin."""

    def begun(*args, **kwargs):
        raise AssertionError("accepted: a run would begin")

    monkeypatch.setattr(training, "open_folder", begun)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def unsaved(tmp_path_factory) -> str:
    """The folder of a run that has saved nothing yet."""
    folder = tmp_path_factory.mktemp("unsaved")
    (folder / "config.json").write_text(json.dumps(settings.setup("dreamer_v3", "catch").description))
    return str(folder)


def check_all(cases, attempt):
    """Tries all cases, and says of which ones something is not as it should be."""
    wrong, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        start = time.monotonic()
        try:
            problem = attempt(case)
        except BaseException as error:  # whatever it is, it is not what should come
            problem = f"{type(error).__name__}: {error}"
        if time.monotonic() - start > SECONDS:
            problem = f"{problem}; took {time.monotonic() - start:.0f} s"
        if problem:
            wrong.append(f"{checks.show(case)[:160]}: {str(problem)[:300]}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}:", *wrong])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES


def refused(line, capsys):
    """None where a command line is refused in one line with exit code 2, else what came."""
    code = main(line)
    out, err = capsys.readouterr()
    good = code == 2 and err.startswith("wmjax: error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return None if good else (code, err or out[-200:])


def raises(case):
    """None where a call raises a `UsageError` of one line that names the argument, else what came."""
    function, values, name = case
    try:
        function(**values)
    except UsageError as error:
        text = str(error)
        name = "run" if name == "path" else name
        return None if name in text and "\n" not in text and len(text) < 1500 else text
    return "accepted"


def some(cases: list, count: int) -> list:
    return random.Random(0).sample(cases, count)


def bad_calls(folder: str):
    """Of the functions that begin with words of the user's; `folder` is of a run without a checkpoint."""
    return [*calls(wmjax.train), *calls(wmjax.load, path=folder), *calls(wmjax.make_env, env="catch")]


def test_bad_command_lines(nothing_begins, capsys, unsaved):
    lines = command_lines(random.Random(0), unsaved)
    check_all(some(lines, 25), lambda line: refused(line, capsys))


@pytest.mark.slow
def test_bad_calls(nothing_begins, unsaved):
    check_all(some(bad_calls(unsaved), 25), raises)
    check_all(some(list(overrides("dreamer_v3")), 10), raises)


@pytest.mark.slow
def test_all_bad_command_lines(nothing_begins, capsys, unsaved):
    lines = command_lines(random.Random(0), unsaved)
    assert len(lines) > 1500
    check_all(some(lines, 600), lambda line: refused(line, capsys))


@pytest.mark.slow
def test_all_bad_calls(nothing_begins, unsaved):
    cases = bad_calls(unsaved) + [case for agent in AGENTS for case in some(list(overrides(agent)), 60)]
    assert len(cases) > 400
    check_all(cases, raises)
