"""The notebooks, and the pictures that they show."""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tests.docs.pages import DOCS


def load_tool() -> Any:
    """`docs/execute.py`."""
    spec = importlib.util.spec_from_file_location("docs_execute", DOCS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()
NOTEBOOKS = tool.NOTEBOOKS
# Not executed yet: their cells are stored without outputs.
WAITING = ()
STORED = [path for path in NOTEBOOKS if path.stem not in WAITING]


def text(lines: str | list[str]) -> str:
    """What a file of a notebook says in one string or in lines."""
    return "".join(lines)


def outputs(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What its cells gave."""
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def pictures(notebook: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures it shows."""
    shown = [text(output["data"]["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", ())]
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in shown]


def check_pictures(notebook: Mapping[str, Any]) -> None:
    """They are more than paper with words on it: large, of many colors, and far from constant."""
    for picture in pictures(notebook):
        assert min(picture.size) >= 100, picture.size
        assert picture.getcolors(15) is None
        assert np.std(picture) > 10
