import json
import os

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.loops.fakes import counter_env, fake_agent
from wmjax import figures
from wmjax.types import Box, UsageError


def windows():
    """Two windows of one pixel: context 1, horizon 2; the second window's episode ends after one step."""
    truth = np.array([[0, 51], [102, 51], [204, 255]], np.uint8)
    model = np.array([[0, 51], [102, 102], [153, 0]], np.float32)
    valid = np.array([[True, True], [True, False]])
    pixel = lambda x: {"image": x[..., None, None, None]}
    return figures.OpenLoop(pixel(truth), pixel(model), valid)


def test_errors_by_horizon_count_only_what_belongs_to_the_episode():
    errors = figures.horizon_errors(windows(), 1)
    assert errors["count"] == [2, 1]
    np.testing.assert_allclose(errors["image"]["model"], [(0 + 0.2**2) / 2, 0.2**2], rtol=1e-5)
    np.testing.assert_allclose(errors["image"]["repeat_last"], [(0.4**2 + 0) / 2, 0.8**2], rtol=1e-5)
    mean = (0 + 0.2 + 0.4 + 0.2 + 0.8 + 1.0) / 6
    np.testing.assert_allclose(
        errors["image"]["mean_frame"], [((0.4 - mean) ** 2 + (0.2 - mean) ** 2) / 2, (0.8 - mean) ** 2], rtol=1e-5
    )


def test_horizons_that_no_window_reaches_are_null():
    result = windows()._replace(valid=np.array([[True, False], [False, False]]))
    errors = figures.horizon_errors(result, 1)
    assert errors["count"] == [1, 0]
    assert errors["image"]["model"][1] is None


