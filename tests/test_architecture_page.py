"""What the pages on architecture and on a batch say is so: names exist, and the layers are those that are demanded."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_architecture import ALLOWED, PACKAGE, TOP

ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
PAGE = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("architecture.md", "batch.md"))
PICTURES = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "_static").glob("batch_*.svg")))
FENCES = dict(re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL))
DRAWN = "\n".join([PICTURES, *re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)])
ROOMS = "|".join(sorted(ALLOWED | dict.fromkeys(TOP)))
# Dotted names of ours, in diagrams too; files and folders; and what is one word.
DOTTED = set(re.findall(rf"\b(?:{ROOMS})(?:\.\w+)+", DRAWN + re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
QUOTED = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
FILES = {name for name in QUOTED if "/" in name or name.endswith(".md")}
WORDS = {name for name in QUOTED if re.fullmatch(r"\w+", name)}
OF_A_RUN = {"config.json", "metrics.jsonl", "usage.json"}


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What is defined, assigned, annotated or imported at the top of a module or class, and as `self.NAME`."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def exists(name: str) -> bool:
    """Whether `a.b.c` is a module of ours, or something in one, or a member of a class in one."""
    place, *rest = PACKAGE, *name.split(".")
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place = place / rest.pop(0)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    node = ast.parse(path.read_text()) if path.is_file() else None
    for word in rest:
        node = names_in(getattr(node, "body", [])).get(word)
    return node is not None


@pytest.mark.parametrize("name", sorted(DOTTED))
def test_a_name_of_the_page_exists(name):
    assert exists(name)


def test_files_and_single_words_of_the_page_exist():
    assert FILES and all((ROOT / name).exists() or (PACKAGE / name).exists() for name in FILES)
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert all(re.search(rf"\b{word}\b", source) for word in WORDS)
    assert {name for name in QUOTED if "." in name} <= DOTTED | FILES | OF_A_RUN


def test_a_name_that_does_not_exist_is_noticed():
    assert not exists("ops.kl.no_such_loss") and not exists("ops.no_such_file") and exists("types.Update.fn")


def test_the_layers_are_those_that_are_demanded():
    drawn, bottom, top = {}, set(), set()
    for line in FENCES["layers"].splitlines():
        if "<-" in line:
            room, used = line.split("<-")
            drawn[room.strip()] = set(used.split())
        elif "nothing of ours" in line:
            bottom |= set(line.removesuffix("nothing of ours").split())
        elif "everything" in line:
            top |= set(line.partition("everything")[0].split())
    assert drawn | {room: set() for room in bottom} == ALLOWED
    assert top == {name for name in TOP if not name.startswith("__")}


def test_imports_point_down():
    order = [re.split(r"<-|nothing|everything", line)[0].split() for line in FENCES["layers"].splitlines()]
    rank = {room: number for number, rooms in enumerate(order) for room in rooms}
    assert all(rank[used] > rank[room] for room, uses in ALLOWED.items() for used in uses)


def test_the_page_is_linked():
    for name in ("README.md", "CONTRIBUTING.md"):
        assert "docs/architecture.md" in (ROOT / name).read_text()
    assert Path(ROOT / "docs" / "architecture.md").is_file()
