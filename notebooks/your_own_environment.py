# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own environment
#
# Two ways, for one small game: in JAX, as a `RawEnv` of pure functions, which then runs inside of the compiled program;
# and as a `gymnasium.Env`, which runs in worker processes. Agents, run folders and commands are the same for both.
#
# The game: four lamps in a row, of which one is lit. Press the button under it for a reward of 1. The light then moves
# on to the right, and from the last lamp to the first. After 12 steps it is over: 12 is the best return, 3 is chance.

# %%
import os
import tempfile

import gymnasium
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import figures

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 3000))  # of the environment
LAMPS, SIDE, LIMIT = 4, 16, 12
ON, OFF = (255, 200, 60), (40, 40, 60)
SHORT = dict(steps=STEPS, prefill=512, batch_size=8, progress=False)  # two are fields of the agent's configuration
folder = tempfile.mkdtemp()

# %% [markdown]
# ## In JAX
#
# A `RawEnv` is an `EnvSpec`, which says what is observed and what actions there are, and three pure functions. `reset`
# makes a state, any tree of arrays. `step` gives the next state and an `Outcome`. `observe` draws a state. Rules and
# looks are apart, so that pictures are drawn only once where an episode ends and the next one begins in the same step.
#
# `is_terminal` says that the episode ends by its own rules, so that nothing is worth anything afterwards; `is_last`
# that it ends, for whatever reason. This game has no end of its own, only a limit, which `time_limit` adds.

# %%
spec = wmjax.EnvSpec({"image": wmjax.Box(0, 255, (SIDE, SIDE, 3), "uint8")}, wmjax.Discrete(LAMPS))


def reset(key):
    return jax.random.randint(key, (), 0, LAMPS)


def step(key, lit, action):
    over = jnp.bool_(False)
    return (lit + 1) % LAMPS, wmjax.Outcome(reward=jnp.float32(action == lit), is_last=over, is_terminal=over)


def observe(lit):
    lamp = jnp.arange(SIDE) * LAMPS // SIDE  # of each column of pixels
    row = jnp.where((lamp == lit)[:, None], jnp.array(ON), jnp.array(OFF))
    return {"image": jnp.broadcast_to(row, (SIDE, SIDE, 3)).astype(jnp.uint8)}


lamps = wmjax.time_limit(wmjax.RawEnv(spec, reset, step, observe), LIMIT)

# %% [markdown]
# `auto_reset` makes an `Env` of it, whose `step` begins a new episode after the last record of one. `train` does so by
# itself; here it lets us look at what the agent will see. Batches of environments come from `vmap`, time from `scan`.


# %%
@jax.jit
def play(key):
    """Records `[T, B]` of random play."""
    env, keys = wmjax.auto_reset(lamps), jax.random.split(key, LIMIT)
    state, _ = jax.vmap(env.reset)(jax.random.split(keys[0], 2))

    def step(state, key):
        actions = jax.random.randint(key, (2,), 0, LAMPS)
        state, record = jax.vmap(env.step)(jax.random.split(key, 2), state, actions)
        return state, record

    return jax.lax.scan(step, state, keys)[1]


records = play(jax.random.key(0))
fig, axes = plt.subplots(1, 8, figsize=(10, 1.7))
for t, axis in enumerate(axes):
    axis.imshow(records.obs["image"][t, 0])
    axis.set(title=f"reward {records.reward[t, 0]:.0f}", xticks=[], yticks=[])

# %% [markdown]
# Any agent that takes such observations and actions trains on it. Shapes, dtypes and bounds are compared with the spec
# before anything runs.

# %%
run = wmjax.train("dreamer_v3", lamps, out=f"{folder}/lamps", **SHORT)
scores = run.evaluate(episodes=64)
print(f"mean return {scores.mean:.1f} over {scores.episodes} episodes (chance 3, best 12)")

# %% [markdown]
# These few steps are enough for the world model to learn how the light moves; whether the actor makes use of it already
# depends on the seed. The model sees some frames of an episode and predicts the rest from the actions alone:

# %%
seen = figures.open_loop(run.agent, run.env, run.state.variables, jax.random.key(1))
figures.write_dream_strip(f"{folder}/strip.png", seen, seen.context, "image", f"Lamps after {run.step:,} steps")
figures.show(f"{folder}/strip.png")

# %% [markdown]
# A run is read back from its folder. The game was a value of this notebook, which no name finds again, so it is given
# once more:

# %%
again = wmjax.load(f"{folder}/lamps", env=lamps)
print(again.description["agent"], again.step, again.config == run.config)

# %% [markdown]
# ## In Gymnasium
#
# The same game as a class. `wmjax.train` starts environments of it in worker processes, reads its spaces, and keeps
# `terminated` and `truncated` apart. `max_episode_steps`, in `env_args`, is that of `gymnasium.make`.


# %%
class Lamps(gymnasium.Env):
    """Press the button of the lamp that is lit."""

    observation_space = gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(LAMPS)

    def picture(self):
        lit = np.arange(SIDE) * LAMPS // SIDE == self.lit
        row = np.where(lit[:, None], np.array(ON), np.array(OFF)).astype(np.uint8)
        return np.broadcast_to(row, (SIDE, SIDE, 3)).copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lit = int(self.np_random.integers(LAMPS))
        return self.picture(), {}

    def step(self, action):
        reward = float(action == self.lit)
        self.lit = (self.lit + 1) % LAMPS
        return self.picture(), reward, False, False, {}


game = wmjax.train("dreamer_v3", Lamps, env_args={"max_episode_steps": LIMIT}, out=f"{folder}/gym", **SHORT)
scores = game.evaluate(episodes=16)
print(f"mean return {scores.mean:.1f} over {scores.episodes} episodes (chance 3, best 12)")

# %% [markdown]
# `run.act` takes the environment's own observation and gives the environment's own action, for any program that plays:

# %%
env = Lamps()
obs, _ = env.reset(seed=0)
fig, axes = plt.subplots(1, 8, figsize=(10, 1.7))
reward, total = 0.0, 0.0
for t, axis in enumerate(axes):
    action = game.act(obs, is_first=t == 0, reward=reward)
    axis.imshow(obs)
    axis.set(title=f"presses {action + 1}", xticks=[], yticks=[])
    obs, reward, *_ = env.step(action)
    total += reward
print(f"{total:.0f} of {len(axes)} lamps were hit")

# %% [markdown]
# ## What is wrong is said before training
#
# Here `observe` gives floats where the spec says bytes:

# %%
wrong = lamps._replace(observe=lambda state: {"image": lamps.observe(state)["image"] / 255})
try:
    wmjax.train("dreamer_v3", wrong, out=f"{folder}/wrong", **SHORT)
except wmjax.UsageError as error:
    print(error)

# %% [markdown]
# ## Further
#
# `docs/environments.md` has all ways to hand one over, by the command line too, what is read of other libraries, and
# what happens when a worker dies. A registered name, `gym:FILE.py:NAME`, lets `wmjax eval` and `wmjax dream` find the
# environment again in a new process.
