"""What the pages show to type in can be typed in: commands are known with their options, Python runs."""

import dataclasses
import doctest
import re

import numpy as np
import pytest

import wmjax
from tests.docs.pages import PAGES, ROOT, blocks
from tests.marks import partly_long
from tests.test_run import TINY
from wmjax.agents import AGENTS
from wmjax.cli import COMMANDS, HELP
from wmjax.planning import PLANNERS

SHOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
PYTHON = [path for path in SHOWN if blocks(path, "python")]
PARTS = re.findall(r"^wmjax (\w+)(.*?)(?=^wmjax |\Z)", HELP, re.DOTALL | re.MULTILINE)
USAGE = {name: "".join(text for other, text in PARTS if other == name) for name, _ in PARTS}
FIELDS = {name: {field.name for field in dataclasses.fields(config)} for name, (config, *_) in AGENTS.items()}


def commands(path):
    """Lines that call `wmjax` in blocks without a language, with what follows a `#` left out."""
    lines = "\n".join(blocks(path, "", "console")).replace("\\\n", " ").splitlines()
    return [line.split(" # ")[0].split() for line in lines if re.match(r"(\w+=\S+ )?wmjax ", line)]


@pytest.mark.parametrize("path", [path for path in SHOWN if commands(path)], ids=lambda path: path.stem)
def test_commands_of_a_page_have_options_that_there_are(path):
    for _, name, *words in (line[line.index("wmjax") :] for line in commands(path)):
        assert name in COMMANDS or name in ("--version", "COMMAND"), name
        usage = USAGE.get(name, "") + (USAGE["compare"] if name == "ablate" else "")
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--agent."):
                known = set().union(*(FIELDS[agent] for agent in AGENTS if agent in words)) or set().union(
                    *FIELDS.values()
                )
                assert option.split(".")[1].replace("-", "_") in {*known, "FIELD"}, (name, word)
            elif option.startswith("--planner."):
                assert any(hasattr(config, option.split(".")[1]) for config, _ in PLANNERS.values()), (name, word)
            elif option.startswith("--") and option != "--help":
                assert re.search(rf"{option}(?![\w-])", usage), (name, word)


@pytest.mark.parametrize("path", [path for path in SHOWN if blocks(path, "pycon")], ids=lambda path: path.stem)
def test_examples_with_their_output_give_it(path):
    names = {"wmjax": wmjax}
    for code in blocks(path, "python"):
        if ">>>" not in code and "wmjax.train(" not in code and "wmjax.load(" not in code:
            exec(code, names)
    text = "\n".join(blocks(path, "pycon"))
    example = doctest.DocTestParser().get_doctest(text, names, path.name, str(path), 0)
    assert example.examples
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert not doctest.DocTestRunner(optionflags=flags).run(example).failed


class Episode:
    """As in the page on fixed episodes."""

    images, choices, reward = np.zeros((10, 64, 64, 3), np.uint8), np.zeros(10, int), np.zeros(10, np.float32)
    ended_by_itself = True


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs that pages speak of, tiny ones."""
    folder = tmp_path_factory.mktemp("pages")
    for name, env in (("catch", "catch"), ("mine", "catch"), ("cartpole", "gym:CartPole-v1")):
        wmjax.train("dreamer_v3", env, steps=64, out=folder / "runs" / name, progress=False, **TINY)
    return folder


LONG = ("equations", "planning")  # CI runs the other pages


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", partly_long(PYTHON, [path for path in PYTHON if path.stem not in LONG]), ids=lambda path: path.stem
)
def test_python_of_a_page_runs(path, runs, tmp_path, monkeypatch):
    train, load = wmjax.train, wmjax.load
    if path.stem == "export":
        pytest.importorskip("jax2onnx")

    def short(agent="dreamer_v3", env=None, **given):
        """As it is called, for fewer steps, with a smaller agent, and where nothing is."""
        settings = {**TINY, **given, "steps": 64, "progress": False}
        settings["out"] = tmp_path / settings["out"]
        return train(agent, env, **settings)

    (runs / "data").mkdir(exist_ok=True)
    monkeypatch.chdir(runs)
    monkeypatch.setattr(wmjax, "train", short)
    trained_here = lambda path: tmp_path / path if (tmp_path / path).exists() else path
    monkeypatch.setattr(wmjax, "load", lambda path, **given: load(trained_here(path), **given))
    names = {
        "wmjax": wmjax,
        "my_episodes": [Episode] * 20,
        "obs": np.zeros((64, 64, 3), np.uint8),
        "__name__": path.stem,
    }
    for code in blocks(path, "python"):
        code = re.sub(r"episodes=\d+", "episodes=2", code)
        exec(compile(code, path.name, "exec"), names)  # blocks follow each other
