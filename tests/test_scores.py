"""What evaluations come to, and how they are kept beside each other."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wmjax.run import Run
from wmjax.scores import keep, record, summarize, summarize_seeds

ABOUT = dict(env="catch", env_args={}, action="sample", seed=0, step=60, which="latest", max_steps=None, version="1")


def kept(folder):
    return sorted(path.name for path in (folder / "evals").iterdir())


def test_scores_of_numbers_that_can_be_checked_by_hand():
    scores = summarize([7.0, 0.0, 100.0, 3.0, 4.0, 5.0, 6.0, -50.0])
    assert scores.mean == pytest.approx(9.375)
    assert scores.iqm == pytest.approx((3 + 4 + 5 + 6) / 4)  # without -50, 0, 7 and 100
    assert scores.ci95[0] < scores.iqm < scores.ci95[1]
    assert summarize([2.0, 2.0]).ci95 == (2.0, 2.0)
    assert summarize(np.tile([0.0, 1.0], 500)).ci95[1] - scores.iqm < 1  # narrows with more episodes


def test_the_bootstrap_does_not_depend_on_how_much_it_draws_at_once(monkeypatch):
    returns = np.random.default_rng(1).normal(size=37)
    whole = summarize(returns).ci95
    monkeypatch.setattr("wmjax.scores.BLOCK", 1000)
    assert summarize(returns).ci95 == whole


def test_episodes_that_were_cut_are_counted_and_said_for_each_seed_and_all():
    one = [1.0, 2.0, 3.0], [10, 4, 10], [True, False, True]
    scores = summarize_seeds({3: one, 4: ([5.0], [2], [False])})
    assert (scores.cut, scores.lengths, scores.seeds[3].cut, scores.seeds[4].cut) == (2, [10, 4, 10, 2], 2, 0)
    assert scores.cut_line() == "2 of 4 episodes were cut after 10 steps"
    assert scores.seeds[4].cut_line() is None
    assert summarize([1.0], [12_000], [True]).cut_line() == "1 of 1 episodes were cut after 12,000 steps"


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_return_that_is_not_finite_is_not_hidden_and_json_stays_json(lost):
    scores = summarize([1.0, lost, 1.0, 1.0, 1.0], [1] * 5, [False] * 5)  # the IQM alone would drop it
    assert all(math.isnan(x) for x in (scores.mean, scores.std, scores.iqm, *scores.ci95)) and scores.episodes == 5
    found = json.loads(json.dumps(record(scores, **ABOUT | dict(env="atari:Pong")), allow_nan=False))
    assert (found["mean"], found["ci95"], found["returns"]) == (None, [None, None], [1.0, None, 1.0, 1.0, 1.0])
    pooled = summarize_seeds({0: ([1.0], [1], [False]), 1: ([lost], [1], [False])}).to_json()
    assert (pooled["mean"], pooled["seeds"]["0"]["mean"], pooled["seeds"]["1"]["mean"]) == (None, 1.0, None)


def test_scores_are_shown_in_one_line():
    scores = summarize_seeds({0: (np.zeros(100), [4] * 100, [True] * 100), 1: (np.ones(100), [4] * 100, [False] * 100)})
    assert repr(scores).startswith("Scores(mean=0.5, std=0.5, iqm=0.5, ci95=(")
    assert repr(scores).endswith("episodes=200, cut=100, seeds=[0, 1])") and "\n" not in repr(scores)


def test_evaluations_are_kept_beside_each_other_and_the_newest_once_more(tmp_path):
    scores = summarize([1.0, 0.0], [3, 3], [False, True])
    other = [
        dict(step=61), dict(which="best"), dict(action="mode"), dict(seed=1), dict(env="gym:Walk-v0"),
        dict(env="gym-Walk-v0"), dict(env="gym/Walk-v0"), dict(env="x" * 70), dict(env="x" * 71),
        dict(env_args={"slippery": True}), dict(env_args={"slippery": False}), dict(max_steps=10), dict(env=None),
    ]  # fmt: skip
    for change in [{}, *other]:
        written = keep({tmp_path: record(scores, **ABOUT | change)})
        assert written == [tmp_path / "evals" / written[0].name, tmp_path / "eval.json"]
        assert written[0].read_text() == written[1].read_text()
    keep({tmp_path: record(summarize([1.0]), **ABOUT)})
    assert len(kept(tmp_path)) == len(other) + 2
    assert "step-60-latest-catch-sample-seed-0-2-episodes.json" in kept(tmp_path)
    assert max(map(len, kept(tmp_path))) < 160
    before = kept(tmp_path)
    keep({tmp_path: record(summarize([5.0, 5.0]), **ABOUT)})
    assert kept(tmp_path) == before and json.loads((tmp_path / "eval.json").read_text())["mean"] == 5
    found = json.loads((tmp_path / "evals" / "step-60-latest-catch-sample-seed-0-2-episodes.json").read_text())
    assert found["mean"] == 5 and found.items() >= ABOUT.items()
    assert json.loads((tmp_path / "evals" / "step-60-best-catch-sample-seed-0-2-episodes.json").read_text())["cut"] == 1


def test_evaluations_of_seeds_are_kept_in_their_folders_and_nothing_is_written_behind_a_link(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "seed-0", elsewhere):
        folder.mkdir(parents=True)
    one = record(summarize([1.0]), **ABOUT)
    assert {path.parent.parent for path in keep({run: one, run / "seed-0": one})[:1]} == {run}
    assert kept(run / "seed-0") == kept(run) and (run / "seed-0" / "eval.json").exists()
    (run / "seed-1").symlink_to(elsewhere)
    (run / "seed-2").mkdir()
    (run / "seed-2" / "evals").symlink_to(elsewhere)
    for name in ("seed-1", "seed-2"):
        with pytest.raises(OSError, match="link"):
            keep({run: one, run / name: one})
    assert not list(elsewhere.iterdir())


def test_a_record_says_the_checkpoint_the_action_that_was_taken_and_the_arguments_of_the_environment():
    config = SimpleNamespace(eval_action="mode")
    run = Run(
        Path("run"), {"env": "gym:Lake-v1", "env_args": {"slippery": True}, "seed": 7}, config, *[None] * 3, step=5
    )
    said = lambda *args, **how: {
        name: run.records(summarize([1.0]), *args, **how)[run.path][name]
        for name in ("env", "env_args", "action", "seed", "step", "which", "max_steps")
    }
    own = {"env": "gym:Lake-v1", "env_args": {"slippery": True}, "action": "mode", "seed": 7, "step": 5}
    assert said() == own | {"which": "latest", "max_steps": None}
    assert said(3, action="sample", max_steps=9) == own | {
        "action": "sample", "seed": 3, "which": "latest", "max_steps": 9,
    }  # fmt: skip
    other = said(3, env="gym:Pond-v1", env_args={"deep": 2})
    assert (other["env"], other["env_args"]) == ("gym:Pond-v1", {"deep": 2})
