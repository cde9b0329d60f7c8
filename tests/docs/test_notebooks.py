"""Notebooks are stored with what they show, are as their texts are, and use public names alone."""

import ast
import json
import re
import sys

import pytest

from tests.docs.notebooks import NOTEBOOKS, STORED, check_pictures, outputs, pictures, text, tool
from tests.docs.pages import DOCS
from wmjax import figures
from wmjax.types import UsageError

LARGEST = 400_000  # bytes
TUPLES = {"_replace", "_asdict", "_fields", "_make"}  # which Python gives a `NamedTuple`; they are public
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_stored = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))


def code(path):
    return [text(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


@each_stored
def test_a_stored_notebook_shows_pictures_and_nothing_of_the_machine_it_ran_on(path):
    notebook = read(path)
    assert len(pictures(notebook)) >= 2, f"python docs/execute.py {path.stem} stores them"
    check_pictures(notebook)
    assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    words = [text(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs(notebook)]
    assert not re.search(r"/(tmp|home|root|Users)/", "\n".join(words))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert path.with_suffix(".ipynb").stat().st_size < LARGEST


@each
def test_a_stored_notebook_has_the_cells_of_its_text(path):
    jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    stored = [(cell["cell_type"], text(cell["source"])) for cell in read(path)["cells"]]
    assert cells == stored, f"python docs/execute.py {path.stem} stores it anew"


@each
def test_a_notebook_uses_public_names_alone(path):
    tree = ast.parse("\n".join(code(path)))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not {name for name in names if name.startswith("_") and not name.endswith("__")} - TUPLES
    targets = [target for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets]
    patched = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
    assert not [name for name in patched if not name.startswith("self.")]


@each_stored
def test_the_source_that_a_notebook_shows_is_that_of_the_package(path):
    for cell in read(path)["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] != "code" or not source.startswith("print(inspect.getsource("):
            continue
        names, imports = {}, [line for block in code(path) for line in ast.parse(block).body]
        imports = [line for line in imports if isinstance(line, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), path.name, "exec"), names)
        shown = [ast.unparse(line.value.args[0]) for line in ast.parse(source).body]
        present = "".join(eval(expression, names) + "\n" for expression in shown)
        stored = "".join(text(output["text"]) for output in cell["outputs"])
        assert stored == present, f"python docs/execute.py {path.stem} stores it anew"


def test_every_notebook_is_a_page_of_the_site():
    listed = re.findall(r"^notebooks/(\w+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]


def test_without_their_extra_notebooks_say_which_one_it_is(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(SystemExit, match=r'extra `notebooks` .* pip install -e ".\[notebooks\]"'):
        tool.main([NOTEBOOKS[0].stem])
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UsageError, match="IPython, which the extra `notebooks` brings"):
        figures.show(tmp_path / "picture.png")


def test_an_unknown_notebook_is_refused_by_name():
    with pytest.raises(SystemExit, match="no notebook 'none'; valid are differentiate_through_a_dream, "):
        tool.main(["none"])
