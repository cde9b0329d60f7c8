"""What takes minutes: learning from pixels as a user would, and the notebooks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def environment(**more: str) -> dict[str, str]:
    """A process of its own, compiled as a user's: the flags of `conftest.py` make slow programs."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)} | more


def tiny_environment(**more: str) -> dict[str, str]:
    """A process of its own for tiny models, whose programs take longer to compile than to run."""
    return environment(XLA_FLAGS=os.environ["XLA_FLAGS"], **more)


def test_dreamer_v3_learns_catch_from_pixels_with_its_default_preset(tmp_path):
    """Two thirds of the registered budget: a random policy returns -0.6, the best 1."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", "--steps", "20000", "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "eval.json").read_text())["mean"] >= 0.6


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=[] if path.stem == "world_models" else pytest.mark.long) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_on_a_tiny_budget(notebook, tmp_path):
    # Some updates after the first batch of records, which dreamer_v1 has after 2080 frames.
    steps = "2200" if notebook.stem == "dreamer_v1" else "1400"
    budget = {"WMJAX_NOTEBOOK_STEPS": steps, "WMJAX_NOTEBOOK_SIZE": "32", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(notebook)], cwd=tmp_path, env=tiny_environment(**budget), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_and_its_text_have_the_same_cells(notebook):
    jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")
    text, paired = jupytext.read(notebook), jupytext.read(notebook.with_suffix(".ipynb"))
    assert [cell.source for cell in text.cells] == [cell.source for cell in paired.cells]
