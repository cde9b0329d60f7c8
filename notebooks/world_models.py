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
# # World Models: see, remember, and evolve a controller in a dream
#
# Ha & Schmidhuber, *World Models* ([arXiv 1803.10122](https://arxiv.org/abs/1803.10122)). The code is the folder
# `wmjax/agents/world_models/`, a file for each part; its page is `docs/papers/world_models.md`.
#
# ## The idea
#
# Three parts, trained one after the other. **V** sees: a variational autoencoder makes a few numbers $z_t$ of a picture
# $x_t$,
#
# $$z = \mu(x) + \sigma(x)\,\epsilon, \qquad
# L_V = \Vert x - \hat x(z) \Vert^2
# + \beta \max\big(\tau Z,\; \mathrm{KL}[\mathcal N(\mu, \sigma) \Vert \mathcal N(0, 1)]\big).$$
#
# **M** remembers: an LSTM predicts the next $z$ as a mixture of normal distributions, for the future is not certain,
#
# $$h_{t+1} = \mathrm{LSTM}(h_t, z_t, a_t), \qquad L_M = -\ln \sum_k \pi_k(h_{t+1})\,
# \mathcal N\big(z_{t+1};\, \mu_k(h_{t+1}), \sigma_k(h_{t+1})\big).$$
#
# **C** acts: $a_t = \tanh(W [z_t, h_t] + b)$, so few numbers that CMA-ES can search for them: draw a population of
# controllers from a normal distribution, let each play, move the distribution towards the best. The play may be real,
# or it may be a dream of M alone.

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
from wmjax import dreaming, evolution, figures
from wmjax.agents import world_models as wm
from wmjax.agents.world_models import controller, memory, vision
from wmjax.ops import mixture
from wmjax.types import Trajectory

PRETRAINED = "world_models/catch"
STEPS = int(os.environ.get("WMJAX_NOTEBOOK_STEPS", 400))  # of gradient, of what is trained here
folder = tempfile.mkdtemp()

# %% [markdown]
# ## The equations in the package
#
# V's loss, and the floor under its KL; M's likelihood; C:

# %%
print(inspect.getsource(vision.kl_floor))
print(inspect.getsource(vision.vision_loss))

# %%
print(inspect.getsource(mixture.Mixture.log_prob))
print(inspect.getsource(memory.memory_loss))

# %%
print(inspect.getsource(controller.controller))

# %% [markdown]
# ## A trained run
#
# One comes with the package; `wmjax list pretrained` says by which command it was trained. Its stages follow each
# other: records are collected, V learns, then M, and then C is evolved.

# %%
run = wmjax.load(f"pretrained:{PRETRAINED}")
for stage in run.agent.recipe.stages:
    print(f"stage {stage.name}: {stage.iterations} iterations, each with {len(stage.updates)} kinds of updates")
scores = run.evaluate(episodes=64)
print(f"mean return {scores.mean:.2f} over {scores.episodes} episodes (random play: -0.6, best: 1)")

# %% [markdown]
# ## What V sees
#
# `figures.open_loop` plays episodes, lets the model see the first steps of each, and has it predict the rest from the
# actions alone. First the frames that it saw:

# %%
env, params = run.env, run.state.variables
seen = figures.open_loop(run.agent, env, params, jax.random.key(1))
figures.write_reconstructions(f"{folder}/seen.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/seen.png")

# %% [markdown]
# ## What M dreams
#
# Green: the model sees the frame. Orange: it sees nothing but the actions.

# %%
figures.write_dream_strip(f"{folder}/dream.png", seen, seen.context, "image", run.title())
figures.show(f"{folder}/dream.png")

# %%
errors = figures.horizon_errors(seen, seen.context)
figures.plot_horizon_errors(f"{folder}/errors.png", errors, seen.context, run.title())
figures.show(f"{folder}/errors.png")

# %% [markdown]
# ## Change the temperature of dreams
#
# `temperature` is a field of the configuration: it divides the logits of the mixture and widens its components, so that
# dreams are less certain than M is. The paper evolves Doom's controller at 1.15, so that it does not learn to exploit
# M's mistakes. The parameters stay the same; only the agent is made anew.


# %%
def dream_at(temperature):
    """The same windows, predicted at a temperature: `[T, B, H, W, C]`."""
    agent = wm.world_models(env.spec, dataclasses.replace(run.config, temperature=temperature))
    records = figures.play(agent, env, params, jax.random.key(1), 4, 9)
    batch = Trajectory(records.step, records.action, jnp.ones(records.action.shape[:2], bool), ())
    predict = jax.jit(lambda params, batch: dreaming.open_loop(agent.model, params, jax.random.key(2), batch, 2))
    return records.step.obs["image"], predict(params, batch)["image"]


