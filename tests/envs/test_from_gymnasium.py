import errno
import os
import signal
import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from tests.envs import gymnasium_envs as suite
from wmjax.envs import env_names, make_env
from wmjax.envs.from_gymnasium import EnvironmentsLostError
from wmjax.envs.wrappers import agent_actions
from wmjax.suites import SuiteError, worker
from wmjax.types import Box, Discrete, MultiDiscrete, RunError, UsageError


def stream(env, actions, *, num_envs=2, steps=8, workers=2, seed=0, **options):
    """Records of some steps, stacked over time, and how many environments were lost."""
    envs = env.start(num_envs, workers=workers, **options)
    try:
        rows = [envs.reset([[seed, i] for i in range(num_envs)])]
        for _ in range(steps):
            envs.send(actions)
            rows.append(envs.receive())
        stack = lambda name: np.stack([getattr(row, name) for row in rows])
        obs = {name: np.stack([row.obs[name] for row in rows]) for name in rows[0].obs}
        return obs, {name: stack(name) for name in ("reward", "is_first", "is_last", "is_terminal")}, envs.restarts
    finally:
        envs.close()


def test_entries_of_all_kinds_become_images_vectors_and_choices():
    env = make_env("gym:tests.envs.gymnasium_envs:WmjaxCounter-v0")
    assert env.spec.obs == {
        "bits": Box(0.0, 1.0, (2,)),
        "camera": Box(0, 255, (6, 6, 3), "uint8"),
        "inner/count": Box(0.0, 9.0, (1,)),
        "inner/phase": Discrete(4),
        "two": Box(0.0, 1.0, (5,)),
    }
    assert env.spec.action == Discrete(3)
    obs, flags, _ = stream(env, np.array([0, 2], np.int32), num_envs=2, steps=7)
    count = [0, 1, 2, 3, 4, 5, 0, 1]
    assert obs["inner/count"][:, 0, 0].tolist() == count and obs["inner/count"].dtype == np.float32
    assert obs["inner/phase"][:, 1].tolist() == [c % 4 for c in count] and obs["inner/phase"].dtype == np.int32
    assert obs["camera"][:, 1, 2, 3, 1].tolist() == [10 * c for c in count] and obs["camera"].dtype == np.uint8
    assert obs["two"][0, 0].tolist() == [0, 1, 0, 0, 1] and obs["bits"][0, 0].tolist() == [1, 0]
    # NEXT_STEP: the last observation is kept, and the step after it begins an episode with reward 0.
    assert flags["reward"].T.tolist() == [[0, 1, 1, 1, 1, 1, 0, 1], [0, 3, 3, 3, 3, 3, 0, 3]]
    assert np.flatnonzero(flags["is_first"][:, 0]).tolist() == [0, 6]
    assert np.flatnonzero(flags["is_last"][:, 0]).tolist() == [5] == np.flatnonzero(flags["is_terminal"][:, 0]).tolist()


def test_what_an_environment_renders_is_among_its_observations_where_that_is_asked_for():
    env = agent_actions(make_env("gym:tests.envs.gymnasium_envs:Drawn"))
    assert set(env.spec.obs) == {"vector"}
    drawn = env.rendered()
    assert drawn.spec.obs == env.spec.obs | {"render/rgb_array": Box(0, 255, (4, 400, 3), "uint8")}  # made smaller
    obs, _, lost = stream(drawn, np.zeros(2, np.int32), steps=5)
    assert obs["render/rgb_array"][:, 0, 0, 0, 0].tolist() == [0, 50, 100, 150, 200, 0] and not lost
    assert obs["vector"][:, 1, 0].tolist() == [0, 1, 2, 3, 4, 0]


def test_an_environment_that_renders_nothing_is_told_apart():
    env = make_env(suite.register("WmjaxUnseen-v0", "Pedals"))
    with pytest.raises(UsageError, match=r"^video: .*render"):
        env.rendered()


