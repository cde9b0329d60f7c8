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
# # DreamerV1: learn to act by differentiating a dream
#
# The paper's idea in one line: imagine 15 steps with a learned model, add up what they are worth, and follow the
# gradient of that number through values, rewards, dynamics and actions into the actor. Everything below runs on a
# laptop's CPU. `STEPS` is the budget in environment steps (frames): with the registered budget the agent learns to
# swing a pendulum up from pixels; the default here only shows the mechanics.

# %%
import dataclasses
import os
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import dreaming
from wmjax.agents import dreamer_v1 as v1
from wmjax.loops import device
from wmjax.loops.rollout import Position, rollout
from wmjax.types import Trajectory

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 8000))
IMAGE_SIZE = int(os.environ.get("WMJAX_NOTEBOOK_SIZE", 32))
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Train
# A run is a folder. `wmjax.train` is what the command line calls.

# %%
run = wmjax.train(
    "dreamer_v1", "pendulum", steps=STEPS, image_size=IMAGE_SIZE, seed=0, out=f"{folder}/pendulum", progress=False
)
scores = run.evaluate(episodes=16)
print(f"mean return {scores.mean:.0f} over {scores.episodes} episodes (random: about -1200, good: about -150)")

# %% [markdown]
# ## Reconstructions and dreams
# The model sees the first four frames and predicts the rest from the actions alone. Its latents are Gaussian, so a
# dream blurs where the model is unsure.

# %%
agent, env, params = run.agent, run.env, run.state.variables
CONTEXT, SHOWN = 4, 12


@jax.jit
def play(params, key):
    env_state, step = jax.vmap(env.reset)(jax.random.split(key, 4))
    start = Position(env_state, step, agent.act_carry(params, 4))
    _, record = rollout(partial(agent.act, explore=True), env, params, key, start, SHOWN)
    return Trajectory(record.step, record.action, jnp.ones(record.step.reward.shape, bool), record.latent)


trajectory = play(params, jax.random.key(1))
predicted = jax.jit(lambda p, k, t: dreaming.open_loop(agent.model, p, k, t, CONTEXT))(
    params, jax.random.key(2), trajectory
)
figure, axes = plt.subplots(2, SHOWN, figsize=(13, 2.6))
for t in range(SHOWN):
    axes[0, t].imshow(np.asarray(trajectory.step.obs["image"][t, 0]))
    axes[1, t].imshow(np.asarray(predicted["image"][t, 0]).astype(np.uint8))
    axes[0, t].set_title("seen" if t < CONTEXT else "dreamed", fontsize=8)
for axis in axes.ravel():
    axis.axis("off")
figure.suptitle("truth above, model below")
figure.savefig(f"{folder}/dream.png")
plt.close(figure)

# %% [markdown]
# ## The gradient through the dream
# `imagine_behavior` follows the actor through imagination and is differentiable in the actor's parameters. The same
# gradient can be taken with respect to the actions: it says how each of them should have been different. Finite
# differences agree, because the noise of the latents is a function of the key.

# %%
start = agent.model.init_state(params, 4)


@jax.jit
def imagined_return(actions):
    policy, carry = dreaming.given_actions(actions)
    _, states, _ = dreaming.imagine(agent.model, params, jax.random.key(0), start, policy, 6, policy_carry=carry)
    reward, _ = agent.model.predict(params, states)
    return reward[1:].sum()


actions = jnp.zeros((6, 4, 1))
gradient = jax.grad(imagined_return)(actions)
print("how the imagined return of a start changes with each of its six actions:", gradient[:, 0, 0].round(4))
nudge = jnp.zeros_like(actions).at[0, 0, 0].set(1e-2)
finite = (imagined_return(actions + nudge) - imagined_return(actions - nudge)) / 2e-2
print(f"first action, by finite differences: {finite:.4f}, by the chain rule: {gradient[0, 0, 0]:.4f}")

# %% [markdown]
# ## Change one equation
# The actor climbs `targets`: λ-returns that end in the value of the last imagined state. Here is the agent whose
# returns are plain sums of imagined rewards instead, without values: replace the function, make the agent, train.
# (This one is an option, too: `bootstrap=False, lambda_=1`.)

# %%
lambda_targets = v1.targets


def plain_sums(imagined, config):
    """Discounted sums of the rewards up to the horizon."""

    def add(later, now):
        total = now[0] + now[1] * later
        return total, total

    reward, discount = imagined.reward, imagined.discount
    return jax.lax.scan(add, reward[-1], (reward[:-1], discount[:-1]), reverse=True)[1]


v1.targets = plain_sums
try:
    mine = v1.dreamer_v1(env.spec, dataclasses.replace(run.config, prefill=20 * run.config.num_envs))
    state = jax.jit(lambda key: device.init(mine, env, key))(jax.random.key(0))
    prefill, train = mine.recipe.stages
    state, _ = device.compile_stage(mine, env, prefill)(state, prefill.iterations)
    learn = device.compile_stage(mine, env, train)  # one compiled program: acting, replay and learning
    state, before = learn(device.next_stage(state), 2)
    state, after = learn(state, max(20, STEPS // 100))
finally:
    v1.targets = lambda_targets
print(f"image loss: {before['train/loss/decode/image']:.0f} -> {after['train/loss/decode/image']:.0f}")
print(f"imagined return over {run.config.horizon} steps: {after['train/return_mean']:.1f}")
assert after["train/loss/decode/image"] < before["train/loss/decode/image"]
