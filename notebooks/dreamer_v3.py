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
# # DreamerV3: train it, look at its dreams, change a loss term
#
# Everything below runs on a laptop's CPU. `STEPS` is the budget in environment steps: with the registered 32,000 the
# agent learns `catch` from pixels; the default here only shows the mechanics.

# %%
import os
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import dreaming
from wmjax.agents import dreamer_v3 as v3
from wmjax.loops import device
from wmjax.loops.rollout import Position, rollout
from wmjax.types import Trajectory

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 3000))
IMAGE_SIZE = int(os.environ.get("WMJAX_NOTEBOOK_SIZE", 64))
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Train
# A run is a folder. `wmjax.train` is what the command line calls.

# %%
run = wmjax.train(
    "dreamer_v3", "catch", steps=STEPS, image_size=IMAGE_SIZE, seed=0, out=f"{folder}/catch", progress=False
)
scores = run.evaluate(episodes=32)
print(f"mean return {scores.mean:.2f} over {scores.episodes} episodes (random: about -0.6, best: 1)")

# %% [markdown]
# ## Reconstructions and dreams
# An agent is a tuple of pure functions. We play some episodes, let the model see the first three frames of each, and
# have it predict the rest from the actions alone.

# %%
agent, env, params = run.agent, run.env, run.state.variables


@jax.jit
def play(params, key):
    env_state, step = jax.vmap(env.reset)(jax.random.split(key, 4))
    start = Position(env_state, step, agent.act_carry(params, 4))
    _, record = rollout(partial(agent.act, explore=False), env, params, key, start, 9)
    return Trajectory(record.step, record.action, jnp.ones(record.step.reward.shape, bool), record.latent)


trajectory = play(params, jax.random.key(1))
CONTEXT = 3
predicted = jax.jit(lambda p, k, t: dreaming.open_loop(agent.model, p, k, t, CONTEXT))(
    params, jax.random.key(2), trajectory
)
figure, axes = plt.subplots(2, 9, figsize=(13, 3.2))
for t in range(9):
    axes[0, t].imshow(np.asarray(trajectory.step.obs["image"][t, 0]))
    axes[1, t].imshow(np.asarray(predicted["image"][t, 0]).astype(np.uint8))
    axes[0, t].set_title("seen" if t < CONTEXT else "dreamed", fontsize=8)
for axis in axes.ravel():
    axis.axis("off")
figure.suptitle("truth above, model below")
figure.savefig(f"{folder}/dream.png")
plt.close(figure)

# %% [markdown]
# ## Imagine, and differentiate
# Imagination is a scan, so a gradient passes through it: how would the imagined return of a start state change
# with the actions?

# %%
start = agent.model.init_state(params, 4)


def imagined_return(actions):
    policy, carry = dreaming.given_actions(actions)
    _, states, _ = dreaming.imagine(agent.model, params, jax.random.key(0), start, policy, 5, policy_carry=carry)
    reward, _ = agent.model.predict(params, states)
    return reward.sum()


actions = jax.nn.one_hot(jnp.ones((5, 4), int), env.spec.action.n)
gradient = jax.jit(jax.grad(imagined_return))(actions)
print("sensitivity of the imagined return by step:", np.abs(np.asarray(gradient)).sum((1, 2)).round(4))

# %% [markdown]
# ## Change one loss term
# The equations that research changes are arguments. Here is DreamerV3 whose decoder minimizes the absolute instead of
# the squared error of pictures: `reconstruction` is the loss on one entry of the observations.


# %%
def absolute(output, target, space, config):
    """L1 on images, the paper's loss on everything else."""
    if len(space.shape) != 3:
        return v3.reconstruction_loss(output, target, space, config)
    return jnp.sum(jnp.abs(output - target.astype(jnp.float32) / 255), (-3, -2, -1))


mine = v3.dreamer_v3(env.spec, run.config, equations=v3.Equations(reconstruction=absolute))
state = jax.jit(lambda key: device.init(mine, env, key))(jax.random.key(0))
prefill, train = mine.recipe.stages
state, _ = device.compile_stage(mine, env, prefill)(state, prefill.iterations)
learn = device.compile_stage(mine, env, train)  # one compiled program: acting, replay and learning
state, before = learn(device.next_stage(state), 2)
state, after = learn(state, max(20, STEPS // 100))
print(f"L1 image loss: {before['train/loss/decode/image']:.0f} -> {after['train/loss/decode/image']:.0f}")
assert after["train/loss/decode/image"] < before["train/loss/decode/image"]
