"""The suites, as workers make them; each is skipped where its extra is not installed."""

import os
import subprocess
import sys

import numpy as np
import pytest

from wmjax.envs import make_env
from wmjax.envs.atari_scores import SCORES, human_normalized
from wmjax.envs.wrappers import agent_actions
from wmjax.suites import SUITES, SuiteError, suite, worker


def play(env, steps, choose, seed=0):
    """Steps of one episode after another: rewards, flags, and the seen pictures' sums."""
    rows, over = [], True
    for _ in range(steps):
        if over:
            obs, reward, terminated, truncated = env.reset(seed=seed if not rows else None)[0], 0.0, False, False
        else:
            obs, reward, terminated, truncated, _ = env.step(choose())
        over = terminated or truncated
        rows.append((reward, terminated, truncated, env.observe() if obs is None else obs))
    return rows


@pytest.fixture
def atari():
    pytest.importorskip("ale_py", reason="needs the extra `atari`")
    return lambda name, game, training=True: suite(name).make(suite(name).find(game, name), training)


def test_the_two_protocols_of_atari_differ_as_they_should(atari):
    small, large = (worker.describe(atari(name, "Pong"), None, 1) for name in ("atari", "atari200m"))
    assert small["obs"] == [{"name": "image", "dtype": "uint8", "shape": [64, 64, 3], "low": 0, "high": 255}]
    assert large["obs"][0]["shape"] == [96, 96, 1]
    assert (small["action"]["n"], large["action"]["n"]) == (6, 18)
    assert small["frames"] == large["frames"] == 4 and small["max_episode_steps"] == 27_000


def test_a_lost_life_ends_an_episode_of_atari_in_training_only(atari):
    rng = np.random.default_rng(0)
    ends = {}
    for training in (True, False):
        env = atari("atari", "Breakout", training)
        rows = play(env, 300, lambda env=env: int(rng.integers(env.action_space.n)))
        ends[training] = sum(row[1] for row in rows)
        assert not any(row[2] for row in rows)
    assert ends[True] > 3 * ends[False] > 0


def test_the_larger_protocol_of_atari_repeats_actions_by_chance_and_plays_on_when_a_life_is_lost(atari):
    chances = {name: atari(name, "Pong")._ale.getFloat("repeat_action_probability") for name in ("atari", "atari200m")}
    assert chances == {"atari": 0.0, "atari200m": 0.25}
    rng = np.random.default_rng(0)
    env = atari("atari200m", "Breakout", True)
    env.reset(seed=0)
    lives, terminated = [env._ale.lives()], False
    while not terminated:
        terminated = env.step(int(rng.integers(env.action_space.n)))[2]
        lives.append(env._ale.lives())
    assert (lives[0], lives[-1], len(set(lives))) == (5, 0, 6)


@pytest.mark.parametrize("name", ["atari", "atari200m"])
def test_a_game_of_atari_begins_after_one_to_thirty_frames_without_action(atari, name):
    env, frames = atari(name, "Pong"), set()
    for seed in range(80):
        env.reset(seed=seed)
        frames.add(env._ale.getEpisodeFrameNumber())
    assert min(frames) == 1 and 25 < max(frames) <= 30


def test_after_a_lost_life_one_frame_without_action_passes(atari):
    env, over, rng = atari("atari", "Breakout"), False, np.random.default_rng(0)
    env.reset(seed=0)
    while not over:
        over = env.step(int(rng.integers(env.action_space.n)))[2]
    before, lives = env._ale.getEpisodeFrameNumber(), env._ale.lives()
    env.reset()
    assert (env._ale.getEpisodeFrameNumber(), env._ale.lives()) == (before + 1, lives) == (before + 1, 4)


