"""Runs read from their folders and put together."""

import json

import numpy as np
import pytest

from tests.comparison.fake_runs import write_run
from wmjax.comparison import statistics, summary
from wmjax.comparison.references import reference
from wmjax.comparison.results import at, equal_place, first_above, group_runs, read_run
from wmjax.types import UsageError

CURVE = [(100, -0.5), (500, 0.0), (1000, 0.9)]


def test_runs_of_one_seed_and_of_several_in_one_program_are_read_alike(tmp_path):
    one = [write_run(tmp_path / f"one-{seed}", "iris", CURVE, 0.5 + seed / 10, seed=seed) for seed in range(3)]
    many = write_run(tmp_path / "many", "iris", CURVE, [0.5, 0.6, 0.7])
    for folders in (one, [many]):
        (group,) = group_runs(folders)
        assert (group.label, [run.seed for run in group.runs]) == ("iris", [0, 1, 2])
        np.testing.assert_allclose(group.scores[:, 0], [0.5, 0.6, 0.7])
        assert summary.score(group.scores[:, 0].tolist())["iqm"] == pytest.approx(0.6)


def test_runs_are_put_together_by_what_was_trained(tmp_path):
    runs = [
        write_run(tmp_path / "a", "dreamer_v3", CURVE, 1.0),
        write_run(tmp_path / "b", "dreamer_v3", CURVE, 0.0, unimix=0.0),
        write_run(tmp_path / "c", "dreamer_v3", CURVE, 1.0, seed=1),
        write_run(tmp_path / "d", "dreamer_v3", CURVE, 1.0, env="pendulum"),
        write_run(tmp_path / "e", "dreamer_v3", [*CURVE, (2000, 1.0)], 1.0, steps=2000),
        write_run(tmp_path / "f", "iris", CURVE, 1.0),
    ]
    found = {(group.env, group.label): len(group.runs) for group in group_runs(runs)}
    assert found == {
        ("catch", "dreamer_v3 steps=1000"): 2,
        ("catch", "dreamer_v3 unimix=0.0 steps=1000"): 1,
        ("pendulum", "dreamer_v3"): 1,
        ("catch", "dreamer_v3 steps=2000"): 1,
        ("catch", "iris"): 1,
    }


def test_runs_on_fixed_data_are_not_seeds_of_those_that_collect(tmp_path):
    runs = [write_run(tmp_path / str(seed), "dreamer_v3", CURVE, 1.0, seed=seed) for seed in range(3)]
    for path, fingerprint in zip(runs[1:], "ab", strict=True):
        said = json.loads((path / "config.json").read_text())
        data = {"path": f"/data/{fingerprint}", "fingerprint": fingerprint, "spec": {}}
        (path / "config.json").write_text(json.dumps(said | {"data": data}))
    found = [group.label for group in group_runs(runs)]
    assert found == ["dreamer_v3 collecting", "dreamer_v3 data=a", "dreamer_v3 data=b"]


def test_a_seed_that_is_there_twice_is_refused_by_both_folders(tmp_path):
    runs = [write_run(tmp_path / name, "iris", CURVE, 1.0) for name in ("a", "b")]
    with pytest.raises(UsageError, match=r"seed 0 of iris is in '.*/a' and '.*/b'"):
        group_runs(runs)
    with pytest.raises(UsageError, match="not a run folder"):
        group_runs([tmp_path])


def test_the_end_is_the_evaluation_of_the_last_step_with_the_runs_own_actions_and_seed(tmp_path):
    folder = write_run(tmp_path / "a", "iris", CURVE, 0.25)
    (path,) = (folder / "evals").iterdir()
    for name, change in (
        ("step-1000-latest-catch-sample-seed-7-4-episodes.json", {"seed": 7}),
        ("step-1000-latest-x-sample-seed-0-4-episodes.json", {"env": "x"}),
        ("step-1000-latest-catch-0a-sample-seed-0-9-episodes.json", {"env_args": {"flicker": 0.5}, "episodes": 9}),
        ("step-1000-latest-catch-mode-seed-0-9-episodes.json", {"action": "mode", "episodes": 9}),
        ("step-1000-latest-catch-sample-seed-0-9-episodes-policy.json", {"policy": "cem", "episodes": 9}),
    ):
        (folder / "evals" / name).write_text(json.dumps(json.loads(path.read_text()) | change | {"mean": -9.0}))
    (folder / "evals" / "step-1000-latest-damaged.json").write_text("{")
    (run,) = read_run(folder)
    assert (run.final, run.episodes) == (0.25, 4)
    path.unlink()
    assert read_run(folder)[0].final is None


