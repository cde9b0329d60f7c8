"""Every way to hand over an environment, and what a run writes down of it."""

import functools
import importlib
import json
import os
import sys
import threading
import types

import gymnasium
import numpy as np
import pytest

import wmjax
from tests.envs import gymnasium_envs as suite
from wmjax.envs import make_env
from wmjax.envs.handed import check_trust, handed
from wmjax.suites import gym_suite
from wmjax.types import UntrustedError, UsageError

HERE = "tests.envs.test_handed"


class Walk(gymnasium.Env):
    """Walks up or down from a start; ends at 5."""

    observation_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, start=0, *, pay=1.0):
        self.start, self.pay = start, pay

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.start
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += 2 * int(action) - 1
        return np.array([self.x], np.float32), self.pay, self.x == 5, False, {}


class Twice(gymnasium.RewardWrapper):
    """Pays twice."""

    def reward(self, reward):
        return 2 * reward


def make_walk(start=0):
    return Walk(start)


class Outer:
    """Has one in it."""

    Inner = Walk


def made(env, args=None, training=True):
    """What a worker makes of what is handed over, in this process."""
    value, name, args = handed(env, args)
    task = (value if isinstance(value, str) else name).removeprefix("gym:")
    found = gym_suite.find(task, "gym", args) if isinstance(value, str) else gym_suite.found(task, value, args)
    return gym_suite.make(found, training)


def first_reward(env):
    env.reset(seed=0)
    return env.step(1)[1]


NAMED = [
    # what is handed over, its name, its arguments
    (Walk, f"gym:{HERE}:Walk", {}),
    (make_walk, f"gym:{HERE}:make_walk", {}),
    (functools.partial(Walk, 3, pay=2.0), f"gym:{HERE}:Walk", {"start": 3, "pay": 2.0}),
    (functools.partial(functools.partial(make_walk, 1), start=2), f"gym:{HERE}:make_walk", {"start": 2}),
    (lambda: Walk(), f"gym:{HERE}:<lambda>", {}),
    ("gym:CartPole-v1", "gym:CartPole-v1", {}),
    (
        functools.partial(gymnasium.make, "FrozenLake-v1", is_slippery=False),
        "gym:FrozenLake-v1",
        {"is_slippery": False},
    ),
    (f"gym:{HERE}:Walk", f"gym:{HERE}:Walk", {}),
    ("gym:tests/envs/test_handed.py:Walk", f"gym:{os.path.abspath('tests/envs/test_handed.py')}:Walk", {}),
    ("atari:Pong", "atari:Pong", {}),
    ("catch", "catch", {}),
]


@pytest.mark.parametrize("env, name, args", NAMED, ids=[row[1] for row in NAMED])
def test_what_is_handed_over_has_a_name_by_which_it_is_found_again(env, name, args):
    assert handed(env)[1:] == (name, args)
    if ":<" not in name and name.startswith("gym:"):
        again = made(name, args)
        assert type(again.unwrapped).__name__ == type(made(env).unwrapped).__name__
        assert vars(again.unwrapped).get("start") == vars(made(env).unwrapped).get("start")


def test_what_has_no_name_is_not_found_in_a_process_of_its_own():
    class Local(Walk):
        pass

    assert handed(Local).name == f"gym:{HERE}:<Local>"
    assert handed(Walk(7).reset).name.startswith(f"gym:{HERE}:<")
    for name in (f"gym:{HERE}:<Local>", "gym:__main__:<lambda>"):
        with pytest.raises(UsageError, match=r"no new process can find; from Python, load the run with env="):
            check_trust(name, {}, False)


def test_a_class_and_a_function_reach_a_worker_with_their_arguments():
    env = make_env(functools.partial(Walk, 3, pay=2.0), env_args={"max_episode_steps": 4})
    assert env.spec.max_episode_steps == 4
    envs = env.start(1)
    try:
        rows = [envs.reset([[0]])]
        for _ in range(2):
            envs.send(np.ones(1, np.int32))
            rows.append(envs.receive())
    finally:
        envs.close()
    assert [row.obs["vector"].item() for row in rows] == [3, 4, 5]
    assert [row.reward.item() for row in rows] == [0, 2, 2] and rows[-1].is_terminal.item()


