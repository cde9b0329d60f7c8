"""What is read from observations and written as actions, over generated spaces and over those that people bring."""

import json
import pickle

import numpy as np
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.envs import gymnasium_envs as suite
from wmjax.envs.from_gymnasium import host_env
from wmjax.envs.wrappers import agent_actions
from wmjax.suites import SuiteError, worker
from wmjax.suites.spaces import obs_reader, plain
from wmjax.types import Box, Discrete, UsageError


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
        host = agent_actions(host_env(setup, about, None))
    except (SuiteError, UsageError) as error:
        return str(error)
    size, places = worker.layout(about, 1)
    views = worker.arrays(bytearray(size), places)
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


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(observations, actions)
def test_generated_spaces_are_read_and_acted_in_or_refused_in_one_line(obs, act):
    refused = trial(obs, act)
    if refused is not None:
        assert refused.startswith(("env: ", "action space: ")) and "\n" not in refused and len(refused) < 500
