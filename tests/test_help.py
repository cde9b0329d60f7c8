"""What `--help` says of every field, and what `list` shows."""

import dataclasses
import re

import pytest

from wmjax.agents import AGENTS
from wmjax.cli import main
from wmjax.presets import PRESETS


def options(text):
    """Help by option: what stands between it and the next one, without its metavar."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip("│ ") for line in plain.splitlines() if line.strip("│╭╮╰╯─ ")]
    found, name = {}, None
    for line in lines:
        if match := re.match(r"(-h, )?(--[\w.-]+)\s?(.*)", line):
            name, line = match[2], match[3]
            found[name] = ""
        if name:
            found[name] += " " + line
    return found


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("preset", ["small", "guide"])
def test_every_field_has_help_and_one_default(agent, preset, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider ones have two columns
    assert main(["train", agent, "--preset", preset, "--help"]) == 0
    out = capsys.readouterr().out
    assert "the defaults are those of the preset" in out and "defaults are the paper's" not in out
    found = options(out)
    config = AGENTS[agent][0]()
    wanted = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = [f"{field.name}.{x.name}" for x in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        wanted += inner or [field.name]
    for name in [f"--agent.{name.replace('_', '-').rstrip('-')}" for name in wanted]:
        text = " ".join(text for flag, text in found.items() if flag.rstrip("_-") == name)
        words = re.sub(r"\(default: [^)]*\)|\[[^]]*\]|\{[^}]*\}|\b(INT|FLOAT|STR|None)\b|[|]", "", text)
        assert len(re.findall(r"[a-zA-Z]", words)) >= 3, (name, text)
    for name, text in found.items():
        assert len(re.findall(r"default", text.replace("by default", ""))) <= 1, (name, text)
        assert "by default" not in text, (name, text)
        assert "default: None" not in text or name.startswith("--agent."), (name, text)


def test_help_of_train_lists_the_agents_and_of_a_preset_its_values(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(agent in out for agent in AGENTS)
    assert main(["train", "dreamer_v3", "--preset", "paper", "--help"]) == 0
    assert re.search(r"--agent.size .*?\(default: 200m\)", capsys.readouterr().out, re.DOTALL)


def listed(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["list", *words]) == code
    said = capsys.readouterr()
    return (said.err if code else said.out).splitlines()


@pytest.mark.parametrize("words", [["envs"], ["agents"], ["presets"], ["envs", "*"], ["envs", "gym"]], ids=" ".join)
def test_lists_fit_a_terminal_of_80_columns(words, capsys):
    assert max(map(len, listed(capsys, *words))) <= 80


def test_environments_are_shown_by_suite_with_what_is_missing_and_how_to_get_it(capsys, monkeypatch):
    from wmjax.suites import SUITES

    lines = listed(capsys, "envs")
    text = "\n".join(lines)
    assert len(lines) < 60
    for name in (*SUITES, "catch", "gymnax", "craftax"):
        assert name in text, name
    monkeypatch.setattr("wmjax.cli.lists.find_spec", lambda name: None)
    text = "\n".join(listed(capsys, "envs"))
    for extra in ("gymnax", "craftax", "atari", "dmc", "crafter", "vizdoom"):
        assert f'"wmjax[{extra}]"' in text, extra


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("catch", ["catch"]),
        ("PEND*", ["pendulum", "gym:Pendulum-v1"]),
        ("gym:cartpole", ["gym:CartPole-v1"]),
        ("probe:*_obs", ["probe:act_obs"]),
    ],
)
def test_a_pattern_is_a_part_of_a_name_or_a_glob_in_any_case(pattern, names, capsys):
    lines = listed(capsys, "envs", pattern)
    shown = {line.split()[0] for line in lines}
    assert set(names) <= shown
    assert "dreamer_v3" not in shown


def test_agents_and_presets_take_a_pattern_too(capsys):
    text = "\n".join(listed(capsys, "presets", "dreamer_v2"))
    assert all(name in text for name in PRESETS["dreamer_v2"]) and "dreamer_v3" not in text
    assert "iris" not in "\n".join(listed(capsys, "agents", "dreamer*"))
    assert "images as tokens" in "\n".join(listed(capsys, "agents", "iris"))


def test_a_pattern_that_nothing_matches_is_one_line(capsys):
    (line,) = listed(capsys, "envs", "pendulun", code=2)
    assert "'pendulun'" in line and "'pendulum'" in line
    (line,) = listed(capsys, "agents", "xyzzy", code=2)
    assert "xyzzy" in line