REFUSED = [
    (lambda: gymnasium.make("CartPole-v1"), "env: .*made already.*give its name, 'gym:CartPole-v1', its class, or a"),
    (lambda: Walk(), "env: Walk is an environment that is made already.*give its class, or a function"),
    (lambda: gymnasium.wrappers.TimeLimit(Walk(), 3), "env: TimeLimit is .* made already"),
    (
        lambda: gymnasium.make_vec("CartPole-v1", 2),
        "env: .*VectorEnv is a vector environment.*that one's name, class",
    ),
    (lambda: 3, "env: 3 is not valid; a name, a class or function"),
    (lambda: [], r"env: \[\] is not valid"),
    (lambda: np.zeros(3), r"env: array\(.* is not valid"),
    (lambda: b"catch", "env: b'catch' is not valid"),
    (lambda: {"env": "catch"}, "env: .* is not valid"),
    (lambda: "", "env: '' is not valid; a name of 1 to 4096 printable characters is"),
    (lambda: float("nan"), "env: nan is not valid"),
    (lambda: functools.partial(make_walk, 1, 2), "env: functools.partial.*too many positional arguments"),
]


@pytest.mark.parametrize("make, message", REFUSED)
def test_what_is_none_of_the_ways_is_refused_in_one_line(make, message, tmp_path):
    env = make()
    for call in (lambda: make_env(env), lambda: wmjax.train("dreamer_v3", env, out=tmp_path / "run")):
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: None, "makes None, which is not an environment"),
        (lambda: gymnasium.make_vec("CartPole-v1", 2), "makes a vector environment"),
        (lambda: make_env("probe:act"), "makes a Env of JAX; hand over that itself"),
        (lambda start: Walk(start), "missing 1 required positional argument: 'start'"),
    ],
)
def test_a_function_that_makes_no_environment_is_told_so(function, message):
    found = gym_suite.found("here:<lambda>", function)
    with pytest.raises((gym_suite.SuiteError, TypeError), match=message):
        gym_suite.make(found, True)


def test_what_cannot_be_pickled_is_refused_in_one_line():
    lock = threading.Lock()
    with pytest.raises(UsageError, match=r"env: .*<lambda>.* cannot be sent to a process of its own: .*lock"):
        make_env(lambda: Walk(lock))


# ---------------------------------------------------------------------------------------------------------------------
# What is registered


@pytest.mark.parametrize("entry_point", [Walk, f"{HERE}:Walk"])
def test_what_is_registered_is_written_down_as_what_makes_it(entry_point):
    gymnasium.register("WmjaxWalk-v0", entry_point, max_episode_steps=7, kwargs={"start": 2})
    value, name, args = handed("gym:WmjaxWalk-v0", {"pay": 3.0})
    assert (value, name) == ("gym:WmjaxWalk-v0", f"gym:{HERE}:Walk")
    assert args == {"start": 2, "max_episode_steps": 7, "pay": 3.0}
    for env in (made("gym:WmjaxWalk-v0", {"pay": 3.0}), made(name, args)):
        assert env.unwrapped.start == 2 and first_reward(env) == 3.0
        assert [env.step(0)[3] for _ in range(6)] == [False] * 5 + [True]


def test_what_cannot_be_written_down_so_is_found_by_the_id_of_its_source():
    gymnasium.register("WmjaxLambda-v0", lambda: Walk(), max_episode_steps=7)
    assert handed("gym:WmjaxLambda-v0")[1:] == (f"gym:{HERE}:WmjaxLambda-v0", {})
    assert made(f"gym:{HERE}:WmjaxLambda-v0").unwrapped.start == 0
    gymnasium.register("WmjaxArray-v0", Walk, kwargs={"start": np.arange(2)})
    assert handed("gym:WmjaxArray-v0")[1:] == (f"gym:{HERE}:WmjaxArray-v0", {})


