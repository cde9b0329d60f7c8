"""What is read from observations and written as actions, over generated spaces and over those that people bring."""

import io
import json
import pickle
import re

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import wmjax
from tests.envs import gymnasium_envs as suite
from tests.marks import partly_long
from tests.test_run import TINY
from wmjax.envs import make_env, own
from wmjax.envs.from_gymnasium import host_env
from wmjax.envs.wrappers import agent_actions
from wmjax.loops.report import read_metrics
from wmjax.settings import describe
from wmjax.suites import SuiteError, worker
from wmjax.suites.pictures import resize
from wmjax.suites.spaces import ActionReader, Fault, obs_reader, plain
from wmjax.types import Box, Discrete, Env, EnvSpec, UsageError


def reader(space, image_size=None):
    return obs_reader(plain(space), image_size)


# ---------------------------------------------------------------------------------------------------------------------
# Generated environments, through what workers and the main process do


FLOATS = {"float16": 16, "float32": 32, "float64": 64}


@st.composite
def boxes(draw, dtypes, shapes):
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(shapes))
    if dtype in FLOATS:
        number = st.one_of(
            st.floats(width=FLOATS[dtype], allow_nan=False, allow_infinity=False),
            st.sampled_from([0.1, np.pi, 1e-30, 1.0, 3.0, 0.0, -0.1, -np.pi, -1.0]),
        )
    else:
        info = np.iinfo(dtype) if dtype != "bool" else None
        number = st.integers(int(info.min), int(info.max) - 1) if info else st.booleans()
    count = draw(st.sampled_from([1, int(np.prod(shape))]))
    pairs = [sorted((draw(number), draw(number))) for _ in range(count)]
    size = int(np.prod(shape))
    low, high = (np.resize(np.array([pair[i] for pair in pairs], dtype), size).reshape(shape) for i in (0, 1))
    kind = draw(st.sampled_from(["bounded"] * 6 + ["unbounded", "from below"]))
    if dtype in FLOATS and kind != "bounded":
        high = np.full(shape, np.inf, dtype)
        low = -high if kind == "unbounded" else low
    return spaces.Box(low, high, dtype=np.dtype(dtype).type)


@st.composite
def multi_discretes(draw):
    shape = draw(st.sampled_from([(1,), (2,), (3,), (2, 2)]))
    integers = lambda low, high: np.array([draw(st.integers(low, high)) for _ in range(np.prod(shape))]).reshape(shape)
    dtype = draw(st.sampled_from([np.int64, np.int32]))
    return spaces.MultiDiscrete(integers(1, 5), dtype=dtype, start=integers(-5, 5))