def test_a_dream_has_a_frame_for_each_step_and_rows_truth_model_error(tmp_path):
    size, steps = 16, 4
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(0, 256, (steps, 3, 1, 1, 1)), size, 2).repeat(size, 3).astype(np.uint8)
    model = np.zeros(truth.shape, np.float32)
    result = figures.OpenLoop({"image": truth}, {"image": model}, np.ones((2, 3), bool))
    figures.write_dream_gif(tmp_path / "dream.gif", result, 2, "image")
    frames = iio.imread(tmp_path / "dream.gif")[..., :3].astype(int)
    assert len(frames) == steps
    high = (frames.shape[1] - 4) // 3
    tops = frames[:, high // 2 :: high][:, :3, high // 2]  # a pixel of the first window in each row
    np.testing.assert_allclose(tops[:, 0], np.repeat(truth[:, 0, 0, 0], 3, -1), atol=8)
    np.testing.assert_allclose(tops[:, 1], 0, atol=8)
    np.testing.assert_allclose(tops[:, 2], tops[:, 0], atol=8)


def test_reconstructions_are_drawn_below_their_originals(tmp_path):
    truth = np.zeros((3, 10, 64, 64, 3), np.uint8)
    model = np.zeros(truth.shape, np.float32)
    truth[1], model[1] = np.arange(10)[:, None, None, None] * 20, 255 - np.arange(10)[:, None, None, None] * 20
    result = figures.OpenLoop({"image": truth}, {"image": model}, np.ones((1, 10), bool))
    figures.write_reconstructions(tmp_path / "grid.png", result, 2, "image")
    grid = iio.imread(tmp_path / "grid.png").astype(int)
    cell, pair = 64 + figures.GAP, 2 * 64 + 4 * figures.GAP  # eight windows above, two below
    for i in range(10):
        x, y = 32 + cell * (i % 8), 32 + pair * (i // 8)
        assert grid[y, x].tolist() == 3 * [20 * i] and grid[y + cell, x].tolist() == 3 * [255 - 20 * i]
    errors = figures.reconstruction_errors(result, 2)
    assert errors["image"] == pytest.approx(np.mean([((255 - 40 * i) / 255) ** 2 for i in range(10)]), rel=1e-5)


def write_search(folder, generations, shift=0.0):
    folder.mkdir()
    names = {"fitness_best": 2.0, "fitness_mean": 0.0, "mean_return": 1.0, "sigma": 9.0}
    lines = [{"step": 5, "episode/return": 1.0}] + [
        {"step": 5} | {f"controller/{n}": v + g + shift for n, v in names.items()} | {"controller/generation": g}
        for g in generations
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_fitness_curve_has_the_best_the_mean_and_the_distributions_mean(tmp_path, monkeypatch):
    one, two = write_search(tmp_path / "a", (10, 20, 30)), write_search(tmp_path / "b", (10, 20), shift=4.0)
    assert figures.fitness_curves(one) == {
        "fitness_best": ([10, 20, 30], [12, 22, 32]),
        "fitness_mean": ([10, 20, 30], [10, 20, 30]),
        "mean_return": ([10, 20, 30], [11, 21, 31]),
    }
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, axes, path: drawn.extend(axes.lines))
    figures.plot_fitness_curves(tmp_path / "p.png", [("x", one), ("x", two)], points=2)
    monkeypatch.undo()
    assert [line.get_ydata().tolist() for line in drawn] == [[14, 24], [12, 22], [13, 23]]
    assert all(line.get_xdata().tolist() == [10, 20] for line in drawn)
    figures.plot_fitness_curves(tmp_path / "p.png", [("x", one), ("y", two)])
    assert iio.imread(tmp_path / "p.png").ndim == 3
    plain = write_run(tmp_path / "c", [0.0])
    assert figures.fitness_curves(plain) == {}
    with pytest.raises(UsageError, match="no generation"):
        figures.plot_fitness_curves(tmp_path / "q.png", [("x", one), ("x", plain)])


def write_run(folder, returns):
    folder.mkdir()
    lines = [{"step": 10 * i, "episode/return": value} for i, value in enumerate(returns)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_learning_curve_is_the_mean_over_seeds_with_its_interval(tmp_path):
    folders = [write_run(tmp_path / "a", [0.0, 2.0, None, 4.0]), write_run(tmp_path / "b", [2.0, 4.0, 4.0])]
    curve = figures.learning_curve(folders, points=3)
    np.testing.assert_allclose(curve.steps, [0, 10, 20])  # to where the shorter run ends
    np.testing.assert_allclose(curve.mean, [1.0, 3.0, 3.5])
    np.testing.assert_allclose(curve.high - curve.mean, 1.96 * np.array([1.0, 1.0, 0.5]))
    assert curve.runs == 2


def test_a_plot_is_a_picture_and_an_empty_run_is_refused(tmp_path):
    folders = [write_run(tmp_path / "a", [0.0, 1.0]), write_run(tmp_path / "b", [None])]
    figures.plot_learning_curves(tmp_path / "p.png", [("x", folders[0])])
    assert iio.imread(tmp_path / "p.png").ndim == 3
    with pytest.raises(UsageError, match="no finished episodes"):
        figures.plot_learning_curves(tmp_path / "q.png", [("x", folders[1])])


@pytest.mark.parametrize(
    ("name", "written"),
    [("p.png", "p.png"), ("p", "p.png"), ("p.", "p.png"), ("p.PDF", "p.PDF"), (".p.svg", ".p.svg"), ("a b", "a b.png")],
)
def test_a_chart_says_where_it_was_written(tmp_path, name, written):
    run = write_run(tmp_path / "run", [0.0, 1.0])
    path = figures.plot_learning_curves(tmp_path / name, [("half a $formula_{", run)])
    assert path == tmp_path / written and path.stat().st_size > 1000
    assert {x.name for x in tmp_path.iterdir()} == {"run", written}
    if written.endswith("png"):
        assert iio.imread(path).ndim == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is a folder"), ("pipe", "not a regular file"), ("pipe.png", "not a regular file"),
        ("/dev/full", "not a regular file"), ("/dev/null", "not a regular file"),
        ("p.nonsense", "no format; valid are .*png"), (".png", "no name before its suffix"),
        ("..", "is a folder"), ("...", "no name before its suffix"), ("folder.png", "is a folder"),
        ("p.pgf", r"needs TeX .*\.pdf"), ("absent/p.png", "'.*absent' does not exist"),
        ("run/metrics.jsonl/p.png", "does not exist"), ("p\0.png", "not valid"), ("\udcff.png", "not valid"),
        ("p" * 300 + ".png", "not valid: File name too long"), ("p/" * 3000, "not valid: File name too long"),
    ],
)  # fmt: skip
def test_a_chart_that_cannot_be_written_is_refused_in_one_line_and_nothing_is_changed(
    tmp_path, monkeypatch, name, words
):
    monkeypatch.setattr("shutil.which", lambda name: None)
    run = write_run(tmp_path / "run", [0.0, 1.0])
    (tmp_path / "folder.png").mkdir()
    for pipe in ("pipe", "pipe.png"):
        os.mkfifo(tmp_path / pipe)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"^out: .*{words}") as caught:
        figures.plot_learning_curves(f"{tmp_path}/{name}" if not name.startswith("/") else name, [("x", run)])
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_a_video_shows_one_episode_from_its_first_frame_to_its_last(tmp_path):
    env = counter_env(length=4, size=16)
    env = env._replace(spec=env.spec._replace(obs=env.spec.obs | {"image": Box(0, 255, (16, 16, 3), "uint8")}))
    (path,) = figures.write_episode(tmp_path, fake_agent(), env, {}, jax.random.key(0))
    assert path == tmp_path / "episode.gif"
    frames = iio.imread(path)
    assert frames.shape == (5, 64, 64, 3)  # enlarged
    np.testing.assert_array_equal(frames[:, 0, 0, 0], range(5))  # counts to its end, and does not begin again
    with pytest.raises(UsageError, match=r"video: .*vector"):
        figures.write_episode(tmp_path, fake_agent(), counter_env(), {}, jax.random.key(0))


def test_a_window_in_the_middle_of_an_episode_is_predicted_by_a_model_that_saw_its_beginning():
    """A model that only counts: its state is right where it was filtered from the episode's first record on."""
    agent, env = fake_agent(), counter_env(length=30, limit=30)
    count = lambda state, is_first: jnp.where(is_first, 0.0, state + 1)
    model = agent.model._replace(
        init_state=lambda params, batch: jnp.zeros(batch),
        encode=lambda params, obs: obs["vector"],
        observe=lambda params, key, state, prev_action, embed, is_first: count(state, is_first),
        imagine=lambda params, key, state, action: state + 1,
        decode=lambda params, state: {"vector": state[..., None]},
    )
    result = figures.open_loop(agent._replace(model=model), env, {}, jax.random.key(0), context=2, horizon=3)
    begun = result.truth["vector"][0, :, 0]
    assert np.ptp(begun) > 10  # windows from all over the episode
    same = result.valid.all(0)
    np.testing.assert_array_equal(result.model["vector"][:, same], result.truth["vector"][:, same])
