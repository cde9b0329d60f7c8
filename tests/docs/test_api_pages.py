"""Every module, and so every public name, is on one page of the API."""

import re

import wmjax
from tests.docs.pages import DOCS, ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "wmjax").rglob("*.py")
    if path.name != "__main__.py"
}


def test_every_module_is_on_one_page_of_the_api():
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    shown = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(MODULES)


def test_every_page_of_the_api_is_listed_and_public_names_are_found_where_they_are_said_to_be():
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    listed = re.search(r"```\{toctree\}\n.*?\n\n(.*?)```", index, re.DOTALL)[1].split()
    assert sorted([*listed, "index"]) == sorted(path.stem for path in (DOCS / "api").glob("*.md"))
    assert all(getattr(wmjax, name).__module__.startswith("wmjax") for name in wmjax.__all__)
