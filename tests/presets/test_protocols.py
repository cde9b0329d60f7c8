"""How each agent plays each suite is in one table of the documentation, which is read from the settings."""

import re
from pathlib import Path

import pytest

from wmjax import presets
from wmjax.agents import AGENTS
from wmjax.suites import SuiteError
from wmjax.suites.atari_suite import ARGUMENTS, Protocol, protocol

DOCS = Path(__file__).parents[2] / "docs" / "protocols.md"
SHOWN = {True: "yes", False: "no"}


def atari(agent, suite, preset="small"):
    """How a game of Atari is played by an agent."""
    return protocol(f"{suite}:Pong", presets.resolve(agent, preset, f"{suite}:Pong")[1].env_args)


def table(heading):
    """Rows of the first table under a heading, as lists of cells."""
    section = DOCS.read_text().split(f"## {heading}\n")[1]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    return [[cell.strip(" `") for cell in row.strip("| ").split(" | ")] for row in rows]


def test_the_table_of_atari_says_what_is_played():
    head, _, *rows = table("Atari")
    assert head[:2] == ["agent", "suite"] and head[2:] == [*ARGUMENTS, "size"]
    documented = {tuple(row[:2]): row[2:] for row in rows}
    wanted = {}
    for agent in AGENTS:
        for suite in ("atari", "atari200m"):
            played = atari(agent, suite)
            wanted[agent, suite] = [str(SHOWN.get(x, x) if isinstance(x, bool) else x) for x in played[:-1]]
    assert {key: row[:-1] for key, row in documented.items()} == wanted
    for (agent, suite), row in documented.items():
        preset = next(name for name in presets.PRESETS[agent] if name.startswith("paper"))
        settings = presets.resolve(agent, preset, f"{suite}:Pong")[1]
        assert row[-1] == str(settings.image_size or atari(agent, suite).image_size), (agent, suite)


def test_a_protocol_is_the_same_for_all_presets_of_an_agent():
    for agent, table in presets.PRESETS.items():
        for suite in ("atari", "atari200m"):
            assert len({atari(agent, suite, preset) for preset in table}) == 1


PAPERS = [
    # DreamerV3's Atari 100k: a lost life ends nothing, 108,000 frames, RGB pictures resized after the maximum.
    ("dreamer_v3", "atari", dict(sticky=0.0, life_loss=False, limit=108_000, all_actions=False, gray=False,
                                 min_noops=0)),
    # Its 200 million frames: resized from RGB, then gray; 0 to 30 frames without action.
    ("dreamer_v3", "atari200m", dict(sticky=0.25, life_loss=False, all_actions=True, resize="bilinear", gray=True,
                                     gray_last=True, min_noops=0, max_noops=30, resize_first=False)),
    # DreamerV2: gray from the emulator, by areas, the actions that a game uses.
    ("dreamer_v2", "atari200m", dict(sticky=0.25, life_loss=False, all_actions=False, resize="area", gray=True,
                                     gray_last=False, min_noops=1, max_noops=30)),
    # DreamerV1: RGB, sticky actions, lost lives.
    ("dreamer_v1", "atari", dict(sticky=0.25, life_loss=True, gray=False, limit=108_000, resize="bilinear")),
    ("dreamer_v1", "atari200m", dict(sticky=0.25, life_loss=True, gray=False)),
    # IRIS: no sticky actions, lost lives, 20,000 frames, resized before the maximum.
    ("iris", "atari", dict(sticky=0.0, life_loss=True, limit=20_000, resize_first=True, gray=False, min_noops=1)),
]  # fmt: skip


@pytest.mark.parametrize("agent, suite, wanted", PAPERS)
def test_an_agent_plays_atari_by_its_paper(agent, suite, wanted):
    played = atari(agent, suite)._asdict()
    assert {name: played[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "args, message",
    [
        ({"sticky": 2}, "sticky of 'atari:Pong' is 2, which is not valid; a number in \\[0, 1\\] is"),
        ({"lives": True}, "'lives' is not an argument of 'atari:Pong'; .*life_loss"),
        ({"life_loss": 1}, "life_loss of 'atari:Pong' is 1.*true or false"),
        ({"resize": "nearest"}, "resize of 'atari:Pong' is 'nearest'.*area, bilinear"),
        ({"min_noops": 40}, "min_noops 40 of 'atari:Pong' is above max_noops 30"),
        ({"max_noops": -1}, "max_noops of 'atari:Pong' is -1"),
        ({"gray_last": True}, "gray_last of 'atari:Pong' is valid with gray alone"),
        ({"image_size": 84}, "'image_size' is not an argument"),
    ],
)
def test_an_argument_of_atari_that_is_not_valid_is_named(args, message):
    with pytest.raises(SuiteError, match=message):
        protocol("atari:Pong", args)


def test_arguments_are_all_that_a_protocol_has_but_the_size():
    assert tuple(ARGUMENTS) == Protocol._fields[:-1]


def test_the_tables_of_other_suites_name_their_arguments():
    from wmjax.suites import crafter_suite, dmc_suite, vizdoom_suite

    text = DOCS.read_text()
    for module in (crafter_suite, dmc_suite, vizdoom_suite):
        for name in module.ARGUMENTS:
            assert re.search(rf"`{name}`", text), name