def test_places_between_evaluations_are_interpolated_and_those_before_the_first_are_none(tmp_path):
    (run,) = read_run(write_run(tmp_path / "a", "iris", CURVE, 1.0))
    assert [at(run, place, over="steps") for place in (99, 100, 300, 1000)] == [None, -0.5, -0.25, 1.0]
    assert at(run, 75.0, over="seconds") == pytest.approx(0.5)
    assert first_above(run, 0.9) == (1000, 100.0) and first_above(run, 1.1) is None


def test_of_evaluations_at_one_step_the_last_counts_over_steps(tmp_path):
    """As while World Models trains on what it has collected."""
    folder = write_run(tmp_path / "a", "world_models", [(1000, -1.0)], 0.5)
    later = json.loads((folder / "metrics.jsonl").read_text()) | {"time": 200.0, "iteration": 2000, "eval/return": 0.3}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    (run,) = read_run(folder)
    assert at(run, 1000, over="steps") == 0.5
    assert at(run, 150.0, over="seconds") == pytest.approx(-0.25)  # the end replaces the periodic one at its time


def test_equal_places_are_the_most_that_all_reached(tmp_path):
    runs = [
        *read_run(write_run(tmp_path / "a", "iris", CURVE, 1.0, seconds=50.0)),
        *read_run(write_run(tmp_path / "b", "dreamer_v3", [*CURVE, (2000, 1.0)], 1.0, steps=2000, seconds=400.0)),
    ]
    assert (equal_place(runs, "steps"), equal_place(runs, "seconds")) == (1000.0, 50.0)


def test_speeds_are_over_the_time_spent_training(tmp_path):
    (run,) = read_run(write_run(tmp_path / "a", "iris", CURVE, 1.0))
    assert run.steps_per_second == pytest.approx(20.0)
    assert run.update_seconds == pytest.approx(0.5)  # 100 updates in 1000 / 20 seconds


def test_numbers_of_an_environment(tmp_path):
    better = write_run(tmp_path / "a", "iris", CURVE, [1.0, 0.8, 0.9])
    worse = write_run(tmp_path / "b", "dreamer_v3", CURVE, [0.0, 0.9], seconds=200.0)
    found = summary.environment("catch", group_runs([better, worse]), reference("catch"))
    first, second = found["groups"]
    assert first["end"]["iqm"] == pytest.approx(0.9) and first["end"]["interval"] == pytest.approx([0.8, 1.0])
    assert second["end"]["interval"] is None and second["too_few"] == statistics.too_few(2)
    assert found["improvement"]["matrix"][0][1] == {"probability": pytest.approx(4.5 / 6), "interval": None}
    assert (first["reached"], second["reached"]) == (2, 1)
    assert found["equal_seconds"] == 100.0 and second["at_equal_seconds"]["by_seed"] == [0.0, 0.0]
    assert found["profiles"]["groups"]["iris"]["share"][0] == 1.0
    assert json.loads(json.dumps(found)) == found


def test_a_time_to_threshold_is_of_at_least_half_of_the_seeds(tmp_path):
    few = write_run(tmp_path / "a", "iris", [(100, 0.0), (1000, 0.5)], [1.0, 0.0, 0.0])
    most = write_run(tmp_path / "b", "dreamer_v2", [(100, 0.0), (1000, 0.5)], [1.0, 1.0, 0.0])
    first, second = summary.environment("catch", group_runs([few, most]), reference("catch"))["groups"]
    assert (first["reached"], first["threshold_steps"]) == (1, None)
    assert (second["reached"], second["threshold_steps"], second["threshold_seconds"]) == (2, 1000.0, 100.0)
