import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.loops.fakes import counter_env, fake_agent
from wmjax import figures
from wmjax.envs import make_env
from wmjax.envs.wrappers import agent_actions
from wmjax.figures import charts, dream, episode, frames, learning
from wmjax.figures import windows as found
from wmjax.types import Box, UsageError


def read(path):
    """Frames of an animation, `[T, H, W, 3]`, or a picture `[H, W, 3]`."""
    with Image.open(path) as image:
        shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    return np.stack(shown) if path.suffix == ".gif" else shown[0]


def drawn(monkeypatch, draw, *arguments, **how):
    """The figure that would be written."""
    with monkeypatch.context() as patch:
        found = []
        patch.setattr(charts, "save", lambda figure, path: found.append(figure) or path)
        draw(*arguments, **how)
    return found[0]


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


def blocks(windows=3, steps=4, size=16):
    """Pictures of one gray each, and a model that expects black."""
    truth = np.random.default_rng(0).integers(0, 256, (steps, windows, 1, 1, 1)).repeat(size, 2).repeat(size, 3)
    truth = truth.astype(np.uint8)
    return figures.OpenLoop({"image": truth}, {"image": np.zeros(truth.shape, np.float32)}, np.ones((2, windows), bool))


def test_a_dream_has_a_frame_for_each_step_and_rows_truth_model_error(tmp_path):
    result = blocks()
    truth = result.truth["image"]
    path, *_ = figures.write_dream_gif(
        tmp_path / "dream.gif", result, 2, "image", "a title"
    )  # and a video, with ffmpeg
    animation = read(path).astype(int)
    assert len(animation) == 4
    top = dream.scale_top(truth[2:] / 255.0)  # of predictions
    for t, frame in enumerate(animation):
        for window in range(3):
            x = dream.MARGIN + window * (frames.PANEL + dream.GAP) + 128
            pixels = [frame[dream.TOP + row * (frames.PANEL + dream.GAP) + 128, x] for row in range(3)]
            gray = truth[t, window, 0, 0, 0]
            np.testing.assert_allclose(pixels[0], [gray] * 3, atol=10)
            np.testing.assert_allclose(pixels[1], 0, atol=10)
            heat = dream._heat_colors()[int(min(gray / 255 / top * 255, 255))]
            np.testing.assert_allclose(pixels[2], heat, atol=20)
        edge = frame[dream.TOP + 128, dream.MARGIN - 2]
        np.testing.assert_allclose(edge, frames.SEEN if t < 2 else frames.PREDICTED, atol=10)


def test_what_is_beyond_the_end_of_an_episode_is_pale(tmp_path):
    result = blocks(windows=1)._replace(valid=np.array([[True], [False]]))
    result = result._replace(truth={"image": np.zeros_like(result.truth["image"])})
    figures.write_dream_gif(tmp_path / "dream.gif", result, 2, "image")
    at = (dream.TOP + 20, dream.MARGIN + 20)
    assert [frame[at].max() < 20 for frame in read(tmp_path / "dream.gif")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("high", "top"), [(0.0, 0.05), (0.04, 0.05), (0.051, 0.06), (0.13, 0.2), (0.5, 0.5), (0.97, 1)]
)
def test_the_scale_of_errors_ends_at_a_round_number(high, top):
    assert dream.scale_top(np.full(10, high)) == pytest.approx(top)


def test_small_pictures_are_at_least_256_pixels_wide_and_their_pixels_stay_squares():
    picture = np.arange(10 * 7 * 3).reshape(10, 7, 3)
    large = frames.enlarged(picture)
    assert large.shape == (370, 259, 3)
    np.testing.assert_array_equal(large[18::37, 18::37], picture)
    assert frames.enlarged(np.zeros((2, 300, 400, 3))).shape == (2, 300, 400, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 9, 12])
def test_pictures_of_any_number_of_channels_are_shown_in_color(channels):
    pixels = np.arange(channels, dtype=np.uint8) * np.ones((2, 2, 1), np.uint8)
    shown = frames.rgb(pixels)[0, 0].tolist()
    assert (
        shown
        == {1: [0] * 3, 2: [1] * 3, 3: [0, 1, 2], 4: [0, 1, 2], 6: [3, 4, 5], 9: [6, 7, 8], 12: [9, 10, 11]}[channels]
    )