discretes = st.builds(
    lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
    st.integers(1, 9), st.integers(-9, 9), st.sampled_from([np.int64, np.int32]),
)  # fmt: skip
binaries = st.builds(spaces.MultiBinary, st.sampled_from([1, 3, (2, 2)]))
LAYOUTS = [
    (64, 64, 3), (3, 20, 20), (21, 16), (12, 84, 84), (5, 64, 64), (2, 16, 16), (4, 16, 16, 3), (4, 3, 16, 16),
    (9, 9, 9), (3, 3, 3), (16, 5, 16), (16, 12, 1), (7, 16, 1, 16), (2, 2, 2, 2),
]  # fmt: skip
pictures = st.builds(
    lambda shape, dtype: spaces.Box(0, 255, shape, dtype),
    st.sampled_from(LAYOUTS),
    st.sampled_from([np.uint8] * 5 + [np.float32, np.int64]),
)
vectors = boxes([*FLOATS, "int8", "int32", "int64", "uint8", "uint16", "bool"], [(), (1,), (3,), (2, 2), (2, 2, 3)])
leaves = st.one_of(vectors, pictures, discretes, multi_discretes(), binaries, st.just(spaces.Text(3)))
observations = st.recursive(
    st.one_of(vectors, pictures, discretes, multi_discretes(), binaries),
    lambda inner: st.one_of(
        st.builds(spaces.Dict, st.dictionaries(st.sampled_from(["a", "b", "c/d"]), inner, min_size=1, max_size=3)),
        st.builds(spaces.Tuple, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=4,
)
actions = st.one_of(boxes([*FLOATS, "int32"], [(), (1,), (3,), (2, 2)]), discretes, multi_discretes(), binaries, leaves)


def native_actions(action):
    """Actions of a spec: all the lowest, all the highest, and between."""
    if isinstance(action, Box):
        low, high = (np.broadcast_to(np.asarray(x, np.float32), action.shape) for x in (action.low, action.high))
        return [low, high, low / 2 + high / 2, np.where(np.arange(low.size) % 2, low, high).astype(np.float32)]
    counts = np.array(action.n if isinstance(action, Discrete) else action.ns, np.int32)
    return [np.zeros_like(counts), counts - 1, counts // 2]


def unambiguous(space):
    """Whether what is read from a space cannot be another thing of that space."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return all(map(unambiguous, space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces))
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.sum() > space.nvec.size
    return isinstance(space, spaces.MultiBinary) or (isinstance(space, spaces.Box) and space.dtype.kind == "f")


def trial(obs, act):
    """Reads and acts in one environment as training and `Run.act` do. Returns how it was refused, if it was."""
    env = suite.Sampled(obs, act, length=3)
    try:
        about = worker.describe(env, None, 1)
        assert json.loads(json.dumps(about)) == about
        setup = worker.Setup("gym", None, None, 1, 0, 1, 1, None)
        host = agent_actions(host_env(setup, about, None, 60.0))
    except (SuiteError, UsageError) as error:
        return str(error)
    shared = worker.layout(about)
    views = worker.arrays(bytearray(shared.itemsize), shared)
    served = worker._Served(lambda: env, 1, 0, views, None)
    served.reset([0])
    read, write = pickle.loads(pickle.dumps((host.read, host.write)))
    for action in native_actions(host.spec.action):
        views["action"][0] = action
        assert served.step() is None  # a strict environment, in which nothing is lost
        assert env.action_space.contains(write(action))
        mine = read(env.seen)
        assert set(mine) == set(host.spec.obs)
        for name, array in mine.items():
            trained = views[f"obs/{name}"][0]
            assert np.shape(array) == trained.shape and array.dtype == trained.dtype
            np.testing.assert_array_equal(array, trained)
            assert np.isfinite(array).all()
        for name, array in (read(dict(mine)) if unambiguous(obs) else {}).items():  # what was read is read again
            np.testing.assert_array_equal(array, mine[name])
    return None


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(observations, actions)
def test_generated_spaces_are_read_and_acted_in_or_refused_in_one_line(obs, act):
    refused = trial(obs, act)
    if refused is not None:
        assert refused.startswith(("env: ", "action space: ")) and "\n" not in refused and len(refused) < 500


# ---------------------------------------------------------------------------------------------------------------------
# Spaces that people bring


def picture(shape, dtype=np.uint8, low=0, high=255):
    return spaces.Box(low, high, shape, dtype)


def hosted(obs, act=None, image_size=None):
    """A `HostEnv` whose workers are not started, as `wmjax.make_env` gives it."""
    about = worker.describe(suite.Sampled(obs, act), image_size, 1)
    return agent_actions(host_env(worker.Setup("gym", None, image_size, 1, 0, 1, 1, None), about, None, 60.0))


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((64, 64, 3), (64, 64, 3)),
        ((12, 84, 84), (84, 84, 12)),
        ((6, 64, 64), (64, 64, 6)),
        ((5, 64, 64), (64, 64, 5)),
        ((2, 64, 60), (64, 64, 2)),
        ((3, 6, 6), (6, 6, 3)),
        ((64, 64, 2), (64, 64, 2)),
        ((210, 160, 3), (64, 64, 3)),
        ((210, 160), (64, 64, 1)),
        ((4, 64, 64, 3), (64, 64, 12)),
        ((4, 3, 64, 64), (64, 64, 12)),
        ((4, 84, 84, 1), (84, 84, 4)),
        ((4, 84, 84), (84, 84, 4)),
    ],
)
def test_pictures_are_read_in_every_layout_that_is_clear(shape, read):
    ((entry,), pixels) = reader(picture(shape)).describe(), np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert (entry["name"], entry["dtype"], tuple(entry["shape"])) == ("image", "uint8", read)
    image = reader(picture(shape)).read(pixels)["image"]
    assert image.dtype == np.uint8 and image.shape == read
    if read[0] in shape and (len(shape) == 4 or shape[0] == read[2]):  # as it is, in another order
        for channel in range(read[2]):
            frame = pixels[channel] if len(shape) == 3 else pixels.reshape(-1, *read[:2])[channel]
            if len(shape) == 4 and shape[3] == 3:
                frame = pixels[channel // 3, :, :, channel % 3]
            if frame.shape == read[:2]:
                np.testing.assert_array_equal(image[:, :, channel], frame)


@pytest.mark.parametrize("shape", [(64, 64, 64), (3, 3, 3), (10, 12, 11), (64, 3, 64), (64, 64, 3, 4), (40, 64, 64)])
def test_bytes_whose_layout_is_not_clear_are_refused(shape):
    with pytest.raises(SuiteError, match=r"may be meant as pictures or as numbers; valid are .*FlattenObservation"):
        reader(picture(shape))


@pytest.mark.parametrize(
    "box",
    [
        picture((64, 64, 3), np.float32, 0, 1),
        picture((64, 64, 3), np.float32),
        picture((84, 84, 3), np.int64),
        picture((4, 84, 84), np.float16, -1, 1),
        picture((4, 64, 64, 3), np.float32, -np.inf, np.inf),
        picture((84, 84), np.float32, 0, 1),
        picture((10, 10, 4), bool, 0, 1),
        picture((64, 64, 1), np.uint8, 0, 1),
        picture((64, 64), np.uint8, 0, 1),
        picture((3, 40, 40), np.uint8, 0, 10),
        picture((64, 64, 1), np.uint16, 0, 65535),
        picture((64, 64, 3), np.int8, -128, 127),
        picture((64, 64, 3), np.float32, 0, 100),
    ],
)
def test_what_looks_like_pictures_is_refused_with_a_wrapper_that_works(box):
    with pytest.raises(SuiteError) as caught:
        reader(box)
    text = str(caught.value)
    assert "\n" not in text and "may be meant as pictures or as numbers" in text
    env = suite.Sampled(box)
    if box.dtype != bool:  # of which bounds are not numbers
        code = text.partition(", or ")[2].removesuffix(" for pictures")
        wrapped = eval(code, {"gymnasium": gymnasium, "numpy": np, "env": env})
        about = worker.describe(wrapped, None, 1)["obs"][0]
        assert about["name"] == "image" and about["dtype"] == "uint8"
        if np.isfinite(box.high).all():  # the darkest and the brightest stay so
            ends = [wrapped.func(bound) for bound in (box.low, box.high)]
            assert [(end.min(), end.max()) for end in ends] == [(0, 0), (255, 255)]
    code = text.partition("valid are ")[2].partition(" for numbers")[0]
    flat = eval(code, {"gymnasium": gymnasium, "env": env})
    assert worker.describe(flat, None, 1)["obs"][0]["shape"] == [int(np.prod(box.shape))]


@pytest.mark.parametrize("shape", [(3, 3), (2, 2), (6, 7), (9, 9), (100,), (4, 9), (60, 40), (2, 3, 4)])
def test_small_boxes_and_tables_stay_vectors(shape):
    dtypes = [np.float32, np.int64] + [np.uint8] * (len(shape) < 3)
    for dtype in dtypes:
        bound = 9 if len(shape) == 2 else 1
        assert reader(spaces.Box(0, bound, shape, dtype)).describe()[0]["name"] == "vector"


FAULTS = [
    (picture((8, 8)), np.full((8, 8), 300, np.uint16), "'image' holds 300, which is outside of uint8 in [0, 255]"),
    (picture((8, 8)), np.full((8, 8), -1), "'image' holds -1"),
    (picture((8, 8)), np.ones((8, 8), np.float32), "'image' is float32, not uint8"),
    (picture((8, 8)), np.ones((8, 9), np.uint8), "'image' has the shape (8, 9), not (8, 8)"),
    (picture((8, 8)), None, "'image' is None, not uint8"),
    (spaces.Box(0, 9, (2,), np.int16), [1, 10], "'vector' holds 10, which is outside of int16 in [0, 9]"),
    (spaces.Box(0, 9, (2,), np.int16), [0.5, 1.0], "'vector' is float64, not int16"),
    (spaces.Box(0, 9, (2,)), [1, np.nan], "'vector' is not finite"),
    (spaces.Box(0, 9, (2,)), np.nan, "'vector' has the shape (), not (2,)"),
    (spaces.Box(0, 9, (2,)), "no", "'vector' is 'no', not float32"),
    (spaces.Box(0, 9, (2,)), [[1], [1, 2]], "'vector' is not an array"),
    (spaces.MultiDiscrete([2, 3]), [1, 3], "'vector' holds 3, which is outside of int64 in [0, 2]"),
    (spaces.MultiDiscrete([2, 3], start=[5, -1]), [0, 0], "'vector' holds 0"),
    (spaces.MultiBinary(2), [0, 2], "'vector' holds 2, which is outside of int8 in [0, 1]"),
    (spaces.Discrete(3), 1.9, "'choice' is 1.9, not one of 3 choices from 0 upwards"),
    (spaces.Discrete(3, start=-1), 2, "'choice' is 2, not one of 3 choices from -1 upwards"),
    (spaces.Discrete(3), [1], "'choice' has the shape (1,), not ()"),
    (spaces.Dict(a=spaces.Discrete(2)), {"a": 0, "b": 1}, "'b' is not in its space, whose entries are ['a']"),
    (spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), {"a": {}}, "'a/b' is missing"),
    (spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), {"a": 3}, "'a' is 3, not a dict with the entries ['b']"),
    (spaces.Tuple([spaces.Discrete(2)] * 2), (1,), "is a tuple of 1, not a tuple of 2"),
]


@pytest.mark.parametrize(("space", "given", "message"), FAULTS)
def test_what_a_space_does_not_hold_is_named_in_training_and_in_act(space, given, message):
    with pytest.raises(Fault, match=re.escape(message)):
        reader(space).read(given)
    with pytest.raises(UsageError, match=f"^obs: .*{re.escape(message)}"):
        own.read(hosted(space), given)


def test_bools_are_integers_and_integers_of_any_width_are_read():
    assert reader(spaces.Discrete(2)).read(True)["choice"] == 1
    assert reader(picture((8, 8))).read(np.full((8, 8), 200, np.int64))["image"].max() == 200
    assert reader(spaces.MultiBinary(2)).read([True, False])["vector"].tolist() == [1, 0]


def test_acting_takes_the_environments_own_observation_or_what_the_spec_says():
    env = hosted(suite.Counter.observation_space)
    mine, _ = suite.Counter().reset()
    mine["camera"] = np.arange(108, dtype=np.uint8).reshape(3, 6, 6)
    read = own.read(env, mine)
    assert read["inner/phase"] == 0 and read["two"].tolist() == [0, 1, 0, 0, 1]
    np.testing.assert_array_equal(read["camera"][..., 2], mine["camera"][2])
    flat = {"inner/count": mine["inner"]["count"], "inner/phase": -1, "bits": mine["bits"], "two": read["two"]}
    again = own.read(env, flat | {"camera": read["camera"]})
    assert all((again[name] == read[name]).all() for name in read)
    resized = hosted(picture((210, 160, 3)))
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(own.read(resized, small)["image"], small)
    with pytest.raises(UsageError, match=r"'image' has the shape \(100, 100, 3\), not \(210, 160, 3\)"):
        own.read(resized, np.zeros((100, 100, 3), np.uint8))
    assert own.read(hosted(spaces.Dict(eye=picture((9, 9)))), np.zeros((9, 9), np.uint8))["eye"].shape == (9, 9, 1)


def test_environments_on_the_device_are_read_by_their_spec():
    env = make_env("catch")
    pixels = np.random.default_rng(0).integers(0, 256, (210, 160, 3), np.uint8)
    np.testing.assert_array_equal(own.read(env, pixels)["image"], resize(pixels, 64))
    assert own.read(env, {"image": pixels[:64, :64]})["image"].shape == (64, 64, 3)
    spec = EnvSpec({"a": Box(-1, 1, ()), "b": Discrete(3)}, Discrete(2))
    assert own.read(Env(spec, None, None), {"a": 0.5, "b": 2})["a"].shape == ()
    for wrong, message in (
        (np.zeros((64, 64, 3)), "'image' is float64, not uint8"),
        (np.zeros((64, 64, 4), np.uint8), "'image' has the shape"),
        (None, "'image' is None"),
        ({"picture": pixels}, "'picture' is not in its space, whose entries are ['image']"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            own.read(env, wrong)
    for wrong, message in (({"a": 0.5}, "'b' is missing"), ({"a": 0.5, "b": 3}, "'b' is 3"), (None, "it is None")):
        with pytest.raises(UsageError, match=message):
            own.read(Env(spec, None, None), wrong)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_reach_both_bounds_of_a_box_and_never_leave_it(dtype):
    intervals = [(-0.1, 0.1), (-np.pi, np.pi), (-1e-30, 1e-30), (0.0, 1e-300), (-6e4, 6e4), (2.0, 2.0)]
    for low, high in [*intervals, (1e4, 1e4 + 1)]:
        space = spaces.Box(dtype(low), dtype(high), (2, 2), dtype)
        env = hosted(spaces.Discrete(2), space)
        lowest, middle, highest = (
            own.write(env, np.asarray(env.native(np.full(4, x, np.float32)))) for x in (-1, 0, 1)
        )
        for action in (lowest, middle, highest):
            assert space.contains(action) and type(action) is np.ndarray and action.dtype == dtype
        assert (highest - space.high <= 1e-6 * np.abs(space.high)).all() and (lowest <= middle).all()
        if dtype == np.float64 and low < high:
            assert ((middle > lowest) & (middle < highest)).all()


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (0, np.inf), (-np.inf, 1)])
def test_a_box_without_bounds_is_refused_with_a_wrapper_that_works(bounds):
    space = spaces.Box(*bounds, (2,), np.float64)
    with pytest.raises(UsageError, match=r"has no bounds .*TransformAction.*RescaleAction.*ClipAction") as caught:
        hosted(spaces.Discrete(2), space)
    code = str(caught.value).partition("give it some: ")[2].partition(", or RescaleAction")[0]
    wrapped = eval(code, {"gymnasium": gymnasium, "env": suite.Sampled(act=space)})
    assert wrapped.action_space == spaces.Box(-1, 1, (2,))


def test_the_check_gives_actions_of_the_type_that_a_run_gives():
    class Item(suite.Sampled):
        def step(self, action):
            return super().step(self.action_space.dtype.type(action.item()))

    for act in (spaces.Discrete(3), spaces.MultiBinary(1)):
        env = Item(act=act)
        if act.shape == ():
            assert worker.describe(env, None, 1)["action"]["n"] == 3
        else:  # an array is not a number: the check says so, and not the run
            with pytest.raises(SuiteError, match="its step raised AssertionError"):
                worker.describe(env, None, 1)
    assert type(ActionReader(plain(spaces.Discrete(3, start=4))).read(np.int32(1))) is np.int64
    assert type(ActionReader(plain(spaces.Discrete(3, dtype=np.int32))).read(np.int32(1))) is np.int32


def test_too_many_choices_are_refused():
    for space in (spaces.Discrete(2**40), spaces.MultiDiscrete([2**20, 2])):
        with pytest.raises(SuiteError, match=r"choices; valid are at most 1,048,576"):
            reader(space)
        with pytest.raises(SuiteError, match=r"its action space has .* choices"):
            ActionReader(plain(space))


def test_pictures_of_a_size_that_the_agent_cannot_take_are_resized_and_it_is_said():
    for shape, size, said in (
        ((84, 84, 3), 64, "84x84 resized to 64x64"),
        ((80, 80, 3), 80, None),
        ((64, 64, 3), 64, None),
    ):
        made = wmjax.settings.setup("dreamer_v3", hosted(picture(shape)), overrides=TINY | {"stem": "pool"})
        assert made.env.spec.obs["image"].shape == (size, size, 3)
        assert made.description["image_size"] == (64 if shape[0] == 84 else None)
        assert said is None or describe(made, "somewhere").count(f"observation 'image': {said}") == 1


def test_a_worker_reads_what_act_reads():
    env = make_env(suite.register("WmjaxSeen-v0", "Sampled", obs=spaces.Dict(
        eye=picture((30, 21, 3)), phase=spaces.Discrete(5, start=-2), two=spaces.MultiDiscrete([[2], [3]]),
        arm=spaces.Box(-1, 1, (2, 2), np.float64),
    )))  # fmt: skip
    envs = env.start(1)
    try:
        seen = envs.reset([[7, 1]]).obs
    finally:
        envs.close()
    mine = suite.Sampled(env_space := gymnasium.spec("WmjaxSeen-v0").kwargs["obs"])
    raw, _ = mine.reset(seed=worker.gymnasium_seed([7, 1]))
    assert env_space.contains(raw)
    for name, array in own.read(env, raw).items():
        np.testing.assert_array_equal(seen[name][0], array)


# ---------------------------------------------------------------------------------------------------------------------
# Runs in strict environments


four, two = dict(shape=(4,), dtype=np.float32), dict(shape=(2,), dtype=np.float32)
TRAINED = {  # name -> observations and actions; those of one spec are compiled once
    "plain": (spaces.Box(-1, 1, **four), spaces.Discrete(2)),
    "start": (spaces.Box(-1, 1, (2, 2), np.float64), spaces.Discrete(2, start=-3)),
    "one of several": (spaces.MultiBinary(4), spaces.MultiDiscrete([[2]], start=[[5]])),
    "bit": (spaces.MultiBinary((2, 2)), spaces.MultiBinary((1, 1))),
    "small integer": (spaces.MultiDiscrete([2, 2], start=[5, -1]), spaces.Discrete(2, start=7, dtype=np.int32)),
    "tenth": (spaces.Box(-3, 3, (4,), np.int8), spaces.Box(-0.1, 0.1, (2,), np.float64)),
    "pi": (spaces.Box(0, 255, (4,), np.uint8), spaces.Box(-np.pi, np.pi, (2, 1), np.float64)),
    "half": (spaces.Box(-np.inf, np.inf, (4, 1), np.float16), spaces.Box(-0.3, 0.7, (1, 2), np.float16)),
    "entries": (spaces.Box(0, 1, (4,), bool), spaces.Box(np.array([-1e-30, 2.0]), np.array([1e-30, 3.0]), dtype=float)),
    "huge": (spaces.Box(0, 60_000, (4,), np.uint16), spaces.Box(-1e300, 1e300, (2,), np.float64)),
    **{
        name: (
            spaces.Dict({
                "a": spaces.Tuple([spaces.Discrete(3, start=-1), spaces.Box(-1, 1, (2, 2), np.float64)]),
                "b": spaces.Dict({"c": spaces.MultiBinary(2), "d": spaces.Box(0, 255, shape, np.uint8)}),
            }),
            spaces.MultiDiscrete(counts, start=np.full_like(counts, -1)),
        )
        for name, shape, counts in [
            ("nested", (16, 16, 3), [2, 3]), ("channels first", (3, 16, 16), [[2], [3]]),
            ("stack", (3, 16, 16, 1), [2, 3]), ("resized", (21, 30, 3), [[2, 3]]), ("large", (3, 84, 84), [2, 3]),
        ]
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", partly_long(TRAINED, tuple(TRAINED)[::3]))
def test_runs_train_in_strict_environments_and_act_on_their_own_observations(name, tmp_path):
    obs, act = TRAINED[name]
    env = suite.register(f"WmjaxSpaces{list(TRAINED).index(name)}-v0", "Sampled", obs=obs, act=act, length=5)
    pictured = isinstance(obs, spaces.Dict)
    out = io.StringIO()
    run = wmjax.train(
        "dreamer_v3", env, steps=50, out=tmp_path / "run", progress=out, workers=1, max_restarts=0, eval_every=50,
        image_size=16 if pictured else None, **TINY,
    )  # fmt: skip
    assert "warning" not in out.getvalue()
    assert [line["envs/restarts"] for line in read_metrics(run.path) if "envs/restarts" in line][-1] == 0
    mine = suite.Sampled(obs, act, length=5)
    seen, _ = mine.reset(seed=3)
    for step in range(4):
        seen = mine.step(run.act(seen, is_first=step == 0))[0]
    if name == "resized":  # as a new process would read it
        again = wmjax.load(run.path, trust_env=True)
        assert mine.action_space.contains(again.act(seen)) and again.env.notes == run.env.notes != ()
