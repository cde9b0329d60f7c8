"""Tables of the site are those of the code."""

import importlib.util
import re

import pytest

from tests.docs.pages import DOCS
from wmjax.agents import AGENTS


def load_tables():
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()
MARKED = [path for path in tables.pages() if tables.MARKED.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
def test_the_tables_of_a_page_are_as_the_code_is(path):
    text = path.read_text(encoding="utf-8")
    assert text == tables.renewed(text), "python docs/tables.py writes them anew"


def test_every_table_is_on_a_page():
    shown = {name for path in MARKED for _, name, _ in tables.MARKED.findall(path.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_field_has_a_row_that_says_what_it_is(agent):
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", tables.fields_of(agent), re.MULTILINE)
    assert len(rows) >= len(AGENTS[agent][0].__dataclass_fields__)
    assert all(what for _, what in rows)
