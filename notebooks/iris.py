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
# # IRIS: images as tokens, dreams token by token
#
# Micheli, Alonso, Fleuret, *Transformers are Sample-Efficient World Models* ([arXiv
# 2209.00588](https://arxiv.org/abs/2209.00588)). The code is the folder `wmjax/agents/iris/`, a file for each part; its
# page is `docs/papers/iris.md`.
#
# ## The idea
#
# A tokenizer makes a few tokens of a picture: an encoder $E$ gives vectors, each of which becomes the number of the
# nearest entry $e_k$ of a learned codebook, and a decoder $D$ draws what the entries say,
#
# $$z^i = \arg\min_k \Vert E(x)^i - e_k \Vert, \qquad
# L = \Vert x - D(z) \Vert_1 + \Vert \mathrm{sg}(E(x)) - e_z \Vert^2 + \Vert E(x) - \mathrm{sg}(e_z) \Vert^2
# + L_{\mathrm{perceptual}}.$$
#
# A transformer reads frames and actions, $z_0^1 \dots z_0^K, a_0, z_1^1 \dots$, and predicts what follows,
#
# $$p(z_{t+1}^k \mid z_{\le t}, a_{\le t}, z_{t+1}^{<k}), \qquad p(r_t \mid z_{\le t}, a_{\le t}), \qquad
# p(d_t \mid z_{\le t}, a_{\le t}),$$
#
# by cross-entropy: the next token, the sign of the reward, the end. A dream draws token after token. The actor-critic
# learns in such dreams alone, from decoded frames and from λ-returns that are cut at drawn ends.

# %%
import dataclasses
import inspect
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import wmjax
from wmjax import figures
from wmjax.agents import iris
from wmjax.agents.iris import behavior, dynamics, tokenizer
from wmjax.ops import vq
from wmjax.types import Trajectory

PRETRAINED = "iris/catch"
STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 600))  # of gradient, of what is trained here
folder = tempfile.mkdtemp()

# %% [markdown]
# ## The equations in the package
#
# The nearest entry, the gradient past it, and the tokenizer's terms:

# %%
print(inspect.getsource(vq.nearest))
print(inspect.getsource(vq.straight_through))
print(inspect.getsource(tokenizer.tokenizer_losses))

# %% [markdown]
# The three cross-entropies of the transformer, and how a frame is drawn, token by token:

# %%
print(inspect.getsource(dynamics.world_model_losses))
print(inspect.getsource(dynamics.next_frame))

# %% [markdown]
# The actor-critic:

# %%
print(inspect.getsource(behavior.actor_critic_losses))

# %% [markdown]
# ## A trained run
#
# One comes with the package; `wmjax list pretrained` says by which command it was trained.

# %%
run = wmjax.load(f"pretrained:{PRETRAINED}")
scores = run.evaluate(episodes=32)
print(f"{run.title()}: mean return {scores.mean:.2f} over {scores.episodes} episodes (random play: -0.6, best: 1)")

# %% [markdown]
# ## What it sees
#
# `figures.open_loop` plays episodes, lets the model see the first steps of each, and has it predict the rest from the
# actions alone. First the frames that it saw:

# %%
env, params = run.env, run.state.variables
seen = figures.open_loop(run.agent, env, params, jax.random.key(1))
figures.write_reconstructions(f"{folder}/seen.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/seen.png")

# %% [markdown]
# ## What it dreams
#
# Green: the model sees the frame. Orange: it sees nothing but the actions.

# %%
figures.write_dream_strip(f"{folder}/dream.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/dream.png")

# %% [markdown]
# The error over all such windows, beside two guesses that know no dynamics:

# %%
errors = figures.horizon_errors(seen, seen.context)
figures.plot_horizon_errors(f"{folder}/errors.png", errors, seen.context, run.title())
figures.show(f"{folder}/errors.png")

# %% [markdown]
# ## Images to tokens and back
#
# `iris.encode` gives the tokens of a frame, `iris.decode` what the policy sees of it. Each cell of the grid is one
# token: the number of an entry of the codebook.

