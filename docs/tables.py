"""Writes what the pages take from the code, tables and lists of modules: `python docs/tables.py`.

It stands between `<!-- table: NAME -->` and `<!-- end -->`; `tests/docs/test_tables.py` tells when one is old.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wmjax import checks, planning, presets
from wmjax.agents import AGENTS
from wmjax.cli.lists import GROUPS
from wmjax.comparison.references import reference
from wmjax.envs import PICTURES, PROBES, make_env
from wmjax.fields import dotted
from wmjax.presets.budgets import BUDGETS, MEASURED

DOCS = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown, with an empty line before and after it."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    escape = lambda cell: cell.replace("|", "\\|")
    return "\n" + "".join(f"| {' | '.join(map(escape, row))} |\n" for row in lines) + "\n"


def comments(config_class: type) -> dict[str, str]:
    """What the source says of each field, in the comment on its line."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                found[node.target.id] = said.get(node.end_lineno, "")
    return found


def fields(config: Any, *others: Any, prefix: str = "") -> Iterator[list[str]]:
    """A row of each field: its name, its value here and, where it differs, in the others, choices and meaning."""
    about = comments(type(config))
    for field in dataclasses.fields(config):
        value, *rest = (getattr(one, field.name) for one in (config, *others))
        if dataclasses.is_dataclass(value):
            yield from fields(value, *rest, prefix=f"{prefix}{field.name}.")
            continue
        hints = inspect.get_annotations(type(config), eval_str=True) or {}
        choices = [x for one in checks.alternatives(hints.get(field.name)) for x in getattr(one, "__args__", ())]
        what = about.get(field.name, "")
        words = ", ".join(f"`{choice}`" for choice in choices if isinstance(choice, str))
        shown = ["" if other == value else f"`{other}`" for other in rest]
        yield [f"`{prefix}{field.name}`", f"`{value}`", *shown, f"{what}{'; ' if what and words else ''}{words}"]


def fields_of(agent: str) -> str:
    """Fields of an agent's configuration: the paper's values, which are the defaults, and those of two presets."""
    others = [name for name in ("small", "guide") if name in presets.PRESETS[agent]]
    configs = [presets.resolve(agent, name)[0] for name in others]
    return table(["field", "default", *others, "what it is"], fields(AGENTS[agent][0](), *configs))


def planners() -> str:
    rows = [[f"`{name}`", *row] for name, (kind, _) in planning.PLANNERS.items() for row in fields(kind())]
    return table(["planner", "field", "default", "what it is"], rows)


def presets_table() -> str:
    """Every preset, what it is for, and how much of the paper's defaults it changes."""
    rows = [
        [f"`{agent}`", f"`{name}`", presets.PRESET_NOTES[name], str(len(changes))]
        for agent, made in presets.PRESETS.items()
        for name, changes in made.items()
    ]
    return table(["agent", "preset", "what for", "fields it changes"], rows)


def _cell(value: Any) -> str:
    if value is ...:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _settings(values: Any) -> str:
    return "" if values is ... else ", ".join(f"`{name}={value}`" for name, value in dotted(values).items())


def budgets() -> str:
    """The table of budgets, row by row; later rows are laid over earlier ones, and what is empty is as before."""
    head = ["agent", "preset", "environment", "env steps", "image size", "action repeat", "arguments", "fields"]
    rows = [
        [*(f"`{name}`" if name != "*" else "all" for name in (row.agent, row.preset, row.env)),
         *map(_cell, (row.steps, row.image_size, row.action_repeat)),
         *map(_settings, (row.env_args, row.config)),
         row.score, f"`{row.source}`" if "/" in row.source else row.source]
        for row in BUDGETS
    ]  # fmt: skip
    return table([*head, "return", "of"], rows)


def environments() -> str:
    """Environments of ours, which run on the device."""
    rows = []
    for name, env in (PICTURES | PROBES).items():
        spec = make_env(name).spec
        obs = ", ".join(f"{key} {space.dtype} {list(space.shape)}" for key, space in spec.obs.items())
        rows.append([f"`{name}`", obs, f"`{spec.action}`".replace(", dtype='float32'", ""), env.description])
    return table(["name", "observation", "action", "what"], rows)


def suites() -> str:
    """Groups of environments of other libraries, and the extra that brings each."""
    rows = [
        [f"`{group.prefix}:NAME`", group.title, ", ".join(f"`{extra}`" for extra, _ in group.needs)]
        for group in GROUPS
        if group.prefix not in ("", "probe")
    ]
    return table(["name", "what", "extra"], rows)


def departures(agent: str) -> str:
    """What the head of an agent's file says that is not as in the authors' code."""
    text = sys.modules[f"wmjax.agents.{agent}"].__doc__ or ""
    said = next(part for part in text.split("\n\n") if part.startswith("Departures: ")).removeprefix("Departures: ")
    points = re.split(r"(?<=[;.]) (?=[A-Za-z`])", re.sub(r"\s+", " ", said).partition(" Numbers that differ")[0])
    points = [point.rstrip(";.") for point in points if not point.endswith(":")]
    return "\n" + "".join(f"- {point}\n" for point in points) + "\n"


def results(agent: str) -> str:
    """What an agent was measured to reach with the preset `small`."""
    head = ["environment", "env steps", "return", "random play"]
    rows = [
        [f"`{row.env}`", f"{row.steps:,}", row.score, _cell(reference(row.env).random)]
        for row in BUDGETS
        if row.agent == agent and row.source == MEASURED
    ]
    return table(head, rows)


# Pages of the API that are of files; those of folders have their names, and what is on no other is on "runs".
FILES = {
    "types": ("types", "raw_env", "checks", "recipes"),
    "models": ("dreaming", "planning", "evolution", "optim"),
    "sizes": ("sizing", "estimate", "arithmetic", "buffers", "cards"),
}
PACKAGE = DOCS.parent / "wmjax"
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def modules(page: str) -> str:
    """The modules of a page of the API, each as Sphinx writes it out."""
    if page in ROOMS:
        paths = sorted((PACKAGE / page).rglob("*.py"))
    else:
        apart = {f"{name}.py" for other, names in FILES.items() if other != page for name in names}
        paths = [path for path in sorted(PACKAGE.glob("*.py")) if path.name not in apart | {"__init__.py"}]
        paths = [PACKAGE / f"{name}.py" for name in FILES.get(page, ())] or paths
    found = [".".join(path.relative_to(DOCS.parent).with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__init__") for name in found if not name.endswith("__main__")]
    return "\n" + "\n".join(f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n" for name in names) + "\n"


TABLES = {
    "presets": presets_table, "budgets": budgets, "environments": environments, "suites": suites, "planners": planners,
    **{f"{name}-{agent}": functools.partial(make, agent) for agent in AGENTS
       for name, make in (("fields", fields_of), ("departures", departures), ("results", results))},
    **{f"api-{page}": functools.partial(modules, page) for page in (*FILES, *ROOMS, "runs")},
}  # fmt: skip


def renewed(text: str) -> str:
    """A page with its tables as the code is."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def pages() -> list[Path]:
    return sorted(path for place in (DOCS, DOCS / "papers", DOCS / "api") for path in place.glob("*.md"))


def main() -> None:
    for path in pages():
        if MARKED.search(text := path.read_text(encoding="utf-8")):
            path.write_text(renewed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
