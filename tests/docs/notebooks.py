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


def text(lines: str | list[str]) -> str:
    """What a file of a notebook says in one string or in lines."""
    return "".join(lines)


def outputs(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What its cells gave."""
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def pictures(notebook: Mapping[str, Any]) -> list[np.ndarray]:
    """The pictures it shows, uint8 `[H, W, 3]`."""
    shown = [text(output["data"]["image/png"]) for output in outputs(notebook) if "image/png" in output.get("data", ())]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in shown]


def check_pictures(notebook: Mapping[str, Any]) -> None:
    """They are more than paper with words on it: large, and of many colors or with much that is not white."""
    for picture in pictures(notebook):
        assert min(picture.shape[:2]) >= 100, picture.shape
        assert picture.std() > 10, picture.std()
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) >= 16