@pytest.mark.parametrize("name, training, limit", [("atari", True, 20_000), ("atari", False, 108_000)])
def test_episodes_of_atari_are_cut_later_in_evaluation(atari, name, training, limit):
    env = atari(name, "Pong", training)
    env.reset(seed=0)
    env._frame = limit - 8
    ends = [env.step(0)[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]


@pytest.mark.parametrize("name", ["atari", "atari200m"])
def test_what_is_seen_of_atari_is_the_maximum_of_the_last_two_of_four_frames(atari, name):
    from PIL import Image

    env, seen = atari(name, "Pong"), []
    reader, _ = worker.readers(env, None)
    env.reset(seed=3)
    ale = env._ale

    class Watched:
        """The emulator, whose screens are kept."""

        def __getattr__(self, name):
            return getattr(ale, name)

        def act(self, action):
            reward = ale.act(action)
            seen.append(ale.getScreenRGB() if name == "atari" else ale.getScreenGrayscale())
            return reward

    env._ale = Watched()
    for _ in range(30):
        obs = reader.read(env.step(2)[0])["image"]
    assert len(seen) == 120
    assert any((np.maximum(seen[i], seen[i - 1]) != seen[i]).any() for i in range(3, 120, 4))
    resized = lambda x, size, how: np.asarray(Image.fromarray(x).resize((size, size), how))
    if name == "atari":  # resized before they are merged
        wanted = np.maximum(*(resized(x, 64, Image.Resampling.BILINEAR) for x in seen[-2:]))
    else:
        wanted = resized(np.maximum(*seen[-2:]), 96, Image.Resampling.BOX)[..., None]
    np.testing.assert_array_equal(obs, wanted)
    assert worker.describe(atari(name, "Pong"), 48, 1)["obs"][0]["shape"][:2] == [48, 48]


def test_the_picture_of_dreamer_v3_is_resized_from_rgb_and_then_gray(atari):
    from PIL import Image

    args = dict(resize="bilinear", gray_last=True)
    env = suite("atari200m").make(suite("atari200m").find("Pong", "atari200m", args), True)
    reader, _ = worker.readers(env, None)
    env.reset(seed=3)
    merged = [env._screen()]
    obs = reader.read(env._picture(merged[0]))["image"]
    small = np.asarray(Image.fromarray(merged[0]).resize((96, 96), Image.Resampling.BILINEAR))
    wanted = np.tensordot(small, [0.299, 0.587, 1 - (0.299 + 0.587)], (-1, 0)).astype(np.uint8)[..., None]
    assert merged[0].shape == (210, 160, 3) and obs.shape == (96, 96, 1)
    np.testing.assert_array_equal(obs, wanted)
    assert worker.describe(env, 48, 1)["obs"][0]["shape"] == [48, 48, 1]


def test_arguments_change_how_a_game_of_atari_is_played(atari):
    args = dict(life_loss=False, limit=400, sticky=0.5, all_actions=True, min_noops=0, max_noops=0, gray=True)
    env = suite("atari").make(suite("atari").find("Breakout", "atari", args), True)
    env.reset(seed=0)
    assert env._ale.getEpisodeFrameNumber() == 0 and env.action_space.n == 18
    assert env._ale.getFloat("repeat_action_probability") == 0.5
    assert worker.describe(env, None, 1)["obs"][0]["shape"] == [64, 64, 1]
    rows = play(env, 101, lambda: 1)
    assert [i for i, row in enumerate(rows) if row[2]] == [100] and not any(row[1] for row in rows)


def test_a_seed_says_how_an_atari_game_begins(atari):
    screens = {}
    for seed in (0, 0, 1, 2):
        env = atari("atari", "Pong")
        rows = play(env, 20, lambda: 0, seed)
        screens.setdefault(seed, []).append(np.stack([row[3] for row in rows]))
    assert np.array_equal(*screens[0])
    assert not np.array_equal(screens[1][0], screens[2][0])  # other numbers of frames without action


def test_an_unknown_game_is_answered_with_the_nearest(atari):
    with pytest.raises(SuiteError, match="did you mean 'atari200m:MsPacman'"):
        suite("atari200m").find("MsPackman", "atari200m")


def test_an_atari_game_is_one_that_can_be_made(atari):
    games = suite("atari").names()
    assert {"Pong", "Breakout", "MontezumaRevenge", "UpNDown"} <= set(games)
    assert set(SCORES) <= set(games)


def test_scores_of_atari_are_normalized_by_the_published_numbers():
    assert human_normalized("atari:Pong", -20.7) == 0 and human_normalized("atari200m:Pong", 14.6) == 1
    assert human_normalized("atari:Breakout", 16.1) == pytest.approx(0.5)
    assert human_normalized("gym:Pong", 1.0) is None and human_normalized(None, 1.0) is None
    assert len(SCORES) == 57 and all(human > random for random, human in SCORES.values())


@pytest.mark.parametrize("name", ["dmc", "dmc_proprio"])
def test_a_control_task_is_seen_or_felt(name):
    pytest.importorskip("dm_control", reason="needs the extra `dmc`")
    env = suite(name).make(suite(name).find("cartpole_swingup", name), True)
    about = worker.describe(env, None, 2)
    shapes = {entry["name"]: entry["shape"] for entry in about["obs"]}
    assert shapes == ({"image": [64, 64, 3]} if name == "dmc" else {"position": [3], "velocity": [2]})
    assert about["max_episode_steps"] == 500 and about["frames"] == 2
    assert about["action"]["low"] == [-1.0] and about["action"]["high"] == [1.0]
    if name == "dmc":
        assert len(np.unique(env.observe())) > 10
    else:
        rows = play(env, 1002, lambda: np.ones(1))
        assert [i for i, row in enumerate(rows) if row[2]] == [1000] and not any(row[1] for row in rows)
    with pytest.raises(SuiteError, match="camera of 'dmc:a' is 'left'" if name == "dmc" else "'camera' is not an arg"):
        suite(name).find("a", name, {"camera": "left"})
    if name == "dmc":
        with pytest.raises(SuiteError, match="camera 9 is not valid for 'cartpole', which has"):
            suite(name).make(suite(name).find("cartpole_swingup", name, {"camera": 9}), True)
    with pytest.raises(SuiteError, match=f"did you mean '{name}:walker_walk'"):
        suite(name).make(("walker_wak", name, {}), True)


DRAWS = """
from wmjax.suites import SuiteError, suite
for name in ("dmc_proprio", "dmc"):
    try:
        suite(name).make(suite(name).find("cartpole_swingup", name), True)
        print(name, "made")
    except SuiteError as error:
        print(name, error)
"""


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_without_a_driver_a_control_task_is_felt_but_not_seen_and_packages_are_named(backend):
    pytest.importorskip("dm_control", reason="needs the extra `dmc`")
    for name, text in (
        ("dmc_proprio", "dmc_proprio made"),
        ("dmc", "dmc env: pictures cannot be drawn with MUJOCO_GL="),
    ):
        script = DRAWS.replace('("dmc_proprio", "dmc")', repr((name,)))
        environment = os.environ | {"MUJOCO_GL": backend, "MUJOCO_EGL_DEVICE_ID": "99"}
        environment |= {"PYTHONPATH": os.getcwd(), "LD_LIBRARY_PATH": "/nowhere"}
        said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        if name == "dmc" and backend == "osmesa" and "dmc made" in said.stdout:
            pytest.skip("OSMesa is installed here")
        assert said.stdout.startswith(text), said.stdout + said.stderr[-2000:]
        assert name == "dmc_proprio" or ("libegl1" in said.stdout and "libosmesa6" in said.stdout)


def test_crafter_ends_by_death_or_by_its_limit():
    pytest.importorskip("crafter", reason="needs the extra `crafter`")
    env = suite("crafter").make(suite("crafter").find("", "crafter"), True)
    about = worker.describe(env, None, 1)
    assert about["obs"][0]["shape"] == [64, 64, 3] and about["action"]["n"] == 17
    rows = play(env, 400, lambda: 0)
    assert any(row[1] for row in rows) and not any(row[2] for row in rows)  # who sleeps on is eaten
    short = suite("crafter").make(suite("crafter").find("", "crafter", {"length": 5}), True)
    assert [row[2] for row in play(short, 6, lambda: 0)] == [False] * 5 + [True] and short.max_episode_steps == 5


def test_doom_shows_its_screen_and_cuts_take_cover_after_a_minute(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="needs the extra `vizdoom`")
    monkeypatch.chdir(tmp_path)
    env = suite("vizdoom").make(suite("vizdoom").find("TakeCover"), True)
    about = worker.describe(env, 64, 4)
    assert about["obs"] == [{"name": "image", "dtype": "uint8", "shape": [64, 64, 3], "low": 0, "high": 255}]
    assert (about["action"]["n"], about["max_episode_steps"], about["frames"]) == (3, 525, 4)
    screens = [np.stack([row[3] for row in play(env, 80, lambda: 1, seed)]) for seed in (1, 1, 2)]
    assert np.array_equal(*screens[:2]) and not np.array_equal(*screens[1:])
    rows = play(env, 600, lambda: 0)
    assert any(row[1] for row in rows) and not any(row[2] for row in rows)  # who stands still is hit
    assert all(row[0] == 1 for row in rows if row[0]) and rows[-1][3].mean() > 10  # never dark, not at the end either
    assert not list(tmp_path.iterdir())  # its settings are left elsewhere
    env.close()
    basic = suite("vizdoom").make(suite("vizdoom").find("Basic"), True)
    rows = play(basic, 302, lambda: 0)
    assert [i for i, row in enumerate(rows) if row[2]] == [300] and not any(row[1] for row in rows)
    basic.close()
    short = suite("vizdoom").make(suite("vizdoom").find("Basic", "vizdoom", {"limit": 40}), True)
    assert short.max_episode_steps == 40 and sum(row[2] for row in play(short, 41, lambda: 0)) == 1
    short.close()
    with pytest.raises(SuiteError, match="did you mean 'vizdoom:TakeCover'"):
        suite("vizdoom").find("takecover")


def test_two_buttons_of_doom_may_be_an_axis_whose_middle_third_presses_none(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="needs the extra `vizdoom`")
    monkeypatch.chdir(tmp_path)
    doom, axis = suite("vizdoom"), {"actions": "axis"}
    env = doom.make(doom.find("TakeCover", args=axis), True)
    assert env.action_space.shape == (1,) and (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    pressed = []
    for value in (-1, -0.34, -0.33, 0, 0.33, 0.34, 1):
        env.step(np.array([value], np.float32))
        pressed.append(tuple(env._env.game.get_last_action()))  # left, right
    assert pressed == [(1, 0)] * 2 + [(0, 0)] * 3 + [(0, 1)] * 2
    env.close()
    with pytest.raises(SuiteError, match=r"actions 'axis' is not valid for .*Basic.*, which has not two buttons"):
        doom.make(doom.find("Basic", args=axis), True)
    with pytest.raises(SuiteError, match="actions of 'vizdoom:TakeCover' is 'keys'"):
        doom.find("TakeCover", args={"actions": "keys"})


def test_a_suite_that_is_not_installed_names_its_extra(monkeypatch):
    for module in ("ale_py", "crafter", "vizdoom", "vizdoom.gymnasium_wrapper"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(suite("dmc"), "installed", lambda name: False)
    for name, extra in (("atari", "atari"), ("crafter", "crafter"), ("dmc", "dmc"), ("vizdoom", "vizdoom")):
        with pytest.raises(SuiteError, match=rf'pip install "wmjax\[{extra}\]"'):
            suite(name).find("Pong" if name == "atari" else "", name)
    assert set(SUITES) >= {"gym", "atari", "atari200m"}


def test_the_pedals_of_car_racing_rest_where_an_agent_does_nothing():
    pytest.importorskip("Box2D", reason="needs the extra `box2d`")
    env = agent_actions(make_env("gym:CarRacing-v3", image_size=64, action_repeat=4))
    assert env.spec.obs["image"].shape == (64, 64, 3) and env.spec.max_episode_steps == 250
    pedals = [
        np.asarray(env.native(np.array(raw, np.float32))).tolist() for raw in ([0, -1, -1], [0, 0, 0], [-1, 1, 1])
    ]
    assert pedals == [[0, 0, 0], [0, 0.5, 0], [-1, 1, 1]]  # rescaled, no action would brake by half