# %%
nets, config = iris.networks(env.spec, run.config), run.config
records = figures.play(run.agent, env, params, jax.random.key(2), 8, 9)
image = records.step.obs["image"]
tokens = iris.encode(nets, config, params, image[:, 0])  # [9, K]
drawn = iris.decode(nets, params, tokens)
side = round(tokens.shape[-1] ** 0.5)
fig, axes = plt.subplots(3, 5, figsize=(9, 5.4))
for t, column in enumerate(axes.T):
    column[0].imshow(image[t, 0])
    column[1].imshow(np.reshape(tokens[t], (side, side)), cmap="tab20")
    for (i, j), token in np.ndenumerate(np.reshape(tokens[t], (side, side))):
        column[1].text(j, i, token, ha="center", va="center", fontsize=7)
    column[2].imshow(drawn[t])
    for axis in column:
        axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## Change an equation
#
# `iris.Equations` holds the functions of the paper; each of them may be another one. The paper's reconstruction loss is
# a mean of absolute errors, in which a small ball hardly counts. Here the worst pixel of each picture counts too.


# %%
def worst(x, y, config):
    """How far images `[B, H, W, C]` are apart, `[B]`: the mean absolute error, and that of the worst pixel."""
    absolute = jnp.abs(x - y)
    return absolute.mean((-3, -2, -1)) + 0.1 * absolute.mean(-1).max((-2, -1))


# %% [markdown]
# `wmjax.train("iris", "catch", equations=iris.Equations(reconstruction=worst))` trains a run with it. To see the
# tokenizer alone we take its update out of the agent's recipe, and make some steps on the frames above, from new
# parameters or from given ones.

# %%
frames = image.reshape(1, -1, *image.shape[2:])
nothing = jnp.zeros(frames.shape[:2])
batch = Trajectory(records.step._replace(obs={"image": frames}, reward=nothing), nothing, nothing == 0, ())


def learned(equations=None, weights=None, **fields):
    """A tokenizer after some updates, and the perplexity of its codebook before each."""
    agent = iris.iris(env.spec, dataclasses.replace(config, **fields), equations=equations)
    update = next(update for update in agent.recipe.stages[-1].updates if update.name == "tokenizer")

    @jax.jit
    def train(key, batch):
        state = agent.init(key)
        state = state._replace(params=state.params | ({} if weights is None else {"tokenizer": weights}))

        def step(state, key):
            state, metrics, _ = update.fn(state, key, batch)
            return state, metrics["perplexity"]

        return jax.lax.scan(step, state, jax.random.split(key, STEPS))

    state, perplexity = train(jax.random.key(0), batch)
    return state.params, perplexity


rows = {"truth": image[5] / 255}
for name, equations in {"mean": iris.Equations(), "mean and worst": iris.Equations(reconstruction=worst)}.items():
    trained, _ = learned(equations, recon_loss="l1")
    rows[name] = iris.decode(nets, trained, iris.encode(nets, config, trained, image[5]))
    print(f"{name:15s} absolute error: mean {np.abs(rows[name] - rows['truth']).mean():.4f}, ", end="")
    print(f"worst pixel {np.abs(rows[name] - rows['truth']).mean(-1).max((-2, -1)).mean():.2f}")
fig, axes = plt.subplots(len(rows), 8, figsize=(10, 4))
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(np.clip(picture, 0, 1))
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)

# %% [markdown]
# ## A codebook that collapsed, and what mends it
#
# A collapsed codebook uses few of its entries; its *perplexity* says how many. Here all entries but one are moved far
# away, and the tokenizer trains on from there: without help, and with `codebook_reset`, a field of the configuration,
# which moves entries that are hardly used to where latents are.

# %%
far = params["tokenizer"] | {"codebook": params["tokenizer"]["codebook"].at[1:].add(100.0)}
fig, axis = plt.subplots(figsize=(6, 3))
for reset in (0.0, 0.1):
    _, perplexity = learned(weights=far, codebook_reset=reset)
    axis.plot(perplexity, label=f"codebook_reset={reset}")
axis.set(xlabel="update", ylabel="perplexity")
axis.legend()
plt.show()

# %% [markdown]
# What else may be changed: `docs/equations.md`.