def test_a_video_is_written_beside_a_gif_where_ffmpeg_is_there(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nfor last; do :; done\nwc -c > "$last"\n')  # how many bytes of frames it was given
    program.chmod(0o755)
    pictures = [frames.canvas(6, 4)[0] for _ in range(3)]
    pictures[1].putpixel((1, 1), (255, 0, 0))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gif, video = frames.write_animation(tmp_path / "x.gif", pictures, 100, 500)
    assert video.name == "x.mp4" and int(video.read_text()) == 6 * 4 * 3 * 7  # the last frame stays five times as long
    program.write_text("#!/bin/sh\nexit 1\n")
    video.unlink()
    assert frames.write_animation(tmp_path / "x.gif", pictures, 100, 500) == [gif] and not video.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ffmpeg", "x.gif"]


def test_reconstructions_are_drawn_below_their_originals(tmp_path):
    truth = np.zeros((3, 6, 64, 64, 3), np.uint8)
    model = np.zeros(truth.shape, np.float32)
    truth[1], model[1] = np.arange(6)[:, None, None, None] * 20, 255 - np.arange(6)[:, None, None, None] * 20
    result = figures.OpenLoop({"image": truth}, {"image": model}, np.ones((1, 6), bool))
    figures.write_reconstructions(tmp_path / "grid.png", result, 2, "image")
    grid = read(tmp_path / "grid.png").astype(int)
    cell, pair = 256 + dream.GAP, 2 * 256 + 2 * dream.GAP + 24  # four windows above, two below
    for i in range(6):
        x, y = dream.MARGIN + 128 + cell * (i % 4), 66 + 128 + pair * (i // 4)
        assert grid[y, x].tolist() == 3 * [20 * i] and grid[y + 256, x].tolist() == 3 * [255 - 20 * i]
    errors = figures.reconstruction_errors(result, 2)
    assert errors["image"] == pytest.approx(np.mean([((255 - 40 * i) / 255) ** 2 for i in range(6)]), rel=1e-5)


def test_a_strip_has_a_column_for_each_step_of_the_longest_window_and_marks_what_was_seen(tmp_path):
    truth = np.zeros((3 + 20, 2, 32, 32, 3), np.uint8) + 10 * np.arange(23, dtype=np.uint8)[:, None, None, None, None]
    model = np.float32(truth) + 5
    valid = np.ones((20, 2), bool)
    truth[:, 0], valid[4:, 0] = 255, False
    result = figures.OpenLoop({"image": truth}, {"image": model}, valid)
    figures.write_dream_strip(tmp_path / "strip.png", result, 3, "image")
    strip = read(tmp_path / "strip.png").astype(int)
    cell, middle = 96 + dream.GAP, dream.TOP + 48
    columns = [dream.MARGIN + 48 + cell * i for i in range(10)]
    steps = [1, 2, 3, 6, 8, 11, 14, 17, 19, 22]  # two of the context, and eight of the twenty predicted
    assert strip[middle, columns, 0].tolist() == [10 * step for step in steps]
    assert strip[middle + cell, columns, 0].tolist() == [10 * step + 5 for step in steps]
    edges = strip[middle, [dream.MARGIN - 2 + cell * i for i in range(10)]].tolist()
    assert edges == 2 * [list(frames.SEEN)] + 8 * [list(frames.PREDICTED)]


def test_a_picture_is_shown_as_it_is_in_its_file(tmp_path):
    frames.write_png(tmp_path / "x.png", frames.canvas(6, 4)[0])
    assert figures.show(tmp_path / "x.png").data == (tmp_path / "x.png").read_bytes()
    with pytest.raises(UsageError, match=r"none.png' is not a file"):
        figures.show(tmp_path / "none.png")


def test_errors_by_horizon_are_drawn_beside_two_guesses(tmp_path, monkeypatch):
    errors = figures.horizon_errors(windows(), 1)
    (axes,) = drawn(monkeypatch, figures.plot_horizon_errors, tmp_path / "p.png", errors, 1).axes
    shown = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert list(shown.values()) == [errors["image"][kind] for kind in ("model", "repeat_last", "mean_frame")]
    assert "model" in next(iter(shown)) and axes.get_legend() is None  # the legend is of the figure, off the data
    gone = errors | {"count": [2, 0], "image": {kind: [values[0], None] for kind, values in errors["image"].items()}}
    assert figures.plot_horizon_errors(tmp_path / "p.png", gone, 1).stat().st_size > 1000


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
    figure = drawn(monkeypatch, figures.plot_fitness_curves, tmp_path / "p.png", [("x", one), ("x", two)], points=2)
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[14, 24], [12, 22], [13, 23]]
    assert all(line.get_xdata().tolist() == [10, 20] for line in axes.lines)
    figures.plot_fitness_curves(tmp_path / "p.png", [("x", one), ("y", two)])
    assert read(tmp_path / "p.png").ndim == 3
    plain = write_run(tmp_path / "c", [0.0])
    assert figures.fitness_curves(plain) == {}
    with pytest.raises(UsageError, match="no generation"):
        figures.plot_fitness_curves(tmp_path / "q.png", [("x", one), ("x", plain)])


def write_run(folder, returns, evaluations=()):
    folder.mkdir()
    lines = [{"step": 10 * i, "episode/return": value} for i, value in enumerate(returns)]
    lines += [{"step": step, "eval/return": value} for step, value in evaluations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_learning_curve_is_the_mean_over_seeds_with_its_interval(tmp_path):
    lines = [([0, 10, 30], [0.0, 2.0, 4.0]), ([0, 10, 20], [2.0, 4.0, 4.0])]
    curve = learning.over_runs(lines, points=3)
    np.testing.assert_allclose(curve.steps, [0, 10, 20])  # to where the shorter run ends
    np.testing.assert_allclose(curve.mean, [1.0, 3.0, 3.5])
    assert curve.runs == 2 and curve.interval is None  # too few to say
    curve = learning.over_runs([*lines, ([0, 20], [1.0, 6.0])], points=2)
    low, high = curve.interval
    np.testing.assert_allclose(curve.mean, [1.0, 13 / 3])
    assert (low < curve.mean).all() and (curve.mean < high).all() and low[0] >= 0 and high[1] <= 6


def test_training_returns_are_smoothed_and_of_evaluations_at_one_step_the_last_counts(tmp_path):
    run = write_run(tmp_path / "a", [0.0, None, 3.0, *[3.0] * 97], [(5, 1.0), (5, 2.0), (7, None), (9, 4.0)])
    assert learning.evaluation_line(run) == ([5, 9], [2.0, 4.0])
    steps, returns = learning.training_line(run)
    assert steps == [0, *range(20, 1000, 10)] and returns[0] == pytest.approx(2.0)  # of the first three
    assert returns[1] == pytest.approx(9 / 4) and returns[3:] == pytest.approx([3.0] * 96)


def test_a_plot_has_a_panel_for_each_environment_with_random_play_and_what_counts_as_learned(tmp_path, monkeypatch):
    write = lambda name, shift: write_run(tmp_path / name, [0.0, 1.0, 2.0], [(0, shift), (20, 1 + shift)])
    runs = [("v3", write(f"a{i}", 0.1 * i), "catch") for i in range(3)] + [("v1", write("b", 0.5), "pendulum")]
    figure = drawn(
        monkeypatch, figures.plot_learning_curves, tmp_path / "p.png", [*runs, runs[0], ("v3", *runs[3][1:])]
    )
    catch, pendulum = figure.axes
    assert (catch.get_title(), pendulum.get_title()) == ("catch", "pendulum")
    labels = {line.get_label(): line for line in catch.lines if not line.get_label().startswith("_")}
    assert list(labels) == ["v3 (3 seeds)"]  # one of which was named twice
    np.testing.assert_allclose(labels["v3 (3 seeds)"].get_ydata()[[0, -1]], [0.1, 1.1])
    assert len(catch.collections) == 1  # the interval
    pale = [line for line in catch.lines if line.get_alpha() == 0.35]
    assert len(pale) == 1 and pale[0].get_ydata()[-1] == 2.0  # training
    level = lambda axes: {text.get_text() for text in axes.texts}
    assert level(catch) == {"random\n-0.6", "threshold\n0.9"} and level(pendulum) == {
        "random\n-1200",
        "threshold\n-250",
    }
    assert [line.get_color() for line in pendulum.lines if line.get_label() == "v3 (1 seed)"] == ["C0"]  # as in catch
    assert all(axes.get_legend() is None for axes in figure.axes) and len(figure.legends) == 1


def test_a_plot_is_a_picture_and_an_empty_run_is_refused(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / "a", [0.0, 1.0]), write_run(tmp_path / "b", [None])]
    figures.plot_learning_curves(tmp_path / "p.png", [("x", folders[0])])
    assert read(tmp_path / "p.png").ndim == 3
    (axes,) = drawn(monkeypatch, figures.plot_learning_curves, tmp_path / "p.png", [("x", folders[0])]).axes
    assert [line.get_label() for line in axes.lines] == ["x (1 seed)"]  # of training, where nothing was evaluated
    with pytest.raises(UsageError, match=r"'.*b' has no evaluations and no finished episodes"):
        figures.plot_learning_curves(tmp_path / "q.png", [("x", folders[0]), ("x", folders[1])])


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
        assert read(path).ndim == 3


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
    counting = env = counter_env(length=4, size=16)
    env = env._replace(spec=env.spec._replace(obs=env.spec.obs | {"image": Box(0, 255, (16, 16, 3), "uint8")}))
    brighter = lambda step: step._replace(obs=step.obs | {"image": 50 * step.obs["image"]})
    seen = lambda pair: (pair[0], brighter(pair[1]))
    env = env._replace(reset=lambda key: seen(counting.reset(key)), step=lambda *args: seen(counting.step(*args)))
    path, *_ = figures.write_episode(tmp_path, fake_agent(), env, {}, jax.random.key(0))
    assert path == tmp_path / "episode.gif"
    shown = read(path)
    assert len(shown) == 5 and shown.shape[2] >= 256  # enlarged
    np.testing.assert_allclose(
        shown[:, 100, 100, 0], range(0, 250, 50), atol=5
    )  # counts to its end, and does not begin again
    with pytest.raises(UsageError, match=r"video: .*vector"):
        figures.write_episode(tmp_path, fake_agent(), counter_env(), {}, jax.random.key(0))


def test_a_video_of_an_environment_of_vectors_shows_what_it_renders_and_the_agent_does_not_see_that(tmp_path):
    env, asked = agent_actions(make_env("gym:tests.envs.gymnasium_envs:Drawn")), []

    def act(params, key, carry, step, *, explore):
        asked.append(sorted(step.obs))
        return carry, jax.nn.one_hot(jnp.ones(1, int), 3), ()

    agent = fake_agent()._replace(act=act, act_carry=lambda params, count: ())
    path, *_ = figures.write_episode(tmp_path, agent, env, {}, jax.random.key(0), "a title")
    assert {name for names in asked for name in names} == {"vector"}
    shown = read(path)
    np.testing.assert_allclose(shown[:, episode.TOP + 2, 200, 0], np.arange(5) * 50, atol=5)


@pytest.mark.parametrize(
    ("given", "fits"),
    [((None, None), (2, 8)), ((4, None), (4, 6)), ((None, 7), (3, 7)), ((20, None), (20, 1)), ((3, 30), (3, 30))],
)
def test_windows_fit_the_episodes(given, fits):
    is_first = np.zeros((40, 3), bool)
    is_first[::10] = True  # ten records
    assert found.fitting(jnp.asarray(is_first), *given) == fits
    assert found.fitting(jnp.zeros((40, 3), bool), None, None) == (5, 15)
    assert found.fitting(jnp.zeros((99, 3), bool), 30, None) == (30, 15)  # there is room for both
    assert found.fitting(jnp.zeros((99, 3), bool), None, 30) == (5, 30)
    assert found.fitting(jnp.ones((40, 3), bool), None, None) == (1, 1)


def counting_agent():
    """With a model that only counts: its state is right where it was filtered from the episode's first record on."""
    agent = fake_agent()
    count = lambda state, is_first: jnp.where(is_first, 0.0, state + 1)
    model = agent.model._replace(
        init_state=lambda params, batch: jnp.zeros(batch),
        encode=lambda params, obs: obs["vector"],
        observe=lambda params, key, state, prev_action, embed, is_first: count(state, is_first),
        imagine=lambda params, key, state, action: state + 1,
        decode=lambda params, state: {"vector": state[..., None]},
    )
    return agent._replace(model=model)


def test_windows_lie_within_one_episode_where_one_is_long_enough():
    agent, env = counting_agent(), counter_env(length=7, limit=7)  # eight records
    result = figures.open_loop(agent, env, {}, jax.random.key(0), context=2, horizon=3)
    begun = result.truth["vector"][0, :, 0]
    assert result.valid.all() and set(begun.tolist()) == {0, 1, 2, 3}
    assert (result.context, result.horizon) == (2, 3)
    np.testing.assert_array_equal(result.truth["vector"][..., 0], begun + np.arange(5)[:, None])
    long = figures.open_loop(agent, env, {}, jax.random.key(0), context=2, horizon=9)
    assert not long.valid[-1].any() and long.valid[0].any() and len(set(long.truth["vector"][0, :, 0])) > 4


def test_a_window_in_the_middle_of_an_episode_is_predicted_by_a_model_that_saw_its_beginning():
    env = counter_env(length=30, limit=30)
    result = figures.open_loop(counting_agent(), env, {}, jax.random.key(0), context=2, horizon=3)
    begun = result.truth["vector"][0, :, 0]
    assert np.ptp(begun) > 10  # windows from all over the episode
    same = result.valid.all(0)
    np.testing.assert_array_equal(result.model["vector"][:, same], result.truth["vector"][:, same])
