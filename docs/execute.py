"""Executes the notebooks and stores what they show: `python docs/execute.py [NAME ...]`, by default all of them.

A notebook is written as `notebooks/NAME.py`. Beside it `NAME.ipynb` gets the same cells with their outputs, which the
site and a repository's page show; `tests/docs/test_notebooks.py` tells when one is old.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def execute(path: Path, **environment: str) -> Any:
    """The notebook of a text, with its outputs; `environment` is added to that of its process.

    It runs in a folder that is deleted afterwards. Raises `nbclient.exceptions.CellExecutionError` where a cell fails.
    """
    import jupytext
    import nbclient

    notebook = jupytext.read(path)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}},
            record_timing=False, coalesce_streams=True,
        )  # fmt: skip
        client.execute(env=environment)
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64, in 128 colors."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def write(notebook: Any, path: Path) -> None:
    """Stores a notebook without what differs from machine to machine: versions, names of cells, warnings."""
    import nbformat

    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output["data"] for output in cell.outputs if "image/png" in output.get("data", ())):
                data["image/png"] = smaller(data["image/png"])
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, path)


def main(names: list[str]) -> None:
    """Executes and stores the notebooks of these names."""
    known: Mapping[str, Path] = {path.stem: path for path in NOTEBOOKS}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"there is no notebook {unknown[0]!r}; valid are {', '.join(known)}")
    try:
        import ipykernel  # noqa: F401
        import jupytext  # noqa: F401
        import nbclient  # noqa: F401
    except ImportError as error:
        sys.exit(f'{error.name} is not installed; the extra `notebooks` brings it: pip install -e ".[notebooks]"')
    os.environ.pop("WMJAX_NOTEBOOK_STEPS", None)  # what is stored is no toy
    for name in names or known:
        write(execute(known[name]), known[name].with_suffix(".ipynb"))
        print(f"wrote notebooks/{name}.ipynb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="without the suffix; all by default")
    main(parser.parse_args().names)