temperatures = (0.1, 1.0, 3.0)
truth, _ = dream_at(1.0)
rows = {"truth": truth} | {f"τ = {t}": dream_at(t)[1] for t in temperatures}
fig, axes = plt.subplots(len(rows), 8, figsize=(10, 5.2))
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for t, axis in enumerate(row):
        axis.imshow(np.clip(pictures[t, 0], 0, 255).astype(np.uint8))
        axis.set(xticks=[], yticks=[], title=("sees" if t < 2 else f"+{t - 1}") if row is axes[0] else "")
    row[0].set_ylabel(name)

# %% [markdown]
# ## Change an equation
#
# `wm.Equations` holds the functions of the paper; each of them may be another one. The paper's squared error is taken
# behind a sigmoid, whose slope is next to nothing where a pixel is black: so is the gradient where it should not be,
# and a small ball is learned late. The gradient of a cross-entropy is the error itself, however sure the output is.


# %%
def cross_entropy(output, target, config):
    """V's reconstruction loss, `[B]`: pixels as probabilities."""
    on, off = jnp.maximum(output, 1e-30), jnp.maximum(1 - output, 1e-7)  # the sigmoid may be 0 or 1 in float32
    return -jnp.sum(target * jnp.log(on) + (1 - target) * jnp.log(off), (-3, -2, -1))


# %% [markdown]
# `wmjax.train("world_models", "catch", equations=wm.Equations(reconstruction=cross_entropy))` trains a run with it; the
# preset has it as `recon_loss="bce"`, so here we ask for the paper's. To see V alone we take its update out of the
# agent's recipe, and make some steps on the frames of a few episodes.


# %%
papers = dataclasses.replace(run.config, recon_loss="mse")
records = figures.play(run.agent, env, params, jax.random.key(4), 8, 9)
frames = Trajectory(records.step, records.action, jnp.ones(records.action.shape[:2], bool), ())
shown = records.step.obs["image"][5]


def learned(equations):
    """How a V that is trained from nothing, by these equations, reconstructs the sixth frame of each episode."""
    agent = wm.world_models(env.spec, papers, equations=equations)
    (update,) = next(stage for stage in agent.recipe.stages if stage.name == "vision").updates

    @jax.jit
    def train(key, frames):
        step = lambda state, key: update.fn(state, key, frames)[:2]
        state, _ = jax.lax.scan(step, agent.init(key), jax.random.split(key, STEPS))
        z = agent.model.encode(state.params, {"image": shown})["mu"]
        state_of = agent.model.init_state(state.params, len(shown))._replace(z=z)
        return agent.model.decode(state.params, state_of)["image"]

    return train(jax.random.key(0), frames)


rows = {
    "truth": shown,
    "squared error": learned(wm.Equations()),
    "cross-entropy": learned(wm.Equations(reconstruction=cross_entropy)),
}
fig, axes = plt.subplots(len(rows), 8, figsize=(10, 4))
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(np.clip(picture, 0, 255).astype(np.uint8))
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
lit = shown.max(-1) > 0.3 * 255
for name in list(rows)[1:]:
    error = np.abs(rows[name] - shown).mean(-1) / 255
    print(f"{name:13s} absolute error of bright pixels {error[lit].mean():.3f}, of dark ones {error[~lit].mean():.3f}")

# %% [markdown]
# ## One generation by hand
#
# `ask`, play, `tell`: fitness is maximized, and only ranks matter. The dream is an environment like any other, made
# inside of the traced function, from its parameters. Here it begins from nothing seen; in training it begins from
# states that M reached on real records.

# %%
strategy = evolution.make_strategy(evolution.StrategyConfig(dims=params["controller"].size, population=16))
starts = jax.tree.map(lambda x: jnp.repeat(x, 8, 0), run.agent.model.init_state(params, 1))
act = lambda params, key, carry, step: run.agent.policy(params, key, carry, step.obs["state"], explore=True)


@jax.jit
def generation(params, key, state):
    """The distribution after one generation, and the fitness of the controllers that were drawn."""
    key_ask, key_play, key_tell = jax.random.split(key, 3)
    candidates, state = strategy.ask(key_ask, state)
    dream = dreaming.dream_env(run.agent.model, params, starts, env.spec, horizon=9, obs="state", actions="agent")
    population = params | {"controller": candidates}
    keys = evolution.episode_keys(key_play, 16, 4)
    returns = evolution.play(dream, act, population, run.agent.policy_carry(population, 64), keys, 9).returns
    return strategy.tell(key_tell, state, candidates, returns.mean(1)), returns.mean(1)


state = strategy.init(jax.random.key(2), params["controller"])
for i in range(3):
    state, fitness = generation(params, jax.random.key(i), state)
    print(f"generation {i}: mean {fitness.mean():.2f}, best {fitness.max():.2f}, step size {state.sigma:.3f}")
