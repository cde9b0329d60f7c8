"""How Sphinx builds the site: `sphinx-build -W -b html docs docs/_build`. Nothing is downloaded for it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from pygments.lexers.special import TextLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import wmjax  # noqa: E402

project, author, release = "wmjax", "the wmjax developers", wmjax.__version__
copyright = "the wmjax developers, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "notebooks/*.py", "notebooks/.ipynb_checkpoints"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["ref.python"]  # names such as `Env` are at two places: in `wmjax` and where they are defined
nb_execution_mode = "off"  # notebooks show the outputs that are stored in them
# Nothing is downloaded when a page is read either: equations become MathML, which browsers draw themselves.
html_math_renderer = "mathml"
default_role = "code"  # docstrings have names in single backticks

html_theme = "pydata_sphinx_theme"
html_title = "wmjax"
html_static_path, templates_path = ["_static"], ["_templates"]
html_sidebars = {"**": ["all-pages.html"]}
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_center": [],  # the sidebar has all pages
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: what reStructuredText would read as markup, but for names in backticks, is escaped.

    What Python writes of the fields of a `NamedTuple` by itself is left out.
    """
    if lines and re.fullmatch(r"Alias for field number \d+", lines[0]):
        lines.clear()
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[number] = "".join(
            part if part.startswith("`") else re.sub(r"([*|])|(?<=\w)(_)(?!\w)", r"\\\g<0>", part) for part in parts
        )


def mathml(self, node: nodes.math | nodes.math_block) -> None:
    """An equation in LaTeX as MathML."""
    block = isinstance(node, nodes.math_block)
    markup = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f'<div class="math">{markup}</div>' if block else markup)
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.add_lexer("layers", TextLexer)  # of the diagram that a test reads
    app.connect("autodoc-process-docstring", escape, priority=400)
