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
# # IRIS: images as tokens, dreams token by token, and a codebook that stays alive
#
# Everything below runs on a laptop's CPU. `STEPS` is the budget in environment steps, and the schedule is
# shortened to it: with the preset's own the agent learns `catch` from pixels; here only the mechanics are shown.

# %%
import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import dreaming
from wmjax.agents import iris
from wmjax.types import Trajectory

STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 4000))
IMAGE_SIZE = int(os.environ.get("WMJAX_NOTEBOOK_SIZE", 64))
folder = tempfile.mkdtemp()

# %% [markdown]
# ## Train
# A recipe is a value: epochs that only collect, then train the tokenizer, then the world model too, then everything.
# Here the phases are shortened to a few epochs.

# %%
per_epoch = 128  # env steps: 16 environments, 8 steps each
third = max(1, STEPS // per_epoch // 3)
run = wmjax.train(
    "iris", "catch", steps=STEPS, image_size=IMAGE_SIZE, seed=0, out=f"{folder}/catch", progress=False,
    tokenizer_after=2, world_model_after=2 + third, actor_critic_after=2 + 2 * third,
)  # fmt: skip
for stage in run.agent.recipe.stages:
    print(f"{stage.name:12s} {stage.iterations or 'the rest':>8} epochs, updates: {[u.name for u in stage.updates]}")
scores = run.evaluate(episodes=32)
print(f"mean return {scores.mean:.2f} over {scores.episodes} episodes (random: about -0.6, best: 1)")

# %% [markdown]
# ## Images to tokens and back
# `encode` gives the tokens of a frame, `decode` what the policy sees of it.

# %%
agent, env, params, config = run.agent, run.env, run.state.variables, run.config
nets = iris.networks(env.spec, config)


@jax.jit
def play(key):
    """Random play: records `[9, 4]`."""
    state, first = jax.vmap(env.reset)(jax.random.split(key, 4))

    def step(carry, key):
        state, record = carry
        action = jax.nn.one_hot(jax.random.randint(key, (4,), 0, env.spec.action.n), env.spec.action.n)
        state, following = jax.vmap(env.step)(jax.random.split(key, 4), state, action)
        return (state, following), (record, action)

    _, (records, actions) = jax.lax.scan(step, (state, first), jax.random.split(key, 9))
    return Trajectory(records, actions, jnp.ones((9, 4), bool), ())


trajectory = play(jax.random.key(1))
image = trajectory.step.obs["image"]
tokens = jax.jit(lambda p, x: iris.encode(nets, config, p, x))(params, image)
seen = jax.jit(lambda p, t: iris.decode(nets, p, t))(params, tokens)
side = int(tokens.shape[-1] ** 0.5)
print("the first frame's tokens:\n", np.asarray(tokens[0, 0]).reshape(side, side))
print("mean absolute error:", float(jnp.abs(seen - image / 255).mean()))

# %% [markdown]
# ## Dream
# `generate` continues a frame token by token, the key-value cache inside one `scan`. Every agent's model also does what
# `dreaming` asks of it: here it sees three frames and predicts the rest from the actions.

# %%
dream, frames = jax.jit(lambda p, k, t: iris.generate(nets, agent.model, p, k, t, 8))(
    params, jax.random.key(2), tokens[0]
)
print("generated tokens", dream.tokens.shape, "rewards drawn", np.asarray(dream.reward[:, 0]))
CONTEXT = 3
predicted = jax.jit(lambda p, k, t: dreaming.open_loop(agent.model, p, k, t, CONTEXT))(
    params, jax.random.key(3), trajectory
)["image"]
figure, axes = plt.subplots(3, 9, figsize=(13, 4.8))
for t in range(9):
    for row, picture in enumerate((image[t, 0], predicted[t, 0].astype(jnp.uint8), frames[t, 0])):
        axes[row, t].imshow(np.asarray(picture))
        axes[row, t].axis("off")
figure.suptitle("truth; three frames seen, then predicted; generated with random actions")
figure.savefig(f"{folder}/dream.png")
plt.close(figure)

# %% [markdown]
# ## A collapsed codebook, and what mends it
# A collapsed codebook uses few of its entries. `perplexity`, `usage` and `dead` are logged; `codebook="ema"`,
# `codebook="ema_cosine"`, `codebook_reset`, `commit_scale` and `vocab_size` are the switches. Here all entries but one
# are moved far away, and the tokenizer trains on from there, without help and with `codebook_reset`.


# %%
def train_tokenizer(**switches):
    """Perplexity after some updates that start from a collapsed codebook."""
    mine = iris.iris(env.spec, dataclasses.replace(config, **switches))
    learn = mine.recipe.stages[-1].updates[0].fn
    weights = params["tokenizer"]
    far = weights["codebook"].at[1:].add(100.0)
    state = run.state._replace(params=params | {"tokenizer": weights | {"codebook": far}})
    frames = image.reshape(1, -1, *image.shape[2:])
    nothing = jnp.zeros(frames.shape[:2])
    step = trajectory.step._replace(obs={"image": frames}, reward=nothing)
    batch = Trajectory(step, nothing, nothing > -1, ())

    @jax.jit
    def learn_on(state, key):
        return jax.lax.scan(lambda s, k: learn(s, k, batch)[:2], state, jax.random.split(key, 150))

    _, metrics = learn_on(state, jax.random.key(0))
    return np.asarray(metrics["perplexity"])


alone, helped = train_tokenizer(), train_tokenizer(codebook_reset=0.1)
print(f"perplexity after 150 updates: {alone[-1]:.1f} without help, {helped[-1]:.1f} with codebook_reset=0.1")
assert helped[-1] > alone[-1]
