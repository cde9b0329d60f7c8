"""IRIS through the command line, from training to its dream; tiny, but every stage of its recipe compiles."""

import json

import pytest

from tests.agents.batches import TINY_IRIS
from wmjax.agents.iris import IRISConfig
from wmjax.cli import main
from wmjax.loops.report import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.long]
PAPER = vars(IRISConfig())
FIELDS = [
    word
    for name, value in vars(TINY_IRIS).items()
    if value != PAPER[name]
    for word in (f"--agent.{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
]


def train(out, *more, steps=160):
    """An epoch is 16 env steps: one that collects, one with the tokenizer, one with the world model, then with all."""
    arguments = ["train", "iris", "--env", "catch", "--image-size", "16", "--steps", str(steps), "--out", str(out)]
    return main([*arguments, *FIELDS, *more])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    path = tmp_path_factory.mktemp("iris") / "run"
    assert train(path, "--seeds", "2") == 0
    return path


def test_two_seeds_are_trained_evaluated_and_dreamed_of(seeds, capsys):
    scores = json.loads((seeds / "eval.json").read_text())
    assert scores["episodes"] == 200 and set(scores["seeds"]) == {"0", "1"}
    assert scores["seeds"]["0"]["returns"] != scores["seeds"]["1"]["returns"]
    assert main(["eval", str(seeds), "--episodes", "16"]) == 0
    assert main(["dream", str(seeds), "--context", "2", "--horizon", "4"]) == 0
    errors = json.loads((seeds / "seed-0" / "dream.json").read_text())
    assert all(count > 0 for count in errors["count"]) and len(errors["image"]["model"]) == 4
    assert (seeds / "seed-0" / "dream.gif").read_bytes().startswith(b"GIF")


def test_two_seeds_resume_byte_for_byte_across_the_stages_of_the_recipe(seeds, tmp_path, capsys):
    capsys.readouterr()
    assert train(seeds, "--seeds", "2", "--resume") == 0
    whole = capsys.readouterr().out.splitlines()[-1]
    assert train(tmp_path / "parts", "--seeds", "2", steps=40) == 0
    assert train(tmp_path / "parts", "--seeds", "2", "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == whole
    assert whole.startswith("state sha256 ")


def test_epochs_at_the_end_that_collect_nothing_are_evaluated_too(tmp_path):
    epochs = ["--agent.collect_epochs", "6", "--agent.final_epochs", "5"]  # of 16 env steps each
    arguments = ["train", "iris", "--env", "catch", "--image-size", "16", "--out", str(tmp_path / "run"), *FIELDS]
    assert main([*arguments, *epochs, "--eval-every", "32"]) == 0
    lines = [line for line in read_metrics(tmp_path / "run") if "eval/return" in line]
    assert [(line["iteration"], line["step"]) for line in lines if line["stage"] == "final"] == [(8, 96), (10, 96)]
