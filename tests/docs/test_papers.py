"""What the pages of the papers name is there: functions, and the tests that pin them."""

import re

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.test_architecture_page import exists
from wmjax.agents import AGENTS

SECTIONS = ["Equation, function, test", "Deviations", "Results", "Dream", "Cost", "Settings"]


def rows(agent):
    text = (DOCS / "papers" / f"{agent}.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (?!equation|---)(.*) \| (.*) \| (.*) \|$", text.split("## Deviations")[0], re.MULTILINE)


@pytest.mark.parametrize("agent", AGENTS)
def test_functions_and_tests_that_a_page_names_are_there(agent):
    assert len(rows(agent)) > 6
    for equation, functions, test in rows(agent):
        names = re.findall(r"`([\w.]+)`", functions)
        assert names and all(map(exists, names)), equation
        path, name = re.fullmatch(r"`(.*)::(\w+)`", test).groups()
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("agent", AGENTS)
def test_a_page_says_all_that_it_should(agent):
    text = (DOCS / "papers" / f"{agent}.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
