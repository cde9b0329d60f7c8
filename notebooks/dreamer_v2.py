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
# # DreamerV2: categorical latents, and three gradients for one actor
#
# Everything below runs on a laptop's CPU. `STEPS` is the budget in environment steps: with the registered budget the
# agent learns `catch` from pixels; the default here only shows the mechanics.

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
from wmjax.agents import dreamer_v2 as v2
from wmjax.loops import device
from wmjax.loops.rollout import Position, rollout
from wmjax.types import Trajectory

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 4000))
IMAGE_SIZE = int(os.environ.get("WMJAX_NOTEBOOK_SIZE", 64))
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Train
# A run is a folder. `wmjax.train` is what the command line calls.

# %%
run = wmjax.train(
    "dreamer_v2", "catch", steps=STEPS, image_size=IMAGE_SIZE, seed=0, out=f"{folder}/catch", progress=False
)
scores = run.evaluate(episodes=32)
print(f"mean return {scores.mean:.2f} over {scores.episodes} episodes (random: about -0.6, best: 1)")

# %% [markdown]
# ## What the latents say
# A state is a recurrent vector and a handful of categorical choices. We play an episode, filter it, and look at which
# class each latent takes, step by step; then the model sees three frames only and dreams the rest.

# %%
agent, env, params, config = run.agent, run.env, run.state.variables, run.config
CONTEXT, SHOWN = 3, 9


@jax.jit
def play(params, key):
    env_state, step = jax.vmap(env.reset)(jax.random.split(key, 4))
    start = Position(env_state, step, agent.act_carry(params, 4))
    _, record = rollout(partial(agent.act, explore=False), env, params, key, start, SHOWN)
    return Trajectory(record.step, record.action, jnp.ones(record.step.reward.shape, bool), record.latent)


@jax.jit
def watch(params, key, trajectory):
    prev_action = jnp.concatenate([jnp.zeros_like(trajectory.action[:1]), trajectory.action[:-1]])
    embed = agent.model.encode(params, trajectory.step.obs)
    start = agent.model.init_state(params, 4)
    return dreaming.observe(agent.model, params, key, start, prev_action, embed, trajectory.step.is_first)[1]


trajectory = play(params, jax.random.key(1))
states = watch(params, jax.random.key(2), trajectory)
predicted = jax.jit(lambda p, k, t: dreaming.open_loop(agent.model, p, k, t, CONTEXT))(
    params, jax.random.key(2), trajectory
)
figure, axes = plt.subplots(3, SHOWN, figsize=(13, 4.5))
for t in range(SHOWN):
    axes[0, t].imshow(np.asarray(trajectory.step.obs["image"][t, 0]))
    axes[1, t].imshow(np.asarray(predicted["image"][t, 0]).astype(np.uint8))
    axes[2, t].imshow(np.asarray(states.stoch[t, 0]), cmap="gray")
    axes[0, t].set_title("seen" if t < CONTEXT else "dreamed", fontsize=8)
for axis in axes.ravel():
    axis.axis("off")
figure.suptitle("truth, model, and the class (column) of each latent (row)")
figure.savefig(f"{folder}/dream.png")
plt.close(figure)
print("classes of the latents, step by step:")
print(np.asarray(states.stoch[:, 0].argmax(-1)))

# %% [markdown]
# ## Three gradients
# The actor can follow REINFORCE (unbiased, noisy), the derivative through the straight-through latents (biased,
# smooth), or a mix. Given the same imagined trajectories they point in different directions; the cosine says how
# different.

# %%
parts = v2.assemble(env.spec, config)
rows = 32
start = jax.tree.map(lambda x: jnp.broadcast_to(x[4, :1], (rows, *x.shape[2:])), states)
keys, alive = jax.random.split(jax.random.key(3), rows), jnp.zeros(rows, bool)
trained = {name: params[name] for name in ("actor", "critic")}


def gradient(mode):
    own = parts._replace(config=dataclasses.replace(config, actor_grad=mode))
    loss = lambda trained: v2.behavior_loss(own, params, trained, keys, start, alive)[0]
    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(trained)["actor"])
    return np.concatenate([np.ravel(x) for x in leaves])


reinforce, dynamics = gradient("reinforce"), gradient("dynamics")
cosine = reinforce @ dynamics / (np.linalg.norm(reinforce) * np.linalg.norm(dynamics) + 1e-12)
print(f"norms: reinforce {np.linalg.norm(reinforce):.4f}, dynamics {np.linalg.norm(dynamics):.4f}; cosine {cosine:.2f}")

# %% [markdown]
# ## Change one loss term
# The decoder's likelihood is one function. Here is DreamerV2 whose decoder minimizes the absolute instead of the
# squared error: replace the function, make the agent, train.

# %%
normal = v2.strided_codec.log_prob


def laplace(output, target, space):
    """L1 on images, the paper's likelihood on everything else."""
    if not v2.spaces.is_image(space):
        return normal(output, target, space)
    return -jnp.sum(jnp.abs(output - (target.astype(jnp.float32) / 255 - 0.5)), (-3, -2, -1))


v2.strided_codec.log_prob = laplace
try:
    mine = v2.dreamer_v2(env.spec, config)
    state = jax.jit(lambda key: device.init(mine, env, key))(jax.random.key(0))
    prefill, train = mine.recipe.stages
    state, _ = device.compile_stage(mine, env, prefill)(state, prefill.iterations)
    learn = device.compile_stage(mine, env, train)  # one compiled program: acting, replay and learning
    state, before = learn(device.next_stage(state), 2)
    state, after = learn(state, max(20, STEPS // 100))
finally:
    v2.strided_codec.log_prob = normal
print(f"L1 image loss: {before['train/loss/decode/image']:.0f} -> {after['train/loss/decode/image']:.0f}")
assert after["train/loss/decode/image"] < before["train/loss/decode/image"]