def test_truncated_is_not_terminated_and_repeats_stop_where_the_episode_ends():
    suite.register("WmjaxTruncated-v0", "Counter", truncates=True)
    env = make_env("gym:WmjaxTruncated-v0", action_repeat=2, image_size=12)
    assert env.spec.action_repeat == 2 and env.spec.obs["camera"].shape == (12, 12, 3)
    obs, flags, _ = stream(env, np.zeros(1, np.int32), num_envs=1, steps=4)
    assert obs["inner/count"][:, 0, 0].tolist() == [0, 2, 4, 5, 0]
    assert flags["reward"][:, 0].tolist() == [0, 2, 2, 1, 0]
    assert flags["is_last"][:, 0].tolist() == [False, False, False, True, False]
    assert not flags["is_terminal"].any()


def test_equal_seeds_begin_equal_episodes_and_choices_reach_the_environment():
    env = make_env(suite.register("WmjaxSeeded-v0", "Seeded"))
    assert env.spec.obs == {"choice": Discrete(1000)} and env.spec.action == MultiDiscrete((2, 3))
    runs = [
        stream(env, np.array([[1, 2], [0, 1], [1, 0]], np.int32), num_envs=3, steps=4, seed=seed, workers=workers)
        for seed, workers in ((0, 1), (0, 2), (1, 1))
    ]
    first, again, other = (obs["choice"] for obs, _, _ in runs)
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first[0].tolist())) == 3 and (first[0] != first[2]).any()
    assert runs[0][1]["reward"][1].tolist() == [12, 1, 10]


slow = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("fault", ["dies", "nan", *slow("hangs", "raises", "shape", "dtype", "reward")])
def test_an_environment_that_fails_begins_again_and_the_others_go_on(fault, tmp_path):
    said = []
    env = make_env(suite.register(f"Wmjax-{fault}-v0", "Faulty", fault=fault, marker=str(tmp_path / "marker")))
    assert env.spec.action == Box((-1.0, 0.0), (1.0, 2.0), (2,))
    action = np.array([[0.5, 1.0], [0.5, 1.0]], np.float32)
    obs, flags, restarts = stream(env, action, timeout=1.0, say=said.append)
    counts = sorted(obs["vector"][..., 0].T.tolist())
    assert counts == [[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1, 2]]
    lost = int(obs["vector"][3, 1, 0] == 0)
    assert np.flatnonzero(flags["is_first"][:, lost]).tolist() == [0, 3] and not flags["is_last"][:8, lost].any()
    assert flags["reward"][:4, lost].tolist() == [0, 1.5, 1.5, 0]
    assert restarts == 1 and len(said) == 1
    reasons = {
        "dies": f"worker {lost} (environment {lost}) died (signal 9)",
        "hangs": f"worker {lost} (environment {lost}) gave no answer for 1 s",
        "raises": f"environment {lost}: RuntimeError: the physics exploded",
        "nan": f"environment {lost}: observation 'vector' is not finite",
        "shape": f"environment {lost}: observation 'vector' has the shape (2,), not (1,)",
        "dtype": f"environment {lost}: observation 'vector' is complex64, not float32",
        "reward": f"environment {lost}: reward is inf",
    }
    assert reasons[fault] in said[0]


def test_what_an_environment_started_ends_with_its_worker(tmp_path):
    env = make_env(suite.register("WmjaxServed-v0", "Served", folder=str(tmp_path)))
    envs = env.start(2, workers=2)
    envs.reset([[0, 0], [0, 1]])
    started = lambda: [int(path.name) for path in tmp_path.iterdir()]
    alive = lambda: [pid for pid in started() if Path(f"/proc/{pid}/cmdline").exists() and _state(pid) != "Z"]
    assert len(started()) == 3 and len(alive()) == 2  # that of the description is gone
    os.kill(envs._processes[0].popen.pid, signal.SIGKILL)
    envs.send(np.zeros(2, np.int32))
    assert envs.receive() is not None and envs.restarts == 1
    assert len(started()) == 4 and len(alive()) == 2
    envs.close()
    deadline = time.monotonic() + 10
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_that_dies_is_missed_at_once_even_if_a_child_of_it_lives_on():
    said = []
    env = make_env(suite.register("WmjaxForked-v0", "Forked"))
    envs = env.start(2, workers=2, timeout=60.0, say=said.append)
    try:
        envs.reset([[0, 0], [0, 1]])
        os.kill(envs._processes[1].popen.pid, signal.SIGKILL)
        begin = time.monotonic()
        envs.send(np.zeros(2, np.int32))
        assert envs.receive().is_first.tolist() == [False, True]
        assert time.monotonic() - begin < 30 and "died (signal 9)" in said[0]
    finally:
        envs.close()


