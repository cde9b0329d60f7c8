"""What takes minutes: learning from pixels as a user would, and the notebooks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.notebooks import NOTEBOOKS, STORED, check_pictures, pictures, tool

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
QUICK = ("differentiate_through_a_dream",)  # notebooks that train little


def environment(**more: str) -> dict[str, str]:
    """A process of its own, compiled as a user's: the flags of `conftest.py` make slow programs."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)} | more


def tiny_environment(**more: str) -> dict[str, str]:
    """A process of its own for tiny models, whose programs take longer to compile than to run."""
    return environment(XLA_FLAGS=os.environ["XLA_FLAGS"], **more)


@pytest.mark.long
def test_dreamer_v3_learns_catch_from_pixels_with_its_default_preset(tmp_path):
    """Two thirds of the registered budget: a random policy returns -0.6, the best 1."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "wmjax.cli", "train", "dreamer_v3", "--steps", "20000", "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "eval.json").read_text())["mean"] >= 0.6


# Env steps of what is trained from the beginning; of the others, steps of gradient.
BUDGETS = {"your_own_environment": "700"}


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.long) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_on_a_tiny_budget_and_shows_as_many_pictures_as_are_stored(notebook):
    pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
    done = tool.execute(notebook, WMJAX_NOTEBOOK_STEPS=BUDGETS.get(notebook.stem, "3"))
    stored = json.loads(notebook.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert len(pictures(done)) >= 2 and (notebook not in STORED or len(pictures(done)) == len(pictures(stored)))
    check_pictures(done)