def test_wrappers_that_were_registered_are_around_it():
    wrapper = gymnasium.envs.registration.WrapperSpec("Twice", f"{HERE}:Twice", {})
    gymnasium.register("WmjaxTwice-v0", Walk, additional_wrappers=(wrapper,))
    assert handed("gym:WmjaxTwice-v0").name == f"gym:{HERE}:WmjaxTwice-v0"
    assert first_reward(made("gym:WmjaxTwice-v0")) == 2.0


def test_an_entry_point_in_main_works_like_the_class_itself(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "Mine", Walk, raising=False)
    gymnasium.register("WmjaxMine-v0", entry_point="__main__:Mine", kwargs={"start": 4})
    assert made("gym:WmjaxMine-v0").unwrapped.start == 4
    gymnasium.register("WmjaxNone-v0", entry_point="__main__:Absent")
    with pytest.raises(gym_suite.SuiteError, match="entry point '__main__:Absent', which does not exist"):
        made("gym:WmjaxNone-v0")


FILE = """
import dataclasses
import gymnasium
import numpy as np
import sibling

@dataclasses.dataclass
class Settings:
    start: int = sibling.START

class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, step=1):
        self.size = step

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = Settings().start
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += self.size
        return np.array([self.x], np.float32), 1.0, False, False, {}

gymnasium.register("FileWalk-v0", "__main__:Walk", max_episode_steps=3)
assert __name__ != "__main__"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")  # so that what is appended to it goes again
    (tmp_path / "sibling.py").write_text("START = 40")
    (tmp_path / "my-walk.py").write_text(FILE)
    return tmp_path / "my-walk.py"


def test_a_file_is_a_source_too_with_what_lies_beside_it(file):
    for name, limit in ((f"gym:{file}:Walk", None), (f"gym:{file}:FileWalk-v0", 3)):
        env = make_env(name, env_args={"step": 2})
        assert env.spec.max_episode_steps == limit
    envs = env.start(1)
    try:
        envs.reset([[0]])
        envs.send(np.zeros(1, np.int32))
        assert envs.receive().obs["vector"].item() == 42
    finally:
        envs.close()
    module = gym_suite.imported(str(file))
    assert handed(module.Walk).name == f"gym:{file}:Walk" and "my-walk" not in sys.modules


def test_a_file_that_trains_when_it_is_imported_is_told_where_to_put_that(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "trains.py"
    path.write_text(f'import wmjax\nwmjax.train("dreamer_v3", "catch", out={str(tmp_path / "run")!r})')
    for name in (f"gym:{path}:Walk", "gym:trains:Walk"):
        with pytest.raises(
            UsageError, match=r'is being imported for its environment; put .* under `if __name__ == "__m'
        ):
            make_env(name)
    assert gym_suite.importing() is None and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        (f"gym:{HERE}:Wlak", "neither registers 'Wlak' nor has a class or function of that name"),
        (f"gym:{HERE}:HERE", "is 'tests.envs.test_handed', neither a registered id nor a class or function"),
        ("gym:/no/such/file.py:Walk", "file '/no/such/file.py' cannot be imported"),
        (
            "gym:no_such_module:Walk",
            "module 'no_such_module' cannot be imported.*; start where it lies, or name its fi",
        ),
    ],
)
def test_a_source_without_it_is_told_so(name, message):
    with pytest.raises(UsageError, match=message):
        make_env(name)


def test_what_a_session_without_a_file_defined_is_to_be_loaded_from_python(monkeypatch):
    session = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", session)
    session.Mine = type("Mine", (Walk,), {"__module__": "__main__", "__qualname__": "Mine"})
    assert handed(session.Mine).name == "gym:__main__:Mine"
    check_trust("gym:__main__:Mine", {}, False)  # it is this session's
    del session.Mine
    with pytest.raises(UsageError, match=r"a session that has no file.*wmjax.load\(path, env=Mine\)"):
        make_env("gym:__main__:Mine")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    "env, args, message",
    [
        (Walk, {"strat": 1}, "env_args: 'strat' is not an argument of .*did you mean 'start'.*start, pay, max_epi"),
        ("gym:FrozenLake-v1", {"slippery": False}, "'slippery' is not an argument of 'gym:FrozenLake-v1'.*is_slippery"),
        ("gym:CartPole-v1", {"max_episode_steps": 0}, "max_episode_steps of 'gym:CartPole-v1' is 0.*positive"),
        (Walk, {"max_episode_steps": 2.5}, "max_episode_steps of .*Walk.* is 2.5"),
        ("catch", {"rows": 3}, "env_args: 'rows' is not an argument of 'catch'; valid are flicker"),
        ("racing:flicker", {"flicker": 1.5}, r"flicker of 'racing:flicker' is 1.5.*a number in \[0, 1\] is"),
        ("pendulum", {"flicker": "half"}, r"flicker of 'pendulum' is 'half'.*a number in \[0, 1\] is"),
        ("probe:act", {"size": 3}, "env_args: 'size' is not an argument of 'probe:act'; it has none"),
        (Walk, {"start": object()}, "env_args: start is <object.*config.json keeps it"),
        (Walk, {"start": float("inf")}, "env_args: start is inf"),
        (Walk, {"start": json.loads("[" * 600 + "]" * 600)}, "env_args: start is .*config.json keeps it"),
        (Walk, {3: 4}, "env_args: {3: 4} is not valid"),
        (Walk, ["start"], r"env_args: \['start'\] is not valid"),
        (make_env("probe:act"), {"start": 3}, "env_args: .*Env value"),
    ],
)  # fmt: skip
def test_arguments_that_it_does_not_have_are_named(env, args, message):
    with pytest.raises(UsageError, match=message):
        make_env(env, env_args=args)


def test_arguments_are_what_config_json_gives_back():
    args = {"a": np.float32(0.5), "b": (1, 2), "c": "text\nin lines", "d": None, "e": [True, {"f": -3}]}
    assert handed(Walk, args).args == {"a": 0.5, "b": [1, 2], "c": "text\nin lines", "d": None, "e": [True, {"f": -3}]}


def test_arguments_of_gymnax_are_its_parameters():
    pytest.importorskip("gymnax", reason="needs the extra `gymnax`")
    env = make_env("gymnax:CartPole-v1", env_args={"max_steps_in_episode": 20, "gravity": 1})
    assert env.spec.max_episode_steps == 20
    with pytest.raises(
        UsageError, match="env_args: 'max_steps' is not an argument of 'gymnax:CartPole-v1'; did you mean"
    ):
        make_env("gymnax:CartPole-v1", env_args={"max_steps": 20})
    with pytest.raises(UsageError, match="gravity of 'gymnax:CartPole-v1' is 'low'"):
        make_env("gymnax:CartPole-v1", env_args={"gravity": "low"})


# ---------------------------------------------------------------------------------------------------------------------
# What a file names


EVIL = [
    "gym:evil:X-v0", "gym:runs.downloaded.evil:X-v0", "gym:evil:Walk", "gym:./evil.py:Walk", "gym:/tmp/evil.py:X",
    "gym:x:y:Z-v0", "gym::evil:X", "gym:os:system", "gym:subprocess:run", "gym:gymnasium:make", f"gym:{HERE}:make_walk",
    "gym:wmjax.cli:main", "gym:builtins:exec", "gym:__main__:main", "gym:gymnasium.envs.registration:load_env_creator",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_a_name_in_a_file_that_would_run_code_of_its_own_is_refused_before_anything_is_imported(name, monkeypatch):
    refuse = lambda *args, **kwargs: pytest.fail("imported")
    path = list(sys.path)
    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(gym_suite, "import_source", refuse)
    with pytest.raises(UntrustedError, match=r"env: config.json says .*--env .*--trust-env \(trust_env=True\)"):
        check_trust(name, {}, False)
    check_trust(name, {}, True)
    assert sys.path == path


@pytest.mark.parametrize(
    "name",
    ["catch", "probe:act", "gymnax:evil:X", "gym:CartPole-v1", "gym:Evil-v0", "atari:../../x", "dmc:a:b", "evil"],
)
def test_a_name_that_only_chooses_of_what_is_installed_needs_no_word(name):
    check_trust(name, {"size": 8, "map_name": "8x8", "deep": [{"a": True}]}, False)


@pytest.mark.parametrize(
    "args",
    [{"env_id": "evil:X-v0"}, {"xml_file": "./evil.xml"}, {"a": [["evil.module"]]}, {"a": {"b/c": 1}}, {"é": "é"}],
)
def test_arguments_in_a_file_that_may_name_code_or_files_need_the_users_word(args):
    with pytest.raises(UntrustedError, match=r"env_args: config\.json says"):
        check_trust("gym:GymV26Environment-v0", args, False)
    check_trust("gym:GymV26Environment-v0", args, True)


def test_arguments_that_the_user_gives_stand_for_those_of_the_file():
    with pytest.raises(UntrustedError, match=r"'\./b\.xml'"):
        check_trust("gym:Hopper-v5", {"xml_file": "./evil.xml", "other": "./b.xml"}, False, {"xml_file"})
    check_trust("gym:Hopper-v5", {"xml_file": "./evil.xml"}, False, {"xml_file"})


def test_a_class_that_this_session_has_imported_needs_no_word():
    check_trust(f"gym:{HERE}:Walk", {}, False)
    check_trust(f"gym:{HERE}:Outer.Inner", {}, False)
    for name in (f"gym:{HERE}:Outer", f"gym:{HERE}:Absent", f"gym:{HERE}:np"):
        with pytest.raises(UntrustedError):
            check_trust(name, {}, False)


# ---------------------------------------------------------------------------------------------------------------------
# Starting


@pytest.mark.slow
def test_an_environment_that_starts_slowly_is_waited_for_as_long_as_is_said():
    def slow():
        import time

        time.sleep(3)
        return Walk()

    with pytest.raises(
        UsageError, match=r"could not be made within 0\.5 seconds; a larger start_timeout gives it longer"
    ):
        make_env(slow, start_timeout=0.5)
    for seconds in (0, -1, float("nan"), "long"):
        with pytest.raises(UsageError, match="start_timeout"):
            make_env(slow, start_timeout=seconds)
    assert make_env(Walk, start_timeout=float("inf")).spec.obs


def test_of_a_simulator_of_which_one_may_exist_the_described_one_has_ended_before_training_begins(tmp_path):
    lock = str(tmp_path / "lock")
    env = make_env(suite.Single, env_args={"lock": lock})
    envs = env.start(1)
    try:
        assert envs.reset([[0]]).is_first.all() and envs.restarts == 0
    finally:
        envs.close()


def test_arguments_are_typed_on_the_command_line():
    from wmjax.cli.arguments import EvalArgs, TrainArgs, env_args, parse, split_agent

    pairs = {
        "size": ("8", 8), "slip": ("false", False), "Slip": ("True", True), "low": ("-9.8", -9.8),
        "none": ("null", None), "None": ("None", None), "list": ("[1, 2]", [1, 2]), "text": ('"3"', "3"),
        "nan": ("NaN", "NaN"), "name": ("8x8", "8x8"),
    }  # fmt: skip
    argv = [word for name, (text, _) in pairs.items() for word in ("--env-arg", name, text)]
    for args in (parse(TrainArgs, argv, "wmjax"), parse(EvalArgs, ["run", *argv], "wmjax")):
        found = env_args(args.env_arg)
        assert found == {name: value for name, (_, value) in pairs.items()}
        assert [type(value) for value in found.values()] == [type(value) for _, value in pairs.values()]
    assert split_agent([*argv, "iris", "--seed", "3"]) == ("iris", [*argv, "--seed", "3"])
    with pytest.raises(UsageError):
        parse(TrainArgs, ["--env-arg", "size"], "wmjax")