def test_waiting_for_an_episode_to_begin_ends_when_told_to_stop(tmp_path):
    stop, marker = [], tmp_path / "marker"
    env = make_env(suite.register("WmjaxSlow-v0", "Slow", marker=str(marker)))
    envs = env.start(1, stop=lambda: bool(stop))
    envs.reset([[0]])
    marker.write_text("")
    timer = threading.Timer(1.0, lambda: stop.append(1))
    timer.start()
    begin = time.monotonic()
    assert envs.reset([[1]]) is None
    envs.close()
    assert time.monotonic() - begin < 8


def test_an_environment_that_cannot_be_closed_ends_quietly(capfd):
    env = make_env(suite.register("WmjaxCloseRaises-v0", "CloseRaises"))
    stream(env, np.zeros(2, np.int32), steps=2)
    assert capfd.readouterr().err == ""


def test_bounds_of_actions_may_be_alike_on_one_side_only():
    env = agent_actions(make_env(suite.register("WmjaxPedals-v0", "Pedals")))
    assert env.spec.action == Box((-1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (3,))
    actions = np.asarray(env.native(np.array([[0, 0, 0], [1, 1, -1]], np.float32)))
    assert stream(env, actions, steps=1)[1]["reward"][1].tolist() == [1, 2]


@pytest.mark.parametrize("third", ["array", None, float("nan"), 1])
def test_flags_are_bools_in_every_step(third):
    said = []
    env = make_env(suite.register(f"WmjaxFlags{third}-v0", "Flags", third=third))
    _, flags, restarts = stream(env, np.zeros(1, np.int32), num_envs=1, steps=5, say=said.append)
    if third == "array":
        assert restarts == 0 and np.flatnonzero(flags["is_terminal"]).tolist() == [5]
    else:
        assert restarts == 1 and f"terminated, which its step returns, must be a bool, not {third!r}" in said[0]
        assert not flags["is_last"][:5].any() and flags["is_first"][3, 0]


def test_closing_in_the_middle_of_a_step_says_nothing(capfd):
    envs = make_env("gym:tests.envs.gymnasium_envs:WmjaxCounter-v0").start(4, workers=2)
    envs.reset([[0, i] for i in range(4)])
    envs.send(np.zeros(4, np.int32))
    time.sleep(0.2)  # answers lie in the pipes
    processes = [process.popen for process in envs._processes]
    envs.close()
    assert [process.wait(10) for process in processes] == [0, 0]
    assert capfd.readouterr().err == ""


def test_environments_that_are_lost_too_often_stop_the_run():
    env = make_env(suite.register("WmjaxAlways-v0", "Faulty", fault="dies"))
    with pytest.raises(EnvironmentsLostError, match=r"2 environments were lost .*max_restarts 1.*died \(signal 9\)"):
        stream(env, np.zeros((1, 2), np.float32), num_envs=1, steps=30, max_restarts=1)


def test_waiting_ends_when_told_to_stop():
    env, stop = make_env(suite.register("WmjaxHanging-v0", "Faulty", fault="hangs")), []
    envs = env.start(1, stop=lambda: bool(stop))
    envs.reset([[0]])
    for _ in range(2):
        envs.send(np.zeros((1, 2), np.float32))
        assert envs.receive() is not None
    envs.send(np.zeros((1, 2), np.float32))
    stop.append(1)
    assert envs.receive() is None
    envs.close()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("old reset", r"reset\(seed=0\) must return a tuple of 2, not dict"),
        ("old step", "step must return a tuple of 5, not a tuple of 4"),
        ("missing", "observation 'inner/count' is missing"),
        ("float image", "observation 'camera' is float64, not uint8"),
        ("empty", r"observation 'nothing' has the shape \(0,\), which holds nothing"),
        ("empty action", r"action space has the shape \(0,\), which holds nothing"),
        ("twice", "two entries of its observation_space are called 'a/b'"),
        ("overflow", "observation 'inner/count' is not finite"),
        ("reward", "reward that its step returns must be a finite number, not None"),
        ("flag", "terminated, which its step returns, must be a bool, not 0"),
        ("space", "observation 'text' is a Text space"),
        ("action", r"action space Box\(0, 3, \(2,\), int32\) is not supported"),
    ],
)
def test_an_environment_that_breaks_a_rule_is_refused_by_name(rule, message):
    with pytest.raises(SuiteError, match=message):
        worker.describe(suite.Broken(rule), None, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:CartPol-v1", "did you mean 'gym:CartPole-v1'"),
        ("gym:no_such_module:X-v0", "module 'no_such_module' cannot be imported"),
        ("gim:CartPole-v1", "valid are catch, .*gym:NAME"),
        ("gym:CartPole-v1@48", "unknown name"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(UsageError, match=message):
        make_env(name)


def test_a_module_that_ends_the_program_is_one_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "ends_it.py").write_text("import sys\nsys.exit('no license')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="module 'ends_it' cannot be imported: no license"):
        make_env("gym:ends_it:X-v0")


def test_what_a_worker_finds_wrong_is_a_usage_error():
    with pytest.raises(UsageError, match="image_size: 64 is not valid for an environment that observes no picture"):
        make_env("gym:CartPole-v1", image_size=64)


def test_registered_environments_are_listed():
    names = {info.name for info in env_names()}
    assert {"gym:CartPole-v1", "gym:Pendulum-v1", "catch"} <= names


def test_a_function_of_the_users_own_script_reaches_the_workers():
    class Local(suite.Counter):
        observation_space = gymnasium.spaces.Box(0, 9, (1,), np.float32)

        def observe(self):
            return np.array([self.count], np.float32)

    gymnasium.register("WmjaxLocal-v0", lambda: Local(), max_episode_steps=3)
    env = agent_actions(make_env("gym:WmjaxLocal-v0"))
    assert env.spec.max_episode_steps == 3
    assert env.native(np.array([0.0, 0.0, 1.0])) == 2
    obs, flags, _ = stream(env, np.zeros(1, np.int32), num_envs=1, steps=4)
    assert obs["vector"][:, 0, 0].tolist() == [0, 1, 2, 3, 0]
    assert flags["is_last"][3, 0] and not flags["is_terminal"].any()


def full(monkeypatch, disks):
    """Has the first `disks` files not find room."""
    allocate, calls = os.posix_fallocate, []

    def posix_fallocate(*arguments):
        calls.append(arguments)
        if len(calls) <= disks:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    return calls


def test_shared_memory_that_has_no_room_is_taken_from_the_disk_or_refused_before_a_worker_starts(monkeypatch):
    env = make_env("gym:tests.envs.gymnasium_envs:WmjaxCounter-v0")
    calls = full(monkeypatch, 1)
    assert stream(env, np.zeros(2, np.int32), steps=1)[2] == 0 and len(calls) == 2
    full(monkeypatch, 2)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(RunError, match=r"MB of memory .* no room in /dev/shm .No space left .*num_envs"):
        env.start(2, workers=2)


def test_an_episode_may_take_as_long_to_begin_as_the_first_one(tmp_path):
    marker, said = tmp_path / "marker", []
    env = make_env(suite.register("WmjaxBegins-v0", "Slow", marker=str(marker), seconds=1.0))
    marker.write_text("")
    _, flags, lost = stream(env, np.zeros(1, np.int32), num_envs=1, steps=7, timeout=0.3, say=said.append)
    assert np.flatnonzero(flags["is_first"][:, 0]).tolist() == [0, 6] and not lost and not said
