"""Gymnasium environments that can be worked out by hand, some of which break; workers import this module."""

import fcntl
import os
import signal
import subprocess
import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env):
    """Observes how many steps the episode has had, pays the number of the action, ends after five steps."""

    action_space = spaces.Discrete(3, start=1)
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (3, 6, 6), np.uint8),
            "inner": spaces.Dict({"count": spaces.Box(0, 9, (1,), np.float64), "phase": spaces.Discrete(4, start=-1)}),
            "bits": spaces.MultiBinary(2),
            "two": spaces.MultiDiscrete([2, 3]),
        }
    )

    def __init__(self, truncates=False):
        self.truncates, self.count = truncates, 0

    def observe(self):
        inner = {"count": np.array([self.count], np.float64), "phase": self.count % 4 - 1}
        image = np.full((3, 6, 6), 10 * self.count, np.uint8)
        return {"camera": image, "inner": inner, "bits": np.array([1, 0], np.int8), "two": np.array([1, 2])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        over = self.count == 5
        return self.observe(), float(action), over and not self.truncates, over and self.truncates, {}


class Faulty(gymnasium.Env):
    """Counts as above, and does something wrong in the third step: once, if there is a marker, or always."""

    action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 2], np.float32))
    observation_space = spaces.Box(-1, 9, (1,), np.float32)

    def __init__(self, fault, marker=None):
        self.fault, self.marker, self.count = fault, marker, 0

    def observe(self):
        return np.array([self.count], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def due(self):
        if self.count != 3:
            return False
        try:
            return self.marker is None or bool(os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL)) or True)
        except FileExistsError:
            return False

    def step(self, action):
        self.count += 1
        obs, reward = self.observe(), float(action.sum())
        if self.due():
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hangs":
                time.sleep(600)
            if self.fault == "raises":
                raise RuntimeError("the physics exploded")
            obs = {"nan": obs * np.nan, "shape": np.zeros(2, np.float32), "dtype": obs.astype(np.complex64)}.get(
                self.fault, obs
            )
            reward = np.inf if self.fault == "reward" else reward
        return obs, reward, self.count == 5, False, {}


class Served(Counter):
    """Has a process of its own, as ViZDoom has, which writes its number into a folder and outlives who started it."""

    def __init__(self, folder):
        super().__init__()
        process = subprocess.Popen(["sleep", "600"])
        open(os.path.join(folder, str(process.pid)), "w").close()


class CloseRaises(Counter):
    """Cannot be closed."""

    def close(self):
        raise RuntimeError("it is stuck")


class Pedals(Counter):
    """Acts in a box of which one bound is the same everywhere, and the other is not, as CarRacing's; pays their sum."""

    action_space = spaces.Box(np.array([-1, 0, 0], np.float32), np.array([1, 1, 1], np.float32))

    def step(self, action):
        return super().step(action.sum())


class Flags(Counter):
    """Tells its end by an array without axes, which is as good as a bool, or in its third step by what is not."""

    def __init__(self, third):
        super().__init__()
        self.third = third

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        terminated = self.third if self.count == 3 and self.third != "array" else np.array(terminated)
        return obs, np.array(reward), terminated, truncated, info


class Forked(Counter):
    """Has a child that is a copy of its process, and so has all that this has open."""

    def __init__(self):
        super().__init__()
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)


class Slow(Counter):
    """Takes its time to begin an episode."""

    def __init__(self, marker, seconds=600):
        super().__init__()
        self.marker, self.seconds = marker, seconds

    def reset(self, *, seed=None, options=None):
        if os.path.exists(self.marker):
            time.sleep(self.seconds)
        return super().reset(seed=seed)


class Pictured(Counter):
    """Counts as above, and shows it as a picture only; an action of 1 pays 1."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def observe(self):
        return np.full((64, 64, 3), 40 * self.count, np.uint8)


class Drawn(gymnasium.Env):
    """Counts in a vector, and renders the count as a color, on 8 rows and 800 columns."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 9, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.count = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.array([self.count], np.float32), 0.5, self.count == 4, False, {}

    def render(self):
        return np.full((8, 800, 3), 50 * self.count, np.uint8) if self.render_mode == "rgb_array" else None


class Seeded(gymnasium.Env):
    """Observes a random number that it draws when it is reset."""

    action_space = spaces.MultiDiscrete([2, 3])
    observation_space = spaces.Discrete(1000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1000))
        return self.number, {}

    def step(self, action):
        return self.number, float(action[0] * 10 + action[1]), True, False, {}


class Sampled(gymnasium.Env):
    """Observes samples of a space, keeps the last one, and takes exactly what samples of its action space are like."""

    def __init__(self, obs=None, act=None, length=20):
        self.observation_space = spaces.Box(-1, 1, (2,)) if obs is None else obs
        self.action_space = spaces.Discrete(2) if act is None else act
        self.length = length

    def observe(self):
        self.seen = self.observation_space.sample()
        return self.seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not of {self.action_space}"
        sample = self.action_space.sample()
        assert type(action) is type(sample) and action.dtype == sample.dtype, f"{action!r} is not like {sample!r}"
        self.count += 1
        return self.observe(), 1.0, False, self.count >= self.length, {}


class Broken(Counter):
    """Breaks a rule of Gymnasium from the start."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        if rule == "space":
            self.observation_space = spaces.Dict({"text": spaces.Text(3)})
        if rule == "empty":
            self.observation_space = spaces.Dict({"nothing": spaces.Box(0, 1, (0,), np.float32)})
        if rule == "empty action":
            self.action_space = spaces.Box(0, 1, (0,), np.float32)
        if rule == "twice":
            box = spaces.Box(0, 1, (1,), np.float32)
            self.observation_space = spaces.Dict({"a/b": box, "a": spaces.Dict({"b": box})})
        if rule == "action":
            self.action_space = spaces.Box(0, 3, (2,), np.int32)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.rule == "missing":
            del obs["inner"]["count"]
        if self.rule == "overflow":
            obs["inner"]["count"] = np.array([1e39])  # finite as float64 only
        if self.rule == "float image":
            obs["camera"] = obs["camera"] / 255
        return obs if self.rule == "old reset" else (obs, info)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.rule == "old step":
            return obs, reward, terminated, info
        if self.rule == "reward":
            reward = None
        return obs, reward, 0 if self.rule == "flag" else terminated, truncated, info


class Alone(gymnasium.Env):
    """A simulator of which one may exist: it locks a file until its process ends. Pays 1 for each of its steps."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-1, 9, (2,), np.float32)

    def __init__(self, lock, length=4):
        self.length, self.count, self.file = length, 0, open(lock, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.full(2, self.count % 9, np.float32), 1.0, self.count == self.length, False, {}


def register(name, entry, **kwargs):
    """Makes an environment of this module known to this process; workers are told."""
    gymnasium.register(name, entry_point=f"{__name__}:{entry}", kwargs=kwargs)
    return f"gym:{name}"


gymnasium.register("WmjaxCounter-v0", Counter)


class Single(gymnasium.Env):
    """Of which only one may exist at a time, and which takes a while to go."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, lock):
        import fcntl

        self.file = open(lock, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def close(self):
        time.sleep(0.3)
        self.file.close()
